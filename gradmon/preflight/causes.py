"""Why a run is likely to fail, with the evidence, and what to change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gradmon.preflight.look import Look
from gradmon.preflight.score import Signs, parts

NOTABLE = math.log(2)
"""A part of the risk that doubles the odds of a failure is a cause."""
BEYOND: Mapping[str | None, str] = {None: "", "below": " or less", "above": " or more"}
"""What is said of a suggestion where only a bound of what it is made of is known."""
_ANEW = "initialise anew with `gradmon.reinitialize(model, loss, batch)`, then take the rate of `gradmon.suggest_lr`"
_DEEPER = "if nothing comes of it, add residual connections and normalisation"


@dataclass(frozen=True)
class Cause:
    """One reason for a failure.

    Attributes:
        name: ``not_finite``, ``no_gradient``, ``vanishing``, ``exploding``, ``chaotic``, ``sharp``,
            ``rate_too_high``, ``rate_too_low`` or ``rate_zero``.
        evidence: What was seen, in words, with the numbers.
        remedy: What to change.
        weight: By how much it raises the log of the odds of a failure; infinite where it settles the matter.
    """

    name: str
    evidence: str
    remedy: str
    weight: float

    @property
    def title(self) -> str:
        """The cause in words."""
        return TITLES[self.name]


TITLES: Mapping[str, str] = {
    "not_finite": "not finite from the start",
    "no_gradient": "no gradient",
    "vanishing": "vanishing signal",
    "exploding": "exploding outputs",
    "chaotic": "chaotic depth",
    "sharp": "good for short steps only",
    "rate_too_high": "learning rate too high",
    "rate_too_low": "learning rate too low",
    "rate_zero": "learning rate of zero",
}


def causes_of(seen: Look) -> tuple[Cause, ...]:
    """The causes, the weightiest first."""
    settled = _settled(seen)
    if settled is not None:
        return (settled,)
    # What can be said of networks that start from nothing does not hold for others, but for steps that are too long.
    names = ("rate_too_high",) if seen.begun else tuple(EVIDENCE)
    found = [
        Cause(name, EVIDENCE[name](seen), _remedy(name, seen), weight)
        for name, weight in parts(signs_of(seen)).items()
        if name in names and weight >= NOTABLE
    ]
    return tuple(sorted(found, key=lambda cause: -cause.weight))


def signs_of(seen: Look) -> Signs:
    """What the risk is made of."""
    return Signs(seen.offset, seen.out_sd, seen.sig, seen.relg, seen.sharpness)


def _settled(seen: Look) -> Cause | None:
    """A cause that leaves no doubt."""
    if not math.isfinite(seen.loss):
        evidence = f"The loss is {seen.loss} on the first batch."
        return Cause("not_finite", evidence, "look for what is not finite in the data, the model, the loss", math.inf)
    if seen.gradient_norm is None:
        evidence = f"The loss is {seen.loss:.3g}, but its gradient is not finite."
        return Cause("not_finite", evidence, "look for divisions by zero, roots and logarithms in the model", math.inf)
    if seen.gradient_norm == 0:
        evidence = "The gradient of the loss is zero for every parameter."
        return Cause("no_gradient", evidence, "does the loss depend on the parameters? If so, " + _ANEW, math.inf)
    if all(rate == 0 for rate in seen.rates.groups) and seen.rates.reason is None:
        evidence = "All learning rates of the optimizer are zero, and no schedule has noted a larger one."
        return Cause("rate_zero", evidence, f"set it{_suggested(seen)}", math.inf)
    return None


def _vanishing(seen: Look) -> str:
    return (
        f"The outputs hardly depend on the example: their standard deviation between examples is {seen.out_sd:.2g}"
        f"{_unit(seen)}."
    )


def _exploding(seen: Look) -> str:
    progress = "" if seen.progress is None else f"; the loss is {seen.progress:.3g} times that at chance"
    return f"The outputs differ by {seen.out_sd:.3g}{_unit(seen)} between examples{progress}."


def _chaotic(seen: Look) -> str:
    return (
        f"Relative to its weights, the gradient of the first layer is {seen.relg:.3g} times that of the last, and "
        f"examples come out of the hidden layers as if they had nothing in common ({_percent(seen.sig)} of the energy "
        "lies between them)."
    )


def _sharp(seen: Look) -> str:
    times = 10 ** (seen.sharpness or 0.0)
    default = f"{_count(times)} times below the default of {seen.rates.default:.2g}"
    return f"{_half(seen)[0].upper()}{_half(seen)[1:]}, {default}: the gradient holds for short steps only."


def _too_high(seen: Look) -> str:
    return f"{_times(seen)} as high as the suggested one: {_half(seen)}."


def _too_low(seen: Look) -> str:
    return f"{_times(seen)} lower than the suggested one: {_half(seen)}. Some hundred steps will not lead far."


EVIDENCE: Mapping[str, Callable[[Look], str]] = {
    "vanishing": _vanishing,
    "exploding": _exploding,
    "chaotic": _chaotic,
    "sharp": _sharp,
    "rate_too_high": _too_high,
    "rate_too_low": _too_low,
}
"""What was seen, for every cause that is a part of the risk."""


def _remedy(name: str, seen: Look) -> str:
    if name.startswith("rate"):
        verb = "lower" if name == "rate_too_high" else "raise"
        anew = "" if seen.begun else "; to initialise anew as well rescues more"
        return f"{verb} the learning rate{_suggested(seen)}, from the start (in mid-run it helps little){anew}"
    return f"{_ANEW}; {_DEEPER}"


def _suggested(seen: Look) -> str:
    return "" if seen.best is None else f" to {seen.best:.2g}{BEYOND[seen.scan.bound]}"


def _times(seen: Look) -> str:
    times = 10 ** abs(seen.offset or 0.0)
    return f"The learning rate {seen.rates.rate:.3g} is {_count(times)} times"


def _count(times: float) -> str:
    return f"{times:.2g}" if times < 10 else f"{times:,.0f}"


def _half(seen: Look) -> str:
    where = {None: "at", "below": "already below", "above": "only above"}[seen.scan.bound]
    return f"{where} {seen.half:.2g} one step changes half of the gradient"


def _unit(seen: Look) -> str:
    return "" if seen.chance is None or seen.chance.kind != "other" else " of the targets' deviation"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f} %"
