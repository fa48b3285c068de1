"""The per-example engine on a GPU, against the same numbers from the CPU in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import gradmon
from gradmon.per_example import Listener
from tests import zoo
from tests.zoo.problem import mapped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def moved(value, device):
    return mapped(value, lambda tensor: tensor.to(device))


@pytest.mark.parametrize("case", [case for case in zoo.CASES if not case.values], ids=lambda case: case.name)
@pytest.mark.parametrize("mask", [None, 0.2])
def test_same_as_on_the_cpu(case, mask):
    found = []
    for device in ("cpu", "cuda"):
        problem = case.make(0, torch.float64)
        model, batch = problem.model.to(device), moved(problem.batch, device)
        listener = Listener(model, moments=True, mask=None if mask is None else gradmon.Mask(mask, 3))
        listener.arm()
        try:
            problem.loss(model, batch).backward()
            found.append(listener.collect(batch))
        except gradmon.Unavailable as missing:
            found.append(missing.reason)
        listener.disarm()
    here, there = found
    if isinstance(here, str):
        assert isinstance(there, str)
        return
    size = float(here.gram.abs().max())
    np.testing.assert_allclose(there.gram.cpu(), here.gram, rtol=1e-9, atol=1e-12 * size)
    np.testing.assert_allclose(there.means.cpu(), here.means, rtol=1e-8, atol=1e-12 * size**0.5)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_does_not_get_in(precision):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()
        x, target = torch.randn(32, 64).cuda(), torch.randint(10, (32,)).cuda()
        exact = gradmon.per_example_gram(
            copy.deepcopy(model).double(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), (x.double(), target)
        )
        listener = Listener(model)
        listener.arm()
        F.cross_entropy(model(x), target).backward()
        gram = listener.collect((x, target)).gram
        listener.disarm()
        assert torch.backends.cuda.matmul.fp32_precision == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    # The training's own passes may be coarse; the products made of them are not.
    tolerance = 1e-5 if precision == "ieee" else 1e-2
    np.testing.assert_allclose(gram.cpu(), exact.cpu(), atol=tolerance * float(exact.max()), rtol=0)


@pytest.mark.parametrize("with_loss", [True, False], ids=["loss", "passive"])
def test_step_between_probes_waits_for_nothing(with_loss):
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch = torch.randn(32, 64).cuda(), torch.randint(10, (32,)).cuda()
    with gradmon.Monitor(
        model, optimizer, loss if with_loss else None, schedule=lambda step: step in (2, 7)
    ) as monitor:
        for step in range(1, 8):
            torch.cuda.set_sync_debug_mode("error" if step in (4, 5, 6) else "default")
            try:
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
                monitor.step(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert not monitor.failures
        assert monitor.readings["gradient_rank"].step == 7
