"""Slow, independent truths about models: weights, gradients, Hessians and inputs, one backward pass at a time.

Nothing here imports gradmon.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.zoo.problem import Problem, get_input, set_input

Loss = Callable[[nn.Module, Any], Tensor]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that make up `w`, in `named_parameters()` order."""
    return [parameter for _, parameter in model.named_parameters() if parameter.requires_grad]


def flat_weights(model: nn.Module) -> np.ndarray:
    """`w`, shape (P,)."""
    return np.concatenate([parameter.detach().double().numpy().ravel() for parameter in trainable(model)])


def coordinate_weights(model: nn.Module, coordinates: Sequence[int]) -> np.ndarray:
    """`numel_t / k_t` of each of a mask's coordinates (metrics.md, "Mask")."""
    owner = []
    for t, parameter in enumerate(trainable(model)):
        owner.extend([t] * parameter.numel())
    kept = [owner[c] for c in coordinates]
    return np.array([owner.count(t) / kept.count(t) for t in kept])


def _reduced(value: Tensor, reduction: str) -> Tensor:
    if value.ndim == 0:
        return value
    return value.mean() if reduction == "mean" else value.sum()


def gradient(value: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    grads = torch.autograd.grad(value, parameters, allow_unused=True, create_graph=create_graph)
    pieces = []
    for parameter, grad in zip(parameters, grads, strict=True):
        pieces.append((torch.zeros_like(parameter) if grad is None else grad).reshape(-1))
    return torch.cat(pieces)


def batch_gradient(model: nn.Module, loss: Loss, batch: Any, reduction: str = "mean") -> np.ndarray:
    """`h`, shape (P,): trainable parameters in order, unused ones zero. Model and RNG stay as they were."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        value = _reduced(loss(model, batch), reduction)
    return gradient(value, trainable(model)).double().numpy()


def gradient_at(model: nn.Module, loss: Loss, batch: Any, flat: np.ndarray, reduction: str = "mean") -> np.ndarray:
    """`h` at the weights `flat` (P,) instead of the model's own."""
    model = copy.deepcopy(model)
    start = 0
    with torch.no_grad():
        for parameter in trainable(model):
            piece = torch.from_numpy(flat[start : start + parameter.numel()].copy())
            parameter.copy_(piece.reshape(parameter.shape))
            start += parameter.numel()
    assert start == len(flat)
    return batch_gradient(model, loss, batch, reduction)


def hessian(model: nn.Module, loss: Loss, batch: Any, reduction: str = "mean") -> np.ndarray:
    """The dense (P, P) Hessian of the batch loss, one row at a time.

    An asymmetric result is refused: it means that some operation's double backward is wrong (in torch 2.13
    `torch._weight_norm`'s is). `hessian_by_differences` serves there.
    """
    model = copy.deepcopy(model)
    parameters = trainable(model)
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        h = gradient(_reduced(loss(model, batch), reduction), parameters, create_graph=True)
    H = _rows_of_derivatives(h, parameters)
    tolerance = 1e-8 if h.dtype == torch.float64 else 1e-3
    assert np.linalg.norm(H - H.T) <= tolerance * np.linalg.norm(H), "the Hessian by autograd is not symmetric"
    return H


def hessian_by_differences(
    model: nn.Module, loss: Loss, batch: Any, reduction: str = "mean", step: float = 1e-4
) -> np.ndarray:
    """The dense Hessian of a float64 model by central differences of the gradient, good to about `step ** 2`."""
    w = flat_weights(model)
    columns = []
    for c in range(len(w)):
        forward, backward = w.copy(), w.copy()
        forward[c] += step
        backward[c] -= step
        above = gradient_at(model, loss, batch, forward, reduction)
        below = gradient_at(model, loss, batch, backward, reduction)
        columns.append((above - below) / (forward[c] - backward[c]))
    return np.stack(columns, axis=1)


def _rows_of_derivatives(h: Tensor, sources: Sequence[Tensor]) -> np.ndarray:
    rows = []
    for entry in h:
        width = sum(source.numel() for source in sources)
        if not entry.requires_grad:
            rows.append(np.zeros(width))
            continue
        grads = torch.autograd.grad(entry, sources, allow_unused=True, retain_graph=True)
        pieces = []
        for source, grad in zip(sources, grads, strict=True):
            pieces.append((torch.zeros_like(source) if grad is None else grad).double().numpy().ravel())
        rows.append(np.concatenate(pieces))
    return np.stack(rows)


def shares(problem: Problem) -> np.ndarray:
    """`h_i` for every example, shape (B, P), under the share convention of metrics.md (`mean_i h_i = h`).

    Where examples do not interact: B times the gradient of example i's own term, the example run alone. Where they do:
    the untied network, whose copy i of the parameters serves example i's rows only; `h_i = B dL/d(copy i)`.
    """
    if problem.untied is not None:
        return _untied_shares(problem)
    rows = []
    for i in range(problem.size):
        model = copy.deepcopy(problem.model)
        assert problem.example_loss is not None
        term = problem.example_loss(model, problem.batch, i)
        rows.append(problem.size * gradient(term, trainable(model)).double().numpy())
    return np.stack(rows)


def _untied_shares(problem: Problem) -> np.ndarray:
    assert problem.untied is not None
    copies = []
    for _ in range(problem.size):
        own = {}
        for name, parameter in problem.model.named_parameters():
            own[name] = parameter.detach().clone().requires_grad_(parameter.requires_grad)
        copies.append(own)
    value = problem.untied(copies, problem.batch)
    rows = []
    for own in copies:
        parameters = [parameter for parameter in own.values() if parameter.requires_grad]
        grads = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
        pieces = []
        for parameter, grad in zip(parameters, grads, strict=True):
            piece = torch.zeros_like(parameter) if grad is None else grad
            pieces.append(problem.size * piece.double().numpy().ravel())
        rows.append(np.concatenate(pieces))
    return np.stack(rows)


# --- inputs --------------------------------------------------------------------------------------------------------


def inputs(problem: Problem) -> np.ndarray:
    """`x_i` for every example, flattened, shape (B, D).

    The floating tensor at `problem.input_path`, or for integer inputs the output of `problem.input_module` with the
    example run alone.
    """
    if problem.input_path is not None:
        x = get_input(problem.batch, problem.input_path)
        return np.stack([x[i].detach().double().numpy().ravel() for i in range(problem.size)])
    rows = []
    for i in range(problem.size):
        model = copy.deepcopy(problem.model)
        seen: list[Tensor] = []
        _input_module(problem, model).register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.detach()))
        assert problem.example_loss is not None
        problem.example_loss(model, problem.batch, i)
        assert len(seen) == 1
        rows.append(seen[0].double().numpy().ravel())
    return np.stack(rows)


def _input_module(problem: Problem, model: nn.Module) -> nn.Module:
    assert problem.input_module is not None
    return model.get_submodule(problem.input_module)


def _term_at_input(problem: Problem, model: nn.Module, i: int, x: Tensor) -> Tensor:
    """Example i's own term of the batch loss with its flat input moved to `x` (D,).

    An embedding's output is moved, not replaced: its weights stay part of the graph.
    """
    assert problem.example_loss is not None
    if problem.input_path is not None:
        old = get_input(problem.batch, problem.input_path)
        rows = [x.reshape(old[j].shape) if j == i else old[j] for j in range(problem.size)]
        return problem.example_loss(model, set_input(problem.batch, problem.input_path, torch.stack(rows)), i)
    handle = _input_module(problem, model).register_forward_hook(
        lambda m, args, out: out + (x.reshape(out.shape) - out.detach())
    )
    term = problem.example_loss(model, problem.batch, i)
    handle.remove()
    return term


def _as_input(problem: Problem, x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.copy()).to(next(problem.model.parameters()).dtype)


def input_gradients(problem: Problem) -> np.ndarray:
    """`g_i` for every example, shape (B, D), scaled as the shares are: `B dL/dx_i`.

    Where examples do not interact that is B times the gradient of example i's own term.
    """
    model = copy.deepcopy(problem.model)
    if problem.untied is not None:
        x = get_input(problem.batch, problem.input_path).detach().clone().requires_grad_()
        value = problem.loss(model, set_input(problem.batch, problem.input_path, x))
        (grad,) = torch.autograd.grad(_reduced(value, problem.reduction), [x])
        return np.stack([problem.size * grad[i].double().numpy().ravel() for i in range(problem.size)])
    X = inputs(problem)
    rows = []
    for i in range(problem.size):
        x = _as_input(problem, X[i]).requires_grad_()
        rows.append(problem.size * gradient(_term_at_input(problem, model, i, x), [x]).double().numpy())
    return np.stack(rows)


def shifted_shares(problem: Problem, delta: np.ndarray) -> np.ndarray:
    """`h(w, x_i + delta, t_i)` for every example, shape (B, P).

    `delta` is (D,), the same for all examples, or (B, D). Where examples interact all inputs move at once.
    """
    X = inputs(problem)
    moved = np.stack([X[i] + (delta if delta.ndim == 1 else delta[i]) for i in range(problem.size)])
    if problem.untied is not None:
        x = _as_input(problem, moved).reshape(get_input(problem.batch, problem.input_path).shape)
        return shares(dataclasses.replace(problem, batch=set_input(problem.batch, problem.input_path, x)))
    rows = []
    for i in range(problem.size):
        model = copy.deepcopy(problem.model)
        term = _term_at_input(problem, model, i, _as_input(problem, moved[i]))
        rows.append(problem.size * gradient(term, trainable(model)).double().numpy())
    return np.stack(rows)


def input_jacobian(problem: Problem, i: int) -> np.ndarray:
    """`dh_i / dx_i`, shape (P, D), for examples that do not interact; `sigma_max(J) |x_i| / |h_i|` bounds N-3.4."""
    model = copy.deepcopy(problem.model)
    x = _as_input(problem, inputs(problem)[i]).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        term = _term_at_input(problem, model, i, x)
        h = problem.size * gradient(term, trainable(model), create_graph=True)
    return _rows_of_derivatives(h, [x])
