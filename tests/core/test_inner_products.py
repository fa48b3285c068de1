"""Inner products: of the rows of a matrix, and summed over the parameters of a model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import gradmon
from gradmon._tensors import symmetric
from tests import references
from tests.core.passive import accumulated_shares, listened
from tests.zoo.problem import net

# --- half of a symmetric product -----------------------------------------------------------------------------------

COUNTS = (1, 3, 63, 64, 65, 100, 128, 129, 200, 300)


def uniform(*sizes):
    """Positive numbers, so that no sum of products cancels."""
    return torch.rand(*sizes, dtype=torch.float64)


def assert_symmetric_product(rows):
    found = symmetric(rows)
    assert found.shape == (len(rows), len(rows))
    assert found.dtype == rows.dtype
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-12)


@pytest.mark.parametrize("columns", [1, 30, 2047, 2048])  # 64 * 64 * 2048 multiplications: the least that is halved
@pytest.mark.parametrize("count", COUNTS)
def test_symmetric_product(count, columns):
    assert_symmetric_product(uniform(count, columns))


LAYOUTS = {
    "transposed": lambda n, k: uniform(k, n).T,
    "every other row": lambda n, k: uniform(2 * n, k)[::2],
    "every other column": lambda n, k: uniform(n, 2 * k)[:, ::2],
    "part of a matrix": lambda n, k: uniform(n + 3, k + 5)[2:-1, 3:-2],
    "one row for all": lambda n, k: uniform(k).expand(n, k),
    "one column for all": lambda n, k: uniform(n, 1).expand(n, k),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [3, 64, 100, 129, 300])
def test_symmetric_product_of_a_matrix_that_is_not_contiguous(count, layout):
    rows = LAYOUTS[layout](count, 2048)
    assert not rows.is_contiguous()
    assert_symmetric_product(rows)


def test_little_more_than_half_of_a_large_symmetric_product_is_worked_out(monkeypatch):
    made = []

    def mm(left, right, real=torch.mm, **options):
        made.append(len(left) * right.shape[1])
        return real(left, right, **options)

    monkeypatch.setattr(torch, "mm", mm)
    symmetric(uniform(300, 2048))
    assert 300 * 301 // 2 <= sum(made) < 0.65 * 300**2


# --- sums over parameters ------------------------------------------------------------------------------------------


def many(count):
    """A model of so many parameters, each of which weighs about as much as another."""
    layers = nn.ModuleList(nn.Linear(3, 1 + k % 3, bias=False) for k in range(count))
    return net(lambda m, x: torch.cat([layer(x).tanh() for layer in m.layers], 1), layers=layers)


def loss(model, batch):
    return (model(batch[0]) + 1).square().sum(1).mean()


@pytest.mark.parametrize("sizes", [(5,), (3, 2)], ids=["one pass", "two passes"])
@pytest.mark.parametrize("fraction", [None, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 20])
def test_inner_products_are_summed_over_all_parameters(count, dtype, tolerance, fraction, sizes):
    model, batches = many(count).to(dtype), [(torch.randn(size, 3, dtype=dtype),) for size in sizes]
    H = accumulated_shares(copy.deepcopy(model).double(), [(x.double(),) for (x,) in batches], 1.0, loss)
    mask, factors = None, None
    if fraction is not None:
        mask = gradmon.Mask(fraction)
        kept = mask.sample(model).numpy()
        H, factors = H[:, kept], references.coordinate_weights(model, kept)
    found = listened(model, batches, lambda: [loss(model, batch).backward() for batch in batches], mask=mask)
    G = references.gram(H, factors)
    assert found.gram.dtype == torch.float64
    np.testing.assert_allclose(found.gram, G, rtol=0, atol=tolerance * np.abs(G).max())


# --- gradients that cancel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [4, 64])
def test_gradients_that_cancel_but_for_rounding_add_up(dtype, size):
    model = nn.Linear(4, 1, bias=False).to(dtype)
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    batch = torch.cat([half, -half.flip(0)])[torch.randperm(2 * size, generator=generator)].to(dtype)
    rows = gradmon.per_example_gradients(model, lambda model, x: model(x).mean(), batch)
    torch.testing.assert_close(rows, batch)
    names = ["gradient_rank", "gradient_coherence", "noise_scale", "gradient_snr"]
    found = gradmon.measure(model, lambda model, x: model(x).mean(), batch, metrics=names)
    assert found["gradient_rank"].reason is None
    assert found["gradient_coherence"].value == pytest.approx(0, abs=1e-6)
    assert found["noise_scale"].reason == "no signal above the noise"
    assert found["gradient_snr"].value == pytest.approx(0, abs=1e-6)
    assert listened(model, batch, lambda: model(batch).mean().backward()).rows is None
