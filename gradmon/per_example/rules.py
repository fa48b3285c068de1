"""The rules: how the examples' gradients in the uses of a function are had faster than by making its call again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradmon.per_example import convolution, elementwise, linear, lookup, normalization
from gradmon.per_example.cut import Rule

Rules = Mapping[Callable[..., Any] | type[nn.Module], Rule]

RULES: dict[Callable[..., Any] | type[nn.Module], Rule] = {
    functional.linear: linear.linear,
    torch.matmul: linear.matmul,
    torch.mm: linear.matmul,
    Tensor.matmul: linear.matmul,
    Tensor.mm: linear.matmul,
    torch.addmm: linear.addmm,
    Tensor.addmm: linear.addmm,
    functional.conv1d: convolution.convolution,
    functional.conv2d: convolution.convolution,
    functional.conv3d: convolution.convolution,
    functional.conv_transpose1d: convolution.transposed,
    functional.conv_transpose2d: convolution.transposed,
    functional.conv_transpose3d: convolution.transposed,
    functional.embedding: lookup.embedding,
    functional.embedding_bag: lookup.embedding_bag,
    functional.layer_norm: normalization.layer_norm,
    functional.rms_norm: normalization.rms_norm,
    functional.group_norm: normalization.group_norm,
    functional.instance_norm: normalization.instance_norm,
    functional.batch_norm: normalization.batch_norm,
    functional.prelu: elementwise.prelu,
    torch.add: elementwise.addition,
    Tensor.add: elementwise.addition,
    Tensor.add_: elementwise.addition,
    torch.sub: elementwise.subtraction,
    Tensor.sub: elementwise.subtraction,
    Tensor.sub_: elementwise.subtraction,
    torch.mul: elementwise.multiplication,
    Tensor.mul: elementwise.multiplication,
    Tensor.mul_: elementwise.multiplication,
}
"""By called function, or by the class of a module whose parameters are to be looked at as a whole. One's own go in by
argument: ``rules={**RULES, MyLayer: my_rule}``."""
