"""Optimizers whose steps take several backward passes: a monitor cannot look at the training's own passes then."""

import pytest
import torch
from torch import nn

from gradmon import ArgumentError, Monitor


class Twice(torch.optim.SGD):
    several_passes = True


def test_a_monitor_of_such_an_optimizer_needs_a_loss():
    model = nn.Linear(2, 1)
    message = r"`loss` must be given with Twice, whose steps take several backward passes\. Got None\."
    with pytest.raises(ArgumentError, match=message):
        Monitor(model, Twice(model.parameters(), lr=0.1))
    with Monitor(model, Twice(model.parameters(), lr=0.1), lambda model, batch: model(batch).mean()) as monitor:
        monitor.step(torch.ones(3, 2))
