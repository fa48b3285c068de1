"""Two processes that train one model with DistributedDataParallel, measured as one.

pip install "gradmon[demo]"; torchrun --nproc-per-node 2 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from gradmon import Monitor, every


def loss(model, batch):
    """The loss of a batch: of this process's examples, as in any loop."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def train():
    """What every process does."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    sampler = DistributedSampler(data)  # 32 examples of each batch of 64 for each of two processes
    loader = DataLoader(data, batch_size=64 // dist.get_world_size(), sampler=sampler, drop_last=True)

    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    # In every process, with the wrapped model; the first one writes.
    sinks = "tensorboard:runs/ddp"
    with Monitor(model, optimizer, loss, schedule=every(10), run="ddp", sinks=sinks, on_alert="stop") as monitor:
        for epoch in range(4):
            sampler.set_epoch(epoch)
            for batch in loader:
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
                monitor.step(batch)  # after optimizer.step()
            if monitor.should_stop:  # true in all processes, or in none
                break

    if dist.get_rank() == 0:
        for name in ("batch_size", "loss", "grad_norm", "step_ratio", "noise_ratio"):
            reading = monitor.readings[name]
            print(f"{name:12} {reading.value:10.4g}  at step {reading.step}")
    dist.destroy_process_group()


def start(rank, port):
    """One of two processes, where torchrun has not started them."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        train()
    else:
        import socket

        with socket.socket() as probe:  # a port that nobody uses
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(start, (port,), nprocs=2)
