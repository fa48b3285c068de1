"""Samplers of weight and input perturbations."""

from __future__ import annotations

from gradmon.perturbations import inputs as inputs
from gradmon.perturbations import weights as weights
