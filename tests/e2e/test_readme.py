"""The README's commands, as a new user would paste them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    def anchors(page):
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}

    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_extra_that_is_to_be_installed_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    places = [ROOT / "gradmon", ROOT / "integrations", ROOT / "examples"]
    texts = [*PAGES, *(path for place in places for path in place.rglob("*.py"))]
    named = {
        (str(path.relative_to(ROOT)), extra)
        for path in texts
        for wanted in re.findall(r"pip install[^\n]*gradmon\[([a-z,]+)\]", path.read_text())
        for extra in wanted.split(",")
    }
    assert len(named) > 5
    assert [(path, extra) for path, extra in sorted(named) if extra not in extras] == []
