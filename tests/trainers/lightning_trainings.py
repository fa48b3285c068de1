"""Small trainings with Lightning."""

import pytest
import torch

from tests.trainers.common import examples, momentum, mse, network

MARKS = [
    # What Lightning itself says about these small trainings.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:.*Trying to infer the `batch_size`"),
    # What Lightning and torchmetrics use of other packages.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def module_of(pl, model=None, loss=mse, optimizer=momentum, **methods):
    """A Lightning module around a model."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network() if model is None else model

        def training_step(self, batch, batch_idx):
            found = loss(self.net, batch)
            self.log("train", found)
            return found

        def configure_optimizers(self):
            return optimizer(self.parameters())

    return type("Tiny", (Module,), methods)()


def trainer_of(pl, callbacks, tmp_path, **options):
    given = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=callbacks, **{**given, **options})


def loader(size=8, count=32, dtype=torch.float64):
    data = torch.utils.data.TensorDataset(*examples(count, dtype))
    return torch.utils.data.DataLoader(data, batch_size=size)
