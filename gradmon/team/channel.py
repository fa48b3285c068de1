"""Short messages among the ranks of a job, over the store that they met in; nothing here can wait for ever."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

_FIRST_PAUSE, _LONGEST_PAUSE = 5e-5, 2e-2
"""How long to sleep between two looks into the store, in seconds: at first, and in the end."""
_LOOK_FOR_GONE = 0.05
"""Every how many seconds to see whether those who are waited for have left."""
_MARGIN = 10.0
"""How many seconds longer than the first rank the others wait: it is the first rank that decides."""

Message = Mapping[str, Any]


class Lost(Exception):
    """The ranks have lost each other: there are no more messages."""


class Channel:
    """Exchanges in which every rank says something, and hears what all have said.

    The first rank reads what all have written, and writes it down as a whole, or that somebody is missing: so all of
    them hear the same, also those that come late. What is in the store can be looked at again and again; there is no
    call that would have to be met by another one, so that a rank which stays away can do no harm.

    Args:
        store: A `torch.distributed.Store` of these ranks and for this purpose alone.
        rank: This process's place among them.
        size: How many there are.
        timeout: How many seconds to wait for the others.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.timeout = timeout
        self._count = 0
        self._lost: str | None = None

    @property
    def lost(self) -> str | None:
        """Why there are no more messages; None while there are."""
        return self._lost

    def exchange(self, message: Message) -> list[dict[str, Any]]:
        """Say something, and hear what every rank has said, in the order of the ranks.

        Raises:
            Lost: A rank has left, is dead, or did not come in time.
        """
        if self._lost is not None:
            raise Lost(self._lost)
        number, self._count = self._count, self._count + 1
        try:
            heard = self._lead(number, message) if self._rank == 0 else self._follow(number, message)
        except RuntimeError as error:  # of the store: the process that holds it is dead
            self._lost = f"the ranks have lost each other: {_first_line(error)}"
            raise Lost(self._lost) from error
        except BaseException:
            self.leave("was interrupted")
            raise
        if isinstance(heard, str):
            self._lost = heard
            raise Lost(heard)
        return heard

    def _lead(self, number: int, message: Message) -> list[dict[str, Any]] | str:
        others = {rank: f"{number}/{rank}" for rank in range(1, self._size)}
        missing = self._wait(others, self.timeout)
        if missing is None:
            spoken = [json.loads(text) for text in self._read(list(others.values()))]
            heard: list[dict[str, Any]] | str = [json.loads(json.dumps(message)), *spoken]
        else:
            heard = missing
        self._store.set(f"{number}/all", json.dumps(heard))
        if number > 0 and missing is None:  # who has spoken now has heard what was said before
            self._store.delete_key(f"{number - 1}/all")
        return heard

    def _follow(self, number: int, message: Message) -> list[dict[str, Any]] | str:
        if number > 0:
            self._store.delete_key(f"{number - 1}/{self._rank}")
        self._store.set(f"{number}/{self._rank}", json.dumps(message))
        missing = self._wait({0: f"{number}/all"}, self.timeout + _MARGIN)
        if missing is not None:
            return missing
        return json.loads(self._read([f"{number}/all"])[0])

    def _wait(self, keys: Mapping[int, str], timeout: float) -> str | None:
        """Wait for what some ranks write; None when it is there, or who is missing and why."""
        began = looked = time.monotonic()
        pause = _FIRST_PAUSE
        while not self._store.check(list(keys.values())):
            now = time.monotonic()
            if now - looked >= _LOOK_FOR_GONE or now - began > timeout:
                looked = now
                late = [rank for rank, key in keys.items() if not self._store.check([key])]
                for rank in late:
                    if self._store.check([f"gone/{rank}"]):
                        return f"rank {rank} {self._read([f'gone/{rank}'])[0]}"
                if late and now - began > timeout:
                    return f"rank {late[0]} did not come within {timeout:g} s"
            time.sleep(pause)
            pause = min(1.3 * pause, _LONGEST_PAUSE)
        return None

    def _read(self, keys: list[str]) -> list[str]:
        held = self._store.multi_get(keys) if self._store.has_extended_api() else [self._store.get(k) for k in keys]
        return [bytes(text).decode() for text in held]

    @property
    def is_past(self) -> bool:
        """Whether the first rank has given up waiting before this one came."""
        return self._rank > 0 and self._count == 0 and bool(self._store.check(["0/all"]))

    def retract(self) -> bool:
        """Take back the first message, which the first rank has not heard; whether it was there to be taken back."""
        return self._rank > 0 and not self._store.check(["0/all"]) and bool(self._store.delete_key(f"0/{self._rank}"))

    def leave(self, what: str) -> None:
        """Tell those who will wait for this rank that it does not come any more.

        Args:
            what: What it did, as the end of a sentence that begins with the rank.
        """
        if self._lost is not None:
            return
        self._lost = f"rank {self._rank} {what}"
        try:
            self._store.set(f"gone/{self._rank}", what)
        except RuntimeError:
            return  # the store is gone, and with it everybody who could be told


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
