"""The batch loss as a function of the weights: its value, its gradient, its Hessian products."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradmon._batches import example_count, map_tensors
from gradmon._behind import behind
from gradmon._errors import ArgumentError, Unavailable
from gradmon._parameters import Weights, unwrapped
from gradmon._sandbox import Sandbox
from gradmon._snapshot import RandomState
from gradmon._tensors import ran_out, working
from gradmon._types import Batch, Loss, Reduction
from gradmon.team import Team, without_talk


def check_loss(loss: object, *, optional: bool = False) -> None:
    """Check what a loss is as far as it shows before it is called.

    Args:
        loss: What the caller gave.
        optional: Whether it may be None.

    Raises:
        ArgumentError: It is not callable as ``loss(model, batch)``, or a loss of `torch.nn`, which takes outputs.
    """
    if loss is None and optional:
        return
    must = f"be callable as loss(model, batch){', or None' if optional else ''}"
    if not callable(loss):
        raise ArgumentError("loss", must, type(loss).__name__)
    name = getattr(loss, "__name__", type(loss).__name__)
    if str(getattr(loss, "__module__", "")).startswith("torch.nn."):
        raise ArgumentError("loss", must, f"{name}, which takes outputs and targets: call it in a function of yours")
    try:
        signature = inspect.signature(loss)
    except ValueError:  # some that are written in C have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ArgumentError("loss", must, f"{name}{signature}: {error}") from None


_REENTRANT = "reentrant checkpointing knows no torch.autograd.grad: set use_reentrant=False"


class Gradient(NamedTuple):
    """A gradient at some weights.

    Attributes:
        loss: The batch loss.
        parts: One tensor per trainable parameter.
        unused: The positions of the parameters that the loss does not depend on; their parts are zeros.
    """

    loss: float
    parts: list[Tensor]
    unused: frozenset[int]


class Objective:
    """``w -> loss(w, chi)``, to be used as a context: the model comes out of it as it went in.

    Args:
        model: The model, in the mode in which it is to be measured.
        loss: ``loss(model, batch)``, a scalar or one value per example (B,).
        batch: The batch chi.
        weights: The layout of `w`.
        reduction: How one value per example becomes the batch loss.
        base: The weights w, one tensor per parameter; None for the model's own.
        random: The random states that every pass starts from; None for those found on entry.
        team: The ranks over whose batches the loss is the mean; None for this process alone.

    Raises:
        ArgumentError: `loss`, `batch` or `reduction` is not what it must be.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Batch,
        weights: Weights,
        reduction: Reduction = "mean",
        base: Sequence[Tensor] | None = None,
        random: RandomState | None = None,
        team: Team | None = None,
    ) -> None:
        check_loss(loss)
        if reduction not in ("mean", "sum"):
            raise ArgumentError("reduction", 'be "mean" or "sum"', repr(reduction))
        self.model = unwrapped(model)
        self.loss = loss
        self.batch = batch
        self.weights = weights
        self.reduction: Reduction = reduction
        self.base = list(base) if base is not None else [parameter.data for parameter in weights.parameters]
        self.examples = example_count(batch)
        self.team = team
        self.epsilon = weights.epsilon
        self._checkpoints: list[Any] | None = None
        others = behind(loss)
        self.sandbox = Sandbox(self.model, weights.parameters, others, random)
        self._silenced = [model, *others.modules]
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Objective:
        self._exit = stack = contextlib.ExitStack()
        try:
            stack.enter_context(without_talk(self._silenced))
            stack.enter_context(self.sandbox)
            return self
        except BaseException:  # also an interrupt: nobody is going to call __exit__
            stack.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    @property
    def total(self) -> int:
        """The number of examples of the whole batch, on all ranks."""
        return self.examples if self.team is None else self.team.total

    def at(self, values: Sequence[Tensor] | None = None) -> contextlib.AbstractContextManager[None]:
        """A context in which the parameters have these values, and a pass starts as every other."""
        return self.sandbox.at(self.base if values is None else values)

    def copied(self, batch: Batch | None = None) -> Batch:
        """A copy of the batch (or of another one) for one pass, which the model may overwrite."""
        return map_tensors(self.batch if batch is None else batch, lambda tensor: tensor.detach().clone())

    def evaluate(self, batch: Batch | None = None) -> Tensor:
        """The batch loss at the weights of the surrounding `at`, a scalar with its graph.

        Raises:
            ArgumentError: `loss` returned neither a scalar nor one value per example.
        """
        batch = self.copied(batch) if batch is None else batch
        value = self.loss(self.model, batch)
        if not isinstance(value, Tensor) or not value.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError("loss", "return a floating-point tensor", getattr(value, "dtype", type(value).__name__))
        if value.numel() == 1:
            return value.reshape(())
        if value.ndim != 1 or value.shape[0] != example_count(batch):
            must = f"return a scalar or one value per example, ({example_count(batch)},)"
            raise ArgumentError("loss", must, f"shape {tuple(value.shape)}")
        return value.mean() if self.reduction == "mean" else value.sum()

    def gradient(self, values: Sequence[Tensor] | None = None, batch: Batch | None = None) -> Gradient:
        """The gradient at some weights (the base ones if None), on the batch or another one."""

        def own() -> Gradient:
            with self.at(values):
                loss = self.evaluate(self.copied(batch))
                return self.collect(loss, self.differentiate(loss))

        return own() if self.team is None else self.averaged(self.team, "gradient", own)[0]

    def gauge(self) -> Gradient:
        """The gradient at the base weights; `epsilon` becomes that of the coarsest type that is met on the way."""

        def own() -> Gradient:
            with self.at():
                with self.noting():
                    loss = self.evaluate()
                return self.collect(loss, self.differentiate(loss))

        return own() if self.team is None else self.averaged(self.team, "gauge", own)[0]

    def averaged(
        self,
        team: Team,
        work: str,
        make: Callable[[], Gradient],
        say: Callable[[], dict[str, Any]] | None = None,
    ) -> tuple[Gradient, list[dict[str, Any]]]:
        """The mean over the ranks of what each finds, and what each says of it.

        Args:
            team: The ranks.
            work: What this is.
            make: This rank's own gradient.
            say: What else to tell the others; asked for after it.

        Raises:
            Unavailable: There is none on some rank.
            RankError: It failed on some rank.
        """

        def flat() -> tuple[Gradient, Tensor]:
            own = make()
            return own, working(self.weights.flatten(own.parts))

        (own, vector), heard = team.together(
            work,
            flat,
            lambda made: {
                "loss": made[0].loss,
                "unused": sorted(made[0].unused),
                "epsilon": self.epsilon,
                **({} if say is None else say()),
            },
        )
        self.epsilon = max(other["epsilon"] for other in heard)
        losses = [other["loss"] for other in heard]
        loss = math.fsum(losses) / team.size if all(map(math.isfinite, losses)) else sum(losses)
        unused = own.unused.intersection(*(other["unused"] for other in heard))
        return Gradient(loss, self.weights.unflatten(team.mean(vector)), unused), heard

    @contextlib.contextmanager
    def noting(self) -> Generator[None]:
        """A context for a forward pass, in which `epsilon` becomes that of the coarsest type that is met."""
        with _Coarsest(self.epsilon) as seen:
            yield
        self.epsilon = seen.epsilon

    def product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian at the base weights times a direction, by a second backward pass.

        Args:
            direction: One tensor per parameter.

        Returns:
            One tensor per parameter.

        Raises:
            Unavailable: Some function of the model has no second derivative.
            RuntimeError: The second pass does not fit into memory; on a device an `OutOfMemoryError`.
        """
        if self.team is None:
            return self._product(direction)
        flat = self.team.together("product", lambda: working(self.weights.flatten(self._product(direction))))[0]
        return self.weights.unflatten(self.team.mean(flat))

    def _product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """This process's own product.

        Raises:
            Unavailable: Some function of the model has no second derivative.
            RuntimeError: The second pass does not fit into memory.
        """
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with self.at():
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                loss = self.evaluate()
            try:
                first = self.differentiate(loss, create_graph=True)
                pairs = zip(first, direction, strict=True)
                second = self.differentiate(sum((part * piece).sum() for part, piece in pairs if part is not None))
            except RuntimeError as error:  # also NotImplementedError, for a function without a second derivative
                if ran_out(error):
                    raise
                raise Unavailable(f"no exact product: {error}") from error
        return [dense(part, parameter) for part, parameter in zip(second, self.weights.parameters, strict=True)]

    def collect(self, loss: Tensor, found: Sequence[Tensor | None]) -> Gradient:
        """A gradient from what autograd returned for each parameter."""
        parts = [dense(part, parameter) for part, parameter in zip(found, self.weights.parameters, strict=True)]
        unused = frozenset(position for position, part in enumerate(found) if part is None)
        return Gradient(float(loss.detach()), parts, unused)

    def differentiate(
        self, value: Any, more: Sequence[Tensor] = (), *, create_graph: bool = False
    ) -> list[Tensor | None]:
        """The gradients of a scalar by the parameters, and by some more tensors; None where it does not depend on one.

        Raises:
            Unavailable: Part of the graph is of a kind that knows only `backward`, or makes a backward pass of its own.
            RuntimeError: Autograd fails for another reason.
        """
        parameters = [*self.weights.parameters, *more]
        if not isinstance(value, Tensor) or not value.requires_grad:
            return [None] * len(parameters)
        trained = self.weights.parameters
        before = [_gradient_state(parameter) for parameter in trained]
        try:
            found: list[Tensor | None] = list(
                torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
            )
        except RuntimeError as error:
            if "checkpoint" not in str(error):
                raise
            raise Unavailable(_REENTRANT) from error
        if any(_gradient_state(parameter) != state for parameter, state in zip(trained, before, strict=True)):
            raise Unavailable("a function of the model adds to the gradients in a backward pass of its own")
        if self._checkpoints is None:
            self._checkpoints = _reentrant(value)
        # A part that does not lead to any of the parameters is left out without an error.
        if self._checkpoints and self._hides(found[: len(trained)]):
            raise Unavailable(_REENTRANT)
        return found

    def _hides(self, found: Sequence[Tensor | None]) -> bool:
        """Whether parts that are checkpointed reentrantly may use parameters, whose gradients then lack what these add.

        Args:
            found: The gradients, one per parameter.
        """
        if any(part is None for part in found):
            return True
        trained = {id(parameter) for parameter in self.weights.parameters}
        for function in self._checkpoints or ():
            others = behind(function)
            used = [parameter for module in others.modules for parameter in module.parameters()]
            used += [value for value in others.values if isinstance(value, Tensor)]
            if not used or any(id(parameter) in trained for parameter in used):
                return True
        return False


class _Coarsest(TorchFunctionMode):
    """Notes the coarsest floating type that a call returns."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.requires_grad:
            self.epsilon = max(self.epsilon, torch.finfo(result.dtype).eps)
        return result


def _gradient_state(parameter: Tensor) -> tuple[int, int] | None:
    """What tells whether somebody has added to the gradient of a parameter meanwhile."""
    gradient = parameter.grad
    return None if gradient is None else (id(gradient), int(gradient._version))


def _reentrant(value: Tensor) -> list[Any]:
    """The functions of a graph that are checkpointed reentrantly; what is in them is not seen from outside."""
    waiting, seen, found = [value.grad_fn], set[Any](), list[Any]()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("CheckpointFunction"):
            found.append(getattr(node, "run_function", None))
        waiting.extend(following for following, _ in node.next_functions)
    return found


def dense(part: Tensor | None, parameter: Tensor) -> Tensor:
    """The gradient of a parameter as a dense tensor; zeros where the loss does not depend on it."""
    if part is None:
        return torch.zeros_like(parameter)
    return part.to_dense() if part.layout != torch.strided else part
