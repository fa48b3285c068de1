"""A thread between the training and a sink, so that a slow, hanging or dead one costs the training nothing."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from gradmon._errors import told
from gradmon._reading import Alert, Reading
from gradmon.sinks.base import EndAware, InfoAware, RunAware, Sink

CAPACITY = 100_000
"""How many readings may wait for one sink: some 20 MB."""
_AT_EXIT = 5.0
"""The most seconds that a program which forgot to close its monitors is kept from its end."""

Work = Callable[[], object]
Fail = Callable[[Exception], None]


class SinkExit(Exception):
    """Stands for what ends a thread rather than being an error, such as `SystemExit`."""


class Background:
    """Hands on to a sink from a daemon thread of its own, in order.

    What does not fit the queue is dropped, oldest first, and counted. What the sink raises is told, and the next call
    is made all the same.

    Args:
        sink: The sink.
        fail: Told of every exception, on the thread that met it.
        capacity: The most readings that may wait; an alert counts as one.

    Attributes:
        sink: The sink.
    """

    def __init__(self, sink: Sink, fail: Fail, capacity: int = CAPACITY) -> None:
        self.sink = sink
        self._queue = _Queue(fail, capacity)
        # A monitor that is forgotten leaves no thread behind.
        weakref.finalize(self, self._queue.end).atexit = False

    @property
    def dropped(self) -> int:
        """How many readings and alerts had to be dropped so far."""
        return self._queue.dropped

    def bind(self, run: str, rank: int) -> None:
        """Tell the sink the run, on the spot: what is wrong with it is known before the training begins."""
        if isinstance(self.sink, RunAware):
            self.sink.bind(run, rank)

    def describe(self, info: Mapping[str, str | int | float | bool]) -> None:
        """Tell the sink what describes the run, on the spot."""
        if isinstance(self.sink, InfoAware):
            self.sink.describe(info)

    def write(self, readings: Sequence[Reading]) -> None:
        """Have the sink take the readings soon."""
        sink = self.sink
        self._queue.put(len(readings), lambda: sink.write(readings))

    def alert(self, alert: Alert) -> None:
        """Have the sink take the alert soon."""
        sink = self.sink
        self._queue.put(1, lambda: sink.alert(alert))

    def finish(self, succeeded: bool) -> None:
        """Have the sink learn soon how the run ended."""
        sink = self.sink
        if isinstance(sink, EndAware):
            self._queue.put(0, lambda: sink.finish(succeeded))

    def close(self) -> None:
        """Have the sink closed when it has taken all that waits; `wait` waits for it."""
        self._queue.put(0, self.sink.close)
        self._queue.end()

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is left to do; whether that is so."""
        return self._queue.wait(seconds)


class _Queue:
    """What waits to be done on a thread that is there only while there is something to do."""

    def __init__(self, fail: Fail, capacity: int) -> None:
        self._fail, self._capacity = fail, capacity
        self._waiting: deque[tuple[int, Work]] = deque()
        self._weight = 0
        self._begin()
        self.dropped = 0
        self._ended = False
        _QUEUES.add(self)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._working: int | None = None
        self._process = os.getpid()

    def put(self, weight: int, work: Work) -> None:
        """Have something done; what weighs nothing is never dropped."""
        if self._process != os.getpid():  # threads, and who held their locks, do not survive a fork
            self._waiting.clear()
            self._weight = 0
            self._begin()
        with self._changed:
            self._waiting.append((weight, work))
            self._weight += weight
            while self._weight > self._capacity and len(self._waiting) > 1:
                self._drop()
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="gradmon-sink", daemon=True)
                thread.start()  # raises where the system has no more; the next call tries again
                self._thread = thread
            self._changed.notify_all()

    def _drop(self) -> None:
        """Drop the oldest item that has a weight."""
        at = next(at for at, (weight, _) in enumerate(self._waiting) if weight)
        weight, _ = self._waiting[at]
        del self._waiting[at]
        self._weight -= weight
        self.dropped += weight

    def _work(self) -> None:
        while True:
            with self._changed:
                self._working = None
                self._changed.notify_all()
                while not self._waiting and not self._ended:
                    self._changed.wait()
                if not self._waiting:
                    self._thread = None
                    return
                weight, work = self._waiting.popleft()
                self._weight -= weight
                self._working = weight
            try:
                work()
            except Exception as error:
                self._fail(error)
            except BaseException as error:  # `sys.exit` in a sink must not leave a queue that nobody empties
                self._fail(SinkExit(told(error)))

    def end(self) -> None:
        """Let the thread go when it has done what waits."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until nothing waits and nothing is being done; whether that is so."""
        if self._process != os.getpid():
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._working is None, max(0.0, seconds))

    def rescue(self, seconds: float) -> None:
        """Wait until nothing that weighs something is left: a sink that only takes its time to close may be left."""
        if self._process == os.getpid():
            with self._changed:
                self._changed.wait_for(
                    lambda: not self._working and not any(weight for weight, _ in self._waiting), max(0.0, seconds)
                )


_QUEUES: weakref.WeakSet[_Queue] = weakref.WeakSet()


def _drain() -> None:
    """Give what still waits a last chance: daemon threads end with the program."""
    deadline = time.monotonic() + _AT_EXIT
    for queue in list(_QUEUES):
        queue.rescue(deadline - time.monotonic())


atexit.register(_drain)
