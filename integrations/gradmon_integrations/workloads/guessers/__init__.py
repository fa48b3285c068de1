"""Gradients guessed from directional derivatives: "How to Guess a Gradient" (arXiv 2312.04709)."""

from __future__ import annotations

from gradmon_integrations.workloads.guessers.activation import ActivationPerturbation as ActivationPerturbation
from gradmon_integrations.workloads.guessers.comparing import STEP_COSINE as STEP_COSINE
from gradmon_integrations.workloads.guessers.directional import DirectionalDescent as DirectionalDescent
from gradmon_integrations.workloads.guessers.downstream import Downstream as Downstream
from gradmon_integrations.workloads.guessers.downstream import SingularPower as SingularPower
from gradmon_integrations.workloads.guessers.downstream import WeightTranspose as WeightTranspose
from gradmon_integrations.workloads.guessers.estimate import Estimator as Estimator
from gradmon_integrations.workloads.guessers.estimate import estimate_gradient as estimate_gradient
from gradmon_integrations.workloads.guessers.matched import CosineMatched as CosineMatched
from gradmon_integrations.workloads.guessers.mixer import LocalMixer as LocalMixer
from gradmon_integrations.workloads.guessers.mixer import local_losses as local_losses
from gradmon_integrations.workloads.guessers.mixing import ActivationMixing as ActivationMixing
from gradmon_integrations.workloads.guessers.optimizer import GuessedGradient as GuessedGradient
from gradmon_integrations.workloads.guessers.registry import GUESSERS as GUESSERS
