"""The example for several processes runs as it is, by itself and under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp.py"


@pytest.mark.e2e
@pytest.mark.parametrize("how", ["python", "torchrun"])
def test_the_example_runs(how: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [sys.executable, *(launcher if how == "torchrun" else []), str(EXAMPLE)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if " at step " in line]
    shown = {line[0]: float(line[1]) for line in lines}
    assert len(lines) == len(shown) == 5, "the first process alone shows its numbers"
    assert shown["batch_size"] == 64
    assert shown["loss"] < 0.5
    assert len(list((tmp_path / "runs" / "ddp").rglob("*tfevents*"))) == 1
    assert "failed; training goes on" not in done.stderr
