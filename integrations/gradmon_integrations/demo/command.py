"""The command: sets up the runs, shows them, and says what came of it."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gradmon._errors import GradmonError
from gradmon.cli import Command

if TYPE_CHECKING:
    from gradmon_integrations.demo.runs import Run
    from gradmon_integrations.demo.view import View
