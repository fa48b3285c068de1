"""What all tests of the core begin and end with."""

import logging
import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers, whatever ran before; afterwards the process is as it was."""
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        yield
    np.random.set_state(states[0])
    random.setstate(states[1])
    while torch.overrides._get_current_function_mode_stack():  # one failing test shall not fail the next
        torch.overrides._pop_mode()


@pytest.fixture
def log():
    """The records of the monitor's logger."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    logger, handler = logging.getLogger("gradmon"), Keep()
    logger.addHandler(handler)
    logger.propagate = False
    yield records
    logger.removeHandler(handler)
    logger.propagate = True


@pytest.fixture
def rng():
    """Random numbers of one's own."""
    return np.random.default_rng(0)
