"""Importing gradmon imports no framework and no exporter."""

import json
import subprocess
import sys

FOREIGN = ("lightning", "transformers", "sklearn", "rich", "tensorboard", "prometheus_client")


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a statement, without those it started with."""
    program = (
        "import json, sys; before = set(sys.modules); "
        f"{statement}; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_gradmon_imports_nothing_foreign():
    found = modules_after("import gradmon")
    assert {"gradmon", "torch"} <= found
    assert found.isdisjoint(FOREIGN)
    assert "gradmon_integrations" not in found


def test_importing_every_part_of_the_core_imports_nothing_foreign():
    found = modules_after(
        "import gradmon, importlib, pkgutil; "
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(gradmon.__path__, 'gradmon.')]"
    )
    assert "gradmon" in found
    assert found.isdisjoint(FOREIGN)


def test_measuring_imports_nothing_foreign():
    found = modules_after(
        "import torch, gradmon; m = torch.nn.Linear(2, 1); "
        "r = gradmon.measure(m, lambda m, x: m(x).square().mean(), torch.ones(3, 2)); "
        "assert r['grad_norm'].value > 0"
    )
    assert "gradmon" in found
    assert found.isdisjoint(FOREIGN)


def test_the_check_sees_what_is_imported():
    assert modules_after("import colorsys, wave") >= {"colorsys", "wave"}


def test_importing_does_not_touch_the_random_state_or_the_threads():
    program = (
        "import torch; torch.manual_seed(3); before = torch.get_rng_state(), torch.get_num_threads(); import gradmon; "
        "assert torch.equal(before[0], torch.get_rng_state()); assert before[1] == torch.get_num_threads(); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "ok", done.stderr
