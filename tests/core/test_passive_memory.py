"""Bounded memory, a penalty that begins in mid-run, and nothing that outlives the step."""

import copy
import gc
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint_sequential

import gradmon
from gradmon import every
from gradmon.per_example import Listener
from tests import references, zoo
from tests.core.passive import (
    NAMES,
    accumulated_shares,
    assert_right,
    assert_right_or_silent,
    assert_silent,
    by_name,
    data,
    masked,
    mlp,
    mse,
    reduced,
    sgd,
    shares,
    truth,
    watching,
)
from tests.zoo.problem import mapped, net, normal

# --- bounded memory ------------------------------------------------------------------------------------------------


OVER_PAIRS = [name for name in NAMES if name != "gradient_snr"]


def step_of(model, optimizer, monitor, batches, loss=mse):
    """A step of one backward pass for each batch; the shares of their sum."""
    H = accumulated_shares(model, batches, 1.0, loss)
    optimizer.zero_grad()
    for batch in batches:
        loss(model, batch).backward()
    optimizer.step()
    monitor.step(batches)
    return H


@pytest.mark.parametrize("max_memory", [1, 1000])
def test_accumulation_that_does_not_fit_into_memory_says_so(max_memory):
    model, batches = mlp(), data(6, 6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer, max_memory=max_memory)
    for _ in range(3):  # the first comes unexpected, the others do not
        step_of(model, optimizer, monitor, batches)
        assert_silent(monitor.readings, f"max_memory, {max_memory} bytes", OVER_PAIRS)
    H = step_of(model, optimizer, monitor, batches[:1])
    assert_right_or_silent(monitor.readings, H)  # it was ready for several passes
    for _ in range(2):
        H = step_of(model, optimizer, monitor, batches[:1])
        assert_right(monitor.readings, H)
    assert not monitor.failures


@pytest.mark.parametrize("max_memory", [1, 1000])
@by_name(
    [
        zoo.plain.mlp_tanh,
        zoo.plain.cnn_group_norm,
        zoo.sequences.transformer_encoder,
        zoo.sequences.tied_language_model,
        zoo.sequences.embedding_bag,
    ]
)
def test_one_backward_pass_is_right_in_little_memory(case, max_memory):
    problem = case.make(0, torch.float64)
    H = truth(case)
    for mask, fraction in ((None, None), (gradmon.Mask(0.2, 3), 0.2)):
        model = copy.deepcopy(problem.model)
        optimizer = sgd(model)
        monitor = watching(model, optimizer, mask=mask, max_memory=max_memory)
        for _ in range(2):  # before and after it has found the ways
            model.load_state_dict(problem.model.state_dict())
            optimizer.zero_grad()
            reduced(problem, problem.loss(model, problem.batch)).backward()
            optimizer.step()
            monitor.step(problem.batch)
            kept, factors = masked(problem.model, H, fraction)
            assert_right(monitor.readings, kept, width=H.shape[1], factors=factors)
        assert not monitor.failures


def wide(dtype=torch.float64):
    """A model to which fewer numbers arrive than it has weights."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 2)).to(dtype)


def test_accumulation_under_a_mask_takes_less_memory():
    """What two backward passes leave is then some coordinates, and not all that the gradients are made of."""
    mask, batches = gradmon.Mask(0.01, 3), data(4, 4)
    kept = mask.sample(wide()).numpy()
    factors = references.coordinate_weights(wide(), kept)
    limit = 8 * (8 * 8 * len(kept))  # an eighth of it holds the coordinates of eight examples
    for given in (mask, None):
        model = wide()
        optimizer = sgd(model, lr=0.01)
        monitor = watching(model, optimizer, mask=given, max_memory=limit)
        for count in (1, 1, 2, 2):
            H = step_of(model, optimizer, monitor, batches[:count])
            if given is not None:
                assert_right(monitor.readings, H[:, kept], width=H.shape[1], factors=factors)
            elif count == 1:
                assert_right(monitor.readings, H)
            else:
                assert_silent(monitor.readings, f"max_memory, {limit} bytes", OVER_PAIRS)
        assert not monitor.failures


# --- a penalty that begins in mid-run ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["every weight", "one matrix"])
@pytest.mark.parametrize("make", [mlp, wide])
def test_penalty_that_begins_in_mid_run_is_found_out(make, which):
    """At once, whether or not fewer numbers arrive at the layers' outputs than there are weights."""
    model, (batch,) = make(), data(6)
    optimizer = sgd(model, lr=0.05)
    monitor = watching(model, optimizer)
    penalised = [*model.parameters()] if which == "every weight" else [model[0].weight]
    for number in range(1, 26):
        H = shares(model, batch)
        optimizer.zero_grad()
        value = mse(model, batch)
        if 7 <= number < 24:
            value = value + 0.1 * sum(p.square().sum() for p in penalised)
        value.backward()
        optimizer.step()
        monitor.step(batch)
        if 7 <= number < 24:
            assert_silent(monitor.readings, "add up|the loss depends on it")
        else:
            assert_right(monitor.readings, H)
    assert not monitor.failures


# --- nothing outlives the step -------------------------------------------------------------------------------------


def memory_of(tree):
    """References, which keep nothing alive, to the memory behind the tensors of a nesting."""
    found = []
    mapped(tree, lambda t: found.append(t) or t) if isinstance(tree, Tensor | tuple | list | dict) else None
    return {t.untyped_storage()._cdata: StorageWeakRef(t.untyped_storage()) for t in found if t.layout == torch.strided}


class Activations:
    """The memory of everything that the modules of a model are given and return."""

    def __init__(self, model, batch):
        own = memory_of([*model.parameters(), *model.buffers(), batch])
        self._own, self._seen, self.count = set(own), [], 0
        for module in model.modules():
            module.register_forward_hook(self._note)

    def _note(self, module, args, output):
        if torch.is_grad_enabled():
            self._seen += [ref for key, ref in memory_of([args, output]).items() if key not in self._own]

    def alive(self):
        if any(not ref.expired() for ref in self._seen):
            gc.collect()
        self.count = len(self._seen)
        return sum(not ref.expired() for ref in self._seen)


LET_GO = [
    zoo.plain.mlp_relu_inplace,
    zoo.plain.cnn_group_norm,
    zoo.plain.conv_transpose,
    zoo.sequences.transformer_encoder,
    zoo.sequences.embedding_bag,
]
LET_GO += [
    zoo.sequences.tied_language_model,
    zoo.parameters.module_used_twice,
    zoo.parameters.weight_norm,
    zoo.parameters.functional_parameters,
    zoo.parameters.checkpointed,
]
LET_GO += [
    zoo.sequences.lstm_bidirectional,
    zoo.plain.prelu,
    zoo.interacting.batch_norm_cnn,
    zoo.again.in_place_after_layers,
    zoo.losses.named_tuple_batch,
]
LET_GO += [
    zoo.losses.penalty,
    zoo.parameters.frozen_parameters,
    zoo.hard.gradient_penalty,
    zoo.hard.recurrent_cells,
    zoo.dropout.dropout_transformer,
]


@by_name(LET_GO)
def test_no_activation_outlives_the_step(case):
    problem = case.make(0, torch.float32)
    optimizer = sgd(problem.model, lr=0.01)
    monitor = watching(problem.model, optimizer, metrics=[*NAMES, "input_gradient_rank"])
    activations = Activations(problem.model, problem.batch)
    for _ in range(2):
        optimizer.zero_grad()
        value = reduced(problem, problem.loss(problem.model, problem.batch))
        value.backward()
        optimizer.step()
        monitor.step(problem.batch)
        del value
        assert activations.alive() == 0
    assert activations.count


def forward_only(model, batch):
    mse(model, batch)


def evaluated(model, batch):
    with torch.no_grad():
        mse(model, batch)


def two_backward_passes(model, batch):
    for _ in range(2):
        mse(model, batch).backward()


def checkpointed(model, batch):
    mse(lambda x: checkpoint_sequential(model, 2, x, use_reentrant=False), batch).backward()


def penalised_outside(model, batch):
    (mse(model, batch) + sum(p.square().sum() for p in model.parameters())).backward()


def interrupted(model, batch):
    with pytest.raises(RuntimeError, match="size"):
        mse(model, (batch[0], batch[1][:, :1].expand(-1, 7)))
    mse(model, batch).backward()


def one_loss_of_two(model, batch):
    mse(model, batch)
    mse(model, batch).backward()


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize(
    "passes",
    [forward_only, evaluated, two_backward_passes, checkpointed, penalised_outside, interrupted, one_loss_of_two],
)
def test_no_activation_outlives_a_step_that_is_not_the_usual_one(passes, skipped):
    model, (batch,) = mlp(), data(6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer, schedule=every(2))
    activations = Activations(model, batch)
    for _ in range(4):
        optimizer.zero_grad()
        passes(model, batch)
        if not skipped:
            optimizer.step()
        monitor.step(batch)
        assert activations.alive() == 0
    assert activations.count or passes is evaluated


def test_graph_that_is_kept_by_the_training_is_kept_by_nobody_else():
    """A loss that lives on holds its graph; the moment it is let go, everything is."""
    model, (batch,) = mlp(), data(6)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    activations = Activations(model, batch)
    value = mse(model, batch)
    value.backward(retain_graph=True)
    optimizer.step()
    monitor.step(batch)
    assert activations.alive() > 0
    del value
    assert activations.alive() == 0


def test_memory_of_a_monitor_does_not_grow_from_probe_to_probe():
    """Transposed weights, a convolution and sequences under a mask: all that is remembered of coordinates."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x.transpose(1, 2)).transpose(1, 2)
        return m.head(F.linear(torch.tanh(F.linear(x, m.tied.T)), m.tied).mean(1))

    torch.manual_seed(1)
    parts = {"conv": nn.Conv1d(3, 6, 3, padding=1), "tied": normal(6, 10), "head": nn.Linear(6, 2)}
    model = net(forward, **parts).double()
    optimizer = sgd(model, lr=0.01)
    monitor = watching(model, optimizer, mask=gradmon.Mask(0.1, 3), alerts=None)
    batch = torch.randn(4, 9, 3).double(), torch.randn(4, 2).double()
    counts = []
    for number in range(12):
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
        if number in (3, 11):
            gc.collect()
            counts.append(sum(issubclass(type(kept), Tensor) for kept in gc.get_objects()))
    assert math.isfinite(monitor.readings["noise_scale"].value)
    assert counts[1] <= counts[0]


def test_number_of_micro_batches_changes_from_step_to_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    listener = Listener(model, moments=True)
    for count in (2, 1, 2, 3, 1, 1, 2):
        xs = [torch.randn(4, 5).double() for _ in range(count)]
        H = torch.stack(
            [
                torch.cat([part.flatten() for part in torch.autograd.grad(model(x).square().sum(), model.parameters())])
                for x in torch.cat(xs)
            ]
        )
        listener.arm()
        for x in xs:
            (model(x).square().sum(1).mean() / count).backward()
        found = listener.collect(xs)
        listener.disarm()
        np.testing.assert_allclose(found.gram, H @ H.T, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.means, H.mean(0), rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(found.variances, H.var(0), rtol=1e-9, atol=1e-13)
