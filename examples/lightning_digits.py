"""Lightning, on scikit-learn's digits: one callback watches the gradient.

pip install "gradmon[demo,lightning]"; python examples/lightning_digits.py; tensorboard --logdir runs
"""

import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from gradmon import every
from gradmon_integrations.callbacks.lightning import GradmonCallback

warnings.filterwarnings("ignore", ".*does not have many workers")  # the data set is in memory


class Digits(pl.LightningModule):
    """A small network."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        """The loss of a batch; the callback makes it again, without logging."""
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        """A warm-up, and then a constant learning rate."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}


pl.seed_everything(0)
digits = load_digits()
data = torch.utils.data.TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
watch = GradmonCallback(schedule=every(10), run="digits", sinks="tensorboard:runs/digits")
trainer = pl.Trainer(
    max_epochs=8,
    gradient_clip_val=1.0,
    callbacks=[watch],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
trainer.fit(Digits(), torch.utils.data.DataLoader(data, batch_size=64, shuffle=True))

for name in ("loss", "grad_norm", "step_ratio", "noise_ratio"):
    reading = watch.monitor.readings[name]
    print(f"{name:12} {reading.value:10.4g}  at step {reading.step}")
