"""What a monitor remembers from probe to probe, so that it need not be found out again."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradmon._tensors import from_plain, to_plain
from gradmon.per_example import Entry, Experience

_CHECKED_EVERY = 100
"""Every how many-th probe takes nothing for granted."""


@dataclass
class Memory:
    """What earlier probes of a model found out.

    Attributes:
        experience: About the examples' gradients.
        precise: Whether everything is widened to float64, which takes time.
        probes: How many probes there have been.
        gap: By how much, relative to its norm, the gradient differed when it was taken twice; None if it is not known.
        entries: Where the examples' inputs enter, by what that was found for.
        direction: The direction along which the gradient changed most, (P,); None for none.
        exhausted: The kinds of evidence that are not gathered any more, because memory ran out twice, and why.
    """

    experience: Experience = field(default_factory=Experience)
    precise: bool = True
    probes: int = 0
    gap: float | None = None
    entries: dict[Any, Entry] = field(default_factory=dict[Any, Entry])
    direction: Tensor | None = None
    exhausted: dict[type, str] = field(default_factory=dict[type, str])

    @property
    def checks(self) -> bool:
        """Whether the probe that was begun last takes nothing for granted: the first, and every 100th after it."""
        return self.probes % _CHECKED_EVERY == 1

    def begin(self) -> None:
        """Begin a probe."""
        if self.probes % _CHECKED_EVERY == 0:
            self.gap = None
            self.entries.clear()
        self.probes += 1

    def relieve(self) -> None:
        """Memory ran out: let go what can be let go, and make do with half as much from now on."""
        self.experience.max_memory = max(1, self.experience.max_memory // 2)
        self.experience.scratch = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def state_dict(self) -> dict[str, Any]:
        """What cannot be found out again, as plain types."""
        return {
            "probes": self.probes,
            "gap": self.gap,
            "direction": None if self.direction is None else to_plain(self.direction),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was saved; what ran out of memory is tried again, since the machine may be another one."""
        self.probes, self.gap = int(state["probes"]), state["gap"]
        self.direction = None if state["direction"] is None else from_plain(state["direction"])
