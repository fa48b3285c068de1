"""A loop of one's own, on scikit-learn's digits: one line watches the gradient.

pip install "gradmon[demo]"; python examples/plain_loop.py; tensorboard --logdir runs
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from gradmon import Monitor, every

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
target = torch.tensor(digits.target)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, target), batch_size=64, shuffle=True)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss(model, batch):
    """The loss of a batch."""
    return functional.cross_entropy(model(batch[0]), batch[1])


with Monitor(model, optimizer, loss, schedule=every(10), run="plain", sinks="tensorboard:runs/plain") as monitor:
    for _ in range(8):
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            monitor.step(batch)  # after optimizer.step()

for name in ("loss", "grad_norm", "step_ratio", "noise_ratio"):
    reading = monitor.readings[name]
    print(f"{name:12} {reading.value:10.4g}  at step {reading.step}")
for alert in monitor.alerts:
    print(f"{alert.severity}: {alert.message} {alert.remedy}")
