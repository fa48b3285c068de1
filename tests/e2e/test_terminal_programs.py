"""Whole training programs in a terminal: what a person sees while they run, and what is left when they end."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.integrations.emulator import Terminal, python

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")]

PRELUDE = """\
import sys, time, torch
from torch import nn
from gradmon import Monitor, every

model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr={rate})
torch.manual_seed(0)
inputs = torch.randn(64, 8)
batch = inputs, inputs.sum(1, keepdim=True)

def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])

def step():
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()
    monitor.step(batch)

from gradmon_integrations.sinks.terminal import TerminalSink
options = {{"run": "mlp", "schedule": every(2), "on_alert": None}}
monitor = Monitor(model, optimizer, loss_of, sinks=[TerminalSink(pause=0.2)], **options)
"""

LOOP = """\
for epoch in range(3):
    for _ in range(20):
        step()
    print("epoch", epoch, "done")
monitor.close()
print("the end")
"""

ERROR = """\
def train():
    for number in range(40):
        step()
        if number % 10 == 0:
            print("step", number)
        if number == 25:
            raise RuntimeError("the disk is full")
"""

BARS = """\
from tqdm import tqdm
for epoch in tqdm(range(2), desc="epoch"):
    for part in tqdm(range(3), desc="part", leave=False):
        for _ in tqdm(range(10), desc="batch", leave=False):
            step()
            time.sleep(0.02)
monitor.close()
print("the end")
"""

RICH = """\
from rich.progress import Progress
with Progress() as progress:
    epochs, batches = progress.add_task("epochs", total=3), progress.add_task("batches", total=20)
    for epoch in range(3):
        progress.reset(batches)
        for number in range(20):
            step()
            time.sleep(0.02)
            progress.advance(batches)
        print("epoch", epoch, "done")
        progress.advance(epochs)
monitor.close()
print("the end")
"""


def program(tmp_path, body, rate=0.01):
    path = tmp_path / "train.py"
    path.write_text(PRELUDE.format(rate=rate) + body)
    return python(path)


def usable(terminal):
    """Whether a shell that comes back finds the terminal as it should be."""
    return not terminal.screen.cursor.hidden and terminal.screen.cursor.x == 0


ENVIRON = {"OMP_NUM_THREADS": "1"}


def test_a_loop_that_prints(tmp_path):
    terminal = Terminal(100, 40)
    text = terminal.play(program(tmp_path, LOOP), ENVIRON)
    printed = [line for line in text.splitlines() if line.startswith(("epoch", "the end"))]
    assert printed == ["epoch 0 done", "epoch 1 done", "epoch 2 done", "the end"]
    (title,) = re.findall("^── gradmon.*$", text, re.MULTILINE)
    assert re.match(r"── gradmon mlp step 60  Sequential SGD ─+ finished ──$", title)
    assert re.search(r"  loss +\S+ [▁-█]{5,}", text)
    assert text.index("epoch 2 done") < text.index("── gradmon") < text.index("the end")
    assert usable(terminal)


def test_an_error_in_a_block(tmp_path):
    terminal = Terminal(100, 40)
    terminal.start(program(tmp_path, ERROR + "with monitor:\n    train()\n"), ENVIRON)
    assert terminal.end() == 1
    text = terminal.text
    assert re.search(r"── gradmon mlp step 26 .*ended by an error ──", text)
    assert text.index("ended by an error") < text.index("Traceback (most recent call last):")
    assert terminal.lines[-1] == "RuntimeError: the disk is full"
    assert [line for line in terminal.lines if line.startswith("step ")] == ["step 0", "step 10", "step 20"]
    assert usable(terminal)


def test_an_error_without_a_block(tmp_path):
    terminal = Terminal(100, 40)
    terminal.start(program(tmp_path, ERROR + "train()\n"), ENVIRON)
    assert terminal.end() == 1
    lines = terminal.lines
    error = lines.index("RuntimeError: the disk is full")
    assert any(line.startswith("Traceback") for line in lines[:error])
    # Nobody has told the sink how it ended: the last state is left behind at the exit of the process.
    assert lines[error + 1].startswith("── gradmon mlp step 26 ")
    assert sum("── gradmon" in line for line in lines) == 1
    assert usable(terminal)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupted_or_killed(number, status, tmp_path):
    terminal = Terminal(100, 40)
    terminal.start(program(tmp_path, "while True:\n    step()\n    time.sleep(0.01)\n"), ENVIRON)
    terminal.until(lambda: re.search("gradmon mlp step 1[0-9]", terminal.text), 60)
    if number == signal.SIGINT:
        terminal.send(b"\x03")
    else:
        os.kill(terminal.pid, number)
    assert terminal.end() == status
    assert sum("── gradmon" in line for line in terminal.lines) == 1
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in terminal.text
    assert usable(terminal)


def test_nested_bars_of_tqdm(tmp_path):
    terminal = Terminal(110, 60)
    terminal.start(program(tmp_path, BARS, rate=2.0), ENVIRON)
    terminal.until(lambda: re.search(r"epoch:  50%.*\npart:  \d+%.*\nbatch:", terminal.text), 60)
    seen = terminal.lines
    assert [line.split(":")[0] for line in seen[-3:]] == ["epoch", "part", "batch"]
    assert terminal.end() == 0
    assert re.search("^gradmon mlp step 2  loss ", terminal.text, re.MULTILINE)
    assert re.search("^gradmon mlp step [0-9]+  (warning|critical) ", terminal.text, re.MULTILINE)
    assert sum(line.startswith(("epoch:", "part:", "batch:")) for line in terminal.lines) == 1
    assert sum("── gradmon" in line for line in terminal.lines) == 1
    assert terminal.lines[-1] == "the end"
    assert usable(terminal)


def test_progress_of_rich(tmp_path):
    terminal = Terminal(110, 60)
    terminal.start(program(tmp_path, RICH), ENVIRON)
    bars = [["epochs"], ["batches"]]
    # Between a line above the bars and the bars themselves there is a moment without them.
    terminal.until(
        lambda: "epoch 1 done" in terminal.text and [x.split()[:1] for x in terminal.lines[-2:]] == bars,
        60,
    )
    assert terminal.end() == 0
    text = terminal.text
    assert [text.count(f"epoch {n} done") for n in range(3)] == [1, 1, 1]
    assert len(re.findall("^(?:epochs|batches) ", text, re.MULTILINE)) == 2
    assert re.search("^gradmon mlp step [0-9]+  loss ", text, re.MULTILINE)
    assert sum("── gradmon" in line for line in terminal.lines) == 1
    assert terminal.lines[-1] == "the end"
    assert usable(terminal)


def test_output_to_a_pipe(tmp_path):
    done = subprocess.run(
        program(tmp_path, LOOP), capture_output=True, text=True, timeout=120, env={**os.environ, **ENVIRON}
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.startswith("gradmon mlp step 2  loss ")
    assert re.search("^gradmon mlp step 60  loss .*  finished$", done.stdout, re.MULTILINE)


def test_what_is_looked_up_by_name_costs_no_import():
    """The command line asks for every command that there is, and a monitor for the class of a sink."""
    modules = "gradmon_integrations.watch.command", "gradmon_integrations.sinks.terminal"
    check = "import sys; print({'rich', 'prometheus_client'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(modules)}; {check}"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "set()\n", done.stderr


def test_watch_follows_a_training(tmp_path):
    body = """\
from gradmon.sinks import JsonlSink
monitor = Monitor(model, optimizer, loss_of, sinks=[JsonlSink(sys.argv[1])], **options)
with monitor:
    for _ in range(100):
        step()
        time.sleep(0.02)
"""
    path = tmp_path / "runs" / "mlp.jsonl"
    terminal = Terminal(100, 45)
    watch = "import sys; from gradmon.cli import main; sys.exit(main(['watch', 'runs', '--interval', '0.2']))"
    terminal.start([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {watch}"], ENVIRON)
    terminal.until(lambda: "runs does not exist. Trying again." in terminal.text, 60)
    with subprocess.Popen([*program(tmp_path, body), str(path)], env={**os.environ, **ENVIRON}) as training:
        terminal.until(lambda: re.search(r"^mlp +running +[1-9]", terminal.text, re.MULTILINE), 60)
        terminal.until(lambda: re.search(r"^mlp +finished", terminal.text, re.MULTILINE), 60)
        assert training.wait(30) == 0
    assert re.search(r"^ *loss +low +\S+ +[▁-█]{10,}", terminal.text, re.MULTILINE)
    time.sleep(0.1)
    terminal.send(b"\x03")
    assert terminal.end() == 130
    assert terminal.raw.rindex(b"finished") > terminal.raw.rindex(b"\x1b[?1049l")
    assert usable(terminal)
