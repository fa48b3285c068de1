"""Trainers are imported by whoever asks for one of them, and by nobody else."""

from __future__ import annotations

import importlib
from typing import Any

from gradmon import GradmonError


def framework(name: str, extra: str) -> Any:
    """A module of a trainer.

    Args:
        name: Its name.
        extra: The extra of gradmon that installs it.

    Returns:
        The module.

    Raises:
        GradmonError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise GradmonError(f'This callback needs {name} ({error}): pip install "gradmon[{extra}]"') from error
