"""Per-example gradients of any model."""

from __future__ import annotations

from gradmon.per_example.active import Experience as Experience
from gradmon.per_example.active import Pass as Pass
from gradmon.per_example.active import PerExample as PerExample
from gradmon.per_example.active import find_entry as find_entry
from gradmon.per_example.arrival import TOO_LARGE as TOO_LARGE
from gradmon.per_example.capture import Entry as Entry
from gradmon.per_example.collected import PerExampleResult as PerExampleResult
from gradmon.per_example.cut import Cut as Cut
from gradmon.per_example.cut import Rule as Rule
from gradmon.per_example.listener import Listener as Listener
from gradmon.per_example.recording import Wanted as Wanted
from gradmon.per_example.rules import RULES as RULES
from gradmon.per_example.rules import Rules as Rules
