"""From the base optimizer's step and the average gradient to the weights after the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flattened
from torch._utils import _unflatten_dense_tensors as unflattened
from torch.optim import SGD, Adagrad, Optimizer, RMSprop
from torch.optim.optimizer import _global_optimizer_post_hooks as after_all
from torch.optim.optimizer import _global_optimizer_pre_hooks as before_all

from gradmon._errors import GradmonError

SMALL = 1 << 14
"""Up to so many elements tensors are worked on together: one call for all costs less than one for each."""
_CHUNK = 1 << 18
"""So many elements of a larger tensor are worked on at a time: what is between stays in the processor's cache."""
KEPT = 1 << 26
"""Up to so many bytes of weights are kept for later iterations: memory that is given back is slow to get again."""


class Candidate:
    """Room for the weights after a step of the base optimizer: one more copy of them, kept from step to step.

    Small tensors lie end to end, so that what is computed of them takes one call for all.

    Args:
        parameters: The parameters that are stepped.

    Attributes:
        origin: The parameters' own memory, one tensor per parameter.
        values: Where the base optimizer's step leads, one tensor per parameter.
        large: The places of those parameters that are worked on one by one, small ones that lie out of order included.

    Raises:
        GradmonError: Two of them share memory, or one is complex.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        if any(map(torch.is_complex, parameters)):
            raise GradmonError("The average gradient needs real parameters: a complex number has no sign.")
        _check_apart(parameters)
        self._parameters = list(parameters)
        self._kinds = _kinds(parameters)
        self.origin = [parameter.data for parameter in parameters]
        self.values, self._reached = list(self.origin), list(self.origin)
        self._blocks = [_Block(places, self.origin) for places in _together(self.origin)]
        for block in self._blocks:
            models = [self.origin[place] for place in block.places]
            for place, view, other in zip(
                block.places, unflattened(block.after, models), unflattened(block.reached, models), strict=True
            ):
                self.values[place], self._reached[place] = view, other
        small = {place for block in self._blocks for place in block.places}
        self.large = [place for place in range(len(self.values)) if place not in small]
        for place in self.large:
            self.values[place] = torch.empty_like(self.values[place])
        self._addresses = [value.data_ptr() for value in self.values]
        self._rooms: dict[torch.dtype, list[Tensor]] = {}
        self._spare: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._versions: list[int] = []
        self._samples: list[Tensor] = []
        self._ascending: Sequence[int] = ()
        self._aims: Sequence[Tensor] = []

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it was made for these parameters as they are."""
        old = self._parameters
        if len(old) != len(parameters) or not all(map(is_, old, parameters)):
            return False
        if all(map(Tensor.is_set_to, old, self.origin)):
            return True
        if self._kinds != _kinds(parameters):
            return False
        _check_apart(parameters)
        self.origin = [parameter.data for parameter in parameters]
        return True

    def begin(self, ascending: Sequence[int]) -> None:
        """Start from w: `values` are equal to it.

        Args:
            ascending: The places of those parameters that are stepped along their gradients.
        """
        self._ascending = ascending
        for block in self._blocks:
            block.before, block.signs = block.joined(self.origin), None
            block.after.copy_(block.before)
        for place in self.large:
            self.values[place].copy_(self.origin[place])

    def note(self, gradients: Sequence[Tensor | None]) -> None:
        """Take up the gradients that the base optimizer starts from, unless it is known to step against them.

        Args:
            gradients: One per parameter; None where it is not to be stepped after all.
        """
        found = [
            torch.zeros_like(value) if gradient is None else gradient
            for gradient, value in zip(gradients, self.values, strict=True)
        ]
        for place in self._ascending:
            found[place] = -found[place]
        for block in self._blocks:
            block.signs = block.joined(found).sign_()
        self._gradients = {place: found[place] for place in self.large}
        self._versions = [gradient._version for gradient in self._gradients.values()]
        self._samples = _samples(self._gradients.values())

    @property
    def lost(self) -> bool:
        """Whether gradients have been written to since `note`, as some optimizers do."""
        gradients = self._gradients.values()
        if [gradient._version for gradient in gradients] != self._versions:
            return True
        return not all(map(torch.equal, _samples(gradients), self._samples))

    def collect(self, parameters: Sequence[Tensor]) -> None:
        """Take up what the base optimizer made of the values, and its gradients off: the closure may change those."""
        for parameter, value, address in zip(parameters, self.values, self._addresses, strict=True):
            if parameter.data_ptr() != address:  # it did not write in place
                value.copy_(parameter)
            parameter.grad = None

    def release(self) -> None:
        """Let go of the gradients, so that their memory is free for the next ones."""
        self._gradients, self._versions, self._samples = {}, [], []
        self.forget()

    def aim(self, *, last: bool) -> Sequence[Tensor]:
        """Get ready for a step with the signs of the average gradient.

        Args:
            last: Whether w may be written to, as the weights after this step are those that are kept.

        Returns:
            Where that step will lead, one tensor per parameter: until the next call, or `forget`. Large ones are w
            itself if it may be written to.
        """
        reached = list(self._reached)
        if last:
            self.forget()
        for place in self.large:
            if not last and place not in self._spare:
                self._spare[place] = torch.empty_like(self.origin[place])
            reached[place] = self.origin[place] if last else self._spare[place]
        self._aims = reached
        return reached

    def take(self, place: int, average: Tensor) -> None:
        """Work out a large parameter's weights after the step.

        Args:
            place: One of `large`.
            average: Its average gradient.
        """
        if place in self._ascending:
            average = -average
        before, after, reached = self.origin[place], self.values[place], self._aims[place]
        self._signed_in_parts(before, after, self._gradients.get(place), average, reached)

    def take_small(self, average: Sequence[Tensor]) -> None:
        """Work out the weights of all small parameters after the step.

        Args:
            average: The average gradient, one tensor per parameter; those of large ones are not looked at.
        """
        found = list(average)
        for place in set(self._ascending).difference(self.large):
            found[place] = -found[place]
        for block in self._blocks:
            signed_step(block.before, block.after, block.signs, block.joined(found), block.reached)

    def forget(self) -> None:
        """Let go of what `aim` gave, if it is much, so that there is room for other things."""
        self._aims = []
        if sum(spare.nbytes for spare in self._spare.values()) > KEPT:
            self._spare = {}

    def _signed_in_parts(
        self, before: Tensor, after: Tensor, gradient: Tensor | None, average: Tensor, out: Tensor
    ) -> None:
        """`signed_step` of a large tensor, some elements at a time; at once where its tensors do not lie alike."""
        tensors = [tensor for tensor in (before, after, average, out, gradient) if tensor is not None]
        if not before.is_cpu or not all(tensor.is_contiguous() for tensor in tensors):
            signed_step(before, after, gradient, average, out)
            return
        dtype = before.dtype
        if dtype not in self._rooms:
            self._rooms[dtype] = [torch.empty(_CHUNK, dtype=dtype, device="cpu") for _ in range(3)]
        rooms, written = self._rooms[dtype], before is out
        for some_before, some_after, some_average, some_out, *some_gradient in zip(
            *(tensor.view(-1).split(_CHUNK) for tensor in tensors), strict=True
        ):
            size = some_before.numel()
            some = [room if size == _CHUNK else room[:size] for room in rooms]
            if not written:
                some[1] = some_out  # it has room for what leads to it
            signed_step(some_before, some_after, next(iter(some_gradient), None), some_average, some_out, some)


class _Block:
    """Small tensors of one dtype and device, end to end, those of one shape in a row.

    Args:
        places: Their places among all.
        models: All tensors, of which these are some.

    Attributes:
        places: As given, but in the order in which they lie.
        before: w.
        after: w'.
        signs: Those of g, if they are wanted.
        reached: Where the step led.
    """

    def __init__(self, places: Sequence[int], models: Sequence[Tensor]) -> None:
        rows, self._single = alike(models, places)
        self.places = [place for row in rows for place in row] + self._single
        self._rows = list[tuple[list[int], tuple[int, ...], tuple[int, ...], int]]()
        self._start = 0
        for row in rows:
            layout = torch.empty(len(row), *models[row[0]].shape, device="meta")
            self._rows.append((row, tuple(layout.shape), layout.stride(), self._start))
            self._start += layout.numel()
        size = self._start + sum(models[place].numel() for place in self._single)
        self.after, self.reached = (models[places[0]].new_empty(size) for _ in range(2))
        self.before, self.signs = self.after, cast("Tensor | None", None)

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """A copy of those of some tensors that have their places here, as they lie here."""
        joined = torch.empty_like(self.after)
        for row, shape, stride, start in self._rows:
            torch.stack([tensors[place] for place in row], out=joined.as_strided(shape, stride, start))
        if self._single:
            joined[self._start :] = flattened([tensors[place] for place in self._single])
        return joined


def alike(tensors: Sequence[Tensor], places: Iterable[int]) -> tuple[list[list[int]], list[int]]:
    """The places of tensors of one shape, which one call copies, and of those whose shape no other has."""
    groups: dict[torch.Size, list[int]] = {}
    for place in places:
        groups.setdefault(tensors[place].shape, []).append(place)
    rows = [group for group in groups.values() if len(group) > 1]
    return rows, [group[0] for group in groups.values() if len(group) == 1]


def _check_apart(parameters: Sequence[Tensor]) -> None:
    """Check that no two parameters lie in the same memory, where a step of one would be a step of the other.

    Raises:
        GradmonError: Two of them do.
    """
    spans = sorted(
        (parameter.data_ptr(), parameter.data_ptr() + _extent(parameter), str(parameter.device))
        for parameter in parameters
        if parameter.numel() and parameter.device.type != "meta"
    )
    for one, other in pairwise(spans):
        if other[0] < one[1] and one[2] == other[2]:
            raise GradmonError("Two parameters share memory. To tie weights, use one and the same parameter twice.")


def _extent(tensor: Tensor) -> int:
    """The bytes from a tensor's first element to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _samples(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Some of the elements of tensors, of those of one dtype and device together."""
    some: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        some.setdefault((tensor.dtype, tensor.device), []).append(_some(tensor))
    return [torch.cat(many, 1) for many in some.values()]


def _some(tensor: Tensor) -> Tensor:
    """32 elements side by side in each of 8 places, since single ones come from memory one by one; of few all."""
    if tensor.numel() < 256:
        return tensor.reshape(1, -1).expand(8, -1)
    apart = tensor.numel() // 8
    if tensor.is_contiguous():
        return tensor.as_strided((8, 32), (apart, 1))
    return tensor.reshape(-1)[: apart * 8].view(8, -1)[:, :32]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Write many tensors into others of their shapes, but for those that are the same."""
    pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target is not source]
    if pairs:
        cast("Any", torch)._foreach_copy_(*zip(*pairs, strict=True))


def _together(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of small tensors of one dtype and device, but for those that do not lie in order.

    End to end those would lie otherwise than their gradients, which fused optimizers walk through side by side.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.numel() <= SMALL and tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
            groups.setdefault((tensor.dtype, tensor.device), []).append(place)
    return list(groups.values())


def _kinds(tensors: Sequence[Tensor]) -> list[Any]:
    """What must stay for a copy of these tensors to fit: shapes, strides, types and devices."""
    return [
        [tensor.shape for tensor in tensors],
        [tensor.stride() for tensor in tensors],
        [tensor.dtype for tensor in tensors],
        [tensor.device for tensor in tensors],
    ]


def descends(optimizer: Optimizer) -> bool:
    """Whether a step of an optimizer is known to take each weight against its gradient, or to leave it where it is.

    What a hook or a method of the caller's does is not known, and neither is what momentum and weight decay amount to.
    """
    if type(optimizer) not in (SGD, RMSprop, Adagrad):
        return False
    own: Any = optimizer
    hooks = (own._optimizer_step_pre_hooks, own._optimizer_step_post_hooks, before_all, after_all)
    step = vars(optimizer).get("step", type(optimizer).step)
    if hasattr(step, "_wrapped_by_lr_sched"):  # a scheduler counts the calls
        step = step.__wrapped__
    return step is type(optimizer).step and not any(hooks) and all(map(_group_descends, optimizer.param_groups))


def _group_descends(group: dict[str, Any]) -> bool:
    rate = group.get("lr")
    return isinstance(rate, float) and rate >= 0 and not group.get("momentum") and group.get("weight_decay") == 0


def signed_step(
    before: Tensor,
    after: Tensor,
    gradient: Tensor | None,
    average: Tensor,
    out: Tensor,
    rooms: Sequence[Tensor] | tuple[None, None, None] = (None, None, None),
) -> None:
    """The weights after a step of the base's lengths whose signs are those of the average gradient.

    Where a has the sign of g, the base's own step stands, bit by bit, and so it does where a or w' is not a number, or
    where the base went against a in any case. Elsewhere a weight goes as far the other way, or stays where a is zero.

    Args:
        before: w, any shape.
        after: w', where the base optimizer would go.
        gradient: g, from which it would go there, or sgn(g); None where each w' is known to lie against g from w, if it
            is not w.
        average: a.
        out: Where to write; may be w itself.
        rooms: Three tensors to work in, if there are any; the second may be `out` where that is not w.
    """
    # Where each weight goes: 1 to w', 0 stays, -1 as far the other way. Numbers, since choosing by booleans is slow.
    wanted = torch.sign(average, out=rooms[0])
    where = torch.sub(before, after, out=rooms[1]).sign_().mul_(wanted)
    if gradient is not None:
        agree = torch.sign(gradient, out=rooms[2])
        agree = torch.threshold_(torch.eq(agree, wanted, out=agree), 0.5, -1)  # 1 where the signs agree, -1 where not
        torch.maximum(where, agree, out=where)
    # One number for both: it is finite only if all of a and w' are. On other devices that would be waited for.
    if average.is_cpu and math.isfinite(torch.dot(average, after) if average.ndim == 1 else (average * after).sum()):
        # At weights 0 and 1 `lerp` returns its ends as they are.
        torch.lerp(before, after, where, out=out)
        return
    wanted, moved = average.sign(), torch.sub(after, before)
    stands = average.isnan() | moved.isnan() | (wanted * moved < 0)
    if gradient is not None:
        stands |= wanted == gradient.sign()
    turned = torch.where(wanted == 0, before, torch.sub(after, moved, alpha=2))
    out.copy_(torch.where(stands, after, turned))
