"""The Trainer of Hugging Face's transformers."""

import gc
import importlib
import logging
import socket

import pytest
import torch
from torch import nn

from gradmon import ArgumentError, every
from gradmon.perturbations.weights import Krylov
from gradmon.preflight.verdict import preflight
from gradmon.sinks import MemorySink
from tests.trainers.common import (
    CLIP,
    EXAMPLES,
    EndSink,
    Reference,
    assert_equal,
    assert_same_readings,
    assert_verdict,
    hooks_on,
    momentum,
    random_states,
    seed,
    series,
)

hf = pytest.importorskip("transformers")

pytestmark = [
    # What transformers uses of other packages, and says about small trainings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

VOCABULARY, LENGTH = 13, 6


@pytest.fixture(autouse=True)
def no_precision_of_another_test(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # to which the arguments of a Trainer leave theirs


@pytest.fixture(scope="module")
def watching():
    return importlib.import_module("gradmon_integrations.callbacks.transformers")


class Tiny(nn.Module):
    """A language model all of whose numbers are of one type; the library's own take their losses in float32."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.mixing = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        x = self.embedding(input_ids)
        x = x + torch.tanh(self.mixing(x.cumsum(1)))
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count, "logits": logits}


def language_model():
    seed(7)
    return Tiny().double()


def transformer(dropout):
    seed(7)
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, attn_implementation="eager",
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def texts(count=32, ragged=False):
    """Token sequences; if ragged, the labels of a different part of each count."""
    generator = torch.Generator().manual_seed(8)
    rows = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    found = []
    for number, row in enumerate(rows):
        labels = row.clone()
        labels[0] = -100  # nothing comes before it
        if ragged:
            labels[1 + number % (LENGTH - 1) + 1 :] = -100
        found.append({"input_ids": row, "labels": labels})
    return found


def stacked(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def batches(size=8, **options):
    rows = texts(**options)
    return [stacked(rows[at : at + size]) for at in range(0, len(rows), size)]


def own_loss(model, batch):
    return model(**batch)["loss"]


class InOrder(hf.Trainer):
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(
    tmp_path, callbacks=(), *, model=None, rows=None, kind=InOrder, optimizer=momentum, given=None, **options
):
    model = language_model() if model is None else model
    arguments = hf.TrainingArguments(
        **{
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "max_grad_norm": CLIP,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            **options,
        }
    )
    own = {} if optimizer is None else {"optimizers": (optimizer(model.parameters()), None)}
    trainer = kind(
        model, arguments, train_dataset=texts() if rows is None else rows, data_collator=stacked,
        callbacks=list(callbacks), **own, **(given or {}),
    )  # fmt: skip
    trainer.remove_callback(hf.PrinterCallback)
    return trainer


def test_the_readings_are_those_of_a_plain_loop_and_before_clipping(watching, tmp_path):
    sink = MemorySink()
    watch = watching.GradmonCallback(sinks=sink, schedule=every(1), metrics="all", layers=True)
    trainer = trainer_of(tmp_path, [watch])
    trainer.train()
    plain = Reference(
        batches(), model=language_model(), loss=own_loss, clip=CLIP, schedule=every(1), metrics="all", layers=True
    )
    assert_same_readings(sink.readings, plain.readings)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert min(plain.norms) > 10 * CLIP
    assert series(sink.readings, "update_ratio") == pytest.approx(plain.ratios, rel=1e-9)
    assert not watch.monitor.failures


@pytest.mark.parametrize("join", [False, True])
def test_the_micro_batches_of_a_step_are_one_batch_weighed_by_tokens(watching, tmp_path, join):
    sink = MemorySink()
    watch = watching.GradmonCallback(sinks=sink, schedule=every(1), join=join, weights=Krylov())
    rows = texts(ragged=True)
    trainer_of(
        tmp_path, [watch], rows=rows, per_device_train_batch_size=2, gradient_accumulation_steps=4
    ).train()  # fmt: skip
    plain = Reference(
        batches(ragged=True), model=language_model(), loss=own_loss, clip=CLIP, schedule=every(1), weights=Krylov()
    )
    assert_same_readings(sink.readings, plain.readings, without=EXAMPLES)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert series(sink.readings, "batch_size") == [8.0] * 4
    if join:
        assert_same_readings(
            [r for r in sink.readings if r.name in EXAMPLES], [r for r in plain.readings if r.name in EXAMPLES]
        )


def test_a_model_that_takes_means_is_weighed_by_micro_batches(watching, tmp_path):
    class Means(hf.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

        _get_train_sampler = InOrder._get_train_sampler

    sink = MemorySink()
    watch = watching.GradmonCallback(sinks=sink, schedule=every(1), weights=Krylov())
    rows = texts(count=24)
    trainer_of(
        tmp_path, [watch], rows=rows, kind=Means, per_device_train_batch_size=4, gradient_accumulation_steps=4
    ).train()
    whole = [stacked(rows[:16]), stacked(rows[16:])]  # the last step has two micro-batches
    plain = Reference(whole, model=language_model(), loss=own_loss, clip=CLIP, schedule=every(1), weights=Krylov())
    assert_same_readings(sink.readings, plain.readings, without=EXAMPLES)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)


@pytest.mark.parametrize("options", [{"metrics": "all"}, {"loss": None}])
def test_training_is_the_same_to_the_last_bit(watching, tmp_path, options):
    def train(callbacks):
        model = transformer(dropout=0.2)
        seed(9)
        trainer = trainer_of(
            tmp_path, callbacks, model=model, kind=hf.Trainer, optimizer=None, max_grad_norm=0.5, num_train_epochs=2,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, lr_scheduler_type="linear",
            eval_strategy="steps", eval_steps=3, given={"eval_dataset": texts(8)},
        )  # fmt: skip
        trainer.train()
        logs = [
            {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
            for entry in trainer.state.log_history
        ]
        return model.state_dict(), trainer.optimizer.state_dict(), random_states(), logs

    watch = watching.GradmonCallback(schedule=every(1), **options)
    with_it, without = train([watch]), train([])
    assert_equal(with_it, without)
    assert watch.monitor.steps == 8
    assert not watch.monitor.failures


@pytest.mark.parametrize("attached", [False, True])
def test_the_monitors_own_passes_are_not_in_low_precision(watching, tmp_path, attached):
    sink = MemorySink()
    trainer = trainer_of(tmp_path, model=transformer(dropout=0.0), bf16=True)
    if attached:
        watching.attach(trainer, sinks=sink, schedule=every(1))
    else:
        trainer.add_callback(watching.GradmonCallback(sinks=sink, schedule=every(1)))
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert series(sink.readings, "grad_norm") == pytest.approx(logged, rel=1e-2)
    for name in ("weight_condition", "step_ratio", "step_condition", "gradient_rank"):
        assert all(r.reason is None for r in sink.readings if r.name == name), name
    assert "forward" in vars(trainer.model)  # accelerate's


def test_the_learning_rate_is_that_of_the_step(watching, tmp_path):
    sink = MemorySink()
    watch = watching.GradmonCallback(sinks=sink, schedule=every(1), metrics=["update_ratio"])
    trainer = trainer_of(tmp_path, [watch], optimizer=None, lr_scheduler_type="linear", learning_rate=0.4)
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert series(sink.readings, "learning_rate") == pytest.approx(logged)


class Weighted(InOrder):
    """A Trainer with a loss of its own, which takes the labels out of what it is given."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = weighted(outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss


def weighted(logits, labels):
    weight = torch.linspace(0.5, 2, VOCABULARY, dtype=logits.dtype)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weight)


def test_a_trainer_with_a_loss_of_its_own_is_attached_to(watching, tmp_path):
    sink = MemorySink()
    trainer = trainer_of(tmp_path, kind=Weighted)
    watch = watching.attach(trainer, sinks=sink, schedule=every(1))
    trainer.train()
    plain = Reference(
        batches(),
        model=language_model(),
        loss=lambda model, batch: weighted(model(input_ids=batch["input_ids"])["logits"], batch["labels"]),
        clip=CLIP,
        schedule=every(1),
    )
    assert_same_readings(sink.readings, plain.readings)
    assert not watch.monitor.failures
    assert "compute_loss" not in vars(trainer)


@pytest.mark.parametrize("join", [False, True])
def test_a_loss_that_ignores_how_many_items_there_are_is_weighed_as_the_trainer_does(watching, tmp_path, join):
    sink = MemorySink()
    trainer = trainer_of(tmp_path, kind=Weighted, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    watching.attach(trainer, sinks=sink, schedule=every(1), join=join)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 4
    assert series(sink.readings, "grad_norm") == pytest.approx(logged, rel=1e-6)


def test_a_model_of_the_library_is_seen_as_the_trainer_sees_it(watching, tmp_path):
    sink = MemorySink()
    watch = watching.GradmonCallback(sinks=sink, schedule=every(1))
    trainer = trainer_of(
        tmp_path, [watch], model=transformer(dropout=0.0), rows=texts(ragged=True), gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 4
    assert series(sink.readings, "grad_norm") == pytest.approx(logged, rel=1e-5)


def test_label_smoothing_and_accumulation_as_the_trainer_does_them(watching, tmp_path):
    sink = MemorySink()
    trainer = trainer_of(
        tmp_path, model=transformer(dropout=0.0), rows=texts(ragged=True), label_smoothing_factor=0.2,
        gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    watching.attach(trainer, sinks=sink, schedule=every(1))
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 4
    assert series(sink.readings, "grad_norm") == pytest.approx(logged, rel=1e-5)


def test_a_loss_that_is_not_the_models_is_never_taken_for_it(watching, tmp_path, caplog):
    sink = MemorySink()
    watch = watching.GradmonCallback(sinks=sink, schedule=every(1))
    with caplog.at_level(logging.ERROR, logger="gradmon"):
        trainer_of(tmp_path, [watch], kind=Weighted).train()
    assert sink.readings == []
    assert watch.monitor.failures == {"batch": 4}
    assert "The loss that is trained is not the one that the model returns" in caplog.text


class Twice(InOrder):
    """A Trainer that calls its model twice for a batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs)["loss"] + model(**{**inputs, "input_ids": inputs["input_ids"].flip(0)})["loss"]


class Around(InOrder):
    """A Trainer that calls no more than parts of its model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model.head(model.embedding(inputs["input_ids"]))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Twice, "The model was called 2 times for one batch"), (Around, "No call of the model was seen")],
)
def test_a_loss_that_cannot_be_made_again_from_the_models_calls_says_so(watching, tmp_path, caplog, kind, message):
    sink = MemorySink()
    watch = watching.GradmonCallback(sinks=sink, schedule=every(1))
    trainer_of(tmp_path, [watch], kind=kind).train()
    assert sink.readings == []
    assert watch.monitor.failures == {"batch": 4}
    assert message in caplog.text
    trainer = trainer_of(tmp_path, kind=kind)
    watching.attach(trainer, sinks=sink, schedule=every(1))
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert series(sink.readings, "grad_norm") == pytest.approx(logged, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}])
def test_where_a_scaler_hides_the_weights_they_are_what_the_trainer_does_by_default(watching, tmp_path, options):
    sink = MemorySink()
    trainer = trainer_of(
        tmp_path,
        model=transformer(dropout=0.0),
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        **options,
    )
    trainer.args.fp16 = True  # as far as the callback can see

    def scaled(loss, **kwargs):
        (loss * 128).backward()
        for parameter in trainer.model.parameters():
            if parameter.grad is not None and trainer.accelerator.sync_gradients:
                parameter.grad /= 128

    trainer.accelerator.backward = scaled
    watching.attach(trainer, sinks=sink, schedule=every(1))
    trainer.train()
    plain = trainer_of(
        tmp_path,
        model=transformer(dropout=0.0),
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        **options,
    )
    plain.train()
    logged = [entry["grad_norm"] for entry in plain.state.log_history if "grad_norm" in entry]
    assert series(sink.readings, "grad_norm") == pytest.approx(logged, rel=1e-5)


def test_a_loss_of_ones_own_and_what_it_takes(watching, tmp_path):
    sink = MemorySink()
    watch = watching.GradmonCallback(
        loss=lambda model, batch: model(input_ids=batch[0], labels=batch[1])["loss"],
        batch=lambda given: (given["input_ids"], given["labels"]),
        sinks=sink,
        schedule=every(1),
    )
    trainer_of(tmp_path, [watch]).train()
    plain = Reference(batches(), model=language_model(), loss=own_loss, clip=CLIP, schedule=every(1))
    assert_same_readings(sink.readings, plain.readings)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_a_loss_gradients_are_read_before_clipping(watching, tmp_path, accumulation):
    sink = MemorySink()
    watch = watching.GradmonCallback(loss=None, sinks=sink, schedule=every(1), mask=None)
    trainer_of(
        tmp_path, [watch], gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation
    ).train()
    plain = Reference(batches(), model=language_model(), loss=own_loss, clip=CLIP, schedule=every(1), mask=None)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert series(sink.readings, "update_ratio") == pytest.approx(plain.ratios, rel=1e-9)
    active = {(r.name, r.step): r.value for r in plain.readings}
    compared = [r for r in sink.readings if r.name in ("gradient_coherence", "step_condition")]
    assert len(compared) == 7
    for reading in compared:
        assert reading.value == pytest.approx(active[reading.name, reading.step], rel=1e-6), reading


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
