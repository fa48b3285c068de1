import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

import gradmon
from gradmon import Metric, _plugins
from gradmon._errors import PluginError
from gradmon._evidence import BatchGradient
from gradmon.options import known_metrics
from gradmon.sinks import MemorySink


@pytest.fixture
def install(monkeypatch):
    """Replaces what is installed by the given entry points."""

    def replace(*points: EntryPoint) -> None:
        monkeypatch.setattr(_plugins, "entry_points", lambda group: [p for p in points if p.group == group])

    return replace


def test_own_sinks_are_installed():
    installed = _plugins.entry_points_named(_plugins.SINKS)
    assert {"memory", "jsonl", "log", "tensorboard", "prometheus"} <= installed.keys()
    assert list(installed) == sorted(installed)


def test_own_command_is_installed():
    assert "demo" in _plugins.entry_points_named(_plugins.COMMANDS)


@pytest.mark.parametrize("name", ["memory", "jsonl", "log", "tensorboard", "prometheus"])
def test_own_sinks_load(name):
    assert callable(_plugins.load(_plugins.SINKS, name).from_spec)


def test_load_gives_the_object_itself():
    assert _plugins.load("gradmon.sinks", "memory") is MemorySink


def test_looking_up_imports_nothing(install):
    install(EntryPoint("broken", "no_such_module:Sink", "gradmon.sinks"))
    assert list(_plugins.entry_points_named("gradmon.sinks")) == ["broken"]


def test_first_of_two_with_the_same_name_wins(install):
    install(EntryPoint("x", "json:loads", "gradmon.metrics"), EntryPoint("x", "json:dumps", "gradmon.metrics"))
    assert _plugins.entry_points_named("gradmon.metrics")["x"].value == "json:loads"


def test_unknown_name_lists_what_is_installed(install):
    install(EntryPoint("b", "json:loads", "gradmon.sinks"), EntryPoint("a", "json:dumps", "gradmon.sinks"))
    with pytest.raises(PluginError, match=r"No 'c' in the entry-point group `gradmon\.sinks`\. Installed: a, b\. "):
        _plugins.load("gradmon.sinks", "c")


def test_nothing_installed_says_how_to_install(install):
    install()
    with pytest.raises(PluginError, match=r"Installed: nothing\. .*pip install PACKAGE.*pip install gradmon"):
        _plugins.load("gradmon.commands", "demo")


@pytest.mark.parametrize("value", ["no_such_module:Sink", "json:no_such_name"])
def test_what_cannot_be_imported(install, value):
    install(EntryPoint("x", value, "gradmon.sinks"))
    with pytest.raises(
        PluginError, match=rf"is installed as {value}, but cannot be imported: .*no_such.* Install what"
    ):
        _plugins.load("gradmon.sinks", "x")


def twice_the_loss(seen):
    return 2 * seen.loss


@pytest.fixture
def offered(monkeypatch):
    """Packages that offer a metric, something that is none, and something that cannot be imported."""
    metric = Metric("double", (BatchGradient,), twice_the_loss, "low", "nowhere")
    things = {"double": metric, "nothing": object()}

    def load(group, name):
        if name not in things:
            raise PluginError(f"{name} cannot be imported")
        return things[name]

    points = {name: EntryPoint(name, f"package:{name}", "gradmon.metrics") for name in ("double", "nothing", "broken")}
    module = sys.modules["gradmon.options"]
    monkeypatch.setattr(module, "entry_points_named", lambda group: points)
    monkeypatch.setattr(module, "load", load)


def measured(metrics):
    model = nn.Linear(2, 1)
    return gradmon.measure(model, lambda m, x: m(x).square().mean(), torch.ones(3, 2), metrics=metrics)


def test_a_metric_of_another_package_is_had_by_its_name(offered):
    found = measured(["loss", "double"])
    assert found["double"].value == 2 * found["loss"].value > 0


def test_a_broken_package_hurts_only_who_asks_for_it(offered):
    assert measured(["loss"])["loss"].value > 0
    with pytest.raises(PluginError, match="broken cannot be imported"):
        measured(["broken"])
    with pytest.raises(PluginError, match="must be a Metric"):
        measured(["nothing"])


def test_what_there_is_leaves_the_broken_out(offered, caplog):
    assert set(known_metrics()) == {*gradmon.METRICS, "double"}
    assert len(caplog.records) == 2


def test_an_unknown_metric_is_told_what_there_is(offered):
    with pytest.raises(gradmon.ArgumentError, match=r"`metrics` must be Metric objects or among .*double.*Got 'lost'"):
        measured(["lost"])
