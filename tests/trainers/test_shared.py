"""What the callbacks share; no trainer is needed."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import SGD

from gradmon import ArgumentError, GradmonError, Monitor, Reading, every, measure
from gradmon.sinks import MemorySink
from gradmon_integrations.callbacks._accumulation import Accumulated, MicroBatch, accumulating, gathered
from gradmon_integrations.callbacks._forwarding import Forwarding
from gradmon_integrations.callbacks._frameworks import framework
from gradmon_integrations.callbacks._options import Options, check_choice, checked, opened
from gradmon_integrations.callbacks._parts import Part, name_of, trained_by
from gradmon_integrations.callbacks._session import Session
from tests.trainers.common import CLIP, Reference, batches, flat, momentum, mse, network, series

SEVERAL = (
    "single examples are not looked at in several micro-batches: join=True takes them together"
    " where they are of one shape and their losses add up"
)


def test_a_missing_trainer_says_what_to_install():
    with pytest.raises(GradmonError, match=r'needs no_such_trainer .*: pip install "gradmon\[lightning\]"'):
        framework("no_such_trainer", "lightning")


@pytest.mark.parametrize("name", ["lightning", "transformers", "accelerate", "ignite"])
def test_each_callback_says_so(name):
    hidden = "for hidden in ('lightning', 'pytorch_lightning', 'transformers', 'accelerate', 'ignite'):\n"
    code = (
        f"import sys\n{hidden}    sys.modules[hidden] = None\n"
        f"try:\n    import gradmon_integrations.callbacks.{name}\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("GradmonError This callback needs")
    assert f'pip install "gradmon[{name}]"' in done.stdout


def test_no_callback_is_imported_by_another():
    trainers = "{'lightning', 'pytorch_lightning', 'transformers', 'accelerate', 'ignite'}"
    code = f"import sys, gradmon_integrations.callbacks; print({trainers} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_options_are_those_of_the_monitor():
    import inspect

    taken = set(inspect.signature(Monitor).parameters) - {"model", "optimizer", "loss"}
    assert set(Options.__annotations__) == taken


def test_unknown_options_are_refused():
    assert checked({"seed": 3}) == {"seed": 3}
    with pytest.raises(ArgumentError, match=r"`sed` must be among .*seed"):
        checked({"sed": 3})


def test_a_switch_is_a_switch():
    check_choice("log", True)
    with pytest.raises(ArgumentError, match="`log` must be True or False"):
        check_choice("log", 1)


def test_sinks_may_be_made_for_each_run():
    sink = MemorySink()
    assert opened(None, "a") == []
    assert opened(sink, "a") == [sink]
    assert opened("memory", "a") == ["memory"]
    assert opened([sink, "memory"], "a") == [sink, "memory"]
    assert opened(lambda run: f"jsonl:{run}.jsonl", "a") == ["jsonl:a.jsonl"]
    assert opened(lambda run: None, "a") == []


def test_one_batch_is_taken_as_it_is():
    batch = batches()[0]
    assert gathered([MicroBatch(batch, 1.0)]) is batch
    half = gathered([MicroBatch(batch, 0.5)])
    assert isinstance(half, Accumulated)
    assert torch.equal(accumulating(mse)(network(), half), 0.5 * mse(network(), batch))


def gradient(model, loss):
    return flat(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize(("join", "twice"), [(False, False), (False, True), (True, False)])
def test_the_loss_of_several_is_their_weighted_sum(join, twice):
    model, data = network(), batches(4)[:3]
    whole = gathered([MicroBatch(batch, 0.25) for batch in data], join=join)
    found = accumulating(mse, twice=twice)(model, whole)
    expected = sum(0.25 * mse(model, batch) for batch in data)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(model, found), gradient(model, expected), rtol=1e-10, atol=1e-14)
    assert len(whole.examples) == 12


def test_the_shares_of_a_step_are_joined_as_shares():
    def share(model, batch):
        return (model(batch["x"]) - batch["target"]).square().sum() / batch["count"]

    data = [{"x": x, "target": target, "count": torch.tensor(24.0)} for x, target in batches(4)[:3]]
    model = network()
    parts = [MicroBatch(batch, 1.0, "share") for batch in data]
    joined, apart = gathered(parts, join=True), gathered(parts)
    assert torch.equal(joined["x"], torch.cat([batch["x"] for batch in data]))
    torch.testing.assert_close(share(model, joined), accumulating(share)(model, apart), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "parts",
    [
        [MicroBatch(batches(4)[0], 0.5), MicroBatch(batches(4)[1], 0.25)],
        [MicroBatch(batches(4)[0], 0.5), MicroBatch(batches(2)[1], 0.5)],
        [MicroBatch((torch.ones(2, 3),), 0.5), MicroBatch((torch.ones(2, 4),), 0.5)],
        [MicroBatch((torch.ones(2, 3), torch.ones(1)), 0.5), MicroBatch((torch.ones(2, 3), torch.zeros(1)), 0.5)],
        [MicroBatch((torch.ones(2),), 0.5), MicroBatch((torch.ones(2), torch.ones(2)), 0.5)],
        [MicroBatch(batch, 0.5, "unknown") for batch in batches(4)[:2]],
        [MicroBatch("no tensor", 0.5)] * 2,
    ],
)
def test_what_cannot_be_joined_stays_apart(parts):
    found = gathered(parts, join=True)
    assert [part.weight for part in found.parts] == [part.weight for part in parts]


def test_several_losses_for_each_example_are_reduced_before_they_are_weighed():
    def rows(model, batch):
        return (model(batch[0]) - batch[1]).square().mean(1)

    model, parts = network(), [MicroBatch(batch, 0.5) for batch in batches(4)[:2]]
    found = accumulating(rows)(model, gathered(parts))
    torch.testing.assert_close(found, 0.5 * sum(mse(model, part.batch) for part in parts))
    found = accumulating(rows, "sum")(model, gathered(parts))
    torch.testing.assert_close(found, 2.0 * sum(mse(model, part.batch) for part in parts))


def test_a_batch_that_is_overwritten_is_whole_again_for_the_pass_that_is_made_again():
    def loss(model, batch):
        batch["x"].mul_(2)
        return mse(model, (batch["x"], batch.pop("target")))

    model, data = network(), batches(4)[:2]
    whole = gathered([MicroBatch({"x": x.clone(), "target": target}, 0.5) for x, target in data])
    expected = sum(0.5 * mse(model, (2 * x, target)) for x, target in data)
    found = accumulating(loss, twice=True)(model, whole)
    torch.testing.assert_close(gradient(model, found), gradient(model, expected))


def test_a_parameter_that_some_micro_batches_use_and_one_that_none_does():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = network(), network(), network()

    def loss(model, batch):
        return mse(model.first if batch[0][0, 0] > 0 else model.second, batch)

    model = Choosing()
    data = [*batches(2)[:4], batches(2)[0]]
    assert {bool(batch[0][0, 0] > 0) for batch in data} == {True, False}
    whole = gathered([MicroBatch(batch, 0.2) for batch in data])
    found = torch.autograd.grad(accumulating(loss)(model, whole), list(model.parameters()), allow_unused=True)
    expected = sum(0.2 * loss(model, batch) for batch in data)
    expected = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    assert found[-1] is None


def test_exact_products_go_through_micro_batches():
    def measured(batch, loss):
        model = network()
        optimizer = momentum(model.parameters())
        wanted = ["weight_condition", "sharpness", "step_ratio"]
        options = {"metrics": wanted, "optimizer": optimizer, "derivative": "exact"}
        return {name: reading.value for name, reading in measure(model, loss, batch, **options).items()}

    whole = batches(8)[0]
    parts = [MicroBatch(part, 0.5) for part in zip(whole[0].chunk(2), whole[1].chunk(2), strict=True)]
    found = measured(gathered(parts), accumulating(mse, twice=True))
    assert found == pytest.approx(measured(whole, mse), rel=1e-9)


@pytest.mark.parametrize(("count", "join"), [(1, False), (4, False), (4, True)])
def test_a_probe_makes_no_more_passes_where_gradients_are_accumulated(count, join):
    model, made = network(), []

    def loss(model, batch):
        made.append(len(batch[0]))
        return mse(model, batch)

    optimizer = momentum(model.parameters())
    session = Session(model, optimizer, loss, {"schedule": every(2), "alerts": None}, join=join)
    for batch in [*batches(), *batches()]:
        for part in zip(batch[0].chunk(count), batch[1].chunk(count), strict=True):
            mse(model, part).backward()
            session.add(part, 1 / count)
        optimizer.step()
        optimizer.zero_grad()
        session.stepped()
    session.close()
    assert not session.monitor.failures
    assert sum(made) / 8 <= 4 * 5 + 10  # of which the first probe may make some more, to find things out
    reading = session.monitor.readings["gradient_rank"]
    assert reading.reason == (None if count == 1 or join else SEVERAL)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        self.second = nn.Linear(2, 1)
        self.scale = nn.Parameter(torch.ones(1))


def test_an_optimizer_that_trains_everything_has_the_model_itself():
    model = Pair()
    assert trained_by(model, SGD(model.parameters(), lr=1)) is model
    assert name_of(model, 3) == "optimizer3"


def test_the_part_of_an_optimizer_keeps_modules_and_names():
    model = Pair()
    part = trained_by(model, SGD([*model.first.parameters()], lr=1))
    assert isinstance(part, Part)
    assert part.first is model.first
    assert [name for name, _ in part.named_parameters()] == [
        "first.0.weight",
        "first.0.bias",
        "first.1.weight",
        "first.1.bias",
    ]
    assert name_of(part, 0) == "first"
    mixed = trained_by(model, SGD([model.scale, model.first[1].bias, *model.second.parameters()], lr=1))
    assert [name for name, _ in mixed.named_parameters()] == ["scale", "first.1.bias", "second.weight", "second.bias"]
    assert mixed.second is model.second
    assert name_of(mixed, 1) == "optimizer1"


def test_readings_are_handed_on_step_by_step():
    seen = []
    sink = Forwarding(lambda numbers, step: seen.append((step, numbers)), "own")
    sink.write(
        [
            Reading("loss", 1.0, 4),
            Reading("step_condition", 2.0, 3),
            Reading("grad_norm", 0.5, 4, layer="0"),
            Reading("noise_scale", float("inf"), 4),
            Reading("outside", 1.0, None),
        ]
    )
    assert seen == [(3, {"own/step_condition": 2.0}), (4, {"own/loss": 1.0, "own/grad_norm/0": 0.5})]


def passive(data, *, clip, tell, accumulate=1, closure=False):
    """A plain loop that clips, with a monitor without a loss."""
    model, sink = network(), MemorySink()
    optimizer = momentum(model.parameters())

    def step(monitor, batch):
        for part in zip(batch[0].chunk(accumulate), batch[1].chunk(accumulate), strict=True):
            (mse(model, part) / accumulate).backward()
            if tell:
                monitor.before_clipping()
        nn.utils.clip_grad_norm_(model.parameters(), clip)

    with Monitor(model, optimizer, sinks=sink, schedule=every(2), mask=None) as monitor:
        for batch in data:
            optimizer.zero_grad()
            if closure:
                optimizer.step(lambda b=batch: step(monitor, b))
            else:
                step(monitor, batch)
                optimizer.step()
            assert monitor.wants_batch == (monitor.steps in (1, 2, 3))
            monitor.step(batch if monitor.wants_batch else None)
        assert not monitor.failures
    return sink.readings


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"closure": True}])
def test_a_monitor_without_a_loss_can_be_told_before_clipping(options):
    plain = Reference(batches(), clip=CLIP, schedule=every(2), mask=None)
    told = passive(batches(), clip=CLIP, tell=True, **options)
    assert series(told, "grad_norm") == pytest.approx([plain.norms[1], plain.norms[3]], rel=1e-12)
    assert series(told, "update_ratio") == pytest.approx([plain.ratios[1], plain.ratios[3]], rel=1e-9)
    assert series(told, "step_condition") == pytest.approx(series(plain.readings, "step_condition"), rel=1e-9)
    untold = passive(batches(), clip=CLIP, tell=False, **options)
    assert series(untold, "grad_norm") == pytest.approx([CLIP, CLIP], rel=1e-3)


def test_alerts_are_logged_above_progress_bars():
    code = """if True:
        import sys, torch, tqdm
        from gradmon import every
        from gradmon_integrations.callbacks._session import Session
        from tests.trainers.common import batches, mse, network
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session = Session(model, optimizer, mse, {"schedule": every(1), "metrics": ["update_ratio"]})
        for batch in tqdm.tqdm(batches() * 2, desc="bar", mininterval=0, ncols=60):
            optimizer.zero_grad()
            mse(model, batch).backward()
            optimizer.step()
            session.add(batch)
            session.stepped()
        session.close()
        import logging
        print(logging.getLogger("gradmon").handlers)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    screen, bare = pyte_screen(done.stderr.decode()), done.stdout.decode().strip()
    assert bare == "[]"
    assert screen[-1].startswith("bar: 100%")
    alerts = [line for line in screen if "update_ratio_out_of_range firing" in line]
    assert len(alerts) == 1
    assert alerts[0].startswith("run: step 2:")
    assert sum(line.startswith("bar:") for line in screen) == 1


def pyte_screen(text):
    """The lines that a terminal would show."""
    pyte = pytest.importorskip("pyte")
    screen = pyte.Screen(400, 30)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display if line.strip()]
