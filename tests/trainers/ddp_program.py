"""A training by one of the trainers in each of several processes, started by torchrun: what its callback read.

Usage: ddp_program.py TRAINER FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gradmon import Alert, every

EXAMPLES, STEPS = 12, 4
METRICS = ["loss", "grad_norm", "noise_scale", "gradient_diversity", "weight_condition", "step_ratio"]


class Fires:
    """A rule that fires in the third step."""

    name = "now"

    def __call__(self, reading: Any) -> Alert | None:
        if reading.name != "grad_norm" or reading.step != 3:
            return None
        return Alert(self.name, "critical", "firing", reading.value, reading.step, None, "It is time.", "Stop.")


class Net(nn.Module):
    """A small network that also makes its loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, x: Any, labels: Any = None) -> Any:
        found = self.net(x)
        return found if labels is None else {"loss": functional.cross_entropy(found, labels), "logits": found}


def loss(model: nn.Module, batch: Any) -> Any:
    """The mean over the examples."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """All examples, in the order in which they are trained on."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES * STEPS, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (EXAMPLES * STEPS,), generator=generator)


def parts(rank: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one process."""
    x, target = data()
    own = EXAMPLES // size
    starts = [step * EXAMPLES + rank * own for step in range(STEPS)]
    return [(x[start : start + own], target[start : start + own]) for start in starts]


class Kept:
    """A sink that keeps every number."""

    immediate = True

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    def write(self, readings: Any) -> None:
        self.numbers.update({f"{reading.name} {reading.step}": reading.value for reading in readings})

    def alert(self, alert: Any) -> None: ...

    def close(self) -> None: ...


def lightning(rank: int, size: int, options: dict[str, Any]) -> int:
    import lightning.pytorch as pl

    from gradmon_integrations.callbacks.lightning import GradmonCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss(self.net, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=size, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[GradmonCallback(**options)],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(parts(rank, size), batch_size=None))
    return trainer.global_step


def transformers(rank: int, size: int, options: dict[str, Any]) -> int:
    from transformers import Trainer, TrainingArguments

    from gradmon_integrations.callbacks.transformers import GradmonCallback

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=options.pop("folder"), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        num_train_epochs=1, per_device_train_batch_size=EXAMPLES // size, max_grad_norm=1e9, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    rows = [{"x": x, "labels": target} for x, target in zip(*data(), strict=True)]
    trainer = InOrder(Net(), arguments, train_dataset=rows, callbacks=[GradmonCallback(**options)])
    trainer.train()
    return trainer.state.global_step


def accelerate(rank: int, size: int, options: dict[str, Any]) -> int:
    from accelerate import Accelerator

    from gradmon_integrations.callbacks.accelerate import monitor

    accelerator, model = Accelerator(cpu=True), Net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    steps = 0
    with monitor(accelerator, model, optimizer, loss, **options) as watch:
        for batch in parts(rank, size):
            steps += 1
            optimizer.zero_grad()
            accelerator.backward(loss(model, batch))
            optimizer.step()
            watch.step(batch)
            if watch.should_stop:
                break
    accelerator.end_training()
    return steps


def ignite(rank: int, size: int, options: dict[str, Any]) -> int:
    import ignite.distributed as idist
    from ignite.engine import create_supervised_trainer

    from gradmon_integrations.callbacks.ignite import GradmonHandler

    with idist.Parallel(backend="gloo"):
        model = idist.auto_model(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = create_supervised_trainer(model, optimizer, functional.cross_entropy)
        GradmonHandler(model, optimizer, functional.cross_entropy, **options).attach(engine)
        engine.run(parts(rank, size), max_epochs=1)
        return engine.state.iteration


def main() -> None:
    """Train, and write what was read."""
    torch.set_num_threads(1)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kept = Kept()
    options: dict[str, Any] = {
        "schedule": every(1), "metrics": METRICS, "mask": None, "alerts": [Fires()], "on_alert": "stop", "sinks": [kept]
    }  # fmt: skip
    if kind == "transformers":
        options["folder"] = str(folder / "out")
    steps = globals()[kind](rank, size, options)
    (folder / f"{rank}.json").write_text(json.dumps({"steps": steps, "numbers": kept.numbers}))
    # Not by the interpreter's own end: a gloo thread that lets go of a tensor just then aborts the process. Destroying
    # the group does not end that thread, as the default arguments in `torch.distributed.nn.functional`, which
    # DistributedDataParallel imports, keep the group.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
