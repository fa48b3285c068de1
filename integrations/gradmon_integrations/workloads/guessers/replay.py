"""Functions and passes that run a second time, as they did the first time."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from gradmon._tensors import wide


def random_states() -> list[Tensor]:
    """Those of torch's global generators: the CPU's, and each CUDA device's where there are some in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


def same_states(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether nothing was drawn in between."""
    return len(before) == len(after) and all(map(torch.equal, before, after))


def alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether two passes made the same losses, but for rounding; what is not finite is not told apart."""
    if found.shape != wanted.shape:
        return False
    a, b = wide(found), wide(wanted)
    size = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else b.new_zeros(())
    return not bool(((a - b).abs() > torch.finfo(wanted.dtype).eps ** 0.5 * (size + b.abs())).any())


@contextlib.contextmanager
def replayed(states: Sequence[Tensor] | None) -> Generator[None]:
    """Random numbers are drawn as they were from some states on, and those drawn meanwhile do not count.

    Args:
        states: What `random_states` returned; None where nothing is drawn.
    """
    if states is None:
        yield
        return
    now = random_states()
    _set(states)
    try:
        yield
    finally:
        _set(now)


def _set(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(list(states[1:]))
