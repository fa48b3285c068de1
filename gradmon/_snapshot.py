"""What a forward pass may change besides the weights, remembered and put back."""

from __future__ import annotations

import copy
import functools
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradmon._tensors import from_plain, to_plain


class RandomState:
    """The global random states as found: torch on the CPU and on every CUDA device, numpy, Python."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._numpy = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        """Put every generator back to where it was."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    def state_dict(self) -> dict[str, Any]:
        """The states as plain types."""
        name, keys, *rest = cast("tuple[Any, ...]", self._numpy)
        return {
            "cpu": to_plain(self._cpu),
            "cuda": None if self._cuda is None else [to_plain(state) for state in self._cuda],
            "numpy": [name, [int(key) for key in keys], *rest],
            "python": [self._python[0], list(self._python[1]), self._python[2]],
        }

    @staticmethod
    def restored(state: Mapping[str, Any]) -> RandomState:
        """What was saved."""
        found = RandomState()
        name, keys, *rest = state["numpy"]
        version, inner, following = state["python"]
        found._cpu = from_plain(state["cpu"])
        if found._cuda is not None and state["cuda"] is not None:
            found._cuda = [from_plain(device) for device in state["cuda"]]
        found._numpy = (name, np.array(keys, dtype=np.uint32), *rest)
        found._python = (version, tuple(inner), following)
        return found


class ModuleState:
    """Everything that modules hold, but for their parameters' values.

    Attributes, modes, buffers and other tensors, numpy arrays, generators, and lists, dicts and sets of all these, at
    any depth; submodules too, whether registered or not. Objects of other classes are kept by reference.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._undo: list[Callable[[], Any]] = []
        seen: set[int] = set()
        waiting: list[Any] = list(modules)
        while waiting:
            value: Any = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module):
                held = vars(value)
                self._undo.append(functools.partial(_restore_container, held, dict(held)))
                waiting.extend(held.values())
            elif isinstance(value, Tensor):
                if not isinstance(value, nn.Parameter) and value.grad_fn is None:
                    self._undo.append(functools.partial(_restore_tensor, value, value.data, _apart(value.data).clone()))
            elif isinstance(value, (list, dict, set, deque)):
                many = cast("Any", value)
                self._undo.append(functools.partial(_restore_container, many, copy.copy(many)))
                waiting.extend(many.values() if isinstance(value, dict) else many)
            elif type(value) is tuple:
                waiting.extend(cast("tuple[Any, ...]", value))
            elif (undo := _keeper(value)) is not None:
                self._undo.append(undo)

    def restore(self) -> None:
        """Put everything back, without touching autograd's version counters."""
        for undo in self._undo:
            undo()


def modules_behind(function: Any) -> Iterator[nn.Module]:
    """The modules that a loss holds: itself, the object it is bound to, what it closes over or names, its defaults."""
    if isinstance(function, nn.Module):
        yield function
        return
    if isinstance(function, functools.partial):
        for held in (function.func, *function.args, *function.keywords.values()):
            yield from modules_behind(held)
        return
    found: list[Any] = [getattr(function, "__self__", None)]
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is not None:
        found += [function.__globals__.get(name) for name in code.co_names]
        found += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:  # a variable that is not bound yet
                continue
    yield from (held for held in found if isinstance(held, nn.Module))


def _keeper(value: Any) -> Callable[[], Any] | None:
    """How to put an array or a generator back; None for other values."""
    if isinstance(value, np.ndarray):
        return functools.partial(np.copyto, cast("np.ndarray[Any, Any]", value), value.copy())
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
    return None


def _apart(tensor: Tensor) -> Tensor:
    """A tensor without the dimensions along which all its entries are one and the same."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _restore_tensor(tensor: Tensor, data: Tensor, content: Tensor) -> None:
    tensor.data = data
    _apart(tensor.data).copy_(content)


def _restore_container(now: Any, before: Any) -> None:
    if _identical(now, before):
        return
    now.clear()
    extend = now.extend if isinstance(now, (list, deque)) else now.update  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    extend(before)


def _identical(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects in the same order; sets are compared as they are."""
    if isinstance(a, set):
        return a == b
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        pairs = zip(cast("dict[Any, Any]", a).items(), cast("dict[Any, Any]", b).items(), strict=True)
        return all(name == other and value is twin for (name, value), (other, twin) in pairs)
    return all(value is twin for value, twin in zip(cast("list[Any]", a), cast("list[Any]", b), strict=True))
