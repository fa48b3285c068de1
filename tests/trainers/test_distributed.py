"""Two processes under each trainer: the readings of the whole batch, written once, and one end for both."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradmon import Monitor, every
from tests.trainers import ddp_program

ROOT = Path(__file__).parents[2]


def plain():
    model, kept = ddp_program.Net(), ddp_program.Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(
        model, optimizer, ddp_program.loss, schedule=every(1), metrics=ddp_program.METRICS, mask=None, alerts=None,
        sinks=[kept],
    ) as monitor:  # fmt: skip
        for batch in ddp_program.parts(0, 1)[:3]:
            optimizer.zero_grad()
            ddp_program.loss(model, batch).backward()
            optimizer.step()
            monitor.step(batch)
    return kept.numbers


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["lightning", "transformers", "accelerate", "ignite"])
def test_two_processes_read_what_one_would(kind, tmp_path):
    pytest.importorskip(kind)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
        "-m", "tests.trainers.ddp_program", kind, str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == second["steps"] == 3, "the alert of the third step stops both"
    assert second["numbers"] == {}, "only the first process writes"
    own = {"probe_seconds", "monitor_overhead"}
    expected = {key: value for key, value in plain().items() if key.split()[0] not in own}
    for key, value in expected.items():
        if math.isfinite(value):
            assert first["numbers"][key] == pytest.approx(value, rel=1e-6), key
        else:
            assert not math.isfinite(first["numbers"][key]), key
    assert first["numbers"]["batch_size 1"] == ddp_program.EXAMPLES
