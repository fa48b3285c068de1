"""Everything that is measured before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon._batches import example_count
from gradmon._errors import OUT_OF_MEMORY, ArgumentError, Unavailable, told
from gradmon._objective import Gradient, Objective
from gradmon._parameters import Weights, check_trains
from gradmon._tensors import length, ran_out, wide
from gradmon._types import Loss, Reduction
from gradmon.metrics.per_example import gradient_coherence, gradient_confusion, noise_scale
from gradmon.per_example import Experience, PerExample, Wanted
from gradmon.preflight.calls import Call, Calls
from gradmon.preflight.chance import Chance, find_chance
from gradmon.preflight.examples import Taken, take
from gradmon.preflight.passes import Passes
from gradmon.preflight.rates import Rates, rates_of
from gradmon.preflight.scan import Scan, scan
from gradmon.probes.per_example import gram_evidence

_MICRO_BATCHES = 8
BEGUN = 0.89
"""The loss over that at chance below which something has been learned."""
_ALIVE = 0.01
"""The least share of the last hidden layer's energy between examples at which a last layer of zeros is only a start."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Look:
    """What was measured. A number that cannot be had is None, and `reasons` says why, under its name.

    Attributes:
        passes: How many passes it took.
        probe: The number of examples in the probe.
        batch: The number of examples in the training batch.
        apart: Whether the probe is other examples than the training batch.
        loss: The loss on the probe.
        chance: The loss at chance.
        out_sd: The standard deviation of the outputs between examples, in units of `Chance.scale`: the square root of
            its mean square over the units.
        sig: The share of the last hidden layer's energy that lies between examples, in [0, 1].
        relg: ``||g|| / ||w||`` of the first weight matrix over that of the last.
        rates: The learning rates of the optimizer.
        scan: What trial steps did to the gradient.
        noise_scale: The batch size at which noise and signal of the gradient are equally strong; infinite where no
            signal stands out.
        coherence: `gradient_coherence` of the probe.
        confusion: `gradient_confusion` of the probe.
        gradient_norm: The norm of the gradient on the probe.
        reasons: Why a number is None.
    """

    passes: int
    probe: int
    batch: int
    apart: bool
    loss: float
    rates: Rates
    scan: Scan
    chance: Chance | None = None
    out_sd: float | None = None
    sig: float | None = None
    relg: float | None = None
    noise_scale: float | None = None
    coherence: float | None = None
    confusion: float | None = None
    gradient_norm: float | None = None
    reasons: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def half(self) -> float | None:
        """The main group's learning rate at which steps change half of the gradient, once their gain has set in."""
        return None if self.scan.half is None else self.scan.half / self.rates.gain

    @property
    def best(self) -> float | None:
        """``lr* = sqrt(lr_half lr_default)``, for the main group; no higher than a bound of `lr_half` allows."""
        return None if self.half is None else math.sqrt(self.half * self.rates.default)

    @property
    def offset(self) -> float | None:
        """``u = log10(lr / lr*)``: how far the learning rate is from it."""
        if self.best is None:
            return None
        return math.log10(self.rates.rate / self.best) if self.rates.rate > 0 else -math.inf

    @property
    def sharpness(self) -> float | None:
        """``log10(lr_default / lr_half)``: by how much steps must be shorter than usual."""
        return None if self.half is None else math.log10(self.rates.default / self.half)

    @property
    def begun(self) -> bool:
        """Whether the network has learned something already: its loss is well below that at chance."""
        return self.progress is not None and self.progress < BEGUN

    @property
    def progress(self) -> float | None:
        """The loss over that at chance."""
        return None if self.chance is None else self.loss / self.chance.loss


def look(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Loss,
    batches: object,
    budget: int,
    *,
    reduction: Reduction = "mean",
    base: Sequence[Tensor] | None = None,
) -> Look:
    """Measure everything; model, optimizer, loaders and random states are afterwards as before.

    Args:
        model: The model, in the mode in which it trains.
        optimizer: Its optimizer.
        loss: ``loss(model, batch)``, a scalar or one value per example.
        batches: One batch, or several.
        budget: How many passes there may be.
        reduction: How one value per example becomes the batch loss.
        base: The weights to look at, one tensor per trainable parameter; None for those that the model has.

    Raises:
        ArgumentError: An argument is not what it must be, or the loss fails.
    """
    passes = Passes(budget)
    weights = Weights(model)
    rates = rates_of(optimizer, weights.parameters)
    check_trains(optimizer, weights.parameters)
    counted = passes.counted(loss)
    taken = take(batches, weights.device)
    with Objective(model, counted, taken.probe, weights, reduction, base) as objective:
        return _Looking(objective, passes, optimizer, rates, taken).all()


class _Looking:
    """The measurements, one after the other."""

    def __init__(self, objective: Objective, passes: Passes, optimizer: Optimizer, rates: Rates, taken: Taken) -> None:
        self._objective, self._passes = objective, passes
        self._optimizer, self._rates, self._taken = optimizer, rates, taken
        self._reasons: dict[str, str] = {}

    def _try(self, name: str, make: Callable[[], _T]) -> _T | None:
        try:
            return make()
        except Unavailable as missing:
            self._reasons[name] = missing.reason
        except Exception as error:  # a model may refuse what it is asked here, such as an output of zeros
            self._reasons[name] = OUT_OF_MEMORY if ran_out(error) else _told(error)
        return None

    def all(self) -> Look:
        """Measure everything."""
        objective, passes, taken = self._objective, self._passes, self._taken
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        trained = frozenset(map(id, [*objective.model.parameters(), *held]))
        with passes.heard(Calls(trained=trained)) as seen:
            gradient = first_gradient(objective)
        probe, batch = example_count(taken.probe), example_count(taken.training)
        norm = math.sqrt(sum(length(part) ** 2 for part in gradient.parts))
        if not (math.isfinite(gradient.loss) and math.isfinite(norm)):
            what = "the loss" if not math.isfinite(gradient.loss) else "the gradient"
            self._reasons = dict.fromkeys(("chance", "out_sd", "sig", "relg", "noise_scale"), f"{what} is not finite")
            nothing = Scan(reason=f"{what} is not finite")
            return Look(
                passes.taken, probe, batch, taken.apart, gradient.loss, self._rates, nothing, reasons=self._reasons
            )
        chance = self._try("chance", lambda: find_chance(objective, passes, seen, probe))
        head = chance is not None and chance.head
        out_sd = self._try("out_sd", lambda: self._spread(seen, chance))
        sig = self._try("sig", lambda: _share(seen.last if head else None))
        relg = self._try("relg", lambda: self._relative(seen, gradient, head))
        scanned = self._try(
            "scan",
            lambda: scan(
                objective,
                self._optimizer,
                self._rates,
                gradient,
                None if taken.training is taken.probe else taken.training,
            ),
        )
        examples = self._try("noise_scale", self._examples) or (None, None, None)
        return Look(
            passes=passes.taken,
            probe=probe,
            batch=batch,
            apart=taken.apart,
            loss=gradient.loss,
            rates=self._rates,
            scan=scanned or Scan(reason=self._reasons.get("scan")),
            chance=chance,
            out_sd=out_sd,
            sig=sig,
            relg=relg,
            noise_scale=examples[0],
            coherence=examples[1],
            confusion=examples[2],
            gradient_norm=norm,
            reasons=MappingProxyType(self._reasons),
        )

    def _spread(self, seen: Calls, chance: Chance | None) -> float:
        """The standard deviation of the outputs between examples, in their own unit."""
        last = seen.last
        if chance is not None and chance.head and last is not None:
            place = self._places().get(id(last.weight))
            # A network may begin with a last layer of zeros, as long as the one before tells the examples apart.
            weight = last.weight.detach() if place is None else self._objective.base[place]
            if length(weight) == 0 and _varies(last):
                raise Unavailable("the last weight matrix is zero, so that no output depends on the example yet")
        return _spread(seen, chance, self._reasons)

    def _places(self) -> dict[int, int]:
        """The place of each trained parameter, by its identity."""
        return {id(parameter): place for place, parameter in enumerate(self._objective.weights.parameters)}

    def _relative(self, seen: Calls, gradient: Gradient, head: bool) -> float:
        """``||g|| / ||w||`` of the first weight matrix over that of the last."""
        if seen.first is None or seen.last is None or not head:
            raise Unavailable("the first and the last layer were not found")
        if seen.first.weight is seen.last.weight:
            raise Unavailable("the first layer that was found is the last")
        places, found = self._places(), list[float]()
        for call in (seen.first, seen.last):
            place = places.get(id(call.weight))
            if place is None:
                raise Unavailable("the first or the last weight matrix is not trained")
            size = length(self._objective.base[place])
            if size == 0:
                raise Unavailable("the first or the last weight matrix is zero")
            found.append(length(gradient.parts[place]) / size)
        if found[1] == 0:
            raise Unavailable("the gradient of the last weight matrix is zero")
        return found[0] / found[1]

    def _examples(self) -> tuple[float, float, float]:
        """Noise scale, coherence and confusion of the probe."""
        wanted = PerExample(self._objective, None, Experience()).run(Wanted(gram=True, precise=True))
        evidence = gram_evidence(wanted.result, self._objective.weights, _MICRO_BATCHES)
        return noise_scale(evidence).value, gradient_coherence(evidence), gradient_confusion(evidence)


def _told(error: Exception) -> str:
    """An error in one line, without the full stop that follows a reason anyway."""
    return told(error).partition("\n")[0].rstrip(".")


def first_gradient(objective: Objective) -> Gradient:
    """The gradient on the probe; that it cannot be had is the caller's to know.

    Raises:
        ArgumentError: The loss fails, or has no gradient.
    """
    try:
        return objective.gauge()
    except ArgumentError:
        raise
    except Unavailable as missing:
        raise ArgumentError("loss", "have a gradient", missing.reason) from missing
    except Exception as error:
        raise ArgumentError("loss", "run on `model` and a batch", told(error)) from error


def _rows(tensor: Tensor) -> Tensor:
    """One row for each example, float64; for each position where there are hardly any examples."""
    held = wide(tensor)
    if held.ndim < 2:
        return held.reshape(-1, 1)
    return held.reshape(len(held), -1) if len(held) >= 4 or held.ndim == 2 else held.reshape(-1, held.shape[-1])


def _spread(seen: Calls, chance: Chance | None, reasons: Mapping[str, str]) -> float:
    """The standard deviation of the outputs between examples, in their own unit."""
    if chance is None:
        raise Unavailable(reasons.get("chance", "the outputs were not found"))
    if chance.scale is None:
        raise Unavailable("the unit of the outputs was not found")
    output = seen.last.output if chance.head and seen.last is not None else seen.output
    if output is None:
        raise Unavailable("the outputs were not found")
    rows = _rows(output)
    if len(rows) < 2:
        raise Unavailable("a probe of one example")
    return math.sqrt(float(rows.var(0, unbiased=False).mean())) / chance.scale


def _varies(last: Call) -> bool:
    """Whether what goes into the last layer differs between examples."""
    try:
        return _share(last) >= _ALIVE
    except Unavailable:
        return False


def _share(last: Call | None) -> float:
    """The share of the energy of what goes into the last layer that lies between examples."""
    if last is None:
        raise Unavailable("the last hidden layer was not found")
    rows = _rows(last.inputs)
    if len(rows) < 2:
        raise Unavailable("a probe of one example")
    energy = float(rows.square().mean(0).sum())
    if not (energy > 0 and math.isfinite(energy)):
        raise Unavailable("the last hidden layer is zero" if energy == 0 else "the last hidden layer is not finite")
    return float(rows.var(0, unbiased=False).sum()) / energy
