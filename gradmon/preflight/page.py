"""The verdict for a terminal, a notebook, a file, and sinks."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gradmon._reading import Reading
from gradmon.preflight.causes import BEYOND

if TYPE_CHECKING:
    from gradmon.preflight.verdict import Preflight

_WIDTH, _INDENT = 80, 12
MEANINGS: Mapping[str, str] = {
    "preflight_risk": "probability that the run fails, as told at its start",
    "preflight_loss": "loss before the first step",
    "preflight_chance": "loss of a guess: ln C for C classes, otherwise of the best output that is the same for all",
    "preflight_out_sd": "standard deviation of the outputs between examples, in their own unit",
    "preflight_sig": "share of the last hidden layer's energy that lies between examples",
    "preflight_relg": "relative gradient of the first weight matrix over that of the last",
    "preflight_lr_half": "learning rate at which one step changes half of the gradient",
    "preflight_lr": "learning rate that the check suggests",
    "preflight_noise_scale": "batch size at which signal and noise of the gradient are equal, before the first step",
    "preflight_passes": "passes that the check took",
}
"""What the readings of a check say, in words."""


def as_text(found: Preflight) -> str:
    """The verdict in lines of at most 80 characters."""
    lines = [f"gradmon preflight: {found.verdict}"]
    for name, text in rows(found):
        head = f"  {name}".ljust(_INDENT)
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=head, subsequent_indent=" " * _INDENT, break_on_hyphens=False
        )
    return "\n".join(lines)


def as_html(found: Preflight) -> str:
    """The verdict as a table."""
    cells = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(text)}</td></tr>'
        for name, text in rows(found)
    )
    return f"<div><b>{html.escape(found.verdict)}</b><table>{cells}</table></div>"


def rows(found: Preflight) -> Iterator[tuple[str, str]]:
    """What there is to say, with a heading each."""
    seen = found.look
    for cause in found.causes:
        yield "cause", f"{cause.title.capitalize()}. {cause.evidence}"
        yield "do", f"{cause.remedy[0].upper()}{cause.remedy[1:]}."
    rates = found.learning_rates
    if rates.groups is None or seen.best is None:
        yield "rate", f"No suggestion: {rates.reason}."
    else:
        pairs = ", ".join(f"{now:.3g} -> {rate:.2g}" for now, rate in zip(rates.now, rates.groups, strict=True))
        yield "rate", f"{pairs}{BEYOND[seen.scan.bound]}{_gated(found)}"
    yield "seen", ", ".join(_seen(found))
    if found.batch_size is not None:
        yield "batch", f"{found.batch_size[0].upper()}{found.batch_size[1:]}."
    if found.reason is not None:
        yield "no risk", f"{found.reason[0].upper()}{found.reason[1:]}."
    for name, reason in seen.reasons.items():
        yield "missing", f"{name}: {reason}"
    yield "cost", f"{seen.passes} passes, {seen.probe} examples looked at"


def _gated(found: Preflight) -> str:
    """When to take the rate of the scan."""
    if any(cause.name.startswith("rate") for cause in found.causes):
        return ""
    again = "scan again after that" if found.initialisation is not None else "no reason to change it"
    return f" by the scan; {again}"


def _seen(found: Preflight) -> Iterator[str]:
    seen = found.look
    chance = seen.chance
    if chance is None:
        yield f"loss {seen.loss:.4g}"
    else:
        kind = f", {chance.classes} classes" if chance.kind == "classification" else ""
        yield f"loss {seen.loss:.4g} ({chance.loss:.4g} at chance{kind})"
    if seen.out_sd is not None:
        yield f"outputs' deviation {seen.out_sd:.2g}"
    if seen.sig is not None:
        yield f"hidden signal {100 * seen.sig:.0f} %"
    if seen.relg is not None:
        yield f"gradient first/last {seen.relg:.2g}"
    if seen.half is not None:
        sign = {None: "", "below": "< ", "above": "> "}[seen.scan.bound]
        yield f"half of the gradient changes at {sign}{seen.half:.2g}"


def as_dict(found: Preflight) -> dict[str, Any]:
    """Everything, as plain types."""
    seen = found.look
    numbers = {
        "loss": seen.loss,
        "out_sd": seen.out_sd,
        "sig": seen.sig,
        "relg": seen.relg,
        "lr_half": seen.half,
        "lr_offset": seen.offset,
        "sharpness": seen.sharpness,
        "noise_scale": seen.noise_scale,
        "coherence": seen.coherence,
        "confusion": seen.confusion,
        "gradient_norm": seen.gradient_norm,
    }
    chance = None
    if seen.chance is not None:
        chance = {
            "loss": _plain(seen.chance.loss),
            "kind": seen.chance.kind,
            "classes": seen.chance.classes,
            "scale": _plain(seen.chance.scale),
        }
    return {
        "verdict": found.verdict,
        "risk": _plain(found.risk),
        "reason": found.reason,
        "flagged": found.flagged,
        "causes": [
            {"name": c.name, "evidence": c.evidence, "remedy": c.remedy, "weight": _plain(c.weight)}
            for c in found.causes
        ],
        "parts": {name: _plain(part) for name, part in found.parts.items()},
        "learning_rates": found.learning_rates.to_dict(),
        "initialisation": found.initialisation,
        "batch_size": found.batch_size,
        "chance": chance,
        "numbers": {name: _plain(number) for name, number in numbers.items()},
        "passes": seen.passes,
        "probe": seen.probe,
        "missing": dict(seen.reasons),
    }


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def as_readings(found: Preflight, step: int | None) -> list[Reading]:
    """The numbers as readings."""
    seen, reasons = found.look, found.look.reasons
    missing = next(iter(reasons.values()), "not measured")
    chance = None if seen.chance is None else seen.chance.loss
    values: Mapping[str, tuple[float | None, str]] = {
        "risk": (found.risk, found.reason or missing),
        "loss": (seen.loss, "not finite"),
        "chance": (chance, reasons.get("chance", missing)),
        "out_sd": (seen.out_sd, reasons.get("out_sd", missing)),
        "sig": (seen.sig, reasons.get("sig", missing)),
        "relg": (seen.relg, reasons.get("relg", missing)),
        "lr_half": (seen.half, seen.scan.reason or missing),
        "lr": (seen.best, seen.scan.reason or missing),
        "noise_scale": (seen.noise_scale, reasons.get("noise_scale", missing)),
        "passes": (float(seen.passes), missing),
    }
    return [_reading(f"preflight_{name}", value, step, reason) for name, (value, reason) in values.items()]


def _reading(name: str, value: float | None, step: int | None, reason: str) -> Reading:
    if value is None or math.isnan(value):
        return Reading(name, math.nan, step, reason=reason)
    return Reading(name, value, step, reason="not finite" if math.isinf(value) else None)
