"""Making calls again: under what circumstances they were made, and what parameters went through before them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradmon._batches import map_tensors, tensors
from gradmon._errors import Unavailable
from gradmon.per_example._autograd import version

_RELOCATING = frozenset({"t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape",
                         "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze", "chunk", "split", "narrow",
                         "select", "unbind", "view_as", "reshape_as", "adjoint", "ravel", "tensor_split"})  # fmt: skip
"""Calls that put numbers elsewhere, or leave some away, and never use one twice."""


_DETERMINISTIC = _RELOCATING | {"linear", "matmul", "mm", "bmm", "addmm", "einsum", "bilinear", "embedding",
                                "embedding_bag", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
                                "conv_transpose3d", "layer_norm", "rms_norm", "group_norm", "instance_norm",
                                "batch_norm", "prelu", "add", "add_", "sub", "sub_", "mul", "mul_", "div",
                                "div_"}  # fmt: skip
"""Calls that never draw random numbers, so that it need not be found out."""


class Surroundings:
    """The random state and the autocast that a call was made under; a context in which it can be made again.

    Args:
        name: The called function.
        like: Tensors that say which devices are involved.
    """

    def __init__(self, name: str, like: Sequence[Tensor]) -> None:
        self._gpus = sorted({t.device.index or 0 for t in like if t.is_cuda})
        kinds = {"cpu", *(t.device.type for t in like)}
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ]
        self._before: list[Tensor] | None = None if name in _DETERMINISTIC else self._states()
        self._exit = contextlib.ExitStack()

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self._gpus)]

    def done(self) -> None:
        """To be called right after the call: its random state is kept only if it used it."""
        before = self._before
        if before is not None and all(torch.equal(a, b) for a, b in zip(before, self._states(), strict=True)):
            self._before = None

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            if self._before is not None:
                stack.enter_context(cast("Any", torch.random).fork_rng(self._gpus))
                torch.set_rng_state(self._before[0])
                for index, state in zip(self._gpus, self._before[1:], strict=True):
                    torch.cuda.set_rng_state(state, index)
            self._exit = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()


@dataclass(frozen=True)
class _Line:
    """A call on parameters alone: what it was given, by identity, and what it made or changed."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Tensor]
    versions: list[int]
    made: list[Tensor]
    places: list[int]
    around: Surroundings


class Tape:
    """What is made of parameters alone, by which calls: reparametrised, transposed, cut and cast weights.

    Args:
        parameters: The trainable parameters.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._positions: dict[int, tuple[Tensor, tuple[int, ...]]] = {
            id(p): (p, (position,)) for position, p in enumerate(parameters)
        }
        self._lines: list[_Line] = []

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of parameters alone."""
        return id(tensor) in self._positions

    def positions(self, tensor: Tensor) -> tuple[int, ...]:
        """The positions of the parameters that a tensor is made of."""
        return self._positions[id(tensor)][1]

    def forget(self, tensor: Tensor) -> None:
        """A tensor has been overwritten by something made of the batch."""
        self._positions.pop(id(tensor), None)

    def record(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call on parameters alone, and remember it if its results have a gradient."""
        given = list({id(t): t for t in tensors((args, kwargs))}.values())
        versions = [version(t) for t in given]
        around = Surroundings(name, given)
        result = func(*args, **kwargs)
        returned = results(name, args, result)
        places = [at for at, t in enumerate(returned) if t.requires_grad and not isinstance(t, nn.Parameter)]
        made = [returned[at] for at in places]
        if made:
            around.done()
            self._lines.append(_Line(func, name, args, kwargs, given, versions, made, places, around))
            behind = sorted({p for t in given if id(t) in self._positions for p in self._positions[id(t)][1]})
            for tensor in made:
                self._positions[id(tensor)] = (tensor, tuple(behind))
        return result

    def _leading_to(self, key: int) -> list[_Line]:
        needed, found = {key}, list[_Line]()
        for line in reversed(self._lines):
            if any(id(t) in needed for t in line.made):
                found.append(line)
                needed.update(id(t) for t in line.given)
        return found[::-1]

    def function(self, key: int, positions: Sequence[int]) -> Callable[..., Tensor]:
        """The tensor with this identity as a function of the parameters at some positions.

        Raises:
            Unavailable: Something else that went into it has been overwritten since.
        """
        lines = self._leading_to(key)
        made = {id(t) for line in lines for t in line.made}
        for line in lines:
            for tensor, before in zip(line.given, line.versions, strict=True):
                if version(tensor) != before and id(tensor) not in made and not isinstance(tensor, nn.Parameter):
                    raise Unavailable(f"what `{line.name}` was given was overwritten afterwards")

        def evaluate(*parameters: Tensor) -> Tensor:
            now = {id(self._parameters[at]): value for at, value in zip(positions, parameters, strict=True)}
            for line in lines:
                # Copies, because a call may overwrite what it is given, as one that fakes quantisation does its scales.
                args, kwargs = map_tensors(
                    (line.args, line.kwargs), lambda t: now[id(t)] if id(t) in now else t.clone()
                )
                if in_place(line.name):
                    args = (args[0].clone(), *args[1:])
                with line.around:
                    found = results(line.name, args, line.func(*args, **kwargs))
                now.update({id(old): found[at] for old, at in zip(line.made, line.places, strict=True)})
            return now[key]

        return evaluate

    def relocation(self, key: int, positions: Sequence[int]) -> Tensor | None:
        """Where each number of a tensor comes from, if it only holds numbers of one parameter; flat indices, int64."""
        lines = self._leading_to(key)
        if len(positions) != 1 or not all(line.name in _RELOCATING or _is_transpose(line) for line in lines):
            return None
        parameter = self._parameters[positions[0]]
        places = torch.arange(parameter.numel(), dtype=torch.float64, device=parameter.device)
        with torch.no_grad():
            return self.function(key, positions)(places.reshape(parameter.shape)).reshape(-1).to(torch.int64)


def _is_transpose(line: _Line) -> bool:
    """Whether the call reads one of the attributes ``.T``, ``.mT``, ``.H`` or ``.mH``."""
    owner = getattr(line.func, "__self__", None)
    return line.name == "__get__" and getattr(owner, "__name__", "") in ("T", "mT", "H", "mH")


def in_place(name: str) -> bool:
    """Whether a call overwrites its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def results(name: str, args: tuple[Any, ...], result: Any) -> list[Tensor]:
    """The tensors that a call made or changed."""
    if isinstance(result, Tensor):
        return [result]
    return [args[0]] if name == "__setitem__" else list(tensors(result))


def name_of(func: Callable[..., Any]) -> str:
    """A function's name, or that of a module's class."""
    return type(func).__name__ if isinstance(func, nn.Module) else getattr(func, "__name__", "")
