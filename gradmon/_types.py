"""Type aliases of the public interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

Batch = Any
"""A tensor, or a nesting of tuples, lists, mappings, named tuples and dataclasses with tensors at the leaves."""

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)``: a scalar, or one value per example, (B,)."""

Reduction = Literal["mean", "sum"]
"""How a loss of shape (B,) becomes the batch loss."""

Derivative = Literal["finite", "exact"]
"""How the change of the gradient along a weight perturbation is taken."""
