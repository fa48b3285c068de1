"""What the pages say to paste runs."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainers.common import batches, examples, momentum, mse, network

PAGES = Path(__file__).parents[2] / "docs" / "trainers"
NEEDS = {
    "plain": "torch",
    "ddp": "torch",
    "lightning": "lightning",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "ignite": "ignite",
}

pytestmark = [
    # What the trainers use of other packages, and say about small trainings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]


def plain(tmp_path):
    model = network()
    return {"torch": torch, "model": model, "optimizer": momentum(model.parameters()), "loss": mse, "loader": batches()}


def lightning(tmp_path):
    pl = importlib.import_module("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            return mse(self.net, batch)

        def configure_optimizers(self):
            return momentum(self.parameters())

    def trainer(callbacks):
        return pl.Trainer(
            callbacks=callbacks, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=8)
    return {"Trainer": trainer, "module": Module(), "loader": data}


class Returning(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels, **kwargs):
        return {"loss": mse(self.net, (x, labels))}


def transformers(tmp_path):
    hf = importlib.import_module("transformers")
    args = hf.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, num_train_epochs=1
    )
    data = [{"x": x, "labels": target} for x, target in zip(*examples(), strict=True)]
    model = Returning()
    return {
        "Trainer": hf.Trainer, "model": model, "args": args, "data": data,
        "trainer": hf.Trainer(Returning(), args, train_dataset=data),
    }  # fmt: skip


def accelerate(tmp_path):
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    raw = network()
    taking = momentum(raw.parameters())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=8)
    constant = torch.optim.lr_scheduler.ConstantLR(taking, 1.0)
    model, optimizer, loader, scheduler = accelerator.prepare(raw, taking, data, constant)
    return {
        "accelerator": accelerator, "model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler,
        "loss": mse,
    }  # fmt: skip


def ignite(tmp_path):
    model = network()
    return {
        "create_supervised_trainer": importlib.import_module("ignite.engine").create_supervised_trainer,
        "model": model, "optimizer": momentum(model.parameters()), "loss_fn": nn.MSELoss(), "loader": batches(),
    }  # fmt: skip


def ddp(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = network()
    return {
        "torch": torch,
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "fully_shard": importlib.import_module("torch.distributed.fsdp").fully_shard,
        "model": model, "optimizer": momentum(model.parameters()), "loss": mse, "loader": batches(),
    }  # fmt: skip


GIVEN = {
    "plain": plain,
    "ddp": ddp,
    "lightning": lightning,
    "transformers": transformers,
    "accelerate": accelerate,
    "ignite": ignite,
}


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_what_a_page_says_to_paste_runs(name, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL)
    assert blocks
    given = GIVEN[name](tmp_path)
    try:
        for block in blocks:
            exec(compile(block.replace("every(50)", "every(2)"), f"{name}.md", "exec"), given)
            if "attach(trainer" in block and name == "transformers":
                given["trainer"].train()
            if name == "ddp":  # each of its blocks begins with a model as it was
                given["model"] = network()
                given["optimizer"] = momentum(given["model"].parameters())
    finally:
        if name == "ddp":
            torch.distributed.destroy_process_group()
    files = [path for path in (tmp_path / "runs/first").rglob("*") if "tfevents" in path.name]
    assert files
    assert all(path.stat().st_size > 500 for path in files)


def test_every_page_is_tested():
    assert {path.stem for path in PAGES.glob("*.md")} == set(NEEDS) == set(GIVEN)
