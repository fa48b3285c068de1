"""The moment between a backward pass and clipping, where no trainer tells its callbacks of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from gradmon import Monitor
from gradmon._sandbox import quiet_depth
from gradmon.per_example._autograd import after_backward, running_backward


def watch_clipping(model: nn.Module, monitor: Monitor) -> Callable[[], None]:
    """Tell a monitor of the end of every backward pass that reaches a model's parameters.

    Args:
        model: The model.
        monitor: The monitor.

    Returns:
        What ends it.
    """
    last: int | None = None

    def arrived(gradient: Tensor) -> None:
        nonlocal last
        task = running_backward()
        if task != last and not quiet_depth() and monitor.wants_batch:
            last = task
            after_backward(monitor.before_clipping)  # when all gradients are there

    handles = [p.register_hook(arrived) for p in model.parameters() if p.requires_grad]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end
