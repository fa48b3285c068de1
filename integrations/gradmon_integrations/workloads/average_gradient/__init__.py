"""The average-gradient optimizer: the base optimizer's step lengths, with the signs of the gradient over the step."""

from gradmon_integrations.workloads.average_gradient.measurement import (
    relative_difference_metric as relative_difference_metric,
)
from gradmon_integrations.workloads.average_gradient.optimizer import AverageGradient as AverageGradient
from gradmon_integrations.workloads.average_gradient.slopes import FUNCTIONS as FUNCTIONS
from gradmon_integrations.workloads.average_gradient.slopes import secant as secant
