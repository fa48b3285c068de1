"""The global random states, so that every call of a closure draws the same numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomStates:
    """Those of torch on the CPU and on CUDA devices, and on request of numpy and Python, as found.

    Args:
        all_kinds: Whether to keep numpy's and Python's, too, which takes far longer.
    """

    def __init__(self, *, all_kinds: bool) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._python = random.getstate() if all_kinds else None
        self._numpy: Any = np.random.get_state() if all_kinds else None

    def restore(self) -> None:
        """Put every generator back to where it was."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._python is not None:
            random.setstate(self._python)
            np.random.set_state(self._numpy)

    @property
    def others_drawn(self) -> bool:
        """Whether somebody has drawn from numpy's or Python's generator since."""
        now: Any = np.random.get_state()
        same = all(np.array_equal(part, kept) for part, kept in zip(now, self._numpy, strict=True))
        return random.getstate() != self._python or not same
