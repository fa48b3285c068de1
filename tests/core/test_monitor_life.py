"""A monitor's alerts, its state, its beginning and its end."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

import gradmon
from gradmon import Monitor, Reading, every
from gradmon.alerts import Above, DeadLayer, NonFinite, default_rules
from gradmon.sinks import MemorySink
from tests.core.monitored import CLOCK, assert_same_weights, data, explode, mlp, mse, train, trained_alone, watched

# --- alerts --------------------------------------------------------------------------------------------------------


def test_alerts_fire_and_resolve():
    model, sink = mlp(), MemorySink()
    rules = [Above("loss", 10.0, name="too_high", severity="critical", remedy="Stop."), NonFinite()]
    monitor = Monitor(model, None, mse, metrics=["loss"], schedule=every(1), sinks=[sink], alerts=rules)
    x, t = data(1)[0]
    active = []
    for factor in (1, 100, 100, 1, math.nan, 1):
        monitor.step((x, t * factor))
        active.append([alert.rule for alert in monitor.alerts])
    assert active == [[], ["too_high"], ["too_high"], [], ["nonfinite"], []]
    assert [(a.rule, a.state, a.step) for a in sink.alerts] == [
        ("too_high", "firing", 2),
        ("too_high", "resolved", 4),
        ("nonfinite", "firing", 5),
        ("nonfinite", "resolved", 6),
    ]
    assert sink.alerts[0].severity == "critical"
    assert sink.alerts[0].remedy == "Stop."
    assert not monitor.failures


def test_divergence_raises_the_default_alerts():
    _, sink, model = watched(steps=14, lr=1e40, metrics="default")
    assert not all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert {"nonfinite", "step_too_long"} <= {alert.rule for alert in sink.alerts}


def test_no_alerts():
    monitor, sink, _ = watched(steps=8, lr=1e6, alerts=None)
    assert sink.alerts == monitor.alerts == []


# --- state ---------------------------------------------------------------------------------------------------------


def is_plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part) for key, part in value.items())
    if isinstance(value, list):
        return all(is_plain(part) for part in value)
    return value is None or type(value) in (bool, int, float, str)


def round_trip(state, kind, folder):
    if kind == "json":
        return json.loads(json.dumps(state, allow_nan=True))
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("kind", ["json", "torch"])
def test_resumed_run_reads_what_an_uninterrupted_one_reads(kind, tmp_path):
    def start():
        model, sink = mlp(), MemorySink()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        # Another seed than the saved one: the mask must come from the state.
        clocked = {"overhead_high"}
        rules = [Above("loss", 0.0, after=4), *(rule for rule in default_rules() if rule.name not in clocked)]
        options = {"metrics": "all", "schedule": every(2), "layers": True, "alerts": rules, "sinks": [sink]}
        return model, optimizer, sink, Monitor(model, optimizer, mse, mask=0.3, **options)

    batches = data(9)
    model, optimizer, sink, monitor = start()
    train(model, optimizer, batches[:5], monitor)
    state, saved = monitor.state_dict(), copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert is_plain(state)
    expected_readings, expected_alerts = monitor.readings, monitor.alerts
    train(model, optimizer, batches[5:], monitor)

    other, again, resumed_sink, resumed = start()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(round_trip(state, kind, tmp_path))
    assert resumed.steps == 5
    assert str(resumed.readings) == str(expected_readings)
    assert resumed.alerts == expected_alerts
    train(other, again, batches[5:], resumed)
    late = [r for r in sink.readings if r.step > 5 and r.name not in CLOCK]
    assert str([r for r in resumed_sink.readings if r.name not in CLOCK]) == str(late)
    assert resumed_sink.alerts == [alert for alert in sink.alerts if alert.step > 5]
    assert_same_weights(model, other)


def test_state_of_a_mask_is_restored():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    saved = Monitor(model, optimizer, mse, mask=0.3, seed=5).state_dict()
    monitor = Monitor(model, optimizer, mse, mask=0.3, seed=6)
    assert monitor.state_dict()["mask"] != saved["mask"]
    monitor.load_state_dict(saved)
    assert monitor.state_dict()["mask"] == saved["mask"]
    unmasked = Monitor(model, optimizer, mse, mask=None).state_dict()
    monitor.load_state_dict(unmasked)
    assert monitor.state_dict() == unmasked


def test_state_that_does_not_fit():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = Monitor(model, optimizer, mse, mask=0.3)
    with pytest.raises(gradmon.ArgumentError, match=r"`state` must be of version 3\. Got 1"):
        monitor.load_state_dict({**monitor.state_dict(), "version": 1})
    wide = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 2))
    other = Monitor(wide, torch.optim.SGD(wide.parameters(), lr=0.05), mse, mask=0.3)
    with pytest.raises(gradmon.ArgumentError, match="`mask` must fit"):
        monitor.load_state_dict(other.state_dict())
    monitor.load_state_dict({})
    assert monitor.steps == 0


# --- beginning and end ---------------------------------------------------------------------------------------------


class Counting(MemorySink):
    closed = 0
    bound = None

    def close(self):
        self.closed += 1

    def bind(self, run, rank):
        self.bound = (run, rank)


def test_close():
    model, sink = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    hooks = len(optimizer._optimizer_step_pre_hooks)
    with Monitor(model, optimizer, mse, schedule=every(1), sinks=sink, run="name", rank=3) as monitor:
        assert len(optimizer._optimizer_step_pre_hooks) == hooks + 1
        train(model, optimizer, data(1), monitor)
    assert sink.bound == ("name", 3)
    assert len(optimizer._optimizer_step_pre_hooks) == hooks
    seen = len(sink.readings)
    monitor.close()
    train(model, optimizer, data(2), monitor)
    assert sink.closed == 1
    assert len(sink.readings) == seen
    assert monitor.readings["loss"].step == 1


def test_context_lets_errors_through_and_closes():
    model, sink = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ZeroDivisionError), Monitor(model, optimizer, mse, sinks=[sink]):
        raise ZeroDivisionError
    assert sink.closed == 1
    assert not optimizer._optimizer_step_pre_hooks


def test_constructor_that_fails_leaves_nothing():
    model, sink = mlp(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(gradmon.ArgumentError, match="`sinks`"):
        Monitor(model, optimizer, mse, sinks=[sink, "no_such_sink"])
    assert sink.closed == 1
    assert not optimizer._optimizer_step_pre_hooks


def test_disabled(monkeypatch):
    monkeypatch.setenv("GRADMON_DISABLED", "1")
    monitor, sink, model = watched(loss=explode, mask=99, metrics="nonsense")
    assert_same_weights(model, trained_alone())
    assert monitor.readings == {}
    assert monitor.alerts == []
    assert monitor.steps == 0
    assert sink.readings == []
    assert monitor.state_dict() == {}
    monitor.load_state_dict({"version": 1})
    with monitor:
        pass
    monitor.close()


def test_two_monitors_on_one_optimizer():
    model, sinks = mlp(), [MemorySink(), MemorySink()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitors = [Monitor(model, optimizer, mse, metrics="all", schedule=every(1), sinks=[sink]) for sink in sinks]
    for batch in data(3):
        train(model, optimizer, [batch])
        for monitor in monitors:
            monitor.step(batch)
    first, second = ([r for r in sink.readings if r.name not in CLOCK] for sink in sinks)
    assert str(first) == str(second)
    assert_same_weights(model, trained_alone())


WRONG = [
    ({"model": "text"}, "`model` must be a torch.nn.Module. Got str"),
    ({"model": nn.ReLU()}, "`model` must have at least one trainable parameter. Got none"),
    ({"optimizer": "sgd"}, "`optimizer` must be a torch.optim.Optimizer. Got str"),
    ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)}, "`optimizer` must hold parameters of `model`"),
    ({"loss": 3}, "`loss` must be callable as loss\\(model, batch\\), or None. Got int"),
    ({"loss": nn.CrossEntropyLoss()}, "`loss` must be .* Got CrossEntropyLoss, which takes outputs and targets"),
    ({"loss": nn.functional.mse_loss}, "`loss` must be .* Got mse_loss, which takes outputs and targets"),
    ({"loss": lambda batch: 0}, "`loss` must be .* Got <lambda>\\(batch\\): too many positional arguments"),
    (
        {"loss": lambda model, x, t: 0},
        "`loss` must be .* Got <lambda>\\(model, x, t\\): missing a required argument: 't'",
    ),
    ({"metrics": "nonsense"}, "`metrics` must be Metric objects or among .*weight_condition.*. Got 'nonsense'"),
    ({"metrics": ["loss", 3]}, "`metrics` must be .*. Got 3"),
    ({"schedule": 5}, "`schedule` must be a budget, or callable as schedule\\(step\\). Got 5"),
    ({"mask": 0}, "`mask` must be in \\(0, 1\\]. Got 0"),
    ({"mask": 1.5}, "`mask` must be in \\(0, 1\\]. Got 1.5"),
    ({"mask": True}, "`mask` must be in \\(0, 1\\]. Got True"),
    ({"seed": 0.5}, "`seed` must be an integer. Got 0.5"),
    ({"run": ""}, "`run` must be a name. Got ''"),
    ({"run": 7}, "`run` must be a name. Got 7"),
    ({"rank": -1}, "`rank` must be an integer of at least 0. Got -1"),
    ({"rank": True}, "`rank` must be an integer of at least 0. Got True"),
    ({"sinks": ["nowhere:x"]}, "`sinks` must begin with the name of an installed sink"),
    ({"sinks": [object()]}, "`sinks` must be sinks"),
    ({"sinks": MemorySink}, "`sinks` must be sinks"),
    ({"alerts": [print]}, '`alerts` must be "default" or rules'),
    ({"weights": "krylov"}, "`weights` must be a sampler of gradmon.perturbations.weights. Got str"),
    ({"inputs": "ascent"}, "`inputs` must be a sampler of gradmon.perturbations.inputs. Got str"),
    ({"derivative": "both"}, '`derivative` must be "finite" or "exact". Got \'both\''),
    ({"micro_batches": 1}, "`micro_batches` must be an integer of at least 2. Got 1"),
    ({"reduction": "none"}, '`reduction` must be "mean" or "sum". Got \'none\''),
    ({"layers": 1}, "`layers` must be True or False. Got 1"),
    ({"preflight": "no"}, "`preflight` must be True or False. Got 'no'"),
    ({"optimizer": None, "metrics": ["step_ratio"]}, "`optimizer` must be given for `step_ratio`. Got None"),
]


@pytest.mark.parametrize(("wrong", "match"), WRONG, ids=[f"{next(iter(w))}-{n}" for n, (w, _) in enumerate(WRONG)])
def test_wrong_arguments(wrong, match):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    arguments = {"model": model, "optimizer": optimizer, "loss": mse, **wrong}
    with pytest.raises(gradmon.ArgumentError, match=match):
        Monitor(**arguments)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("wrong", [{"sinks": 3}, {"alerts": 3}, {"input_module": "nowhere"}, {"input_module": 3}])
def test_wrong_arguments_that_cannot_be_iterated_or_found(wrong):
    model = mlp()
    with pytest.raises(gradmon.ArgumentError, match=f"`{next(iter(wrong))}`"):
        Monitor(model, torch.optim.SGD(model.parameters(), lr=0.05), mse, **wrong)


def test_reading_is_a_plain_tuple():
    monitor, _, _ = watched(metrics=["loss"])
    reading = monitor.readings["loss"]
    assert isinstance(reading, Reading)
    assert type(reading.value) is float
    assert reading.step == 3


@pytest.mark.parametrize("loss", [mse, None])
@pytest.mark.parametrize("schedule", [every(1), every(50)])
@pytest.mark.parametrize("order", ["right", "skipped", "wrong"])
def test_steps_that_are_looked_at_before_they_are_taken_are_warned_of(order, schedule, loss, log):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, loss, schedule=schedule, sinks=[], alerts=[]) as monitor:
        for number, batch in enumerate(data(4)):
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            mse(model, batch).backward()
            if order == "wrong":
                monitor.step(batch)
            if order != "skipped" or number > 1:  # as a gradient scaler does at first
                optimizer.step()
            if order != "wrong":
                monitor.step(batch)
    warnings = [record.getMessage() for record in log if "before optimizer.step" in record.getMessage()]
    assert len(warnings) == (order == "wrong")
    assert not monitor.failures


def test_a_step_that_was_skipped_leaves_its_gradient_to_be_freed():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, mse, schedule=every(1), sinks=[], alerts=[]) as monitor:
        mse(model, data(1)[0]).backward()
        monitor.step(data(1)[0])
        held = [TensorWeakRef(parameter.grad) for parameter in model.parameters()]
        optimizer.zero_grad()
        assert [ref() for ref in held] == [None] * len(held)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("passive", [False, True])
def test_a_dead_layer_that_is_frozen_as_its_page_advises_is_told_of_no_more(passive, resume):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    optimizer, sink = torch.optim.SGD(model.parameters(), lr=0.01), MemorySink()
    loss = lambda model, batch: (model(batch) - 1).square().mean()  # noqa: E731

    def watch():
        options = {"metrics": ["grad_norm", "update_ratio"], "schedule": every(1), "alerts": [DeadLayer()]}
        return Monitor(model, optimizer, None if passive else loss, layers=True, sinks=sink, **options)

    monitor = watch()
    for step in range(8):
        if step == 5:
            model[0].requires_grad_(False)
            if resume:
                state = monitor.state_dict()
                monitor.close()
                monitor = watch()
                monitor.load_state_dict(state)
        batch = torch.randn(8, 3)
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        monitor.step(batch)
    monitor.flush()
    changes = [(alert.layer, alert.state, alert.step) for alert in sink.alerts if alert.rule == "dead_layer"]
    assert changes == [("0", "firing", 3), ("0", "resolved", 6)]
    assert not monitor.alerts
    gone = [(r.name, r.step) for r in sink.readings if r.layer == "0" and math.isnan(r.value)]
    assert sorted(gone) == [("grad_norm", 6), ("update_ratio", 6)]
    assert {r.reason for r in sink.readings if r.layer == "0" and r.step > 5} == {"the layer is not trained any more"}
    monitor.close()
