"""Calls by which the contents of a batch decide where its rows go: sorting, picking, and reading numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gradmon._batches import tensors

_READ = frozenset({"item", "tolist", "__int__", "__index__", "__float__", "__bool__", "numpy", "__array__"})
_WHOLE = frozenset({"nonzero", "argwhere", "masked_select", "masked_scatter", "masked_scatter_", "unique",
                    "unique_consecutive", "repeat_interleave", "_pack_padded_sequence", "pack_padded_sequence",
                    "_pad_packed_sequence", "index_put", "index_put_", "msort"})  # fmt: skip
_ALONG = {"sort": 1, "argsort": 1, "cumsum": 1, "topk": 2, "index_select": 1, "gather": 1, "take_along_dim": 2,
          "scatter": 1, "scatter_": 1, "scatter_add": 1, "scatter_add_": 1, "scatter_reduce": 1, "scatter_reduce_": 1,
          "index_add": 1, "index_add_": 1, "index_copy": 1, "index_copy_": 1, "index_reduce_": 1}  # fmt: skip
"""Calls that move things along one dimension, and the position of the argument that says along which."""
_PICKING = frozenset({"__getitem__", "__setitem__", "index"})


class Decided(NamedTuple):
    """What the batch has chosen so far.

    Attributes:
        among: Among how many things.
        calls: In how many calls.
    """

    among: int = 0
    calls: int = 0

    def then(self, among: int) -> Decided:
        """After one more call; it chose nothing if `among` is 0."""
        return Decided(self.among + among, self.calls + 1) if among else self


NOTHING = Decided()
"""Before the first call."""


def repeats_evenly(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call repeats everything as often, and not as often as a tensor says."""
    return name == "repeat_interleave" and isinstance(kwargs.get("repeats", args[1] if len(args) > 1 else None), int)


def decided(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], of_batch: Callable[[Tensor], bool] = lambda tensor: True
) -> int:
    """Among how many things a call chooses by what the batch holds; 0 where it does not.

    Where that grows with the number of examples, the order of the rows may depend on what these are.

    Args:
        name: The called function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        of_batch: Whether a tensor is made of the batch.
    """
    if name in _PICKING:
        return _picked(args, of_batch)
    if name not in _READ and name not in _WHOLE and name not in _ALONG and name != "where":
        return 0
    if repeats_evenly(name, args, kwargs):
        return 0
    if not any(of_batch(tensor) for tensor in tensors((args, kwargs))):
        return 0
    given = next(tensors((args, kwargs)))
    if name in _ALONG and given.ndim:
        place = _ALONG[name]
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        if isinstance(dim, int) and -given.ndim <= dim < given.ndim:
            return given.shape[dim]
    if name == "where" and len(args) + len(kwargs) > 1:
        return 0
    return given.numel()


def _picked(args: tuple[Any, ...], of_batch: Callable[[Tensor], bool]) -> int:
    """Among how many things an index made of the batch chooses."""
    if len(args) < 2 or not isinstance(args[0], Tensor):
        return 0
    index = cast("tuple[Any, ...]", args[1] if isinstance(args[1], tuple) else (args[1],))
    total = 0
    for place, part in enumerate(index):
        for tensor in tensors(part):
            if tensor.dtype in (torch.bool, torch.uint8):
                total += tensor.numel() if of_batch(tensor) else 0
            elif of_batch(tensor):
                plain = place < args[0].ndim and all(p is not None and p is not Ellipsis for p in index[:place])
                total += args[0].shape[place] if plain else args[0].numel()
    return total
