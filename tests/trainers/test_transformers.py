"""The Trainer of Hugging Face's transformers."""

import logging

import pytest
import torch
from torch import nn

from gradmon import every
from gradmon.perturbations.weights import Krylov
from gradmon.sinks import MemorySink
from tests.trainers.common import (
    CLIP,
    EXAMPLES,
    Reference,
    assert_equal,
    assert_same_readings,
    random_states,
    seed,
    series,
)
from tests.trainers.transformers_trainings import (
    LENGTH,
    MARKS,
    VOCABULARY,
    InOrder,
    Tiny,
    batches,
    hf,
    language_model,
    own_loss,
    stacked,
    texts,
    trainer_of,
)

pytestmark = MARKS


def transformer(dropout):
    seed(7)
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, attn_implementation="eager",
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


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


class Deaf(Tiny):
    """Takes the mean over its own rows, whatever it is told, as the library's classifiers do."""

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        return super().forward(input_ids, labels, **kwargs)


@pytest.mark.parametrize("attached", [False, True])
def test_a_model_that_ignores_how_many_items_there_are_is_weighed_as_it_is_trained(watching, tmp_path, attached):
    sink = MemorySink()
    seed(7)
    trainer = trainer_of(tmp_path, model=Deaf().double(), gradient_accumulation_steps=2, per_device_train_batch_size=4)
    options = {"sinks": sink, "schedule": every(1), "join": True}
    if attached:
        watching.attach(trainer, **options)
    else:
        trainer.add_callback(watching.GradmonCallback(**options))
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
