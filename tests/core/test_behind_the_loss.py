"""What a loss holds, names or is bound to is as it was after a probe."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from tests.core.monitored import mlp, mse
from tests.core.traces import ACTIONS, regression

SHARED = torch.Generator()
HIDDEN = None


class Recipe:
    """A training's own object, of which a method is the loss."""

    def __init__(self):
        self.head, self.parts = nn.BatchNorm1d(2), {"heads": [nn.BatchNorm1d(2)]}
        self.generator, self.draws = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.scale, self.hidden = torch.ones(1), None

    def norm(self, model, batch):
        return F.mse_loss(self.head(model(batch[0])), batch[1])

    def helper(self, model, batch):
        return self.norm(model, batch)

    def nested(self, model, batch):
        return F.mse_loss(self.parts["heads"][0](model(batch[0])), batch[1])

    def noise(self, model, batch):
        x = batch[0] + torch.randn(batch[0].shape, generator=self.generator) * float(self.draws.normal())
        return F.mse_loss(model(x), batch[1])

    def average(self, model, batch):
        value = F.mse_loss(model(batch[0]), batch[1])
        self.scale.mul_(0.9).add_(0.1 * value.detach())
        return value / self.scale.clone()

    def recurrent(self, model, batch):
        output = model(batch[0]) if self.hidden is None else model(batch[0]) + self.hidden[0]
        self.hidden = output.detach().mean(), output.detach()
        return F.mse_loss(output, batch[1])

    def __call__(self, model, batch):
        return self.norm(model, batch)

    def look(self):
        held = [*self.head.state_dict().values(), *self.parts["heads"][0].state_dict().values(), self.scale]
        state = self.generator.get_state().tolist(), str(self.draws.bit_generator.state), self.hidden
        return [value.tolist() for value in held], state


def closed(recipe):
    return lambda model, batch: recipe.norm(model, batch)


LOSSES = {
    **{name: lambda recipe, name=name: getattr(recipe, name) for name in
       ("norm", "helper", "nested", "noise", "average", "recurrent")},
    "callable": lambda recipe: recipe,
    "partial": lambda recipe: functools.partial(recipe.norm),
    "closed over": closed,
}  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_object_of_the_loss(kind, action):
    recipe = Recipe()
    loss, model, before = LOSSES[kind](recipe), mlp(torch.float32), recipe.look()
    ACTIONS[action](model, loss, regression(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert recipe.look() == before


def named(model, batch):
    return F.mse_loss(model(batch[0] + torch.randn(batch[0].shape, generator=SHARED)), batch[1])


def assigned(model, batch):
    global HIDDEN
    output = model(batch[0] if HIDDEN is None else batch[0] + HIDDEN)
    HIDDEN = output.detach().mean()
    return F.mse_loss(output, batch[1])


@pytest.mark.parametrize("loss", [named, assigned, lambda model, batch: named(model, batch)])
def test_what_a_loss_names(loss):
    model, before = mlp(torch.float32), SHARED.get_state()
    ACTIONS["measure"](model, loss, regression(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(SHARED.get_state(), before)
    assert HIDDEN is None


def test_variables_around_a_loss():
    hidden = None
    heads = [nn.BatchNorm1d(2)]

    def inner(model, x):
        return heads[0](model(x))

    def loss(model, batch):
        nonlocal hidden
        output = inner(model, batch[0] if hidden is None else batch[0] + hidden)
        hidden = output.detach().mean()
        return F.mse_loss(output, batch[1])

    model, before = mlp(torch.float32), copy.deepcopy(heads[0].state_dict())
    ACTIONS["measure"](model, loss, regression(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert hidden is None
    assert all(torch.equal(value, before[name]) for name, value in heads[0].state_dict().items())


def test_data_that_a_loss_reads_is_not_copied():
    data = torch.zeros(1 << 23)
    many = [torch.zeros(1) for _ in range(20_000)]

    def loss(model, batch):
        return mse(model, batch) + 0 * data[0] + 0 * many[0][0]

    held = gradmon._behind.behind(loss).values
    assert not any(value is data or value is many[0] for value in held)


def mapped(folder):
    """A tensor whose memory is a file's, which must not be written to; NaN is not equal to itself."""
    np.save(folder / "held.npy", np.array([[1.0, np.nan], [-0.0, 2.0]], dtype=np.float32))
    return torch.from_numpy(np.load(folder / "held.npy", mmap_mode="r"))


READ_ONLY = {
    "mapped tensor": mapped,
    "mapped complex tensor": lambda folder: torch.view_as_complex(mapped(folder)),
    "mapped array": lambda folder: mapped(folder) is None or np.load(folder / "held.npy", mmap_mode="r"),
    "array": lambda folder: np.broadcast_to(np.ones(2), (3, 2)),
    "sparse tensor": lambda folder: torch.eye(3).to_sparse(),
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("place", ["loss", "model"])
@pytest.mark.parametrize("name", READ_ONLY)
def test_what_cannot_be_written_to_is_left_alone(name, place, tmp_path):
    held, model = READ_ONLY[name](tmp_path), mlp(torch.float32)
    if place == "model":
        model.held = held

    def loss(model, batch):
        return mse(model, batch) if held is not None else None

    assert gradmon.measure(model, loss if place == "loss" else mse, regression(), metrics=["loss"])["loss"].value > 0


def test_an_array_in_which_zeros_change_their_sign_is_put_back():
    held = np.array([0.0, 1.0])

    def loss(model, batch):
        held[0] = -0.0
        return mse(model, batch)

    gradmon.measure(mlp(torch.float32), loss, regression(), metrics=["loss"])
    assert held.tobytes() == np.array([0.0, 1.0]).tobytes()
