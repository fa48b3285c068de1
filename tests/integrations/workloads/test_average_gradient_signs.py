"""The step with other signs: one formula in three forms, quick ones for what is known to be harmless."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradmon_integrations.workloads.average_gradient import AverageGradient
from gradmon_integrations.workloads.average_gradient.update import descends, signed_step
from tests.integrations.workloads.average_models import assert_same, batch, chain, closure_of, state_of


def numbers(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """w, g and a: with zeros in either or both, and with numbers whose product underflows."""
    generator = torch.Generator().manual_seed(seed)
    w, g, a = torch.randn(3, 1 + 37 * seed, generator=generator, dtype=dtype)
    part = torch.rand(w.shape, generator=generator)
    g[part < 0.1], a[(part > 0.05) & (part < 0.2)] = 0, 0
    g[part > 0.95] *= 1e-38
    a[part > 0.9] *= 1e-38
    return w, g, a


def stepped(w: Tensor, after: Tensor, g: Tensor | None, a: Tensor) -> Tensor:
    out = torch.empty_like(w)
    signed_step(w, after, g, a, out)
    return out


def with_a_nan(w: Tensor, after: Tensor, g: Tensor | None, a: Tensor) -> Tensor:
    """The form that can deal with numbers that are not finite."""
    w, after, g = (
        each if each is None else torch.cat([each, torch.ones(1, dtype=each.dtype)]) for each in (w, after, g)
    )
    return stepped(w, after, g, torch.cat([a, torch.full((1,), torch.nan, dtype=a.dtype)]))[:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(12))
def test_all_forms_give_the_same_bits_and_what_the_definition_says(seed: int, dtype: torch.dtype) -> None:
    w, g, a = numbers(seed, dtype)
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    after = torch.where(noise > 1.5, w, w + noise)  # some stay
    found = stepped(w, after, g, a)
    assert torch.equal(found, with_a_nan(w, after, g, a))
    wanted = w - (after - w).abs() * a.sign()
    torch.testing.assert_close(found, torch.where(a.sign() == g.sign(), after, wanted), rtol=0, atol=1e-6)
    assert torch.equal(found[a.sign() == g.sign()], after[a.sign() == g.sign()])
    assert torch.equal(found[(a == 0) & (g != 0)], w[(a == 0) & (g != 0)])
    after = w - 0.1 * noise.abs() * g.sign()
    found = stepped(w, after, g, a)
    for known in (g, None):
        assert torch.equal(found, stepped(w, after, known, a))
        assert torch.equal(found, with_a_nan(w, after, known, a))


def test_where_the_base_steps_to_what_is_not_a_number_so_does_the_average_gradient() -> None:
    weight, still = torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.ones(4))
    base = torch.optim.RMSprop([weight, still], lr=0.1, eps=0.0)  # it divides the gradient 0 by 0
    AverageGradient(base).step(lambda: torch.tanh(weight).sum() + 0 * still.sum())
    assert not still.isfinite().any()
    assert weight.isfinite().all()


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD upwards": (torch.optim.SGD, {"maximize": True}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_is_known_steps_as_one_with_a_hook_that_might_do_anything(name: str) -> None:
    make, options = BASES[name]
    data, found = batch(8, 5, 3), []
    for hooked in (False, True):
        model = chain(F.silu, [5, 150, 130, 3])
        base = make(model.parameters(), lr=0.01, **options)
        optimizer = AverageGradient(base, iterations=3)
        assert descends(base)
        if hooked:
            base.register_step_post_hook(lambda *_: None)
            assert not descends(base)
        for _ in range(3):
            optimizer.step(closure_of(model, data))
        found.append(state_of(model))
    assert_same(*found)


def test_what_may_step_along_its_gradient_is_not_known() -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]

    class Own(torch.optim.SGD):
        pass

    others = [
        torch.optim.Adam(weights),
        torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        torch.optim.SGD(weights, lr=0.1, weight_decay=0.1),
        torch.optim.RMSprop(weights, momentum=0.1),
        torch.optim.SGD(weights, lr=torch.tensor(0.1)),
        Own(weights, lr=0.1),
    ]
    assert not any(map(descends, others))
    base = torch.optim.SGD([{"params": weights}, {"params": [torch.nn.Parameter(torch.ones(1))]}], lr=0.1)
    assert descends(base)
    StepLR(base, 1)
    assert descends(base)
    base.param_groups[1]["lr"] = -0.1
    assert not descends(base)
    base.param_groups[1]["lr"] = 0.1
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    try:
        assert not descends(base)
    finally:
        handle.remove()
    assert descends(base)
    step = base.step
    base.step = lambda *_: step()
    assert not descends(base)
