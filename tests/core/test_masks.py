"""Masks: how many coordinates, which, and that they stay the same."""

import json
import math

import pytest
import torch
from torch import nn

import gradmon
from gradmon import Mask


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 7), nn.Linear(7, 1))


SIZES = [300, 30, 210, 7, 7, 1]


def starts():
    return [sum(SIZES[:i]) for i in range(len(SIZES))]


def counts(mask: Mask) -> list[int]:
    found = mask.sample(model())
    return [int(((found >= a) & (found < a + n)).sum()) for a, n in zip(starts(), SIZES, strict=True)]


@pytest.mark.parametrize("fraction", [1e-9, 0.001, 0.05, 0.1, 0.3, 0.5, 0.7, 0.999, 1.0, 1])
def test_every_tensor_has_the_part_rounded_up(fraction):
    # Exact decimal products: 0.1 of 30 is 3, 0.7 of 30 is 21 and 0.7 of 210 is 147.
    parts = [max(1, -(-round(fraction * 10**9) * n // 10**9)) for n in SIZES]
    assert counts(Mask(fraction)) == parts


def test_rounding_up_is_of_the_exact_product():
    assert counts(Mask(0.1)) == [30, 3, 21, 1, 1, 1]
    assert counts(Mask(0.7)) == [210, 21, 147, 5, 5, 1]


@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0])
def test_coordinates_are_sorted_distinct_and_inside(fraction):
    found = Mask(fraction, 3).sample(model())
    assert found.dtype == torch.int64
    assert found.ndim == 1
    assert bool((found.diff() > 0).all())
    assert 0 <= int(found[0]) <= int(found[-1]) < sum(SIZES)


def test_everything_is_everything():
    assert torch.equal(Mask(1.0).sample(model()), torch.arange(sum(SIZES)))


def test_same_seed_same_coordinates_other_seed_others():
    first = Mask(0.2, 5)
    assert torch.equal(first.sample(model()), Mask(0.2, 5).sample(model()))
    assert torch.equal(first.sample(model()), first.sample(model()))
    assert not torch.equal(first.sample(model()), Mask(0.2, 6).sample(model()))
    assert not torch.equal(first.sample(model()), Mask(0.2).sample(model()))


@pytest.mark.parametrize("seed", [-1, 2**31, 2**32, 2**40])
def test_any_integer_is_a_seed(seed):
    found = Mask(0.2, seed).sample(model())
    assert torch.equal(found, Mask(0.2, seed).sample(model()))
    assert not torch.equal(found, Mask(0.2, seed + 1).sample(model()))


def test_tensors_of_one_size_draw_for_themselves():
    twins = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    found = Mask(0.2).sample(twins)
    assert len(found) == 160
    assert not torch.equal(found[:80], found[80:] - 400)


def test_every_coordinate_is_as_likely_as_any_other():
    draws, layer = 600, nn.Linear(10, 4, bias=False)
    hits = torch.zeros(40)
    for seed in range(draws):
        hits[Mask(0.25, seed).sample(layer)] += 1
    error = math.sqrt(draws * 0.25 * 0.75)
    assert bool(((hits - draws * 0.25).abs() < 4.5 * error).all())


def test_the_global_random_state_is_left_alone():
    net, before = model(), torch.get_rng_state()
    Mask(0.2).sample(net)
    assert torch.equal(torch.get_rng_state(), before)


def test_freezing_one_layer_leaves_the_others_coordinates():
    whole, part = model(), model()
    part[0].requires_grad_(False)
    full, rest = Mask(0.2).sample(whole), Mask(0.2).sample(part)
    assert torch.equal(full[full >= 330] - 330, rest)


def test_masked_gradients_are_the_coordinates_of_the_whole_ones():
    net, mask = model().double(), Mask(0.2)
    x = torch.linspace(-1, 1, 50).double().reshape(5, 10)
    kept = mask.sample(net)

    def loss(net, x):
        return net(x).square().mean()

    h = gradmon.batch_gradient(net, loss, x)
    assert torch.equal(gradmon.batch_gradient(net, loss, x, mask=mask), h[kept])
    rows = gradmon.per_example_gradients(net, loss, x)
    assert torch.equal(gradmon.per_example_gradients(net, loss, x, mask=mask), rows[:, kept])
    assert torch.equal(gradmon.batch_gradient(net, loss, x, mask=0.2), h[kept])
    options = {"metrics": ["gradient_coherence", "grad_norm", "param_norm"]}
    assert gradmon.measure(net, loss, x, mask=mask, **options) == gradmon.measure(net, loss, x, mask=0.2, **options)
    plain = gradmon.measure(net, loss, x, **options)
    masked = gradmon.measure(net, loss, x, mask=mask, **options)
    assert masked["grad_norm"] == plain["grad_norm"]
    assert masked["param_norm"] == plain["param_norm"]
    assert masked["gradient_coherence"] != plain["gradient_coherence"]


def test_a_mask_is_saved_and_restored():
    mask = Mask(0.2, 5)
    kept = mask.sample(model())
    restored = Mask(0.9)
    restored.load_state_dict(json.loads(json.dumps(mask.state_dict())))
    assert (restored.fraction, restored.seed) == (0.2, 5)
    assert torch.equal(restored.sample(model()), kept)
    assert restored.state_dict() == mask.state_dict()
    assert repr(restored) == "Mask(0.2, seed=5)"


def test_a_restored_mask_keeps_its_coordinates_whatever_the_generator_would_draw():
    mask = Mask(0.5)
    mask.load_state_dict({"fraction": 0.5, "seed": 0, "picks": {"weight": [0, 1], "bias": [1]}})
    assert mask.sample(nn.Linear(2, 2)).tolist() == [0, 1, 5]


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Linear(2, 1), nn.Linear(1, 2)])
def test_a_restored_mask_must_fit_the_model(layer):
    mask = Mask(0.5)
    mask.load_state_dict({"fraction": 0.5, "seed": 0, "picks": {"weight": [1, 3], "bias": [1]}})
    with pytest.raises(
        gradmon.ArgumentError, match=r"`mask` must fit the model's `(weight|bias)` of \d+ weights\. Got"
    ):
        mask.sample(layer)
