"""What a forward pass may change besides the weights, remembered and put back."""

from __future__ import annotations

import copy
import functools
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradmon._tensors import from_plain, to_plain

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of as many bytes."""


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

    Attributes, modes, buffers and other tensors, numpy arrays, generators, and lists, dicts, sets and tuples of all
    these, at any depth; submodules too, whether registered or not. Objects of other classes are kept by reference.

    Args:
        modules: The modules.
        values: Tensors, arrays, generators and containers beside them; what is in the containers is not looked into.
        bindings: What else puts something back, at any time.
    """

    def __init__(
        self, modules: Sequence[nn.Module], values: Sequence[Any] = (), bindings: Sequence[Callable[[], Any]] = ()
    ) -> None:
        self._undo: list[Callable[[], Any]] = [*bindings]
        self._undo += (undo for value in values if (undo := _keeper(value)) is not None)
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
                if isinstance(value, torch.jit.ScriptModule):
                    waiting.extend(value.children())
                    waiting.extend(self._scripted(value))
                continue
            if isinstance(value, (list, dict, set, deque, tuple)):
                many = cast("Any", value)
                waiting.extend(many.values() if isinstance(value, dict) else many)
            undo = _keeper(value)
            if undo is not None:
                self._undo.append(undo)

    def _scripted(self, module: Any) -> list[Any]:
        """The buffers and attributes of a TorchScript module, which Python does not hold."""
        inner, kinds = module._c, module._concrete_type.get_attributes()
        held = {name: inner.getattr(name) for name, (_, is_parameter) in kinds.items() if not is_parameter}
        self._undo += [functools.partial(inner.setattr, name, value) for name, value in held.items()]
        return list(held.values())

    def restore(self) -> None:
        """Put everything back, without touching autograd's version counters."""
        for undo in self._undo:
            undo()


def _keeper(value: Any) -> Callable[[], Any] | None:
    """How to put a tensor, an array, a generator or a container back; None for other values."""
    if isinstance(value, Tensor):
        return None if isinstance(value, nn.Parameter) or value.grad_fn is not None else _tensor_keeper(value)
    if isinstance(value, (list, dict, set, deque)):
        many = cast("Any", value)
        return functools.partial(_restore_container, many, copy.copy(many))
    if isinstance(value, np.ndarray):
        array = cast("np.ndarray[Any, Any]", value)
        return functools.partial(_restore_array, array, array.copy()) if array.flags.writeable else None
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


def _tensor_keeper(tensor: Tensor) -> Callable[[], Any]:
    """How to put a tensor's memory and what is in it back."""
    if tensor.layout == torch.sparse_coo:
        return functools.partial(_restore_sparse, tensor, tensor.data.clone())
    if tensor.layout != torch.strided or tensor.is_nested:
        return functools.partial(tensor.data.copy_, tensor.data.clone())
    return functools.partial(_restore_tensor, tensor, tensor.data, _apart(tensor.data).clone())


def _restore_sparse(tensor: Tensor, content: Tensor) -> None:
    tensor.data = content.clone()  # which holds other entries, too, where some have come


def _restore_tensor(tensor: Tensor, data: Tensor, content: Tensor) -> None:
    tensor.data = data
    now = _apart(tensor.data)
    if not _is_unchanged(now, content):
        now.copy_(content)


def _is_unchanged(now: Tensor, before: Tensor) -> bool:
    """Whether a tensor on the CPU holds the same bits: its memory may be a file's that must not be written to."""
    if type(now) is not Tensor or not now.is_cpu or now.is_quantized or now.is_conj() or now.is_neg():
        return False
    if now.is_complex():
        now, before = torch.view_as_real(now), torch.view_as_real(before)
    if now.is_floating_point():  # NaN is not equal to itself, and 0 is to -0
        bits = _BITS[now.element_size()]
        now, before = now.view(bits), before.view(bits)
    return torch.equal(now, before)


def _restore_array(now: np.ndarray[Any, Any], before: np.ndarray[Any, Any]) -> None:
    if now.dtype.hasobject or now.tobytes() != before.tobytes():  # NaN is not equal to itself, and 0 is to -0
        np.copyto(now, before)


def _restore_container(now: Any, before: Any) -> None:
    if _identical(now, before):
        return
    if isinstance(now, dict):  # never without what it held all along: other threads may look into it
        names, held = cast("dict[Any, Any]", now), cast("dict[Any, Any]", before)
        for name in [name for name in names if name not in held]:
            del names[name]
        names.update(held)
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
