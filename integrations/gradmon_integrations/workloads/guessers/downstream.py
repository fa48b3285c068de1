"""Images of noise under the transposed weights that follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gradmon._errors import ArgumentError
from gradmon._tensors import working
from gradmon_integrations.workloads.guessers.guesser import Needs
from gradmon_integrations.workloads.guessers.noise import Kind, Noise, check_kind
from gradmon_integrations.workloads.guessers.recording import Site


@dataclass(frozen=True)
class WeightTranspose:
    """``y_i = M_i W_{i+1}^T eps`` with eps at the next layer's pre-activations (arXiv 2312.04709, section 2).

    The next layer is the first, in the order of the calls, that reads something that depends on z_i by functions alone:
    in a residual net the first layer of the following block, or the next one of the same block. M_i is the transposed
    Jacobian of these functions: the slope of an activation, and what normalisation, pooling or a change of shape makes
    of a cotangent. At the last layer y is noise. Biased: it sees ``M W^T W M g``.

    Args:
        noise: ``"normal"`` or ``"uniform"``.

    Raises:
        ArgumentError: `noise` is neither.
    """

    needs: Needs = field(default="slopes", init=False, repr=False)
    overall = False
    reach = "next"

    noise: Kind = "normal"

    def __post_init__(self) -> None:
        check_kind(self.noise)

    def guess(self, site: Site, noise: Noise) -> Tensor:
        """Noise at the next layer, one layer back."""
        after = site.following
        if after is None:
            return noise.draw(site.shape, site.like, self.noise)
        return site.back(after.layer.pull(noise.draw(after.shape, after.like, self.noise), after.input_shape))


@dataclass(frozen=True)
class Downstream:
    """``y_i = M_i W_{i+1}^T M_{i+1} ... eps``, from behind the l-th layer that follows (arXiv 2312.04709, section 2).

    eps is at the input of the layer after those l, that is at x_{i+l+1}: one layer downstream is
    ``M_i W_{i+1}^T M_{i+1} eps``. Where the net ends before, eps is at the last layer's z, so that at the
    last layer but one this is `WeightTranspose`. For next layer and M see there. Biased.

    Args:
        layers: l, at least 1.
        noise: ``"normal"`` or ``"uniform"``.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    needs: Needs = field(default="slopes", init=False, repr=False)
    overall = False
    reach = "any"

    layers: int = 1
    noise: Kind = "normal"

    def __post_init__(self) -> None:
        check_kind(self.noise)
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1:
            raise ArgumentError("layers", "be an integer of at least 1", self.layers)

    def guess(self, site: Site, noise: Noise) -> Tensor:
        """Noise some layers later, brought back."""
        chain = [site]
        while len(chain) <= self.layers and chain[-1].following is not None:
            chain.append(chain[-1].following)
        last = chain[-1]
        end = last.following
        if end is None:
            y = noise.draw(last.shape, last.like, self.noise)
        else:
            y = last.back(noise.draw(end.input_shape, end.like, self.noise))
        for before, after in zip(reversed(chain[:-1]), reversed(chain[1:]), strict=True):
            y = before.back(after.layer.pull(y, after.input_shape))
        return y


@dataclass(frozen=True)
class SingularPower:
    """`WeightTranspose` with the singular values of the next weight raised to a power (arXiv 2312.04709, section 3).

    ``W = U S V^T`` becomes ``s_1 U (S / s_1)^p V^T``, s_1 the largest, so that p = 1 is W itself and larger p narrow
    the guess to its strongest directions. A convolution's kernel is taken as the matrix (out, rest).

    Args:
        power: p, at least 0.
        noise: ``"normal"`` or ``"uniform"``.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    needs: Needs = field(default="slopes", init=False, repr=False)
    overall = False
    reach = "next"

    power: float
    noise: Kind = "normal"
    _sharpened: WeakKeyDictionary[Site, Tensor] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_kind(self.noise)
        if not self.power >= 0 or self.power == float("inf"):
            raise ArgumentError("power", "be a number of at least 0", self.power)

    def guess(self, site: Site, noise: Noise) -> Tensor:
        """Noise at the next layer, one layer back through the sharpened weight."""
        after = site.following
        if after is None:
            return noise.draw(site.shape, site.like, self.noise)
        if after not in self._sharpened:
            self._sharpened[after] = sharpened(after.layer.weight, self.power)
        drawn = noise.draw(after.shape, after.like, self.noise)
        return site.back(after.layer.pull(drawn, after.input_shape, self._sharpened[after]))


def sharpened(weight: Tensor, power: float) -> Tensor:
    """``s_1 U (S / s_1)^p V^T`` of a weight taken as the matrix (first dimension, rest)."""
    u, s, v = torch.linalg.svd(working(weight.detach().flatten(1)), full_matrices=False)
    largest = s[0]
    if not largest > 0:
        return weight.detach()
    return (u * (largest * (s / largest) ** power) @ v).reshape(weight.shape).to(weight)
