"""The passes that a check may take, counted where they happen: one call of the loss is one pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gradmon._errors import ArgumentError, Unavailable
from gradmon._objective import check_loss
from gradmon._types import Batch, Loss
from gradmon.preflight.calls import Calls


@dataclass(eq=False)
class Passes:
    """How many passes have been taken, and who listens to the next.

    Attributes:
        budget: How many there may be.
        taken: How many there have been.
        calls: What listens to the forward passes; None for nobody.
    """

    budget: int
    taken: int = 0
    calls: Calls | None = field(default=None)

    @property
    def left(self) -> int:
        """How many there may still be."""
        return self.budget - self.taken

    @contextlib.contextmanager
    def heard(self, calls: Calls) -> Generator[Calls]:
        """A context in which something listens to the forward passes."""
        before, self.calls = self.calls, calls
        try:
            yield calls
        finally:
            self.calls = before

    def counted(self, loss: Loss) -> Loss:
        """The loss, each call of which is a pass.

        Raises:
            ArgumentError: `loss` is not callable as `loss(model, batch)`.
        """
        check_loss(loss)
        # A partial, because the modules behind a loss are looked for in its arguments.
        return functools.partial(_pass, self, loss)


def _pass(passes: Passes, loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
    if passes.taken >= passes.budget:
        raise Unavailable(f"the budget of {passes.budget} passes is spent")
    passes.taken += 1
    with contextlib.ExitStack() as stack:
        if passes.calls is not None:
            stack.enter_context(passes.calls.during(model))
        return loss(model, batch)


def check_budget(budget: Any, least: int) -> int:
    """Accept a number of passes.

    Raises:
        ArgumentError: It is something else.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < least:
        raise ArgumentError("budget", f"be an integer of at least {least}, in passes", budget)
    return budget
