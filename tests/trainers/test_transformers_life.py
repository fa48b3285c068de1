"""How a training with the Trainer of transformers begins, is resumed, and ends; and what it is asked for."""

import gc
import socket

import pytest
import torch

from gradmon import ArgumentError, every
from gradmon.preflight.verdict import preflight
from gradmon.sinks import MemorySink
from tests.trainers.common import (
    CLIP,
    EndSink,
    Reference,
    assert_equal,
    assert_same_readings,
    assert_verdict,
    hooks_on,
    momentum,
    series,
)
from tests.trainers.transformers_trainings import MARKS, InOrder, batches, language_model, own_loss, texts, trainer_of

pytestmark = MARKS


def test_a_resumed_training_reads_what_an_uninterrupted_one_reads(watching, tmp_path):
    def train(folder, *, resume, epochs):
        sink = MemorySink()
        watch = watching.GradmonCallback(sinks=sink, schedule=every(1))
        trainer = trainer_of(folder, [watch], num_train_epochs=epochs, save_strategy="epoch")
        trainer.train(resume_from_checkpoint=resume)
        return sink.readings

    train(tmp_path / "two", resume=None, epochs=1)
    held = torch.load(tmp_path / "two/checkpoint-4/gradmon.pt", weights_only=True)
    assert held["step"] == 4
    resumed = train(tmp_path / "two", resume=True, epochs=2)
    whole = train(tmp_path / "one", resume=None, epochs=2)
    assert_same_readings([r for r in resumed if r.step > 4], [r for r in whole if r.step > 4], relative=0)


def test_a_checkpoint_without_a_monitor_is_gone_on_with_all_the_same(watching, tmp_path, caplog):
    trainer_of(tmp_path, save_strategy="epoch").train()
    sink = MemorySink()
    watch = watching.GradmonCallback(sinks=sink, schedule=every(1))
    trainer_of(tmp_path, [watch], num_train_epochs=2).train(resume_from_checkpoint=True)
    assert "no gradmon.pt in" in caplog.text
    assert {r.step for r in sink.readings} == {1, 2, 3, 4}


def test_train_may_be_called_again(watching, tmp_path):
    sinks = []

    def made(run):
        sinks.append(EndSink())
        return sinks[-1]

    trainer = trainer_of(tmp_path, [watching.GradmonCallback(sinks=made, schedule=every(1))])
    trainer.train()
    trainer.train()
    assert [sink.ends for sink in sinks] == [[True], [True]]
    assert [series(sink.readings, "batch_size") for sink in sinks] == [[8.0] * 4] * 2


def failing():
    """Rows of which the third batch cannot be collated."""
    rows = texts()
    rows[17] = {"input_ids": rows[17]["input_ids"]}
    return rows


def open_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def assert_free(port):
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_an_exception_leaves_nothing_behind_where_attached(watching, tmp_path):
    end, port = EndSink(), open_port()
    trainer = trainer_of(tmp_path, rows=failing())
    watching.attach(trainer, sinks=lambda run: [end, f"prometheus:{port}"], schedule=every(1))
    with pytest.raises(KeyError, match="labels"):
        trainer.train()
    assert end.ends == [False]
    assert end.closed == 1
    assert hooks_on(trainer.model, trainer.optimizer.optimizer) == 0
    assert_free(port)


def test_an_exception_leaves_nothing_behind_in_a_with_statement(watching, tmp_path):
    end, port = EndSink(), open_port()
    with pytest.raises(KeyError, match="labels"):  # noqa: PT012, SIM117 - the inner one is what is tested
        with watching.GradmonCallback(sinks=[end, f"prometheus:{port}"], schedule=every(1)) as watch:
            trainer = trainer_of(tmp_path, [watch], rows=failing())
            trainer.train()
    assert end.ends == [False]
    assert hooks_on(trainer.model, trainer.optimizer.optimizer) == 0
    assert_free(port)


def test_an_exception_leaves_nothing_behind_with_the_next_training_or_without_the_trainer(watching, tmp_path):
    sinks = []

    def made(run):
        sinks.append(EndSink())
        return sinks[-1]

    def fail(trainer):
        try:
            trainer.train()
        except KeyError:
            return
        raise AssertionError("it should have failed")

    model = language_model()
    optimizer = momentum(model.parameters())
    watch = watching.GradmonCallback(sinks=made, schedule=every(1))
    trainer = trainer_of(tmp_path, [watch], model=model, rows=failing(), optimizer=lambda _: optimizer)
    fail(trainer)
    assert sinks[0].ends == []
    fail(trainer)
    assert sinks[0].ends == [False]
    assert sinks[1].ends == []
    del trainer, watch
    gc.collect()
    assert sinks[1].ends == [False]
    assert hooks_on(model, optimizer) == 0


def test_a_training_leaves_no_hook_behind(watching, tmp_path):
    for options in ({}, {"loss": None}):
        trainer = trainer_of(tmp_path, [watching.GradmonCallback(schedule=every(1), **options)])
        trainer.train()
        assert hooks_on(trainer.model, trainer.optimizer.optimizer) == 0


def test_a_critical_alert_stops_the_training(watching, tmp_path):
    class Breaks(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs)["loss"]
            return loss * float("nan") if self.state.global_step == 2 else loss

    trainer = trainer_of(tmp_path, kind=Breaks, num_train_epochs=5)
    watch = watching.attach(trainer, schedule=every(1), on_alert="stop")
    trainer.train()
    assert trainer.state.global_step == 3
    assert "nonfinite" in [alert.rule for alert in watch.monitor.alerts]


def test_readings_go_to_the_trainers_log_when_asked(watching, tmp_path):
    def logged(log):
        trainer = trainer_of(tmp_path, logging_steps=2)
        watching.attach(trainer, schedule=every(2), log=log, metrics=["grad_norm"])
        trainer.train()
        return trainer.state.log_history

    with_it, without = logged(True), logged(False)
    ours = [entry for entry in with_it if "gradmon/grad_norm" in entry]
    plain = Reference(batches(), model=language_model(), loss=own_loss, clip=CLIP, schedule=every(2))
    assert [entry["step"] for entry in ours] == [2, 4]
    assert [entry["gradmon/grad_norm"] for entry in ours] == pytest.approx([plain.norms[1], plain.norms[3]])
    own = [entry["loss"] for entry in without if "loss" in entry]
    assert [entry["loss"] for entry in with_it if "loss" in entry] == own
    assert len(own) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "other"}, '`loss` must be "trainer", callable as loss'),
        ({"batch": lambda b: b}, "`batch` must be None, or callable with the model's arguments beside a `loss`"),
        ({"join": 1}, "`join` must be True or False. Got 1."),
        ({"log": 0}, "`log` must be True or False. Got 0."),
        ({"log": True}, "`log` must be False without the Trainer that logs"),
        ({"every": 5}, "`every` must be among .*schedule.* Got another name."),
    ],
)
def test_arguments_are_checked_at_once(watching, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        watching.GradmonCallback(**arguments)


def test_there_is_no_monitor_before_the_training(watching):
    with pytest.raises(ArgumentError, match="`monitor` must be asked for when the training has begun"):
        watching.GradmonCallback().monitor  # noqa: B018


def test_nothing_opens_before_the_training(watching):
    port = open_port()
    watching.GradmonCallback(sinks=f"prometheus:{port}")
    assert_free(port)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_verdict_before_the_first_step_is_that_of_a_plain_call(watching, tmp_path, accumulate):
    sink, trained = MemorySink(), []
    watch = watching.GradmonCallback(sinks=sink, schedule=every(1), preflight=True, join=True)
    for callbacks in ([], [watch]):
        trainer = trainer_of(
            tmp_path, callbacks, per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate
        )  # fmt: skip
        trainer.train()
        trained.append(trainer.model.state_dict())
    assert_equal(*trained)
    assert not watch.monitor.failures
    model = language_model()
    found = preflight(model, momentum(model.parameters()), own_loss, batches()[0])
    assert found.risk is not None
    assert_verdict(sink.readings, found)
