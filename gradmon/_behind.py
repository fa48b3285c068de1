"""What a loss holds, names or is bound to, and its passes may change."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from dis import get_instructions
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_BYTES = 1 << 20
"""The most bytes of tensors and arrays that are kept, the nearest first: what is larger is data, which a loss reads."""
_ENTRIES = 1000
"""The most entries of containers: what is longer is data, too, and would be slow to put back after every pass."""
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "gradmon", "gradmon_integrations"}
"""The packages whose functions and objects hold nothing of the caller's."""


@dataclass(frozen=True)
class Behind:
    """What a loss may change, beside the model that it is given.

    Attributes:
        modules: The modules.
        values: Tensors, arrays and generators.
        bindings: What makes attributes, and variables that it assigns, the tensors that they were.
    """

    modules: list[nn.Module] = field(default_factory=list[nn.Module])
    values: list[Any] = field(default_factory=list[Any])
    bindings: list[Callable[[], Any]] = field(default_factory=list[Callable[[], Any]])


def behind(loss: Any) -> Behind:
    """What a loss may change: itself, the object it is bound to, what it closes over or names, its defaults.

    The same for the caller's other functions that it reaches in these ways. The attributes of an object that is reached
    belong to it, and what is in containers at any depth; objects in attributes or containers do not, nor what is as
    large as data. Counters and lists are the caller's own: what the passes of a monitor add to them stays.
    """
    found = Behind()
    seen: dict[Any, Any] = {}  # the values too: the identity of one that is gone is given to another one
    waiting: deque[tuple[Any, bool]] = deque([(loss, True)])
    room, entries = _BYTES, _ENTRIES
    while waiting:
        value, direct = waiting.popleft()
        key = (id(value.__func__), id(value.__self__)) if isinstance(value, MethodType) else id(value)
        if key in seen:
            continue
        seen[key] = value
        if isinstance(value, nn.Module):
            found.modules.append(value)
            waiting.append((MethodType(type(value).forward, value), True))
        elif isinstance(value, functools.partial):
            parts = cast("functools.partial[Any]", value)
            waiting += ((part, direct) for part in (parts.func, *parts.args, *parts.keywords.values()))
        elif isinstance(value, MethodType):
            waiting.append((value.__self__, direct))
            if isinstance(value.__func__, FunctionType):
                waiting += ((held, True) for held in _reached(value.__func__, value.__self__, found.bindings))
        elif isinstance(value, FunctionType):
            waiting += ((held, True) for held in _reached(value, None, found.bindings))
        elif isinstance(value, (list, dict, set, deque, tuple)):
            many = cast("Any", value)
            if len(many) <= entries:
                entries -= len(many)
                waiting += ((part, False) for part in (many.values() if isinstance(value, dict) else many))
        elif isinstance(value, (Tensor, np.ndarray)):
            size = _size(cast("Any", value))
            if size <= room:
                room -= size
                found.values.append(cast("Any", value))
        elif direct and _is_the_callers(value):
            held = cast("dict[str, Any]", vars(value))
            found.bindings.append(functools.partial(_bind, held, dict(held), None))
            waiting += ((part, False) for part in held.values())
            if value is loss:
                waiting.append((MethodType(type(value).__call__, value), True))
        else:
            found.values.append(value)
    return found


def _reached(function: FunctionType, owner: Any, bindings: list[Callable[[], Any]]) -> Iterator[Any]:
    """What a function closes over or names, its defaults, and methods; to `bindings` is added what binds its variables.

    Args:
        function: The function.
        owner: The object to which it is bound; None for none.
        bindings: What makes the variables that are assigned what they were.
    """
    if _is_foreign(function.__module__):
        return
    names, around = _names(function.__code__), function.__globals__
    held: list[Any] = [around[name] for name in names.read | names.assigned if name in around]
    held += (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    before = {name: around[name] for name in names.assigned if name in around}
    bindings.append(functools.partial(_bind, around, before, names.assigned))
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # a variable that is not bound yet
            continue
        bindings.append(functools.partial(_fill, cell, cell.cell_contents))
    yield from held
    for one in (*held, owner):
        if isinstance(one, nn.Module) or _is_the_callers(one):
            kind = cast("Any", type(one))
            methods = (getattr(kind, name, None) for name in names.attributes)
            yield from (MethodType(method, one) for method in methods if isinstance(method, FunctionType))


def _size(value: Any) -> int:
    """The bytes of a tensor or an array."""
    if isinstance(value, Tensor) and value.layout == torch.sparse_coo:
        return value._indices().nbytes + value._values().nbytes
    return int(value.nbytes)


def _bind(space: dict[str, Any], before: dict[str, Any], names: Iterable[str] | None) -> None:
    """Give back to variables, or all of a space, what they were, where that is or was tensors."""
    for name in list(space) if names is None else names:
        now, then = space.get(name), before.get(name)
        if now is then or not (_holds_tensors(now) or _holds_tensors(then)):
            continue
        if name in before:
            space[name] = then
        else:
            del space[name]


def _fill(cell: CellType, before: Any) -> None:
    now = cell.cell_contents
    if now is not before and (_holds_tensors(now) or _holds_tensors(before)):
        cell.cell_contents = before


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensors, cast("tuple[Any, ...]", value)))
    return isinstance(value, (Tensor, np.ndarray))


class _Names(NamedTuple):
    """The names in a function, and in those inside of it: global ones that it reads or assigns, and attributes."""

    read: frozenset[str]
    assigned: frozenset[str]
    attributes: frozenset[str]


@functools.lru_cache(maxsize=256)
def _names(code: CodeType) -> _Names:
    found: dict[str, set[str]] = {"LOAD_GLOBAL": set(), "STORE_GLOBAL": set()}
    for instruction in get_instructions(code):
        if instruction.opname in found:
            found[instruction.opname].add(instruction.argval)
    names = _Names(frozenset(found["LOAD_GLOBAL"]), frozenset(found["STORE_GLOBAL"]), frozenset(code.co_names))
    inner = [_names(held) for held in code.co_consts if isinstance(held, CodeType)]
    return _Names(*(one.union(*others) for one, *others in zip(names, *inner, strict=True)))


def _is_foreign(package: str | None) -> bool:
    return (package or "").partition(".")[0] in _FOREIGN


def _is_the_callers(value: Any) -> bool:
    """Whether it is an object of a class of the caller's, with attributes."""
    if isinstance(value, (type, ModuleType, FunctionType, Optimizer, nn.Module)) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, SimpleNamespace) or not _is_foreign(type(value).__module__)
