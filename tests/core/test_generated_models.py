"""Per-example gradients of models that nobody thought of: equal to the loop over the examples, or refused."""

import copy

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import gradmon
from gradmon.per_example import Listener
from tests import references
from tests.core.generated_models import CLASSES, Made, problems

TIGHT = 1e-9
LISTENED = 100
LEAST = 0.9
"""The part of the models for which there must be numbers."""


def by_loop(made):
    """B times the gradient of each example's own term, the example run alone."""
    size, rows = len(made.batch[0]), []
    for i in range(size):
        model = copy.deepcopy(made.model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(made.term(model, made.batch, i), parameters, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]) * size)
    return torch.stack(rows)


def test_generated_models():
    tried, refused = [], {}

    @hypothesis.settings(derandomize=True, max_examples=250, deadline=None, database=None)
    @hypothesis.given(problems())
    def check(made):
        lone_norm = made.interacting and len(made.batch[0]) == 1
        hypothesis.assume(not lone_norm)  # BatchNorm refuses to average over one
        arguments = (made.model, made.loss, made.batch)
        h = gradmon.batch_gradient(*arguments, reduction=made.reduction)
        tried.append(made.text)
        try:
            H = gradmon.per_example_gradients(*arguments, reduction=made.reduction)
        except gradmon.Unavailable as missing:
            refused[made.text] = missing.reason
            return
        scale = max(float(H.abs().max()), float(h.abs().max()))
        torch.testing.assert_close(H.mean(0), h, rtol=TIGHT, atol=TIGHT * scale)
        if not made.interacting:
            torch.testing.assert_close(H, by_loop(made), rtol=TIGHT, atol=TIGHT * scale)

    with torch.random.fork_rng(devices=[]):
        check()
    assert len(tried) > 100
    assert all(refused.values())
    assert len(refused) <= (1 - LEAST) * len(tried), refused


def from_the_training(made, mask):
    """What is seen of the model's own pass."""
    listener = Listener(made.model, gram=True, moments=True, mask=mask)
    listener.arm()
    try:
        value = made.loss(made.model, made.batch)
        (value.sum() if made.reduction == "sum" else value.mean()).backward()
        return listener.collect(made.batch)
    finally:
        listener.disarm()


def assert_seen(found, made, H, h, mask):
    """Inner products, means and variances are those of the examples' own gradients `H`, whose mean is `h`."""
    kept, factors = slice(None), torch.ones(len(h), dtype=torch.float64)
    if mask is not None:
        kept = mask.sample(made.model)
        factors = torch.from_numpy(references.coordinate_weights(made.model, kept.numpy()))
    H, h = H[:, kept], h[kept]
    scale = max(float(H.abs().max()), float(h.abs().max()))
    G = (H * factors) @ H.T
    torch.testing.assert_close(found.gram, G, rtol=TIGHT, atol=TIGHT * scale**2 * float(factors.sum()))
    torch.testing.assert_close(found.means, h, rtol=TIGHT, atol=TIGHT * scale)
    assert found.variances.isnan().all() or len(H) > 1
    if len(H) > 1:
        torch.testing.assert_close(found.variances, H.var(0), rtol=TIGHT, atol=TIGHT * scale**2)


def test_generated_models_that_are_listened_to():
    """The same architectures in a training's own pass: the same numbers, or none."""
    tried, refused, outside = [], {}, {}

    @hypothesis.settings(derandomize=True, max_examples=LISTENED, deadline=None, database=None)
    @hypothesis.given(problems(), st.sampled_from([None, 0.3]))
    def check(made, fraction):
        hypothesis.assume(not (made.interacting and len(made.batch[0]) == 1))
        mask = None if fraction is None else gradmon.Mask(fraction, 5)
        twin = copy.deepcopy(made.model)
        h = gradmon.batch_gradient(twin, made.loss, made.batch, reduction=made.reduction)
        try:
            found = from_the_training(made, mask)
        except gradmon.Unavailable as missing:
            (outside if made.penalised else refused)[made.text] = missing.reason
            return
        assert not made.penalised  # what is added outside of the model belongs to no example's rows
        tried.append(made.text)
        if made.interacting:
            try:
                H = gradmon.per_example_gradients(twin, made.loss, made.batch, reduction=made.reduction)
            except gradmon.Unavailable:
                torch.testing.assert_close(found.means, h if mask is None else h[mask.sample(made.model)])
                return
        else:
            H = by_loop(made._replace(model=twin))
        assert_seen(found, made, H, h, mask)

    with torch.random.fork_rng(devices=[]):
        check()
    assert len(tried) > LISTENED // 2
    assert outside
    assert all(refused.values())
    assert len(refused) <= (1 - LEAST) * (len(tried) + len(refused)), refused


# --- what no generator would come upon -----------------------------------------------------------------------------


def zeroed(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Reordered(nn.Module):
    """The examples are sorted for a head that is still zero, and put back."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), zeroed(nn.Linear(4, CLASSES))

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.body(x))[order])[order.argsort()]


class OneByOne(nn.Module):
    """A loop over the examples."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.shift, self.scale = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.randn(CLASSES))
        self.zero = zeroed(nn.Linear(3, 4, bias=False))

    def forward(self, x):
        return torch.stack([self.step(self, example) for example in x])


LOOPS = {
    "sorted for a zero head": Reordered,
    "one by one, a shift": lambda: OneByOne(lambda m, x: (torch.tanh(x.sum()) + m.shift) * torch.ones(CLASSES)),
    "one by one, a zero layer": lambda: OneByOne(lambda m, x: m.zero(x)[:CLASSES]),
}


@pytest.mark.parametrize(("name", "size"), [(name, 4) for name in LOOPS])
def test_rows_that_prove_nothing(name, size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LOOPS[name]().double()
        batch = torch.randn(size, 3).double(), torch.randn(size, CLASSES).double()

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def term(model, batch, i):
        return loss(model, (batch[0][i : i + 1], batch[1][i : i + 1])) / size

    made = Made(model, loss, term, batch, "mean", False, False, name)
    try:
        H = gradmon.per_example_gradients(model, loss, batch)
    except gradmon.Unavailable:
        return
    torch.testing.assert_close(H, by_loop(made), rtol=TIGHT, atol=1e-12)
