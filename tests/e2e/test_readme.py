"""The README's commands, as a new user would paste them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.e2e
def test_the_python_blocks_run_one_after_the_other(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    (tmp_path / "pasted.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "pasted.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Reading(name='step_ratio'" in done.stdout
    assert re.search(r"^weight_condition \d", done.stdout, re.MULTILINE)
    assert any((tmp_path / "runs" / "first").glob("events.out.tfevents.*"))


def test_every_metric_is_in_the_readme():
    from gradmon import METRICS

    text = README.read_text()
    assert [name for name in METRICS if f"`{name}`" not in text] == []


def test_the_two_commands_are_in_the_readme():
    text = README.read_text()
    assert "make demo" in text
    assert "make test" in text
