"""The ranks that train one model, as one: what they agree on, and the sums over them."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from gradmon._errors import OUT_OF_MEMORY, GradmonError, Unavailable, told
from gradmon._tensors import Coordinates, ran_out, wide
from gradmon.team.channel import Channel, Lost
from gradmon.team.ranks import Place, Ranks

_LOG = logging.getLogger("gradmon")
_MEETING = 60.0
"""The most seconds to wait for the others when a monitor is made."""
_ALIKE = 1e-5
"""By how much, relative to themselves, norms of the same vector may differ from rank to rank."""
_CHUNK = 1 << 22
"""How many numbers a rank is sent at once."""
_DIST = cast("Any", dist)
_T = TypeVar("_T")
Outcome = Literal["fine", "memory", "missing", "error"]


class RankError(GradmonError):
    """Something failed on a rank, and so it counts as failed on all of them."""


class Team:
    """The ranks that train one model on parts of one batch.

    All of them take the same course: every piece of work whose result is put together is announced by all ranks
    before any of them waits for the others (`together`). Where it failed on one it fails on all; where somebody is
    somewhere else in the program, or does not come, that ends the round on all of them, with a reason, and nobody waits
    for what will not come.

    Args:
        channel: Their messages.
        ranks: Who they are.

    Attributes:
        rank: This process's place among them.
        size: How many they are.
        examples: How many examples each rank has in the batch that is looked at.
    """

    def __init__(self, channel: Channel, ranks: Ranks) -> None:
        self._channel, self._group = channel, ranks.group
        self.rank, self.size, self.why_not = ranks.rank, ranks.size, ranks.why_not
        self.examples: list[int] = [0] * ranks.size
        self._over: str | None = None
        self._trouble: str | None = None

    @staticmethod
    def gathered(ranks: Ranks, alike: Mapping[str, Any], timeout: float) -> Team | None:
        """The team of these ranks, if all of them come and ask for the same; else None, which is logged.

        Args:
            ranks: Who they are.
            alike: What must be the same on all of them, as plain types.
            timeout: How many seconds to wait for the others, here and later.
        """
        place = Place(ranks)
        channel = Channel(place.store(), ranks.rank, ranks.size, min(timeout, _MEETING))
        try:
            while channel.is_past:  # of a monitor that this rank did not make
                place.done()
                channel = Channel(place.store(), ranks.rank, ranks.size, min(timeout, _MEETING))
            heard = channel.exchange({"alike": alike})
            place.done()
        except (Lost, RuntimeError) as missing:
            reason = str(missing)
            if ranks.rank == 0 or not _retracted(channel):
                place.done()
        else:
            other = _first_other([message["alike"] for message in heard])
            if other is None:
                channel.timeout = timeout
                return Team(channel, ranks)
            reason = f"the ranks ask for different things: {other}"
        _LOG.warning(
            "The numbers are those of this process's own batch: %s. Make the monitor on every rank, with the same "
            "arguments; the first rank alone writes.",
            reason,
        )
        return None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes, and whose clock counts."""
        return self.rank == 0

    @property
    def lost(self) -> str | None:
        """Why the ranks will not work together any more; None while they do."""
        return self._channel.lost

    @property
    def over(self) -> str | None:
        """Why the round under way has ended early; None where it has not."""
        return self.lost or self._over

    @property
    def total(self) -> int:
        """The number B of the examples of all ranks."""
        return sum(self.examples)

    @property
    def factor(self) -> float:
        """What a rank's own share times its own number of examples is to be multiplied by: ``B / (W B_r)``.

        The batch loss is the mean over the W ranks of theirs, as their gradients are averaged, however many examples
        each has.
        """
        return self.total / (self.size * self.examples[self.rank])

    def begin(self, **said: Any) -> list[dict[str, Any]]:
        """Begin a round: say where this rank is, and hear where the others are.

        Raises:
            Unavailable: Somebody does not come, or is elsewhere.
        """
        self._over = self._trouble = None
        return self.exchange("begin", **said)

    def exchange(self, work: str, **said: Any) -> list[dict[str, Any]]:
        """Say something about a piece of work, and hear what the others say, in the order of the ranks.

        Raises:
            Unavailable: The round is over, or somebody does not come or is elsewhere, which ends it.
        """
        if self.over is not None:
            raise Unavailable(self.over)
        message = {"work": work, "trouble": self._trouble, **said}
        try:
            heard = self._channel.exchange(message)
        except Lost as missing:
            _LOG.warning("The ranks measure nothing together any more: %s", missing)
            raise Unavailable(str(missing)) from missing
        if len({other["work"] for other in heard}) > 1:
            self._over = _apart(heard)
            raise Unavailable(self._over)
        return heard

    def end(self, reason: str) -> None:
        """End the round, for a reason that all ranks see alike from what they have heard."""
        self._over = reason

    def finish(self, **said: Any) -> list[dict[str, Any]] | None:
        """End the round, on all ranks also where it was over before; None where they have lost each other."""
        while self.lost is None:
            self._over = None
            try:
                return self.exchange("finish", **said)
            except Unavailable:  # the others were elsewhere, have heard it too, and come here next
                continue
        return None

    def trouble(self, error: Exception) -> None:
        """Note what happened on this rank, for the others to hear where it leads this one astray."""
        if not isinstance(error, Unavailable) and self._trouble is None:
            self._trouble = told(error)[:500]

    def leave(self, what: str) -> None:
        """Tell the others not to wait for this rank any more; it ``"has ended"``, say."""
        self._channel.leave(what)

    def differ(self, work: str, numbers: Sequence[float]) -> bool:
        """Whether numbers that must be the same on all ranks are not, up to rounding.

        Raises:
            Unavailable: The round is over, or somebody does not come or is elsewhere, which ends it.
        """
        heard: list[list[float]] = [other["numbers"] for other in self.exchange(work, numbers=list(numbers))]
        return not all(map(_alike, zip(*heard, strict=True)))

    def together(
        self, work: str, make: Callable[[], _T], say: Callable[[_T], Mapping[str, Any]] | None = None
    ) -> tuple[_T, list[dict[str, Any]]]:
        """Do a piece of work on every rank; where it fails on one, it fails on all.

        Args:
            work: Its name.
            make: The work of this rank, in which it waits for nobody.
            say: What to tell the others of its result.

        Returns:
            This rank's result, and what each rank says of its own.

        Raises:
            Unavailable: A number cannot be had on some rank, or memory ran out there, or the round is over.
            RankError: Another error was raised on some ranks.
            Exception: The very same error was raised on all of them.
        """
        if self.over is not None:
            raise Unavailable(self.over)
        failed: Exception | None = None
        made, said = cast("_T", None), dict[str, Any]()
        try:
            made = make()
            said = {} if say is None else dict(say(made))
        except Exception as error:
            failed = error
        except BaseException:
            self.leave("was interrupted")
            raise
        outcome, reason = _outcome(failed)
        heard = self.exchange(work, outcome=outcome, reason=reason, **said)
        if any(other["outcome"] != "fine" for other in heard):
            error = _joint(heard, failed)
            if error is failed:
                raise error
            raise error from failed
        return made, heard

    def _sent(self, send: Callable[[], object]) -> None:
        """Do what all ranks do now; where that fails they have lost each other.

        Raises:
            Unavailable: It fails.
        """
        try:
            send()
        except RuntimeError as error:
            self._channel.leave(f"could not reach the others: {str(error).partition(chr(10))[0]}")
            _LOG.warning("The ranks measure nothing together any more: %s", error)
            raise Unavailable(str(self.lost)) from error
        except BaseException:
            self.leave("was interrupted")
            raise

    def mean(self, vector: Tensor) -> Tensor:
        """The mean over the ranks of a vector that each of them has, which is overwritten by it.

        To be asked for right after `together`: nothing may fail on one rank in between, not for want of memory either.
        """
        return self.sum(vector).div_(self.size)

    def sum(self, vector: Tensor) -> Tensor:
        """The sum over the ranks of a vector that each of them has, which is overwritten by it; as for `mean`."""
        self._sent(lambda: _DIST.all_reduce(vector, group=self._group))
        return vector

    def from_rank(self, rank: int, vector: Tensor) -> Tensor:
        """A vector that one rank has; those of the others, of the same shape and type, are overwritten by it."""
        source = _DIST.get_global_rank(self._group, rank)
        self._sent(lambda: _DIST.broadcast(vector, source, group=self._group))
        return vector

    def rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, one after the other.

        Args:
            own: This rank's, (n_r, ...).
            counts: How many each rank has.

        Returns:
            (n_1 + n_2 + ..., ...).
        """

        def room() -> tuple[Tensor, list[Tensor]]:
            padded = own.new_zeros(max(counts), *own.shape[1:])
            padded[: len(own)] = own
            return padded, [torch.empty_like(padded) for _ in counts]

        padded, found = self.together("rows", room)[0]
        self._sent(lambda: _DIST.all_gather(found, padded, group=self._group))
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    def gram(self, own: Tensor, counts: Sequence[int], coordinates: Coordinates | None = None) -> Tensor:
        """The inner products of the rows of all ranks, of whose columns each rank is sent a part.

        Args:
            own: This rank's rows, (n_r, k).
            counts: How many each rank has.
            coordinates: How the columns count; None for all alike.

        Returns:
            (n, n), float64, n the number of all rows.
        """
        weight = None if coordinates is None else coordinates.weight
        if own.is_cuda and _DIST.get_backend(self._group) == "gloo":  # which exchanges parts on the CPU only
            own = own.cpu()
        rows, width = sum(counts), own.shape[1]
        step = max(1, min(_CHUNK // rows, -(-width // self.size)))
        total = torch.zeros(rows, rows, dtype=torch.float64, device=own.device)
        for start in range(0, width, step * self.size):
            edges = [min(width, start + step * rank) for rank in range(self.size + 1)]
            sizes = [end - begin for begin, end in itertools.pairwise(edges)]
            mine = slice(edges[self.rank], edges[self.rank + 1])

            def room(edges: list[int] = edges, held: int = sizes[self.rank]) -> tuple[Tensor, Tensor]:
                pieces = [own[:, begin:end].reshape(-1) for begin, end in itertools.pairwise(edges)]
                return torch.cat(pieces), own.new_empty(rows * held)

            sent, found = self.together("columns", room)[0]
            there, here = [count * sizes[self.rank] for count in counts], [len(own) * size for size in sizes]
            self._sent(partial(_DIST.all_to_all_single, found, sent, there, here, group=self._group))
            part = wide(found.view(rows, sizes[self.rank]))
            total += (part if weight is None else part * weight[mine].to(part.device)) @ part.T
        return self.sum(self.together("products", lambda: (total + total.T) / 2)[0])


def _alike(numbers: Sequence[float]) -> bool:
    """Whether the same number has come out on all ranks, up to rounding, or none on any of them."""
    finite = [math.isfinite(number) for number in numbers]
    if not all(finite):
        return not any(finite)
    return max(numbers) - min(numbers) <= _ALIKE * max(map(abs, numbers))


def _retracted(channel: Channel) -> bool:
    try:
        return channel.retract()
    except RuntimeError:  # the store is gone
        return False


def _first_other(said: Sequence[Mapping[str, Any]]) -> str | None:
    """In what the ranks differ first; None where they do not."""
    for rank, other in enumerate(said):
        for name, value in said[0].items():
            if other.get(name) != value:
                return f"{name} is {value!r} on rank 0, and {other.get(name)!r} on rank {rank}"
    return None


def _outcome(failed: Exception | None) -> tuple[Outcome, str]:
    if failed is None:
        return "fine", ""
    if ran_out(failed):
        return "memory", OUT_OF_MEMORY
    if isinstance(failed, Unavailable):
        return "missing", failed.reason
    return "error", f"{type(failed).__name__}: {failed}"[:2000]


def _joint(heard: Sequence[Mapping[str, Any]], own: Exception | None) -> Exception:
    """The error of all ranks, from what happened on each."""
    if any(other["outcome"] == "memory" for other in heard):
        return Unavailable(OUT_OF_MEMORY)
    first = next(rank for rank, other in enumerate(heard) if other["outcome"] != "fine")
    alike = all((other["outcome"], other["reason"]) == (heard[0]["outcome"], heard[0]["reason"]) for other in heard)
    reason = heard[first]["reason"] if alike else f"rank {first}: {heard[first]['reason']}"
    if any(other["outcome"] == "error" for other in heard):
        return own if alike and own is not None else RankError(reason)
    return Unavailable(reason)


def _apart(heard: Sequence[Mapping[str, Any]]) -> str:
    """Why a round is over in which the ranks are at different places."""
    for rank, other in enumerate(heard):
        if other["trouble"] is not None:
            return f"rank {rank} took another course: {other['trouble']}"
    places = " and ".join(dict.fromkeys(str(other["work"]) for other in heard))
    return f"the ranks took different courses, at {places}"
