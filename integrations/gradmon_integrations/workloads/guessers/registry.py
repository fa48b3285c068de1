"""The guessers that the command line knows."""

from __future__ import annotations

from gradmon_integrations.workloads.guessers.activation import ActivationPerturbation
from gradmon_integrations.workloads.guessers.directional import DirectionalDescent
from gradmon_integrations.workloads.guessers.downstream import Downstream, SingularPower, WeightTranspose
from gradmon_integrations.workloads.guessers.guesser import Guesser
from gradmon_integrations.workloads.guessers.mixing import ActivationMixing

GUESSERS: dict[str, Guesser] = {
    "directional": DirectionalDescent(),
    "activation": ActivationPerturbation(),
    "activation-masked": ActivationPerturbation(masked=True),
    "mixing": ActivationMixing(),
    "weight-transpose": WeightTranspose(),
    "downstream": Downstream(1),
    "downstream-2": Downstream(2),
    "downstream-uniform": Downstream(1, noise="uniform"),
    "singular-power-2": SingularPower(2.0),
    "singular-power-4": SingularPower(4.0),
}
"""By name. Self-sharpening is "downstream-uniform" with ``exact_last=True``."""
