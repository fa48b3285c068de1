"""Small trainings with the Trainer of transformers."""

import pytest
import torch
from torch import nn

from tests.trainers.common import CLIP, momentum, seed

hf = pytest.importorskip("transformers")

MARKS = [
    # What transformers uses of other packages, and says about small trainings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

VOCABULARY, LENGTH = 13, 6


class Tiny(nn.Module):
    """A language model all of whose numbers are of one type; the library's own take their losses in float32."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.mixing = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        x = self.embedding(input_ids)
        x = x + torch.tanh(self.mixing(x.cumsum(1)))
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count, "logits": logits}


def language_model():
    seed(7)
    return Tiny().double()


def texts(count=32, ragged=False):
    """Token sequences; if ragged, the labels of a different part of each count."""
    generator = torch.Generator().manual_seed(8)
    rows = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    found = []
    for number, row in enumerate(rows):
        labels = row.clone()
        labels[0] = -100  # nothing comes before it
        if ragged:
            labels[1 + number % (LENGTH - 1) + 1 :] = -100
        found.append({"input_ids": row, "labels": labels})
    return found


def stacked(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def batches(size=8, **options):
    rows = texts(**options)
    return [stacked(rows[at : at + size]) for at in range(0, len(rows), size)]


def own_loss(model, batch):
    return model(**batch)["loss"]


class InOrder(hf.Trainer):
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(
    tmp_path, callbacks=(), *, model=None, rows=None, kind=InOrder, optimizer=momentum, given=None, **options
):
    model = language_model() if model is None else model
    arguments = hf.TrainingArguments(
        **{
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "max_grad_norm": CLIP,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            **options,
        }
    )
    own = {} if optimizer is None else {"optimizers": (optimizer(model.parameters()), None)}
    trainer = kind(
        model, arguments, train_dataset=texts() if rows is None else rows, data_collator=stacked,
        callbacks=list(callbacks), **own, **(given or {}),
    )  # fmt: skip
    trainer.remove_callback(hf.PrinterCallback)
    return trainer
