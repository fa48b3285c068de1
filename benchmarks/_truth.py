"""The true condition numbers, which benchmarks/tightness.py compares with: by their definition, in float64."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from overhead import Batch, loss
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap


@dataclass(frozen=True)
class Truth:
    """The condition numbers in the limit of small perturbations, and what they are made of.

    Attributes:
        weights: That of the batch gradient with respect to the weights.
        part: The cosine between the batch gradient and the direction of the weights along which it changes most.
        inputs: That of the examples' gradients with respect to their inputs, the mean over the first few.
        directions: The examples' input gradients, of length 1, (B, 1, 8, 8).
    """

    weights: float
    part: float
    inputs: float
    directions: Tensor


def truth(model: nn.Module, batch: Batch, examples: int) -> Truth:
    """By the definition, from the whole Hessian and the whole Jacobians.

    Args:
        model: In float64, of few weights.
        batch: In float64.
        examples: How many of the batch's examples the condition number with respect to the inputs is taken over.
    """
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shapes = [(name, of.shape, of.numel()) for name, of in named.items()]
    w = torch.cat([of.flatten() for of in named.values()])

    def cost(w: Tensor, x: Tensor, target: Tensor) -> Tensor:
        parts = zip(shapes, torch.split(w, [size for *_, size in shapes]), strict=True)
        values = {name: part.reshape(shape) for (name, shape, _), part in parts}
        return loss(lambda x: functional_call(model, values, (x,)), (x, target))  # type: ignore[arg-type]

    gradient = grad(cost)

    def column(direction: Tensor) -> Tensor:
        return jvp(lambda w: gradient(w, *batch), (w,), (direction,))[1]

    h = gradient(w, *batch)
    hessian = vmap(column, chunk_size=64)(torch.eye(len(w), dtype=w.dtype))
    steepest = float(torch.linalg.eigvalsh(hessian).abs().max())
    direction = torch.as_tensor(eigsh(hessian.numpy(), k=1, which="LM", v0=h.numpy())[1][:, 0])

    values: list[float] = []
    for x, target in zip(batch[0][:examples], batch[1], strict=False):

        def row(direction: Tensor, x: Tensor = x, target: Tensor = target) -> Tensor:
            return jvp(lambda x: gradient(w, x[None], target[None]), (x,), (direction.reshape(x.shape),))[1]

        jacobian = vmap(row)(torch.eye(x.numel(), dtype=w.dtype))
        sigma = float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1]) ** 0.5
        values.append(sigma * float(x.norm() / gradient(w, x[None], target[None]).norm()))
    found = grad(cost, argnums=1)(w, *batch)
    directions = found / found.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    part = abs(float(direction @ h / h.norm()))
    return Truth(steepest * float(w.norm() / h.norm()), part, statistics.mean(values), directions)
