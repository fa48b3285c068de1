"""What a case of the zoo is, and what they are made of."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Loss = Callable[[nn.Module, Any], Tensor]
ExampleLoss = Callable[[nn.Module, Any, int], Tensor]
Parameters = dict[str, Tensor]
Untied = Callable[[Sequence[Parameters], Any], Tensor]
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One model with its loss and batch.

    `example_loss(model, batch, i)` is example i's own term, run on that example alone: the terms sum to the batch loss.
    Where examples interact it is None and `untied(copies, batch)` is the batch loss with one set of parameters (by
    name) per example. `x` of metrics.md is at `input_path` in the batch or, for integer inputs, is the output of the
    submodule named `input_module`.
    """

    model: nn.Module
    loss: Loss
    batch: Any
    size: int
    reduction: str = "mean"
    example_loss: ExampleLoss | None = None
    untied: Untied | None = None
    input_path: Path | None = (0,)
    input_module: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A named, reproducible problem: `make(seed, dtype)`; the global RNG state is left as found.

    `integer`: x is an embedding's output; `interacting`: examples meet inside the model or the loss; `values`: the loss
    returns (B,); `kinked`: piecewise linear somewhere, so finite differences and Hessians may disagree;
    `once_differentiable`: torch 2.13 has no second derivative of one of its operations, or silently a wrong one.
    """

    name: str
    make: Callable[..., Problem]
    integer: bool = False
    interacting: bool = False
    values: bool = False
    kinked: bool = False
    once_differentiable: bool = False


CASES: list[Case] = []
DROPOUT_CASES: list[Case] = []
SINGLE_CASES: list[Case] = []
HARD_CASES: list[Case] = []


def case(*, into: list[Case] = CASES, jitter: float = 0.1, **flags: bool) -> Callable[[Callable[[], Problem]], Case]:
    """Register a problem; `jitter` moves every parameter off its initial value, so that no scale is 1 and no bias 0."""

    def register(build: Callable[[], Problem]) -> Case:
        def make(seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                problem = build()
                with torch.no_grad():
                    for parameter in problem.model.parameters():
                        parameter.add_(jitter * torch.randn(parameter.shape))
            batch = mapped(problem.batch, lambda t: t.to(dtype) if t.is_floating_point() else t)
            return dataclasses.replace(problem, model=problem.model.to(dtype), batch=batch)

        made = Case(build.__name__, make, **flags)
        into.append(made)
        return made

    return register


def mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a nested batch; other leaves stay."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: mapped(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, function) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(mapped(value, function) for value in batch)
    if dataclasses.is_dataclass(batch):
        fields = {field.name: mapped(getattr(batch, field.name), function) for field in dataclasses.fields(batch)}
        return type(batch)(**fields)
    return batch


def take(batch: Any, i: int) -> Any:
    """The batch of example i alone."""
    return mapped(batch, lambda t: t[i : i + 1])


def get_input(batch: Any, path: Path) -> Tensor:
    """The tensor at a path of indices, keys and attribute names."""
    for key in path:
        batch = getattr(batch, key) if isinstance(key, str) and not isinstance(batch, dict) else batch[key]
    return batch


def set_input(batch: Any, path: Path, value: Tensor) -> Any:
    """A copy of the batch with another tensor at the path."""
    old = get_input(batch, path)
    return mapped(batch, lambda t: value if t is old else t)


def averaged(loss: Loss) -> ExampleLoss:
    """Own terms of a loss that is a mean over examples."""
    return lambda model, batch, i: loss(model, take(batch, i)).sum() / _count(batch)


def summed(loss: Loss) -> ExampleLoss:
    """Own terms of a loss that is a sum over examples."""
    return lambda model, batch, i: loss(model, take(batch, i)).sum()


def restoring(term: ExampleLoss) -> ExampleLoss:
    """The same terms, each with the model's buffers as found, for a model that changes what it computes with."""

    def restored(model: nn.Module, batch: Any, i: int) -> Tensor:
        found = [buffer.clone() for buffer in model.buffers()]
        value = term(model, batch, i)
        for buffer, old in zip(model.buffers(), found, strict=True):
            buffer.copy_(old)
        return value

    return restored


def _count(batch: Any) -> int:
    sizes: list[int] = []
    mapped(batch, lambda t: sizes.append(len(t)) or t)
    return sizes[0]


class Net(nn.Module):
    """Named parts (modules, parameters, buffers) and a forward function `forward(net, *inputs)`."""

    def __init__(self, function: Callable[..., Tensor] | None, parts: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


def net(function: Callable[..., Tensor] | None, **parts: Any) -> Net:
    """A module without a class of its own."""
    return Net(function, parts)


def normal(*shape: int) -> nn.Parameter:
    """A standard normal parameter over the square root of its last dimension."""
    return nn.Parameter(torch.randn(shape) / (shape[-1] if shape else 1) ** 0.5)


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross entropy; the batch is `(*inputs, y)`."""
    *inputs, y = batch
    return F.cross_entropy(model(*inputs), y)


def regress(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error over examples and outputs; the batch is `(*inputs, y)`."""
    *inputs, y = batch
    return F.mse_loss(model(*inputs), y)


def classifier(model: nn.Module, x: Tensor, classes: int, **more: Any) -> Problem:
    """A problem with one input and mean cross entropy."""
    return averaged_problem(model, classify, (x, torch.randint(classes, (len(x),))), **more)


def averaged_problem(model: nn.Module, loss: Loss, batch: Any, **more: Any) -> Problem:
    """A problem whose loss is a mean over examples that do not interact."""
    return Problem(model, loss, batch, _count(batch), example_loss=averaged(loss), **more)
