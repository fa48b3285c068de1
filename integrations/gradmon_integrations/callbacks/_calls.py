"""What a Hugging Face Trainer gives to its model, or to its loss, and by what it multiplies what comes out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmon import Monitor, Unavailable
from gradmon._batches import map_tensors
from gradmon._sandbox import Sandbox, quiet_depth
from gradmon._types import Batch, Loss


class Call(NamedTuple):
    """The arguments of a call.

    Attributes:
        args: Those by position.
        kwargs: Those by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Made:
    """A call that the training made.

    Attributes:
        call: Its arguments.
        weight: The gradient that arrived at its loss: by what the loss was multiplied; None if none arrived.
    """

    call: Call
    weight: Tensor | None = None


class Calls:
    """The calls of one micro-batch that the training made.

    Args:
        monitor: Says whether the batch is wanted at all.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._made: list[Made] = []

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Made | None:
        """A call is about to be made; None where it is not the training's, or not wanted."""
        if quiet_depth() or not torch.is_grad_enabled() or not self._monitor.wants_batch:
            return None
        # Containers are copied, because a Trainer takes the labels out of its own.
        made = Made(Call(*map_tensors((tuple(args), dict(kwargs)), lambda tensor: tensor)))
        self._made.append(made)
        return made

    def end(self, made: Made, loss: Any) -> None:
        """A call has returned a loss."""
        if isinstance(loss, Tensor) and loss.requires_grad:

            def note(gradient: Tensor) -> None:
                made.weight = gradient.detach().clone()

            loss.register_hook(note)

    def take(self) -> list[Made]:
        """The calls since the last time."""
        made, self._made = self._made, []
        return made


def watch_model(model: nn.Module, calls: Calls) -> Callable[[], None]:
    """Note the calls of a model in training mode.

    Args:
        model: The model.
        calls: Where to note them.

    Returns:
        What ends it.
    """
    under_way: list[Made | None] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        under_way.append(calls.begin(args, kwargs) if module.training else None)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        made = under_way.pop() if under_way else None
        if made is not None and output is not None:
            calls.end(made, _loss_in(output))

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def watch_trainer(trainer: Any, calls: Calls) -> Callable[[], None]:
    """Note the calls of a Trainer's `compute_loss` in training mode.

    Args:
        trainer: The Trainer.
        calls: Where to note them.

    Returns:
        What ends it.
    """
    compute = trainer.compute_loss

    @functools.wraps(compute)
    def computed(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = calls.begin(args, kwargs) if model.training else None
        result = compute(model, *args, **kwargs)
        if made is not None:
            calls.end(made, result[0] if isinstance(result, tuple) else result)
        return result

    trainer.compute_loss = computed

    def end() -> None:
        if vars(trainer).get("compute_loss") is computed:
            del trainer.compute_loss

    return end


def trainer_loss(compute: Callable[..., Any], model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a Trainer makes.

    Args:
        compute: Its `compute_loss`.
        model: The model.
        batch: A call of it, without the model.

    Returns:
        The loss.
    """
    found = compute(model, *batch.args, **batch.kwargs)
    return found[0] if isinstance(found, tuple) else found


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model returns of its own.

    Args:
        model: The model.
        batch: A call of it.

    Returns:
        The loss.

    Raises:
        Unavailable: It returns none.
    """
    loss = _loss_in(model(*batch.args, **batch.kwargs))
    if not isinstance(loss, Tensor):
        raise Unavailable("the model returned no loss when it was called again")
    return loss


def shares(loss: Loss, model: nn.Module, given: Callable[[Call], Batch], call: Call) -> bool:
    """Whether a loss that is told how many items the step has is its share of the step's: many do not listen.

    Args:
        loss: The loss.
        model: The model.
        given: What is made of a call, for the loss.
        call: A call with that number; it is made twice, with one and with twice as many, and leaves no trace.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: list[float] = []
    with Sandbox(model, parameters) as sandbox, torch.no_grad():
        for times in (1, 2):
            args, kwargs = map_tensors(tuple(call), lambda tensor: tensor.clone())
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * times
            with sandbox.at(parameters):
                found.append(float(loss(model, given(Call(args, kwargs))).sum()))
    one, two = found
    return one != 0 and math.isclose(2 * two, one, rel_tol=1e-4)


def _loss_in(output: Any) -> Any:
    """Where a Trainer looks for the loss."""
    if isinstance(output, Mapping):
        return output.get("loss")
    return output[0] if isinstance(output, (tuple, list)) and output else output
