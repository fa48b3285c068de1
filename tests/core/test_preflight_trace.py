"""A check before the first step changes nothing: model, optimizer, loader, random states; and keeps to its passes."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset, TensorDataset

import gradmon
from gradmon import ArgumentError, preflight, reinitialize, suggest_lr
from gradmon.preflight.examples import PROBE, take
from gradmon_integrations.demo.data import batches as demo_batches
from gradmon_integrations.demo.data import digits
from gradmon_integrations.demo.runs import RECIPES, loss_of, network

SIZE = 12


class Awkward(nn.Module):
    """Buffers, noise of every source, modes and counters that a forward pass changes."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x + 0.01 * torch.randn_like(x) + 0.01 * float(np.random.rand()) * random.random()
        return self.head(self.drop(torch.relu(self.norm(self.first(x)))))


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def data(count=SIZE):
    return torch.randn(count, 6), torch.randint(4, (count,))


def everything(model, optimizer):
    """All that must not change, by value, and the objects themselves."""
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    randoms = torch.get_rng_state(), np.random.get_state(), random.getstate()
    return held, modes, grads, state, randoms, getattr(model, "calls", None)


def assert_same(before, after):
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name
    assert before[1] == after[1]
    for one, two in zip(before[2], after[2], strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)
    assert str(before[3]) == str(after[3])
    assert torch.equal(before[4][0], after[4][0])
    assert all(np.array_equal(a, b) for a, b in zip(before[4][1], after[4][1], strict=True))
    assert before[4][2] == after[4][2]
    assert before[5] == after[5]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("look", [preflight, suggest_lr])
def test_nothing_changes(kind, steps, look):
    model = Awkward()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(steps):
        entropy(model, data()).backward()
        optimizer.step()
    pairs = [data(), data()]
    kept = copy.deepcopy(pairs)
    identities = [id(p) for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
    before = everything(model, optimizer)
    look(model, optimizer, entropy, pairs)
    assert_same(before, everything(model, optimizer))
    assert identities == ([id(p) for p in model.parameters()], [p.data_ptr() for p in model.parameters()])
    assert all(torch.equal(a, b) for one, two in zip(pairs, kept, strict=True) for a, b in zip(one, two, strict=True))
    assert not model._forward_hooks


def test_training_goes_on_as_if_nobody_had_looked():
    def course(check):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        model = Awkward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = DataLoader(TensorDataset(*data(48)), 8, shuffle=True)
        if check:
            preflight(model, optimizer, entropy, loader)
        for batch in loader:
            optimizer.zero_grad()
            entropy(model, batch).backward()
            optimizer.step()
        return list(model.parameters())

    for one, two in zip(course(False), course(True), strict=True):
        assert torch.equal(one, two)


def test_nothing_changes_when_the_loss_fails_on_the_way():
    model = Awkward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []

    def failing(model, batch):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no more")
        return entropy(model, batch)

    batch = data()
    before = everything(model, optimizer)
    found = preflight(model, optimizer, failing, batch)
    assert_same(before, everything(model, optimizer))
    assert found.risk is None or math.isfinite(found.risk)
    assert calls


class Drawing(Dataset):
    """Examples with noise of the dataset's own."""

    def __init__(self):
        self.generator, self.python, self.numpy = torch.Generator(), random.Random(3), np.random.default_rng(3)

    def __len__(self):
        return 40

    def __getitem__(self, index):
        noise = self.python.random() + self.numpy.random() + float(np.random.rand())
        return torch.randn(6, generator=self.generator) + noise, index % 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("own", [False, True])
def test_a_loader_gives_the_same_batches_afterwards(workers, own):
    def loader():
        generator = torch.Generator().manual_seed(9) if own else None
        persistent = workers > 0
        return DataLoader(
            Drawing(), 8, shuffle=True, generator=generator, num_workers=workers, persistent_workers=persistent
        )

    def batches(check):
        torch.manual_seed(1)
        np.random.seed(1)
        made = loader()
        if check:
            model = Awkward()
            state = torch.get_rng_state()
            preflight(model, torch.optim.Adam(model.parameters()), entropy, made)
            assert torch.equal(state, torch.get_rng_state())
            assert made._iterator is None
            torch.manual_seed(1)
            np.random.seed(1)
        if workers:  # these draw in processes of their own; the order is what is left to compare
            return [torch.tensor(list(made.batch_sampler)).reshape(-1)]
        return [x for x, _ in made]

    for one, two in zip(batches(False), batches(True), strict=True):
        assert torch.equal(one, two)


def test_what_is_a_batch_and_what_holds_batches():
    x, y = data()
    same = torch.device("cpu")
    for one in ((x, y), [x, y], {"x": x, "y": y}, x):
        found = take(one, same)
        assert not found.apart
        assert found.training is not None
    found = take([(x, y), (2 * x, y), (3 * x, y)], same)
    assert found.apart
    assert torch.equal(found.training[0], x)
    assert torch.equal(found.probe[0], torch.cat([2 * x, 3 * x]))
    found = take(iter([x, 2 * x]), same)
    assert torch.equal(found.probe, 2 * x)
    # No more than a probe, and none cut that cannot be.
    assert len(take([(x, y)] * 20, same).probe[0]) == PROBE
    assert len(take((torch.randn(200, 2), torch.randn(200)), same).probe[0]) == PROBE
    assert len(take((torch.randn(200, 2), torch.randn(7)), same).probe[0]) == 200
    # Batches that do not fit together: the largest.
    found = take([(x, y), (x, y), (torch.randn(20, 9), torch.zeros(20))], same)
    assert found.probe[0].shape == (20, 9)


def test_bad_batches():
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"`batches` must be a batch, or an iterable of batches\. Got int\."):
        preflight(model, optimizer, entropy, 3)
    with pytest.raises(ArgumentError, match=r"`batches` must hold at least one batch\. Got none\."):
        preflight(model, optimizer, entropy, [])
    with pytest.raises(ArgumentError, match=r"`batches` must hold at least one tensor\. Got tuple\."):
        preflight(model, optimizer, entropy, [(1, 2)])


@pytest.mark.parametrize("look", [preflight, suggest_lr])
def test_bad_arguments(look):
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"`loss` must be callable as loss\(model, batch\)\. Got float\."):
        look(model, optimizer, 0.5, data())
    with pytest.raises(ArgumentError, match=r"`model` must be a torch\.nn\.Module\. Got str\."):
        look("model", optimizer, entropy, data())
    with pytest.raises(ArgumentError, match=r"`optimizer` must be a torch\.optim\.Optimizer\. Got str\."):
        look(model, "sgd", entropy, data())
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"`optimizer` must hold parameters of `model`"):
        look(model, other, entropy, data())
    with pytest.raises(ArgumentError, match=r"`budget` must be an integer of at least \d, in passes\. Got 2\."):
        look(model, optimizer, entropy, data(), budget=2)
    with pytest.raises(ArgumentError, match=r"`budget` must be an integer of at least \d, in passes\. Got 9\.5\."):
        look(model, optimizer, entropy, data(), budget=9.5)
    with pytest.raises(ArgumentError, match=r"`loss` must run on `model` and a batch\. Got RuntimeError: "):
        look(model, optimizer, entropy, (torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(ArgumentError, match=r"`loss` must return a floating-point tensor"):
        look(model, optimizer, lambda model, batch: 3.0, data())


def test_a_loss_without_a_gradient_that_can_be_had_is_named():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    loss = lambda m, b: checkpoint(m[1], m[0](b[0]), use_reentrant=True).square().mean()  # noqa: E731
    with pytest.raises(ArgumentError, match=r"`loss` must have a gradient\. Got reentrant checkpointing"):
        preflight(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, data())


@pytest.mark.parametrize("budget", [8, 9, 11, 14, 40])
def test_every_pass_is_counted_and_none_is_over_the_budget(budget):
    calls = []

    def counted(model, batch):
        calls.append(1)
        return entropy(model, batch)

    model = Awkward()
    found = preflight(model, torch.optim.Adam(model.parameters(), lr=3e-8), counted, [data(), data()], budget=budget)
    assert found.look.passes == len(calls) <= budget
    if budget == 40:
        assert not found.look.reasons


def test_a_budget_that_does_not_suffice_leaves_reasons_and_no_guesses():
    model = Awkward()
    found = preflight(model, torch.optim.SGD(model.parameters(), lr=1e-6), entropy, [data(), data()], budget=8)
    assert found.look.noise_scale is None
    assert found.look.reasons["noise_scale"] == "the budget of 8 passes is spent"
    scanned = suggest_lr(model, torch.optim.SGD(model.parameters(), lr=1e-6), entropy, data(), budget=3)
    assert scanned.groups is None
    assert scanned.reason == "the budget of 3 passes is spent"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_demo_takes_no_more_than_forty_passes(recipe):
    model = network(recipe, 0)
    calls = []

    def counted(model, batch):
        calls.append(1)
        return loss_of(model, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate)
    found = preflight(model, optimizer, counted, demo_batches(digits(), 64, 0))
    assert len(calls) == found.look.passes <= 40
    assert not found.look.reasons


def test_reinitializing_changes_parameters_and_nothing_else():
    model = Awkward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = data()
    before = everything(model, optimizer)
    identities = [id(p) for p in model.parameters()]
    reinitialize(model, entropy, batch)
    after = everything(model, optimizer)
    changed = {name for name, tensor in before[0].items() if not torch.equal(tensor, after[0][name])}
    assert changed == {"first.weight", "first.bias", "head.weight", "head.bias"}
    for name in changed:
        before[0][name] = after[0][name]
    assert_same(before, after)
    assert identities == [id(p) for p in model.parameters()]


def test_the_public_names_are_functions():
    assert callable(gradmon.preflight)
    assert callable(gradmon.suggest_lr)
    assert callable(gradmon.reinitialize)
