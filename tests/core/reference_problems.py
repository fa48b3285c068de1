"""What the references and the zoo are checked with."""

import numpy as np
import pytest

from tests import zoo

SEED = 0
BY_NAME = pytest.mark.parametrize("case", zoo.CASES, ids=lambda case: case.name)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
