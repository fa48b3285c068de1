"""gradmon watches the gradient while a PyTorch model trains: can it be trusted, why not, and what to change."""

from __future__ import annotations

from gradmon._errors import ArgumentError as ArgumentError
from gradmon._errors import GradmonError as GradmonError
from gradmon._errors import PluginError as PluginError
from gradmon._errors import Unavailable as Unavailable
from gradmon._reading import Alert as Alert
from gradmon._reading import Reading as Reading
from gradmon.masks import Mask as Mask
from gradmon.measure import batch_gradient as batch_gradient
from gradmon.measure import measure as measure
from gradmon.measure import per_example_gradients as per_example_gradients
from gradmon.measure import per_example_gram as per_example_gram
from gradmon.metrics import METRICS as METRICS
from gradmon.metrics import Metric as Metric
from gradmon.metrics import Value as Value
from gradmon.monitor import Monitor as Monitor
from gradmon.preflight import LearningRates as LearningRates
from gradmon.preflight import Preflight as Preflight
from gradmon.preflight import Reinitialization as Reinitialization
from gradmon.preflight import preflight as preflight
from gradmon.preflight import reinitialize as reinitialize
from gradmon.preflight import suggest_lr as suggest_lr
from gradmon.schedules import budget as budget
from gradmon.schedules import every as every
from gradmon.schedules import log_spaced as log_spaced
