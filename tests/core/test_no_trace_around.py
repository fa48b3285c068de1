"""A probe leaves hooks, contexts, graphs and state elsewhere as found."""

import contextlib
import copy
import math
import random
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from tests.core.traces import ACTIONS, Body, Found, make, mse, regression

# --- hooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ACTIONS)
def test_hooks_of_parameters_do_not_fire_and_work_afterwards(action):
    model, batch, optimizer = make("norm_and_dropout")
    fired = []
    handle = model[0].weight.register_hook(lambda grad: fired.append("hook"))
    doubling = model[0].weight.register_hook(lambda grad: grad * 2)
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: fired.append("accumulated"))
    ACTIONS[action](model, mse, batch, optimizer)
    assert fired == []
    optimizer.zero_grad()
    state = torch.get_rng_state()
    mse(model, batch).backward()
    assert sorted(fired) == ["accumulated", "hook"]
    changed = model[0].weight.grad.clone()
    handle.remove()
    doubling.remove()
    optimizer.zero_grad()
    torch.set_rng_state(state)
    mse(model, batch).backward()
    assert fired.count("hook") == 1
    assert torch.equal(changed, 2 * model[0].weight.grad)


@pytest.mark.parametrize("action", ACTIONS)
def test_hooks_of_modules_are_still_there_once(action):
    model, batch, optimizer = make("norm_and_dropout")
    calls = []
    model[4].register_forward_hook(lambda module, args, output: calls.append("forward"))
    model[4].register_forward_pre_hook(lambda module, args: calls.append("before"))
    model[4].register_full_backward_hook(lambda module, inputs, outputs: calls.append("backward"))
    ACTIONS[action](model, mse, batch, optimizer)
    calls.clear()
    mse(model, batch).backward()
    assert sorted(calls) == ["backward", "before", "forward"]


# --- contexts ------------------------------------------------------------------------------------------------------


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": contextlib.nullcontext,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_surroundings_change_no_number_and_are_left_as_they_were(context):
    model, batch, optimizer = make("norm_and_dropout")
    names = [name for name in gradmon.METRICS if name != "input_condition"]
    options = {"metrics": names, "optimizer": optimizer, "next_batch": batch}
    expected = gradmon.measure(model, mse, batch, **options)
    found = Found(model, batch, optimizer)
    with CONTEXTS[context]():
        before = Found.contexts()
        readings = gradmon.measure(model, mse, batch, **options)
        assert Found.contexts() == before
    assert readings == expected
    found.check()
    optimizer.zero_grad()
    mse(model, batch).backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


def test_batch_made_in_inference_mode():
    model = make("norm_and_dropout")[0]
    with torch.inference_mode():
        batch = regression()
        readings = gradmon.measure(model, mse, batch)
    assert readings["grad_norm"].value > 0
    assert all(p._version >= 0 and not p.is_inference() for p in model.parameters())


# --- the user's own graphs and compiled models ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norm_and_dropout", "tied", "spectral_norm"])
def test_a_graph_that_waits_for_its_backward_pass(name):
    model, batch, optimizer = make(name)
    optimizer.zero_grad()
    state = torch.get_rng_state()
    mse(model, batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model, batch, optimizer = make(name)
    optimizer.zero_grad()
    torch.set_rng_state(state)
    waiting = mse(model, batch)
    ACTIONS["measure"](model, mse, batch, optimizer)
    waiting.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected, strict=True))


def test_a_compiled_model_is_not_compiled_again():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    fast, batch = torch.compile(model, backend=backend), regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = mse(fast, batch).detach()
    count = len(compiled)
    assert count > 0
    found = Found(fast, batch, optimizer)
    readings = ACTIONS["measure"](fast, mse, batch, optimizer)
    found.check()
    slow = ACTIONS["measure"](model, mse, batch, optimizer)
    for name in gradmon.METRICS:
        assert readings[name].reason == slow[name].reason
        assert readings[name].value == slow[name].value or math.isnan(slow[name].value), name
    assert torch.equal(mse(fast, batch).detach(), before)
    assert len(compiled) == count


# --- state that is not one of the model's own attributes -----------------------------------------------------------


def test_loss_that_is_a_module_keeps_its_buffers():
    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(2), 0

        def forward(self, model, batch):
            self.calls += 1
            return F.mse_loss(self.norm(model(batch[0])), batch[1])

    model, batch, optimizer = make("norm_and_dropout")
    criterion = Criterion()
    found = Found(criterion, batch, optimizer)
    ACTIONS["measure"](model, criterion, batch, optimizer)
    found.check()


NESTED = {
    "list in a dict": ({"a": []}, lambda value: value["a"].append(1), lambda value: len(value["a"])),
    "tensor in a list": ([torch.zeros(1)], lambda value: value[0].add_(1), lambda value: float(value[0])),
    "tensor in a dict": ({"a": torch.zeros(1)}, lambda value: value["a"].add_(1), lambda value: float(value["a"])),
    "array": (np.zeros(1), lambda value: value.__iadd__(1), lambda value: float(value[0])),
    "random.Random": (random.Random(0), lambda value: value.random(), lambda value: value.getstate()),
    "numpy generator": (
        np.random.default_rng(0),
        lambda value: value.random(),
        lambda value: str(value.bit_generator.state),
    ),
    "OrderedDict": (OrderedDict(), lambda value: value.setdefault(len(value), 1), len),
    "Counter": (Counter(), lambda value: value.update("a"), lambda value: value["a"]),
    "defaultdict": (defaultdict(list), lambda value: value["a"].append(1), lambda value: len(value["a"])),
    "torch generators": (
        [torch.Generator()],
        lambda value: torch.rand(1, generator=value[0]),
        lambda value: value[0].get_state().tolist(),
    ),
}


@pytest.mark.parametrize("kind", NESTED)
def test_what_a_module_holds_in_containers(kind):
    held, change, look = NESTED[kind]
    held = copy.deepcopy(held) if kind != "torch generators" else held
    model = Body(lambda model, x: change(model.held) and None, held=held)
    batch, before = regression(), look(held)
    gradmon.measure(model, mse, batch, metrics=["grad_norm", "weight_condition"])
    assert model.held is held
    assert look(held) == before


def test_buffer_that_grows_in_forward():
    def act(model, x):
        model.buffer.data = torch.cat([model.buffer.data, torch.rand(1)])

    model = Body(act, buffer=torch.zeros(2))
    batch, optimizer = regression(), torch.optim.SGD(model.parameters(), lr=0.1)
    found = Found(model, batch, optimizer)
    ACTIONS["measure"](model, mse, batch, optimizer)
    found.check()


def test_buffer_whose_entries_share_their_memory():
    model = Body(lambda model, x: None, buffer=torch.ones(1).expand(5))
    batch, optimizer = regression(), torch.optim.SGD(model.parameters(), lr=0.1)
    found = Found(model, batch, optimizer)
    assert ACTIONS["measure"](model, mse, batch, optimizer)["grad_norm"].value > 0
    found.check()


CHANNELS_LAST = """
import torch, gradmon
from torch import nn
layers = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 2)).to(memory_format=torch.channels_last)
batch = torch.randn(3, 3, 6, 6).to(memory_format=torch.channels_last), torch.randn(3, 2)
loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
found = gradmon.measure(model, loss, batch)
assert found["gradient_rank"].value > 0 or found["gradient_rank"].reason, found
print("alive")
"""


def test_channels_last_group_norm_does_not_end_the_process():
    done = subprocess.run([sys.executable, "-c", CHANNELS_LAST], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "alive"


class Momentum(nn.Module):
    """A frozen twin that follows the trained layer in every forward pass, in place."""

    def __init__(self, width):
        super().__init__()
        self.trained, self.twin = nn.Linear(3, 2), nn.Linear(3, 2)
        self.backbone = nn.Linear(3, width)
        self.twin.requires_grad_(False)
        self.backbone.requires_grad_(False)

    def forward(self, x):
        for ours, theirs in zip(self.twin.parameters(), self.trained.parameters(), strict=True):
            ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)
        return self.trained(x) + self.twin(x) + self.backbone(x).sum(1, keepdim=True)


def test_a_frozen_twin_that_is_updated_in_forward():
    model, batch = Momentum(2), regression()
    before = copy.deepcopy(model.state_dict())
    gradmon.measure(model, mse, batch, metrics=["weight_condition", "gradient_rank"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_large_frozen_backbone_is_not_copied():
    model, batch, pointers = Momentum(1000), regression(), set()
    model.register_forward_hook(lambda module, args, output: pointers.add(module.backbone.weight.data_ptr()))
    gradmon.measure(model, mse, batch, metrics=["weight_condition", "gradient_rank"])
    assert pointers == {model.backbone.weight.data_ptr()}
