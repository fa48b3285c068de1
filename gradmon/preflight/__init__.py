"""What can be said before the first step, and the advice.

`gradmon.preflight` is the function; the modules of this package are imported by their full names.
"""

from __future__ import annotations

from gradmon.preflight.causes import Cause as Cause
from gradmon.preflight.initialisation import Reinitialization as Reinitialization
from gradmon.preflight.initialisation import reinitialize as reinitialize
from gradmon.preflight.look import Look as Look
from gradmon.preflight.suggestion import LearningRates as LearningRates
from gradmon.preflight.suggestion import suggest_lr as suggest_lr
from gradmon.preflight.verdict import Preflight as Preflight
from gradmon.preflight.verdict import preflight as preflight
