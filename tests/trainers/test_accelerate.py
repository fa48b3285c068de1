"""A loop that uses Hugging Face's accelerate."""

import importlib

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
    examples,
    flat,
    hooks_on,
    momentum,
    mse,
    network,
    random_states,
    seed,
    series,
)

accelerate = pytest.importorskip("accelerate")

pytestmark = [
    # What accelerate uses of other packages.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def watching():
    return importlib.import_module("gradmon_integrations.callbacks.accelerate")


@pytest.fixture(autouse=True)
def _alone():
    """Accelerators share what they know of the machine, their precision among it."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Prepared:
    """An accelerator, and what it has prepared."""

    def __init__(
        self, *, size=8, count=32, model=None, optimizer=momentum, shuffle=False, dtype=torch.float64, **options
    ):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.raw = network() if model is None else model
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*examples(count, dtype)), batch_size=size, shuffle=shuffle
        )
        self.taking = optimizer(self.raw.parameters())
        self.model, self.optimizer, self.loader = self.accelerator.prepare(self.raw, self.taking, loader)

    def train(self, watch=None, *, clip=CLIP, loss=mse, until=None, scheduler=None):
        for number, batch in enumerate(self.loader):
            if number == until:
                break
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss(self.model, batch))
                if self.accelerator.sync_gradients and clip is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                if watch is not None:
                    watch.step(batch)
                if scheduler is not None:
                    scheduler.step()
                self.optimizer.zero_grad()
            if self.accelerator.check_trigger():
                break


def test_the_readings_are_those_of_a_plain_loop_and_before_clipping(watching):
    sink, it = MemorySink(), Prepared()
    options = {"schedule": every(1), "metrics": "all", "layers": True}
    with watching.monitor(it.accelerator, it.model, it.optimizer, mse, sinks=sink, **options) as watch:
        it.train(watch)
    plain = Reference(batches(), clip=CLIP, **options)
    assert_same_readings(sink.readings, plain.readings)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert min(plain.norms) > 10 * CLIP
    assert series(sink.readings, "update_ratio") == pytest.approx(plain.ratios, rel=1e-9)
    assert not watch.monitor.failures
    assert_equal(it.raw.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("join", [False, True])
def test_the_micro_batches_of_a_step_are_one_batch(watching, join):
    sink, it = MemorySink(), Prepared(size=2, gradient_accumulation_steps=4)
    options = {"schedule": every(1), "weights": Krylov()}
    with watching.monitor(it.accelerator, it.model, it.optimizer, mse, sinks=sink, join=join, **options) as watch:
        it.train(watch)
    plain = Reference(batches(), clip=CLIP, **options)
    assert_same_readings(sink.readings, plain.readings, without=frozenset() if join else EXAMPLES)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert series(sink.readings, "batch_size") == [8.0] * 4


def test_a_last_step_of_fewer_micro_batches_weighs_them_as_accelerate_does(watching):
    sink, it = MemorySink(), Prepared(size=4, count=24, gradient_accumulation_steps=4)
    with watching.monitor(it.accelerator, it.model, it.optimizer, mse, sinks=sink, schedule=every(1)) as watch:
        it.train(watch, clip=None)
    plain, found = network(), []
    optimizer = momentum(plain.parameters())
    for whole in (batches(4, 24)[:4], batches(4, 24)[4:]):
        optimizer.zero_grad()
        for batch in whole:
            (mse(plain, batch) / 4).backward()
        found.append(float(flat([p.grad for p in plain.parameters()]).norm()))
        optimizer.step()
    assert series(sink.readings, "grad_norm") == pytest.approx(found, rel=1e-9)
    assert series(sink.readings, "batch_size") == [16.0, 8.0]


def test_training_is_the_same_to_the_last_bit(watching):
    def train(watched):
        seed(5)
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
        it = Prepared(
            size=4, model=model, shuffle=True, gradient_accumulation_steps=2, dtype=torch.float32,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        )  # fmt: skip
        warm = it.accelerator.prepare(torch.optim.lr_scheduler.LinearLR(it.taking, total_iters=4))
        seed(6)
        watch = None
        if watched:
            watch = watching.monitor(it.accelerator, it.model, it.optimizer, mse, schedule=every(1), metrics="all")
        for _ in range(2):
            it.train(watch, clip=0.5, scheduler=warm)
        if watch is not None:
            watch.close()
            assert watch.monitor.steps == 8
            assert not watch.monitor.failures
        return it.raw.state_dict(), it.taking.state_dict(), warm.state_dict(), random_states()

    assert_equal(train(True), train(False))


def test_the_monitors_own_passes_are_not_in_low_precision(watching):
    sink = MemorySink()
    it = Prepared(model=network(torch.float32), dtype=torch.float32, mixed_precision="bf16")
    with watching.monitor(it.accelerator, it.model, it.optimizer, mse, sinks=sink, schedule=every(1)) as watch:
        it.train(watch)
    plain = Reference(batches(dtype=torch.float32), model=network(torch.float32), clip=CLIP, schedule=every(1))
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-3)
    assert all(r.reason is None for r in sink.readings if r.name in ("weight_condition", "step_ratio"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_a_loss_gradients_are_read_before_clipping(watching, accumulation):
    sink, it = MemorySink(), Prepared(size=8 // accumulation, gradient_accumulation_steps=accumulation)
    options = {"schedule": every(1), "mask": None}
    with watching.monitor(it.accelerator, it.model, it.optimizer, sinks=sink, **options) as watch:
        it.train(watch)
    plain = Reference(batches(), clip=CLIP, **options)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert series(sink.readings, "update_ratio") == pytest.approx(plain.ratios, rel=1e-9)
    active = {(r.name, r.step): r.value for r in plain.readings}
    compared = [r for r in sink.readings if r.name in ("gradient_rank", "gradient_coherence", "step_condition")]
    assert len(compared) == 11
    for reading in compared:
        assert reading.value == pytest.approx(active[reading.name, reading.step], rel=1e-6), reading


def test_a_resumed_training_reads_what_an_uninterrupted_one_reads(watching, tmp_path):
    def begin():
        sink, it = MemorySink(), Prepared()
        return sink, it, watching.monitor(it.accelerator, it.model, it.optimizer, mse, sinks=sink, schedule=every(1))

    _, it, watch = begin()
    with watch:
        it.train(watch)
        it.accelerator.save_state(str(tmp_path))
    sink, it, watch = begin()
    with watch:
        it.accelerator.load_state(str(tmp_path))
        it.train(watch)
    whole, it, watch = begin()
    with watch:
        it.train(watch)
        it.train(watch)
    resumed = [r for r in sink.readings if r.step > 4]
    assert_same_readings(resumed, [r for r in whole.readings if r.step > 4], relative=0)


def test_an_exception_leaves_nothing_behind(watching):
    end, it = EndSink(), Prepared()

    def fails(model, batch):
        raise ValueError("in the loop")

    with pytest.raises(ValueError, match="in the loop"):  # noqa: PT012, SIM117 - the inner one is what is tested
        with watching.monitor(it.accelerator, it.model, it.optimizer, sinks=end, schedule=every(1)) as watch:
            it.train(watch, until=2)
            it.train(watch, loss=fails)
    assert end.ends == [False]
    assert end.closed == 1
    assert hooks_on(it.raw, it.taking) == 0


def test_a_critical_alert_pulls_the_accelerators_trigger(watching):
    it, seen = Prepared(), []

    def breaks(model, batch):
        seen.append(batch)
        return mse(model, batch) * (float("nan") if len(seen) == 3 else 1.0)

    options = {"schedule": every(1), "on_alert": "stop"}
    with watching.monitor(it.accelerator, it.model, it.optimizer, **options) as watch:
        it.train(watch, loss=breaks)
    assert len(seen) == 3
    assert watch.should_stop


def test_readings_go_to_the_accelerators_trackers_when_asked(watching):
    class Tracker(accelerate.tracking.GeneralTracker):
        name = "remembering"
        requires_logging_directory = False

        def __init__(self):
            super().__init__()
            self.seen = []

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            """Do nothing."""

        def log(self, values, step=None, **_):
            self.seen.append((values, step))

    tracker = Tracker()
    it = Prepared(log_with=tracker)
    it.accelerator.init_trackers("tests")
    options = {"schedule": every(2), "metrics": ["grad_norm"], "log": True}
    with watching.monitor(it.accelerator, it.model, it.optimizer, mse, **options) as watch:
        it.train(watch)
    plain = Reference(batches(), clip=CLIP, schedule=every(2))
    assert [step for _, step in tracker.seen] == [2, 4]
    found = [values["gradmon/grad_norm"] for values, _ in tracker.seen]
    assert found == pytest.approx([plain.norms[1], plain.norms[3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"join": 1}, "`join` must be True or False. Got 1."),
        ({"log": 0}, "`log` must be True or False. Got 0."),
        ({"every": 5}, "`every` must be among .*schedule.* Got another name."),
    ],
)
def test_arguments_are_checked_at_once(watching, arguments, message):
    it = Prepared()
    with pytest.raises(ArgumentError, match=message):
        watching.monitor(it.accelerator, it.model, it.optimizer, mse, **arguments)
