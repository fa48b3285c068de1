"""Per-example gradients of any model."""

from __future__ import annotations

from gradmon.per_example.capture import Entry as Entry
from gradmon.per_example.shares import Pass as Pass
from gradmon.per_example.shares import PerExample as PerExample
from gradmon.per_example.shares import find_entry as find_entry
