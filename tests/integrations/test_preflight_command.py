"""`gradmon preflight script.py:function`."""

import json
import sys

import pytest

from gradmon import cli
from gradmon._errors import ArgumentError, GradmonError
from gradmon_integrations.preflight.command import COMMAND
from gradmon_integrations.preflight.target import load

SCRIPT = """
import dataclasses
import torch
from beside import width

@dataclasses.dataclass
class Settings:
    rate: float = 0.5

def make(rate=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate or Settings().rate)
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    return model, optimizer, loss, (torch.randn(64, 4), torch.randint(3, (64,)))

def wild():
    return make(1e4)

def short():
    return make()[:2]

def broken():
    raise RuntimeError("no data")

number = 3
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("width = 8\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli, "commands", lambda: [COMMAND])
    before = set(sys.modules)
    yield tmp_path / "train.py"
    for name in set(sys.modules) - before:
        if name.startswith("_gradmon_preflight_") or name in ("beside", "train"):
            del sys.modules[name]


def test_it_prints_the_verdict(script, capsys):
    assert cli.main(["preflight", f"{script}:make"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("gradmon preflight: Nothing found that would make this run fail")
    assert "3 classes" in printed


def test_strict_tells_by_its_exit_status(script, capsys):
    assert cli.main(["preflight", f"{script}:make", "--strict"]) == 0
    assert cli.main(["preflight", f"{script}:wild"]) == 0
    assert cli.main(["preflight", f"{script}:wild", "--strict"]) == 2
    assert "Learning rate too high" in capsys.readouterr().out


def test_json_holds_everything(script, capsys):
    assert cli.main(["preflight", f"{script}:wild", "--json", "--budget", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flagged"] is True
    assert found["passes"] <= 20


def test_a_module_that_can_be_imported(script, capsys, monkeypatch):
    monkeypatch.chdir(script.parent)
    assert cli.main(["preflight", "train:make"]) == 0
    assert "gradmon preflight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", r"`target` must be like script\.py:function or package\.module:function\. Got 'nothing'\."),
        ("x.py:a b", r"`target` must be like script\.py:function"),
        ("away.py:make", r"`target` must name a script that is there\. Got away\.py\."),
        ("no.such.module:make", r"`target` must name a module that can be imported"),
    ],
)
def test_targets_that_cannot_be(target, message):
    with pytest.raises(ArgumentError, match=message):
        load(target)


def test_what_the_script_does_wrong_is_told_in_one_line(script, capsys):
    for name, message in {
        "number": "`target` must name a function of",
        "short": "`target` must return (model, optimizer, loss, batches). Got 2 things.",
        "broken": "train.py:broken failed: RuntimeError: no data",
    }.items():
        assert cli.main(["preflight", f"{script}:{name}"]) == 1
        seen = capsys.readouterr()
        assert message in seen.err
        assert seen.err.count("\n") == 1
        assert not seen.out


def test_a_script_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(GradmonError, match=r"bad\.py failed: ZeroDivisionError"):
        load(f"{tmp_path / 'bad.py'}:make")
