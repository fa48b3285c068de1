"""Functions that are named on a command line: ``script.py:function`` or ``package.module:function``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gradmon._errors import ArgumentError, GradmonError


def load(target: str) -> Callable[[], Any]:
    """The function of this name, made to say what went wrong where it fails.

    Args:
        target: ``script.py:function``, or ``package.module:function``.

    Returns:
        A function without arguments; it raises `GradmonError` where the one that was named raises anything.

    Raises:
        ArgumentError: There is no such script, module or function.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ArgumentError("target", "be like script.py:function or package.module:function", repr(target))
    module = _script(Path(where)) if where.endswith(".py") else _module(where)
    function = getattr(module, name, None)
    if not callable(function):
        raise ArgumentError("target", f"name a function of {where}", repr(name))

    def call() -> Any:
        try:
            return function()
        except Exception as error:
            raise GradmonError(f"{target} failed: {type(error).__name__}: {error}") from error

    return call


def _script(path: Path) -> ModuleType:
    """A script as a module of its own, which finds what lies beside it, as when it is run."""
    if not path.is_file():
        raise ArgumentError("target", "name a script that is there", path)
    name = f"_gradmon_preflight_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ArgumentError("target", "name a Python script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickles of the script look for it
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise GradmonError(f"{path} failed: {type(error).__name__}: {error}") from error
    return module


def _module(name: str) -> ModuleType:
    """A module, looked for in the working directory, too."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ArgumentError("target", f"name a module that can be imported ({error})", name) from error
