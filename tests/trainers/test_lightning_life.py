"""How a training with Lightning begins, is resumed, and ends; and what it is asked for."""

import importlib
import socket

import pytest
import torch

from gradmon import ArgumentError, Monitor, every
from gradmon.sinks import MemorySink
from tests.trainers.common import CLIP, EndSink, Reference, assert_same_readings, batches, hooks_on, mse, series
from tests.trainers.lightning_trainings import MARKS, loader, module_of, trainer_of

pytest.importorskip("lightning")

pytestmark = MARKS


def test_a_resumed_training_reads_what_an_uninterrupted_one_reads(pl, callback, tmp_path):
    def train(epochs, path=None):
        sink = MemorySink()
        trainer = trainer_of(pl, [callback(sinks=sink, schedule=every(1))], tmp_path, max_epochs=epochs)
        trainer.fit(module_of(pl), loader(), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return sink.readings

    train(1)
    held = torch.load(tmp_path / "1.ckpt", weights_only=True)  # nothing but plain types
    assert held["callbacks"]["gradmon[run]"][""]["step"] == 4
    resumed, whole = train(2, tmp_path / "1.ckpt"), train(2)
    assert_same_readings(
        [r for r in resumed if r.step > 4], [r for r in whole if r.step > 4], relative=0, without={"step_share"}
    )


def test_fit_may_be_called_again(pl, callback, tmp_path):
    sinks = []

    def made(run):
        sinks.append(EndSink())
        return sinks[-1]

    watch = callback(sinks=made, schedule=every(1))
    module, trainer = module_of(pl), trainer_of(pl, [watch], tmp_path)
    trainer.fit(module, loader())
    trainer.validate(module_of(pl, validation_step=lambda self, batch, batch_idx: None), loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert [sink.ends for sink in sinks] == [[True], [True]]
    assert [series(sink.readings, "batch_size") for sink in sinks] == [[8.0] * 4] * 2
    assert {r.step for r in sinks[1].readings} == {5, 6, 7, 8}
    trainer_of(pl, [watch], tmp_path).fit(module_of(pl), loader())  # another training
    assert {r.step for r in sinks[2].readings} == {1, 2, 3, 4}


def test_an_exception_leaves_nothing_behind(pl, callback, tmp_path):
    def fails(self, batch, batch_idx):
        if batch_idx == 2:
            raise ValueError("in the training step")
        return mse(self.net, batch)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    end = EndSink()
    watch = callback(sinks=lambda run: [end, f"prometheus:{port}"], schedule=every(1))
    module, trainer = module_of(pl, training_step=fails), trainer_of(pl, [watch], tmp_path)
    with pytest.raises(ValueError, match="in the training step"):
        trainer.fit(module, loader())
    assert end.ends == [False]
    assert end.closed == 1
    assert hooks_on(module, trainer.optimizers[0]) == 0
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_a_training_leaves_no_hook_behind(pl, callback, tmp_path):
    for loss in ("training_step", None):
        module, trainer = module_of(pl), trainer_of(pl, [callback(loss=loss, schedule=every(1))], tmp_path)
        trainer.fit(module, loader())
        assert hooks_on(module, trainer.optimizers[0]) == 0
        assert not {"log", "log_dict", "print"} & set(vars(module))


def test_a_critical_alert_stops_the_training(pl, callback, tmp_path):
    def breaks(self, batch, batch_idx):
        return mse(self.net, batch) * (float("nan") if self.global_step == 3 else 1.0)

    watch = callback(schedule=every(1), on_alert="stop")
    module, trainer = module_of(pl, training_step=breaks), trainer_of(pl, [watch], tmp_path, max_epochs=5)
    trainer.fit(module, loader(size=2))
    assert trainer.global_step == 4
    assert "nonfinite" in [alert.rule for alert in watch.monitor.alerts]


def test_readings_go_to_the_trainers_logger_when_asked(pl, callback, tmp_path):
    logger_class = importlib.import_module(f"{pl.__name__}.loggers").CSVLogger

    class Logged(logger_class):
        def __init__(self):
            super().__init__(tmp_path)
            self.seen = []

        def log_metrics(self, metrics, step=None):
            self.seen.append((dict(metrics), step))

    def seen(log):
        logger = Logged()
        watch = callback(schedule=every(2), log=log, metrics=["grad_norm", "step_condition"])
        trainer_of(pl, [watch], tmp_path, logger=logger).fit(module_of(pl), loader())
        return [(numbers, step) for numbers, step in logger.seen if any("gradmon" in name for name in numbers)]

    assert seen(False) == []
    found = seen(True)
    assert {step for _, step in found} == {1, 3}  # Lightning counts from 0
    assert all(name.startswith("gradmon/") for numbers, _ in found for name in numbers)
    plain = Reference(batches(), schedule=every(2))
    logged = [numbers["gradmon/grad_norm"] for numbers, _ in found if "gradmon/grad_norm" in numbers]
    assert logged == pytest.approx([plain.norms[1], plain.norms[3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "other"}, '`loss` must be "training_step", callable as loss'),
        ({"batch": lambda b: b}, "`batch` must be None, or callable with the trainer's batch beside a `loss`"),
        ({"batch": 3, "loss": None}, "`batch` must be None, or callable"),
        ({"join": 1}, "`join` must be True or False. Got 1."),
        ({"log": None}, "`log` must be True or False. Got None."),
        ({"every": 5}, "`every` must be among .*schedule.* Got another name."),
    ],
)
def test_arguments_are_checked_at_once(callback, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        callback(**arguments)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_training_step_that_takes_its_batches_itself_is_not_made_again(pl, callback, tmp_path):
    taken = []

    def training_step(self, dataloader_iter):
        taken.append(next(dataloader_iter))
        return mse(self.net, taken[-1][0])

    sink = MemorySink()
    watch = callback(sinks=sink, schedule=every(1))
    trainer_of(pl, [watch], tmp_path, gradient_clip_val=CLIP).fit(module_of(pl, training_step=training_step), loader())
    plain = Reference(batches(), clip=CLIP, schedule=every(1))
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert len(taken) == 4
    assert not watch.monitor.failures


def test_a_training_step_that_returns_nothing_the_second_time_says_so(pl, callback, tmp_path):
    def training_step(self, batch, batch_idx):
        self.calls += 1
        return mse(self.net, batch) if self.calls == 1 else {"loss": None} if self.calls < 20 else None

    sink = MemorySink()
    watch = callback(sinks=sink, schedule=every(1))
    module = module_of(pl, training_step=training_step, calls=0)
    trainer_of(pl, [watch], tmp_path, limit_train_batches=1).fit(module, loader())
    reasons = {r.reason for r in sink.readings if r.name == "grad_norm"}
    assert reasons == {"training_step returned no loss when it was made again"}


def test_what_is_made_of_a_batch_may_fail_and_the_training_goes_on(pl, callback, tmp_path):
    sink = MemorySink()
    watch = callback(loss=None, batch=lambda batch: batch["x"], sinks=sink, schedule=every(1))
    trainer = trainer_of(pl, [watch], tmp_path)
    trainer.fit(module_of(pl), loader())
    assert trainer.global_step == 4
    assert watch.monitor.failures == {"batch": 4}
    assert sink.readings == []


def test_only_one_monitor_can_be_the_monitor(callback):
    with pytest.raises(ArgumentError, match="`monitor` must be the only one"):
        callback().monitor  # noqa: B018


def test_gradmon_disabled_does_nothing(pl, callback, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMON_DISABLED", "1")
    sink = MemorySink()
    watch = callback(sinks=sink, schedule=every(1))
    trainer_of(pl, [watch], tmp_path).fit(module_of(pl), loader())
    assert sink.readings == []
    assert isinstance(watch.monitor, Monitor)
