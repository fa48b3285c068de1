"""The functions whose outputs are pre-activations: linear maps of their input, their transposes, their gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


class Layer(Protocol):
    """One call of such a function: ``z = W x + b``, linear in x."""

    @property
    def weight(self) -> Tensor:
        """W."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """b; None for none."""
        ...

    @property
    def batched(self) -> bool:
        """Whether the input has a first dimension of its own for examples."""
        ...

    @property
    def settings(self) -> tuple[Any, ...]:
        """What else it was called with."""
        ...

    def push(self, tangent: Tensor) -> Tensor:
        """``W t``, for a tangent of the input's shape."""
        ...

    def pull(self, cotangent: Tensor, shape: Sequence[int], weight: Tensor | None = None) -> Tensor:
        """``W^T y``, of the input's shape; with another weight of the same shape if one is given."""
        ...

    def weight_gradient(self, y: Tensor, x: Tensor) -> Tensor:
        """The gradient of the weight where y is that of z: ``sum y x^T``."""
        ...

    def bias_gradient(self, y: Tensor) -> Tensor:
        """The gradient of the bias where y is that of z: ``sum y``."""
        ...


@dataclass(frozen=True)
class Linear:
    """``torch.nn.functional.linear``: z of shape (..., out), W of shape (out, in)."""

    weight: Tensor
    bias: Tensor | None
    batched: bool

    @property
    def settings(self) -> tuple[Any, ...]:
        """None but whether there are examples."""
        return (self.batched,)

    def push(self, tangent: Tensor) -> Tensor:
        """``t W^T``."""
        return F.linear(tangent, self.weight)

    def pull(self, cotangent: Tensor, shape: Sequence[int], weight: Tensor | None = None) -> Tensor:
        """``y W``."""
        return cotangent @ (self.weight if weight is None else weight)

    def weight_gradient(self, y: Tensor, x: Tensor) -> Tensor:
        """``y^T x`` over all rows."""
        return y.reshape(-1, y.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def bias_gradient(self, y: Tensor) -> Tensor:
        """The sum of all rows."""
        return y.reshape(-1, y.shape[-1]).sum(0)


@dataclass(frozen=True)
class Matmul:
    """``x @ W`` with W of shape (in, out)."""

    weight: Tensor
    bias: Tensor | None
    batched: bool

    @property
    def settings(self) -> tuple[Any, ...]:
        """None but whether there are examples."""
        return (self.batched,)

    def push(self, tangent: Tensor) -> Tensor:
        """``t W``."""
        return tangent @ self.weight

    def pull(self, cotangent: Tensor, shape: Sequence[int], weight: Tensor | None = None) -> Tensor:
        """``y W^T``."""
        return cotangent @ (self.weight if weight is None else weight).T

    def weight_gradient(self, y: Tensor, x: Tensor) -> Tensor:
        """``x^T y`` over all rows."""
        return x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1])

    def bias_gradient(self, y: Tensor) -> Tensor:
        """The sum of all rows: there is no bias that would need it."""
        return y.reshape(-1, y.shape[-1]).sum(0)


@dataclass(frozen=True)
class Convolution:
    """A convolution, transposed or not, over one to three dimensions: z of shape (B, out, ...)."""

    weight: Tensor
    bias: Tensor | None
    batched: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    extra: tuple[int, ...] = field(default=())
    """What `F.pad` puts around the input first, where "same" is not symmetric."""

    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    @property
    def settings(self) -> tuple[Any, ...]:
        """Strides, paddings and the like."""
        return self.batched, *self._options(), self.extra

    def push(self, tangent: Tensor) -> Tensor:
        """The convolution without its bias."""
        if not self.batched:
            return replace(self, batched=True).push(tangent[None])[0]
        padded = F.pad(tangent, self.extra) if self.extra else tangent
        return torch.convolution(padded, self.weight, None, *self._options())

    def pull(self, cotangent: Tensor, shape: Sequence[int], weight: Tensor | None = None) -> Tensor:
        """The transposed convolution, as a linear map of the weight."""
        if not self.batched:
            return replace(self, batched=True).pull(cotangent[None], (1, *shape), weight)[0]
        weight = self.weight if weight is None else weight
        blank = (
            F.pad(weight.new_empty(()).expand(shape), self.extra) if self.extra else weight.new_empty(()).expand(shape)
        )
        only_input = (True, False, False)
        found = torch.ops.aten.convolution_backward(cotangent, blank, weight, None, *self._options(), only_input)[0]
        return F.pad(found, [-size for size in self.extra]) if self.extra else found

    def weight_gradient(self, y: Tensor, x: Tensor) -> Tensor:
        """The correlation of x with y."""
        padded = F.pad(x, self.extra) if self.extra else x
        only_weight = (False, True, False)
        arguments = (y.contiguous(), padded, self.weight, None, *self._options(), only_weight)
        return torch.ops.aten.convolution_backward(*arguments)[1]

    def bias_gradient(self, y: Tensor) -> Tensor:
        """The sum over examples and positions."""
        return y.sum((0, *range(2, y.ndim)))


_LINEAR = inspect.signature(lambda input, weight, bias=None: None)
_MATMUL = inspect.signature(lambda input, other: None)
_CONV = inspect.signature(lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None)
_CONV_TRANSPOSE = inspect.signature(
    lambda input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1: None
)


def _linear(bound: Mapping[str, Any]) -> tuple[Tensor, Layer]:
    x, weight = bound["input"], bound["weight"]
    return x, Linear(weight, bound["bias"], x.ndim >= 2 and weight.ndim == 2)


def _matmul(bound: Mapping[str, Any]) -> tuple[Tensor, Layer]:
    x, weight = bound["input"], bound["other"]
    return x, Matmul(weight, None, x.ndim >= 2 and weight.ndim == 2)


def _convolution(transposed: bool) -> Callable[[Mapping[str, Any]], tuple[Tensor, Layer]]:
    def parse(bound: Mapping[str, Any]) -> tuple[Tensor, Layer]:
        x, weight = bound["input"], bound["weight"]
        spread = weight.ndim - 2
        stride, dilation = _many(bound["stride"], spread), _many(bound["dilation"], spread)
        padding, extra = bound["padding"], ()
        if isinstance(padding, str):
            wanted = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if all(total % 2 == 0 for total in wanted):
                padding = tuple(total // 2 for total in wanted)
            else:
                padding = (0,) * spread
                extra = tuple(size for total in reversed(wanted) for size in (total // 2, total - total // 2))
        output_padding = _many(bound.get("output_padding", 0), spread)
        layer = Convolution(
            weight,
            bound["bias"],
            x.ndim == weight.ndim,
            stride,
            _many(padding, spread),
            dilation,
            transposed,
            output_padding,
            bound["groups"],
            extra,
        )
        return x, layer

    return parse


def _many(value: Any, count: int) -> tuple[int, ...]:
    found = (value,) if isinstance(value, int) else tuple(value)
    return found * count if len(found) == 1 else found


_CONVOLVE, _DECONVOLVE = _convolution(False), _convolution(True)

LAYERS: dict[Any, tuple[inspect.Signature, Callable[[Mapping[str, Any]], tuple[Tensor, Layer]]]] = {
    F.linear: (_LINEAR, _linear),
    torch.matmul: (_MATMUL, _matmul),
    torch.mm: (_MATMUL, _matmul),
    torch.Tensor.matmul: (_MATMUL, _matmul),
    torch.Tensor.__matmul__: (_MATMUL, _matmul),
    torch.Tensor.mm: (_MATMUL, _matmul),
    torch.conv1d: (_CONV, _CONVOLVE),
    torch.conv2d: (_CONV, _CONVOLVE),
    torch.conv3d: (_CONV, _CONVOLVE),
    torch.conv_transpose1d: (_CONV_TRANSPOSE, _DECONVOLVE),
    torch.conv_transpose2d: (_CONV_TRANSPOSE, _DECONVOLVE),
    torch.conv_transpose3d: (_CONV_TRANSPOSE, _DECONVOLVE),
}
"""For each function, its signature and what makes its input and a `Layer` of a call."""


def layer_call(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], parameters: Mapping[int, str]
) -> tuple[Tensor, Layer] | None:
    """The input and the layer of a call; None where it is none of `LAYERS`, or a product that no parameter is part of.

    Args:
        function: What is called.
        args: Its positional arguments.
        kwargs: Its named arguments.
        parameters: The names of the model's parameters, frozen ones too, by identity.
    """
    known = LAYERS.get(function)
    if known is None:
        return None
    signature, parse = known
    if signature is _LINEAR and not kwargs and 2 <= len(args) <= 3:  # as modules call it
        return args[0], Linear(args[1], args[2] if len(args) == 3 else None, args[0].ndim >= 2 and args[1].ndim == 2)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # such as `out=`
        return None
    bound.apply_defaults()
    if signature is _MATMUL and (id(bound.arguments["other"]) not in parameters or bound.arguments["other"].ndim != 2):
        return None
    return parse(bound.arguments)
