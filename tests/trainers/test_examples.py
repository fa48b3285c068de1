"""The examples run as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "plain_loop.py": "sklearn",
    "gan.py": "torch",
    "lightning_digits.py": "lightning",
    "transformers_text.py": "transformers",
}
RUNS = {
    "plain_loop.py": ["plain"],
    "gan.py": ["critic", "generator"],
    "lightning_digits.py": ["digits"],
    "transformers_text.py": ["text"],
}


def test_every_example_is_here():
    alone = {path.name for path in EXAMPLES.glob("*.py")} - {"ddp.py"}  # which takes several processes
    assert alone == set(NEEDS) == set(RUNS)


@pytest.mark.e2e
@pytest.mark.parametrize("name", sorted(NEEDS))
def test_an_example_runs_and_reads(name, tmp_path):
    pytest.importorskip(NEEDS[name])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(loss|grad_norm|step_ratio|noise_ratio) +([-+.\w]+)  at step \d+", done.stdout)
    assert len(found) == 4 * len(RUNS[name])
    assert all(float(value) > 0 for _, value in found)
    assert "training goes on" not in done.stderr
    for run in RUNS[name]:
        assert any("tfevents" in path.name for path in (tmp_path / "runs" / run).rglob("*"))
