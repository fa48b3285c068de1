"""What the tests of passive numbers have in common: small trainings, and what must be true after them."""

import copy
import functools
import math
import random
import re
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon import Monitor, every
from gradmon.per_example import Listener
from tests import references
from tests.zoo.problem import averaged_problem

NAMES = ["gradient_rank", "gradient_confusion", "gradient_diversity", "gradient_coherence"]
NAMES += ["noise_scale", "noise_ratio", "gradient_snr"]
PARTS = 3


def seed(number):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@functools.cache
def truth(case):
    """The shares of a case in float64, (B, P)."""
    return references.shares(case.make(0, torch.float64))


def reduced(problem, value):
    return value.sum() if problem.reduction == "sum" else value.mean()


def backward(problem):
    reduced(problem, problem.loss(problem.model, problem.batch)).backward()


def listened(model, batch, run, *, gram=True, moments=True, mask=None, **options):
    """What a listener finds in one forward and backward pass."""
    listener = Listener(model, gram=gram, moments=moments, mask=mask, **options)
    listener.arm()
    try:
        run()
        return listener.collect(batch)
    finally:
        listener.disarm()


def assert_gram(found, H, factors=None):
    expected = references.gram(H, factors)
    assert found.gram.shape == expected.shape
    assert found.gram.dtype == torch.float64
    np.testing.assert_allclose(found.gram.numpy(), expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def assert_moments(found, H):
    means, variances = H.mean(0), H.var(0, ddof=1)
    size = np.abs(H).max()
    np.testing.assert_allclose(np.ravel(found.means), means, rtol=1e-9, atol=1e-12 * size)
    np.testing.assert_allclose(np.ravel(found.variances), variances, rtol=1e-9, atol=1e-12 * size**2)


def masked(model, H, fraction):
    """The kept columns of the shares, and each one's weight."""
    if fraction is None:
        return H, None
    coordinates = gradmon.Mask(fraction, 3).sample(model).numpy()
    return H[:, coordinates], references.coordinate_weights(model, coordinates)


def assert_right(readings, H, *, width=None, factors=None, rtol=1e-10):
    """Every number is that of the shares `H`."""
    noise = references.noise_scale(H, factors)
    expected = {
        "gradient_rank": references.gradient_rank(H, width, factors),
        "gradient_confusion": references.gradient_confusion(H, PARTS, factors),
        "gradient_diversity": references.gradient_diversity(H, PARTS, factors),
        "gradient_coherence": references.gradient_coherence(H, factors),
        "noise_scale": noise,
        "noise_ratio": references.noise_ratio(H, factors),
    }
    lowest, highest = references.gradient_snr_range(H, 10 * rtol)
    assert lowest <= readings["gradient_snr"].value <= highest
    for name, value in expected.items():
        found = readings[name]
        assert found.reason is None or math.isinf(found.value), f"{name}: {found.reason}"
        loose = rtol
        if name.startswith("noise") and math.isfinite(noise):  # a difference of two numbers of nearly the same size
            loose *= 1 + noise / len(H)
        np.testing.assert_allclose(found.value, value, rtol=loose, atol=1e-12, err_msg=name)


def assert_silent(readings, match=".", names=NAMES):
    """There is no number, and every reading says why."""
    for name in names:
        found = readings[name]
        assert math.isnan(found.value), f"{name}: {found.value}"
        assert isinstance(found.reason, str)
        assert re.search(match, found.reason), found.reason


def assert_right_or_silent(readings, H, **options):
    if all(math.isnan(readings[name].value) for name in NAMES):
        assert_silent(readings)
    else:
        assert_right(readings, H, **options)


TWINS: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def watching(model, optimizer, **options):
    if model not in TWINS:  # the truth is found on a model that nobody listens to
        TWINS[model] = copy.deepcopy(model)
    options = {"metrics": NAMES, "schedule": every(1), "mask": None, "micro_batches": PARTS, **options}
    return Monitor(model, optimizer, **options)


def sgd(model, lr=0.3):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))]
GLOBAL = [name for name in vars(nn.modules.module) if name.startswith("_global_") and "hooks" in name]


def attached(model):
    """Everything that watches a model, or every model, at this moment."""
    saved = torch._C._autograd._top_saved_tensors_default_hooks
    return {
        "modules": [
            (name, type(module).__name__, sorted(vars(module)), [list(getattr(module, kind)) for kind in HOOKS])
            for name, module in model.named_modules()
        ],
        "parameters": [
            (name, type(p), list(p._backward_hooks or {}), list(p._post_accumulate_grad_hooks or {}))
            for name, p in model.named_parameters()
        ],
        "everywhere": [list(getattr(nn.modules.module, kind)) for kind in GLOBAL],
        "functions": len(torch.overrides._get_current_function_mode_stack()),
        "dispatch": len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        "saved": saved(True),
        "patched": [
            F.linear,
            torch.matmul,
            nn.Module.__call__,
            Tensor.backward,
            Tensor.__matmul__,
            torch.autograd.grad,
        ],
    }


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def data(*sizes, dtype=torch.float64):
    """One regression batch for each size."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for size in sizes:
        x = torch.randn(size, 3, generator=generator).to(dtype)
        made.append((x, torch.randn(size, 2, generator=generator).to(dtype)))
    return made


def shares(model, batch, loss=mse):
    """The shares of a mean over examples that do not meet, at the weights of now."""
    twin = TWINS.get(model, model)
    if twin is not model:
        twin.load_state_dict(model.state_dict())
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            one.requires_grad_(other.requires_grad)
    return references.shares(averaged_problem(twin, loss, batch))


def ordinary_step(model, optimizer, monitor, batch, loss=mse):
    """One step, of which every number must be right."""
    H = shares(model, batch, loss)
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()
    monitor.step(batch)
    assert_right(monitor.readings, H)


def accumulated_shares(model, batches, factor, loss=mse):
    """The shares of the sum of the micro-batches' gradients, in the order in which they come."""
    total = sum(len(batch[0]) for batch in batches)
    return np.concatenate([shares(model, batch, loss) * (factor * total / len(batch[0])) for batch in batches])


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def assert_identical(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert (a.dtype, a.layout) == (b.dtype, b.layout), where
        a, b = a.to_dense(), b.to_dense()
        assert torch.equal(a, b) or (a.isnan().any() and torch.equal(a.isnan(), b.isnan())), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_identical(one, other, f"{where}.{place}")
    else:
        assert a == b, where
