"""Several processes on this machine that train together, each of which is stopped by its own object."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(work: Callable[..., Any], folder: Path, *given: Any, size: int = 2, limit: float = 60.0) -> list[Any]:
    """What ``work(rank, *given)`` returns on each of some ranks.

    Raises:
        AssertionError: It failed on one, or took longer than the limit, in seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    files = [folder / f"rank-{rank}-{work.__name__}" for rank in range(size)]
    processes = [
        context.Process(target=_begin, args=(work, rank, size, port, files[rank], given)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"ranks {late} were not done after {limit} s"
    found = [pickle.loads(file.read_bytes()) if file.exists() else (None, None) for file in files]
    for rank, (_, error) in enumerate(found):
        assert error is None, f"rank {rank}:\n{error}"
    return [result for result, _ in found]


def _begin(work: Callable[..., Any], rank: int, size: int, port: int, file: Path, given: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        found = work(rank, *given), None
    except BaseException:
        found = None, traceback.format_exc()
    file.write_bytes(pickle.dumps(found))
    if found[1] is None:
        dist.destroy_process_group()
    else:
        os._exit(1)  # nobody waits for those who have failed
