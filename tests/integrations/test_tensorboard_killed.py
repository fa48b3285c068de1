import os
import signal
import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PROGRAM = """
import sys, time
import torch
from torch import nn
from gradmon import Monitor, every
from gradmon_integrations.sinks.tensorboard import TensorBoardSink

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
loss = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
sinks = [TensorBoardSink(sys.argv[1], flush_secs=1)]
monitor = Monitor(model, optimizer, loss, schedule=every(1), sinks=sinks, run="killed")
for step in range(1, 100_000):
    batch = torch.randn(16, 8), torch.randn(16, 1)
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()
    monitor.step(batch)
    print(step, flush=True)
    time.sleep(0.05)
"""


@pytest.mark.e2e
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_can_be_read_up_to_its_last_seconds(tmp_path):
    program = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        try:
            started, step = None, 0
            for line in run.stdout:
                started = started or time.monotonic()
                step = int(line)
                if step >= 30 and time.monotonic() - started > 3:
                    break
        finally:
            run.kill()
    assert run.returncode == -signal.SIGKILL
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    losses = accumulator.Scalars("health/loss")
    assert [event.step for event in losses] == list(range(1, len(losses) + 1))
    # A second at 20 steps a second may be missing, and a busy machine gets twice that.
    assert step - 40 <= len(losses) <= step + 1
    assert {"latest/loss", "step-consistency/log10_weight_condition"} <= set(accumulator.Tags()["scalars"])
    assert {"custom_scalars__config__", "run/text_summary"} <= set(accumulator.Tags()["tensors"])
    assert "_hparams_/session_start_info" in accumulator.PluginTagToContent("hparams")
    assert "_hparams_/session_end_info" not in accumulator.PluginTagToContent("hparams")
