"""Lightning, under both of its names."""

import importlib

import pytest
import torch
from torch import nn

from gradmon import ArgumentError, every
from gradmon.perturbations.weights import Krylov
from gradmon.preflight.verdict import preflight
from gradmon.sinks import MemorySink
from tests.trainers.common import (
    CLIP,
    CLOCK,
    EXAMPLES,
    Reference,
    assert_equal,
    assert_same_readings,
    assert_verdict,
    batches,
    examples,
    flat,
    momentum,
    mse,
    network,
    random_states,
    seed,
    series,
)
from tests.trainers.lightning_trainings import MARKS, loader, module_of, trainer_of

pytest.importorskip("lightning")

pytestmark = MARKS


def test_a_package_that_is_imported_later_takes_the_callback_for_its_own():
    packages = [importlib.import_module(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    module = importlib.import_module("gradmon_integrations.callbacks.lightning")
    for first, later in (packages, packages[::-1]):
        early = type("Early", (first.Callback,), {})
        assert not issubclass(early, later.Callback)
        made = module._for_both(early)
        assert issubclass(made, early)
        assert issubclass(made, later.Callback)
        assert module._for_both(made) is made


def in_module(net_loss):
    return lambda module, batch: net_loss(module.net, batch)


def test_the_readings_are_those_of_a_plain_loop_and_before_clipping(pl, callback, tmp_path):
    sink = MemorySink()
    watch = callback(sinks=sink, schedule=every(1), metrics="all", layers=True)
    module = module_of(pl)
    trainer_of(pl, [watch], tmp_path, gradient_clip_val=CLIP).fit(module, loader())
    plain = Reference(
        batches(), model=module_of(pl), loss=in_module(mse), clip=CLIP, schedule=every(1), metrics="all", layers=True
    )
    assert_same_readings(sink.readings, plain.readings)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert min(plain.norms) > 10 * CLIP
    assert series(sink.readings, "update_ratio") == pytest.approx(plain.ratios, rel=1e-9)
    assert_equal(module.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("join", [False, True])
def test_the_micro_batches_of_a_step_are_one_batch(pl, callback, tmp_path, join):
    sink = MemorySink()
    watch = callback(sinks=sink, schedule=every(1), join=join, weights=Krylov())
    trainer = trainer_of(pl, [watch], tmp_path, gradient_clip_val=CLIP, accumulate_grad_batches=4)
    trainer.fit(module_of(pl), loader(size=2))
    plain = Reference(
        batches(), model=module_of(pl), loss=in_module(mse), clip=CLIP, schedule=every(1), weights=Krylov()
    )
    assert_same_readings(sink.readings, plain.readings, without=frozenset() if join else EXAMPLES)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert series(sink.readings, "batch_size") == [8.0] * 4
    assert all(r.reason for r in sink.readings if r.name in EXAMPLES) or join


@pytest.mark.parametrize("join", [False, True])
def test_a_last_step_of_fewer_micro_batches_weighs_them_as_lightning_does(pl, callback, tmp_path, join):
    sink = MemorySink()
    watch = callback(sinks=sink, schedule=every(1), join=join)
    module = module_of(pl)
    trainer_of(pl, [watch], tmp_path, accumulate_grad_batches=4).fit(module, loader(size=4, count=24))
    plain, optimizer = module_of(pl), None
    optimizer = momentum(plain.parameters())
    norms = []
    for whole in (batches(4, 24)[:4], batches(4, 24)[4:]):
        optimizer.zero_grad()
        for batch in whole:
            (mse(plain.net, batch) / 4).backward()
        norms.append(float(flat([p.grad for p in plain.parameters()]).norm()))
        optimizer.step()
    assert series(sink.readings, "grad_norm") == pytest.approx(norms, rel=1e-9)
    assert series(sink.readings, "batch_size") == [16.0, 8.0]


@pytest.mark.parametrize("options", [{"metrics": "all"}, {"loss": None}])
def test_training_is_the_same_to_the_last_bit(pl, callback, tmp_path, options):
    def model():
        seed(5)
        return nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
        )  # fmt: skip

    def scheduled(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        x, target = batch[0] + 0.1 * torch.randn_like(batch[0]), batch.pop(1)  # takes the target out of the batch
        found = mse(self.net, (x, target))
        self.seen += len(x)
        self.log("train", found, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"seen": float(self.seen)})
        self.logger.log_metrics({"direct": float(found.detach())}, step=batch_idx)
        return {"loss": found, "more": 1}

    def validation_step(self, batch, batch_idx):
        self.log("val", mse(self.net, batch))

    logger_class = importlib.import_module(f"{pl.__name__}.loggers").CSVLogger

    class Logged(logger_class):
        def __init__(self, folder):
            super().__init__(folder)
            self.seen = []

        def log_metrics(self, metrics, step=None):
            self.seen.append((dict(metrics), step))

    def train(callbacks):
        module = module_of(
            pl,
            model(),
            configure_optimizers=scheduled,
            training_step=training_step,
            validation_step=validation_step,
            seen=0,
        )
        logger = Logged(tmp_path)
        trainer = trainer_of(
            pl, callbacks, tmp_path, logger=logger, max_epochs=2, gradient_clip_val=0.5, accumulate_grad_batches=2,
            val_check_interval=2, check_val_every_n_epoch=None,
        )  # fmt: skip
        seed(6)
        data = torch.utils.data.DataLoader(
            loader(dtype=torch.float32).dataset, batch_size=8, shuffle=True, collate_fn=_lists
        )
        trainer.fit(module, data, loader(dtype=torch.float32))
        state = module.state_dict(), trainer.optimizers[0].state_dict(), random_states(), logger.seen, module.seen
        return *state, dict(trainer.callback_metrics)

    watch = callback(schedule=every(1), **options)
    with_it, without = train([watch]), train([])
    assert_equal(with_it, without)
    assert watch.monitor.steps == 4
    assert not watch.monitor.failures
    assert len(without[3]) > 8


def _lists(rows):
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def test_a_learning_rate_is_that_of_the_step(pl, callback, tmp_path):
    def scheduled(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.8)
        halved = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halved, "interval": "step"}}

    sink = MemorySink()
    watch = callback(sinks=sink, schedule=every(1), metrics=["update_ratio"])
    trainer_of(pl, [watch], tmp_path).fit(module_of(pl, configure_optimizers=scheduled), loader())
    assert series(sink.readings, "learning_rate") == pytest.approx([0.8, 0.4, 0.2, 0.1])


def generative(pl, clip=None, toggle=False):
    """Two optimizers, and a training step of its own."""

    class Generative(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = network(), nn.Linear(2, 1, dtype=torch.float64)
            with torch.no_grad():
                self.critic.weight.fill_(0.3)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            losses = generative_losses(self.generator, self.critic, batch)
            for optimizer, loss in zip((first, second), losses, strict=True):
                if toggle:
                    self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(loss())
                if clip is not None:
                    self.clip_gradients(optimizer, clip, "norm")
                optimizer.step()
                if toggle:
                    self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            return momentum(self.generator.parameters()), momentum(self.critic.parameters())

    return Generative()


def generative_losses(generator, critic, batch):
    return (
        lambda: (critic(generator(batch[0])) - 1).square().mean(),
        lambda: (critic(batch[1]) - 1).square().mean() + critic(generator(batch[0]).detach()).square().mean(),
    )


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_each_of_several_optimizers_has_a_monitor_of_its_own(pl, callback, tmp_path, clip, toggle):
    sinks = {}
    watch = callback(schedule=every(1), run="gan", layers=True, sinks=lambda run: sinks.setdefault(run, MemorySink()))
    module = generative(pl, clip, toggle)
    trainer_of(pl, [watch], tmp_path).fit(module, loader())
    assert set(sinks) == {"gan-generator", "gan-critic"} == {f"gan-{name}" for name in watch.monitors}

    plain = generative(pl)
    parts = plain.generator, plain.critic
    optimizers = [momentum(part.parameters()) for part in parts]
    norms, ratios = [[], []], [[], []]
    for batch in batches():
        for at, loss in enumerate(generative_losses(*parts, batch)):
            optimizers[at].zero_grad()
            loss().backward()
            before = flat(parts[at].parameters())
            norms[at].append(float(flat([p.grad for p in parts[at].parameters()]).norm()))
            if clip is not None:
                nn.utils.clip_grad_norm_(parts[at].parameters(), clip)
            optimizers[at].step()
            ratios[at].append(float((flat(parts[at].parameters()) - before).norm() / before.norm()))
    assert_equal(module.state_dict(), plain.state_dict())
    for at, name in enumerate(("generator", "critic")):
        found = sinks[f"gan-{name}"].readings
        assert series(found, "grad_norm") == pytest.approx(norms[at], rel=1e-9)
        assert series(found, "update_ratio") == pytest.approx(ratios[at], rel=1e-9)
        assert not watch.monitors[name].failures
    assert {r.layer for r in sinks["gan-generator"].readings if r.layer} == {"generator.0", "generator.2"}


def test_several_optimizers_need_sinks_for_each(pl, callback, tmp_path):
    module = generative(pl)
    with pytest.raises(ArgumentError, match="`sinks` must be a function of the run"):
        trainer_of(pl, [callback(sinks="memory")], tmp_path).fit(module, loader())


def test_without_a_loss_gradients_are_read_before_clipping(pl, callback, tmp_path):
    sink = MemorySink()
    watch = callback(loss=None, sinks=sink, schedule=every(1), mask=None)
    trainer_of(pl, [watch], tmp_path, gradient_clip_val=CLIP).fit(module_of(pl), loader())
    plain = Reference(batches(), clip=CLIP, schedule=every(1), mask=None)
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert series(sink.readings, "update_ratio") == pytest.approx(plain.ratios, rel=1e-9)
    active = {(r.name, r.step): r.value for r in plain.readings}
    compared = [r for r in sink.readings if (r.name, r.step) in active and r.name not in CLOCK]
    assert {"gradient_confusion", "gradient_rank", "step_condition"} < {r.name for r in compared}
    for reading in compared:
        assert reading.value == pytest.approx(active[reading.name, reading.step], rel=1e-6), reading


def test_a_loss_of_ones_own_and_what_it_takes(pl, callback, tmp_path):
    sink = MemorySink()
    watch = callback(
        loss=lambda module, batch: mse(module.net, (batch["x"], batch["target"])),
        batch=lambda batch: {"x": batch[0], "target": batch[1]},
        sinks=sink,
        schedule=every(1),
    )
    trainer_of(pl, [watch], tmp_path).fit(module_of(pl), loader())
    plain = Reference(batches(), model=module_of(pl), loss=in_module(mse), schedule=every(1))
    assert_same_readings(sink.readings, plain.readings)


def test_batches_without_a_loss_are_no_part_of_a_step(pl, callback, tmp_path):
    def sometimes(self, batch, batch_idx):
        return None if batch_idx % 2 else mse(self.net, batch)

    sink = MemorySink()
    watch = callback(sinks=sink, schedule=every(1))
    trainer_of(pl, [watch], tmp_path, accumulate_grad_batches=2).fit(module_of(pl, training_step=sometimes), loader(4))
    halves = batches(4)[::2]
    plain = Reference(
        halves, model=module_of(pl), loss=lambda module, batch: mse(module.net, batch) / 2, schedule=every(1)
    )
    assert series(sink.readings, "grad_norm") == pytest.approx(plain.norms, rel=1e-9)
    assert not watch.monitor.failures


@pytest.mark.parametrize("loss", ["training_step", None])
def test_a_gradient_scaler_is_taken_off_and_what_it_leaves_out_is_seen(pl, callback, tmp_path, loss):
    precision = importlib.import_module(f"{pl.__name__}.plugins").MixedPrecision
    plugin = precision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def training_step(self, batch, batch_idx):
        return mse(self.net, batch) * (float("inf") if batch_idx == 2 else 1.0)

    sink = MemorySink()
    module = module_of(pl, network(torch.float32), training_step=training_step)
    watch = callback(loss=loss, sinks=sink, schedule=every(1), alerts=None)
    options = {"plugins": [plugin], "gradient_clip_val": CLIP}
    trainer_of(pl, [watch], tmp_path, **options).fit(module, loader(dtype=torch.float32))
    assert watch.monitor.steps == 4
    data = batches(dtype=torch.float32)
    plain = Reference(
        [data[0], data[1], data[3]], model=network(torch.float32), clip=CLIP, schedule=every(1), alerts=None
    )
    found = {r.step: r for r in sink.readings if r.name == "grad_norm"}
    assert [found[step].value for step in (1, 2, 4)] == pytest.approx(plain.norms, rel=1e-2)
    assert found[3].reason == ("no optimizer step was taken" if loss is None else "non-finite gradient")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_verdict_before_the_first_step_is_that_of_a_plain_call(pl, callback, tmp_path, accumulate):
    sink, trained = MemorySink(), []
    watch = callback(sinks=sink, schedule=every(1), preflight=True, join=True)
    for callbacks in ([], [watch]):
        module = module_of(pl)
        trainer_of(pl, callbacks, tmp_path, accumulate_grad_batches=accumulate).fit(module, loader())
        trained.append(module.state_dict())
    assert_equal(*trained)
    assert not watch.monitor.failures
    module = module_of(pl)
    x, target = (part[: 8 * accumulate] for part in examples())
    found = preflight(module, momentum(module.parameters()), in_module(mse), (x, target))
    assert found.risk is not None
    assert_verdict(sink.readings, found)
