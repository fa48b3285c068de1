"""Alert rules: reading -> alert, when a rule starts or stops to hold."""

from __future__ import annotations

from gradmon.alerts._rule import CONTEXT as CONTEXT
from gradmon.alerts._rule import Rule as Rule
from gradmon.alerts.course import DeadLayer as DeadLayer
from gradmon.alerts.course import Rising as Rising
from gradmon.alerts.course import Stalled as Stalled
from gradmon.alerts.default import default_rules as default_rules
from gradmon.alerts.drift import Drift as Drift
from gradmon.alerts.limits import Above as Above
from gradmon.alerts.limits import Below as Below
from gradmon.alerts.limits import NonFinite as NonFinite
from gradmon.alerts.limits import Outside as Outside
from gradmon.alerts.stuck import Stuck as Stuck
