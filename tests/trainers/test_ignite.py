"""PyTorch-Ignite."""

import importlib
import socket

import pytest
import torch
from torch import nn

from gradmon import ArgumentError, every
from gradmon.perturbations.weights import Krylov
from gradmon.sinks import MemorySink
from tests.trainers.common import (
    CLIP,
    EXAMPLES,
    EndSink,
    Reference,
    assert_equal,
    assert_same_readings,
    batches,
    hooks_on,
    momentum,
    mse,
    network,
    random_states,
    seed,
    series,
)

engines = pytest.importorskip("ignite.engine")
MSE = nn.MSELoss()

pytestmark = [
    # What ignite uses of other packages.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def watching():
    return importlib.import_module("gradmon_integrations.callbacks.ignite").GradmonHandler


def engine_of(model, optimizer, *, clip=CLIP, every_=1, loss=mse):
    """An engine that clips."""

    def update(engine, batch):
        if (engine.state.iteration - 1) % every_ == 0:
            optimizer.zero_grad()
        model.train()
        value = loss(model, batch)
        (value / every_).backward()
        if engine.state.iteration % every_ == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return value.item()

    return engines.Engine(update)


def begin():
    model = network()
    return model, momentum(model.parameters())


def test_the_readings_are_those_of_a_plain_loop_and_before_clipping(watching):
    sink, (model, optimizer) = MemorySink(), begin()
    options = {"schedule": every(1), "metrics": "all", "layers": True}
    watch = watching(model, optimizer, MSE, sinks=sink, **options)
    engine = engine_of(model, optimizer)
    watch.attach(engine)
    engine.run(batches(), max_epochs=1)
    plain = Reference(batches(), clip=CLIP, **options)
    assert_same_readings(sink.readings, plain.readings)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert min(plain.norms) > 10 * CLIP
    assert series(sink.readings, "update_ratio") == pytest.approx(plain.ratios, rel=1e-9)
    assert not watch.monitor.failures
    assert_equal(model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("join", [False, True])
def test_the_micro_batches_of_a_step_are_one_batch(watching, join):
    sink, (model, optimizer) = MemorySink(), begin()
    options = {"schedule": every(1), "weights": Krylov()}
    engine = engine_of(model, optimizer, every_=4)
    watching(model, optimizer, MSE, sinks=sink, gradient_accumulation_steps=4, join=join, **options).attach(engine)
    engine.run(batches(2), max_epochs=1)
    plain = Reference(batches(), clip=CLIP, **options)
    assert_same_readings(sink.readings, plain.readings, without=frozenset() if join else EXAMPLES)
    assert series(sink.readings, "batch_size") == [8.0] * 4


def test_the_librarys_own_trainer_is_the_same_to_the_last_bit(watching):
    def train(watched):
        seed(5)
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        trainer = engines.create_supervised_trainer(model, optimizer, MSE, gradient_accumulation_steps=2)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)
        trainer.add_event_handler(engines.Events.ITERATION_COMPLETED(every=2), lambda: warm.step())
        losses = []
        trainer.add_event_handler(engines.Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output))
        evaluator = engines.create_supervised_evaluator(model)
        trainer.add_event_handler(
            engines.Events.ITERATION_COMPLETED(every=3), lambda: evaluator.run(batches(dtype=torch.float32))
        )
        sink = MemorySink()
        if watched:
            watch = watching(
                model, optimizer, MSE, gradient_accumulation_steps=2, sinks=sink, schedule=every(1), metrics="all"
            ).attach(trainer)
        seed(6)
        trainer.run(batches(4, dtype=torch.float32), max_epochs=2)
        if watched:
            assert watch.monitor.steps == 8
            assert not watch.monitor.failures
            rates = series(sink.readings, "learning_rate")
            assert rates[0] == pytest.approx(0.01 / 3)  # that of the step, not of the next one
        return model.state_dict(), optimizer.state_dict(), random_states(), losses

    assert_equal(train(True), train(False))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_a_loss_gradients_are_read_before_clipping(watching, accumulation):
    sink, (model, optimizer) = MemorySink(), begin()
    options = {"schedule": every(1), "mask": None}
    engine = engine_of(model, optimizer, every_=accumulation)
    watching(model, optimizer, gradient_accumulation_steps=accumulation, sinks=sink, **options).attach(engine)
    engine.run(batches(8 // accumulation), max_epochs=1)
    plain = Reference(batches(), clip=CLIP, **options)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert series(sink.readings, "update_ratio") == pytest.approx(plain.ratios, rel=1e-9)
    active = {(r.name, r.step): r.value for r in plain.readings}
    compared = [r for r in sink.readings if r.name in ("gradient_rank", "gradient_coherence", "step_condition")]
    assert len(compared) == 11
    for reading in compared:
        assert reading.value == pytest.approx(active[reading.name, reading.step], rel=1e-6), reading


def test_a_loss_of_ones_own_and_what_it_takes(watching):
    sink, (model, optimizer) = MemorySink(), begin()
    engine = engine_of(model, optimizer)
    watch = watching(
        model,
        optimizer,
        loss=lambda model, batch: mse(model, (batch["x"], batch["target"])),
        batch=lambda batch: {"x": batch[0], "target": batch[1]},
        sinks=sink,
        schedule=every(1),
    )
    watch.attach(engine)
    engine.run(batches(), max_epochs=1)
    assert_same_readings(sink.readings, Reference(batches(), clip=CLIP, schedule=every(1)).readings)


def test_a_step_that_a_scaler_leaves_out_is_seen_and_one_that_was_never_meant_is_not(watching):
    def run(**options):
        sink, (model, optimizer) = MemorySink(), begin()

        def update(engine, batch):
            optimizer.zero_grad()
            loss = mse(model, batch) * (float("inf") if engine.state.iteration == 2 else 1.0)
            loss.backward()
            if engine.state.iteration != 2:
                optimizer.step()

        seen = []

        def loss(model, batch):
            seen.append(batch)
            return mse(model, batch) * (float("inf") if torch.equal(batch[0], batches()[1][0]) else 1.0)

        engine = engines.Engine(update)
        watch = watching(model, optimizer, loss=loss, sinks=sink, schedule=every(1), **options).attach(engine)
        engine.run(batches(), max_epochs=1)
        return sink, watch.monitor

    sink, monitor = run(scaled=True)
    assert monitor.steps == 4
    bad = next(r for r in sink.readings if r.name == "grad_norm" and r.step == 2)
    assert bad.reason == "non-finite gradient"
    sink, monitor = run()
    assert monitor.steps == 3
    assert all(r.reason is None for r in sink.readings if r.name == "grad_norm")


def test_a_resumed_run_reads_what_an_uninterrupted_one_reads(watching, tmp_path):
    def parts():
        sink, (model, optimizer) = MemorySink(), begin()
        engine = engine_of(model, optimizer)
        watch = watching(model, optimizer, MSE, sinks=sink, schedule=every(1)).attach(engine)
        return sink, engine, {"model": model, "optimizer": optimizer, "engine": engine, "gradmon": watch}

    _, engine, held = parts()
    saved = {}

    def save(_):
        saved.update({name: part.state_dict() for name, part in held.items()})

    engine.add_event_handler(engines.Events.EPOCH_COMPLETED, save)
    engine.run(batches(), max_epochs=1)
    torch.save(saved, tmp_path / "saved.pt")
    sink, engine, held = parts()
    for name, state in torch.load(tmp_path / "saved.pt", weights_only=True).items():
        held[name].load_state_dict(state)
    engine.run(batches(), max_epochs=2)
    whole, engine, _ = parts()
    engine.run(batches(), max_epochs=2)
    resumed = [r for r in sink.readings if r.step > 4]
    assert_same_readings(resumed, [r for r in whole.readings if r.step > 4], relative=0)


def failing(batch_number):
    def loss(model, batch):
        if torch.equal(batch[0], batches()[batch_number][0]):
            raise ValueError("in the update")
        return mse(model, batch)

    return loss


def test_an_exception_goes_on_and_leaves_nothing_behind(watching):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    end, (model, optimizer) = EndSink(), begin()
    engine = engine_of(model, optimizer, loss=failing(2))
    for sinks in ([end, f"prometheus:{port}"], None):  # two of them, neither of which keeps the exception
        watching(model, optimizer, MSE, sinks=sinks, schedule=every(1)).attach(engine)
    with pytest.raises(ValueError, match="in the update"):
        engine.run(batches(), max_epochs=1)
    assert end.ends == [False]
    assert end.closed == 1
    assert hooks_on(model, optimizer) == 0
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_an_exception_that_somebody_else_handles_is_left_to_them(watching):
    end, (model, optimizer) = EndSink(), begin()
    engine = engine_of(model, optimizer, loss=failing(2))
    heard = []
    watching(model, optimizer, MSE, sinks=end, schedule=every(1)).attach(engine)
    engine.add_event_handler(engines.Events.EXCEPTION_RAISED, lambda _, error: heard.append(error))
    engine.run(batches(), max_epochs=1)
    assert isinstance(heard[0], ValueError)
    assert end.ends == [False]


def test_an_engine_may_run_again(watching):
    sinks = []

    def made(run):
        sinks.append(EndSink())
        return sinks[-1]

    model, optimizer = begin()
    engine = engine_of(model, optimizer)
    watching(model, optimizer, MSE, sinks=made, schedule=every(1)).attach(engine)
    engine.run(batches(), max_epochs=1)
    assert hooks_on(model, optimizer) == 0
    engine.run(batches(), max_epochs=2)  # goes on
    engine.state.max_epochs = None
    engine.run(batches(), max_epochs=1)  # begins anew
    assert [sink.ends for sink in sinks] == [[True]] * 3
    assert [{r.step for r in sink.readings} for sink in sinks] == [{1, 2, 3, 4}, {5, 6, 7, 8}, {1, 2, 3, 4}]


def test_a_critical_alert_terminates_the_engine(watching):
    model, optimizer = begin()

    def breaks(model, batch):
        return mse(model, batch) * (float("nan") if torch.equal(batch[0], batches()[2][0]) else 1.0)

    engine = engine_of(model, optimizer, loss=breaks)
    watching(model, optimizer, loss=breaks, schedule=every(1), on_alert="stop").attach(engine)
    engine.run(batches(), max_epochs=3)
    assert engine.state.iteration == 3


def test_a_run_that_is_terminated_without_a_word_ends(watching):
    end, (model, optimizer) = EndSink(), begin()
    engine = engine_of(model, optimizer)
    watching(model, optimizer, MSE, sinks=end, schedule=every(1)).attach(engine)
    engine.add_event_handler(engines.Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate(skip_completed=True))
    engine.run(batches(), max_epochs=1)
    assert engine.state.iteration == 2
    assert end.ends == [True]
    assert hooks_on(model, optimizer) == 0


def test_a_run_that_is_interrupted_goes_on(watching):
    end, (model, optimizer) = EndSink(), begin()
    engine = engine_of(model, optimizer)
    watching(model, optimizer, MSE, sinks=end, schedule=every(1)).attach(engine)
    engine.add_event_handler(engines.Events.ITERATION_COMPLETED(once=2), lambda e: e.interrupt())
    engine.run(batches(), max_epochs=1)
    assert end.ends == []
    engine.run(batches(), max_epochs=1)
    assert end.ends == [True]
    assert_same_readings(end.readings, Reference(batches(), clip=CLIP, schedule=every(1)).readings)


def test_readings_go_to_the_engines_metrics_when_asked(watching):
    def metrics(log):
        model, optimizer = begin()
        engine = engine_of(model, optimizer)
        watching(model, optimizer, MSE, schedule=every(2), metrics=["grad_norm"], log=log).attach(engine)
        engine.run(batches(), max_epochs=1)
        return engine.state.metrics

    assert metrics(False) == {}
    plain = Reference(batches(), clip=CLIP, schedule=every(2))
    assert metrics(True)["gradmon/grad_norm"] == pytest.approx(plain.norms[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": 3}, "`loss_fn` must be callable, or None. Got 3."),
        ({"loss": mse}, "`loss` must be None beside `loss_fn`"),
        ({"batch": 3}, "`batch` must be callable, or None. Got 3."),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be an integer of at least 1. Got 0."),
        ({"join": 1}, "`join` must be True or False. Got 1."),
        ({"log": 0}, "`log` must be True or False. Got 0."),
        ({"scaled": 0}, "`scaled` must be True or False. Got 0."),
        ({"every": 5}, "`every` must be among .*schedule.* Got another name."),
    ],
)
def test_arguments_are_checked_at_once(watching, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        watching(*begin(), **{"loss_fn": MSE, **arguments})


def test_there_is_no_monitor_before_the_run(watching):
    with pytest.raises(ArgumentError, match="`monitor` must be asked for when the engine runs"):
        watching(*begin(), MSE).monitor  # noqa: B018
