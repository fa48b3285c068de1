"""What the tests of a trainer are given."""

import importlib

import pytest


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"], scope="module")
def pl(request):
    for name in ("lightning.pytorch", "pytorch_lightning"):  # both, before the callback is asked for
        importlib.import_module(name)
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def callback():
    for name in ("lightning.pytorch", "pytorch_lightning"):
        importlib.import_module(name)
    return importlib.import_module("gradmon_integrations.callbacks.lightning").GradmonCallback


@pytest.fixture(scope="module")
def watching():
    return importlib.import_module("gradmon_integrations.callbacks.transformers")


@pytest.fixture(autouse=True)
def no_precision_of_another_test(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # to which the arguments of a Trainer leave theirs
