"""Learning rates: defaults, groups, schedules, momentum, and the suggestion that is made of them."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import lr_scheduler

from gradmon import suggest_lr
from gradmon._errors import GradmonError
from gradmon.preflight.rates import rates_of, with_rates
from gradmon.preflight.scan import HALF


def made():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batch():
    return torch.randn(32, 5, dtype=torch.float64), torch.randint(3, (32,))


def of(make):
    model = made()
    return rates_of(make(model.parameters()), list(model.parameters()))


def test_defaults():
    assert of(lambda p: torch.optim.SGD(p, lr=3.0)).default == 0.1
    assert of(lambda p: torch.optim.SGD(p, lr=3.0, momentum=0.9)).default == pytest.approx(0.01)
    assert of(lambda p: torch.optim.SGD(p, lr=3.0, momentum=0.9, dampening=0.9)).default == pytest.approx(0.1)
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam):
        assert of(lambda p, kind=kind: kind(p, lr=3.0)).default == 1e-3
    assert of(lambda p: torch.optim.RMSprop(p, lr=3.0)).default == 1e-3
    assert of(lambda p: torch.optim.Adagrad(p, lr=3.0)).default == 1e-2
    for kind in (torch.optim.Adadelta, torch.optim.Rprop, torch.optim.RAdam):  # of which RAdam begins as momentum
        assert "says nothing" in of(kind).reason


def test_a_step_that_does_not_follow_the_learning_rate_tells_none():
    model, examples = made(), batch()
    optimizer = torch.optim.ASGD(model.parameters())
    assert suggest_lr(model, optimizer, loss, examples).groups is not None
    loss(model, examples).backward()
    optimizer.step()  # from now on its steps are as long as was laid down in the one before
    found = suggest_lr(model, optimizer, loss, examples)
    assert found.groups is None
    assert found.reason == "the next step of ASGD is as long at any learning rate"


def test_optimizers_of_others():
    class Own(torch.optim.Optimizer):
        def __init__(self, params, lr=0.25):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(group["lr"] * parameter.grad)

    class Untold(Own):
        def __init__(self, params, lr):
            super().__init__(params, lr)

    class Without(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    class Derived(torch.optim.AdamW):
        pass

    assert of(lambda p: Own(p, 7.0)).default == 0.25
    assert of(lambda p: Untold(p, 7.0)).default == 7.0
    assert of(lambda p: Derived(p, lr=7.0)).default == 1e-3
    assert of(Without).reason == "Without has no learning rate"
    model = made()
    assert suggest_lr(model, Without(model.parameters()), loss, batch()).reason == "Without has no learning rate"
    found = suggest_lr(model, Own(model.parameters(), 0.3), loss, batch())
    assert found.groups[0] == pytest.approx(math.sqrt(0.25 * found.half))


def test_an_optimizer_that_needs_a_closure_has_no_suggestion():
    model = made()
    found = suggest_lr(model, torch.optim.LBFGS(model.parameters()), loss, batch())
    assert found.groups is None
    assert found.reason.startswith("no trial step with LBFGS")
    assert str(found) == f"No learning rate to suggest: {found.reason}."


def test_groups_keep_their_proportions():
    model = made()
    groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    data = batch()
    found = suggest_lr(model, optimizer, loss, data)
    assert found.main == 0  # the group with the most weights
    assert found.groups[1] / found.groups[0] == pytest.approx(10)
    assert found.groups[0] == pytest.approx(math.sqrt(0.1 * found.half))
    # Which rates they have now is of no matter, only their proportion.
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3
    again = suggest_lr(model, optimizer, loss, data)
    assert again.groups == pytest.approx(found.groups, rel=1e-9)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02e-3, 0.2e-3])


def test_a_group_at_zero_stays_there_and_is_not_the_main_one():
    model = made()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.3}]
    found = suggest_lr(model, torch.optim.SGD(groups), loss, batch())
    assert found.main == 1
    assert found.groups[0] == 0


def test_a_tensor_for_a_learning_rate():
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
    found = suggest_lr(model, optimizer, loss, batch())
    assert found.now == pytest.approx((0.01,))
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert found.groups is not None


def test_schedules_are_known_by_their_peak():
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
    assert optimizer.param_groups[0]["lr"] == 0
    assert rates_of(optimizer, list(model.parameters())).groups == (0.3,)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=50)
    assert rates_of(optimizer, list(model.parameters())).groups == (2.0,)
    found = suggest_lr(model, optimizer, loss, batch())
    assert found.now == (2.0,)


def test_momentum_adds_steps_up():
    model = made()
    data = batch()
    plain = suggest_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, data)
    heavy = suggest_lr(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss, data)
    assert heavy.gain == pytest.approx(10)
    # The walk begins elsewhere, so that the interpolation differs a little.
    assert heavy.half == pytest.approx(plain.half / 10, rel=0.2)
    assert heavy.groups[0] == pytest.approx(plain.groups[0] / 10, rel=0.2)


def test_copies_with_other_rates_share_parameters_and_nothing_else():
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    loss(model, batch()).backward()
    optimizer.step()
    twin = with_rates(optimizer, [7.0])
    assert twin.param_groups[0]["lr"] == 7.0
    assert optimizer.param_groups[0]["lr"] == 0.1
    first = next(model.parameters())
    assert twin.param_groups[0]["params"][0] is first
    assert twin.state[first]["exp_avg"] is not optimizer.state[first]["exp_avg"]
    assert torch.equal(twin.state[first]["exp_avg"], optimizer.state[first]["exp_avg"])


def test_the_suggestion_in_words_and_as_plain_types():
    model = made()
    found = suggest_lr(model, torch.optim.SGD(model.parameters(), lr=50.0), loss, batch())
    assert str(found).startswith("Learning rate: 50 -> ")
    assert max(len(line) for line in str(found).splitlines()) <= 80
    plain = found.to_dict()
    assert plain["passes"] == found.passes
    assert [point[0] for point in plain["points"]] == sorted(point[0] for point in plain["points"])


def test_steps_that_are_too_short_for_any_learning_rate_are_told():
    model = made()
    steep = lambda m, b: 1e7 * loss(m, b)  # noqa: E731
    found = suggest_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), steep, batch())
    assert "So short steps lead nowhere" in str(found)
    assert max(len(line) for line in str(found).splitlines()) <= 80
    found = suggest_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch())
    assert "So short" not in str(found)


def test_the_plot_shows_the_points():
    class Axes:
        def __init__(self):
            self.calls = {}

        def __getattr__(self, name):
            return lambda *args, **kwargs: self.calls.setdefault(name, []).append((args, kwargs))

    model = made()
    found = suggest_lr(model, torch.optim.SGD(model.parameters(), lr=0.5), loss, batch())
    axes = Axes()
    assert found.plot(axes) is axes
    (((rates, changes, _), _),) = axes.calls["plot"]
    assert rates == [point.rate for point in found.scan.points]
    assert changes == [point.change for point in found.scan.points]
    assert axes.calls["axhline"][0][0] == (HALF,)
    assert [args[0] for args, _ in axes.calls["axvline"]] == [found.groups[0], 0.5]


def test_the_plot_says_what_it_needs(monkeypatch):
    import importlib

    def missing(name):
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    model = made()
    found = suggest_lr(model, torch.optim.SGD(model.parameters(), lr=0.5), loss, batch())
    with pytest.raises(GradmonError, match=r"The plot needs matplotlib .*pip install \"gradmon\[figures\]\""):
        found.plot()
