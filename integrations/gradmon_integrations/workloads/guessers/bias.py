"""What a guesser's estimate converges to: its bias against the number of guesses, and the limit without sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmon._errors import ArgumentError
from gradmon._parameters import layer_of
from gradmon._tensors import wide
from gradmon._types import Batch, Loss
from gradmon_integrations.workloads.guessers.comparing import cosines, true_gradient
from gradmon_integrations.workloads.guessers.estimate import estimate_gradient
from gradmon_integrations.workloads.guessers.guesser import ActivationGuesser, Guesser
from gradmon_integrations.workloads.guessers.noise import Kind
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.recording import Site, Structure


def bias_curve(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    guesser: Guesser,
    counts: Sequence[int],
    *,
    generator: torch.Generator | None = None,
) -> dict[int, float]:
    """The cosine of the mean of n guesses to the true gradient, without the last layer, for each n.

    The last layer gets its true gradient and no guess, as in the paper: its gradient is the largest, and its
    derivative would drown the others'.

    Args:
        model: The model.
        loss: One value per example, (B,), or a scalar.
        batch: The batch.
        guesser: The guesser.
        counts: The numbers of guesses; each mean has guesses of its own.
        generator: As in `estimate_gradient`.
    """
    truth, last = true_gradient(model, loss, batch), last_layer(model, loss, batch)
    found: dict[int, float] = {}
    for count in counts:
        estimate = estimate_gradient(model, loss, batch, guesser, guesses=count, exact_last=True, generator=generator)
        found[count] = cosines(estimate, truth, last).without_last
    return found


def last_layer(model: nn.Module, loss: Loss, batch: Batch) -> str | None:
    """The module of the layer that `exact_last` means: the last to be called; None where there is no layer."""
    with Passes(model, loss, batch) as passes:
        sites = [site for site in passes.record(False, False).sites if site.guessed]
    return layer_of(sites[-1].weight or sites[-1].bias or "") if sites else None


def limit_gradient(
    model: nn.Module, loss: Loss, batch: Batch, guesser: Guesser, *, exact_last: bool = False
) -> dict[str, Tensor]:
    """What the mean of infinitely many guesses is, ``Cov g``, without sampling.

    A guess y is linear in its noise, ``y = T eps``, so that ``E[d y] = T T^T dl/dz = Cov dl/dz`` for each layer and
    example: the columns of T are had by putting each unit vector in the place of the noise. Where each example's guess
    is scaled to length 1, as by `ActivationMixing`, it is ``E[y y^T / ||y||^2] dl/dz``; see `projected_factors`.
    Parameters that are guessed directly, or by guesses of weights, get their true gradient.

    Args:
        model: The model, small: there is one pull for each unit vector and layer.
        loss: One value per example, (B,), or a scalar.
        batch: The batch.
        guesser: The guesser.
        exact_last: As in `estimate_gradient`.

    Returns:
        One tensor per parameter name.
    """
    truth = true_gradient(model, loss, batch)
    if not isinstance(guesser, ActivationGuesser):
        return truth
    with Passes(model, loss, batch) as passes:
        structure = passes.record(True, guesser.needs == "values")
        errors = site_gradients(passes, structure)
        inputs: dict[int, Tensor] = {}
        passes.visit(structure, lambda site, x: inputs.__setitem__(site.number, x.detach().clone()))
        sites = [site for site in structure.sites if site.guessed]
        guessed = sites[:-1] if exact_last else sites
        limits = {site.number: errors[site.number] for site in sites}
        limits |= (_scaled if guesser.overall else _plain)(guesser, guessed, errors)
        names = {name for site in sites for name in (site.weight, site.bias) if name is not None}
        sums = {name: torch.zeros_like(truth[name]) for name in names}
        for site in sites:
            y = limits[site.number]
            if site.weight is not None:
                sums[site.weight] += site.layer.weight_gradient(y, inputs[site.number])
            if site.bias is not None:
                sums[site.bias] += site.layer.bias_gradient(y)
    return {**truth, **sums}


def limit_cosine(model: nn.Module, loss: Loss, batch: Batch, guesser: Guesser) -> float:
    """``cos(Cov g, g)``: what the cosine of the mean of guesses goes to, without the last layer; see `bias_curve`."""
    return cosines(
        limit_gradient(model, loss, batch, guesser, exact_last=True),
        true_gradient(model, loss, batch),
        last_layer(model, loss, batch),
    ).without_last


def site_gradients(passes: Passes, structure: Structure) -> dict[int, Tensor]:
    """The gradient of the batch loss by each layer's z, by backpropagation, by the layer's number.

    Raises:
        ArgumentError: The loss does not depend on the parameters by autograd.
    """
    outputs: dict[int, Tensor] = {}
    with torch.enable_grad():
        value = passes.tapped(structure, lambda site, z: outputs.__setitem__(site.number, z)).mean()
        if not value.requires_grad:
            raise ArgumentError("loss", "have a gradient", "a constant")
        numbers = [number for number, z in outputs.items() if z.requires_grad]
        found = torch.autograd.grad(value, [outputs[number] for number in numbers], allow_unused=True)
    errors = {number: torch.zeros_like(z).detach() for number, z in outputs.items()}
    errors.update({number: part for number, part in zip(numbers, found, strict=True) if part is not None})
    return errors


def projected_factors(variances: Tensor) -> Tensor:
    """``E[v_i e_i^2 / sum_j v_j e_j^2]`` for independent normal e, (..., n): they add up to 1.

    By ``1 / s = int_0^inf exp(-s t) dt`` it is ``int v_i / (1 + 2 t v_i) prod_j (1 + 2 t v_j)^(-1/2) dt``, here by the
    trapezoidal rule over log t, which for such integrands is accurate to about 1e-10.

    Args:
        variances: v, at least 0, not all 0.
    """
    v = variances / variances.amax(-1, keepdim=True)
    total = torch.zeros_like(v)
    logs = torch.linspace(-60, 60, 1201, dtype=v.dtype, device=v.device)
    for t in logs.exp():
        spread = 1 + 2 * t * v
        total += v / spread * (-0.5 * spread.log().sum(-1, keepdim=True)).exp() * t
    return total * (logs[1] - logs[0])


def _columns(guesser: ActivationGuesser, site: Site) -> Iterator[Tensor]:
    """The columns of T, each of z's shape."""
    place = 0
    while True:
        unit = _Unit(place)
        column = guesser.guess(site, unit)
        if place >= unit.size:
            return
        yield column
        place += 1


def _plain(guesser: ActivationGuesser, sites: Sequence[Site], errors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """``T T^T e`` for each example."""
    found: dict[int, Tensor] = {}
    for site in sites:
        error = errors[site.number]
        total = torch.zeros_like(error)
        for column in _columns(guesser, site):
            along = (column * error).flatten(1).sum(1)
            total += column * along.reshape(-1, *[1] * (error.ndim - 1))
        found[site.number] = total
    return found


def _scaled(guesser: ActivationGuesser, sites: Sequence[Site], errors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """``E[y y^T / ||y||^2] e`` for each example, y taken over all layers, whose noise is independent."""
    spectra = {
        site.number: torch.linalg.svd(wide(torch.stack(list(_columns(guesser, site)), 1)).flatten(2), False)
        for site in sites
    }
    if not spectra:
        return {}
    factors = projected_factors(torch.cat([values.square() for _, values, _ in spectra.values()], 1))
    found: dict[int, Tensor] = {}
    start = 0
    for number, (_, values, directions) in spectra.items():
        part = factors[:, start : start + values.shape[1]]
        start += values.shape[1]
        error = errors[number]
        along = torch.einsum("bkn,bn->bk", directions, wide(error).flatten(1))
        found[number] = torch.einsum("bk,bkn->bn", part * along, directions).to(error.dtype).reshape(error.shape)
    return found


@dataclass
class _Unit:
    """The unit vector of one place in the place of noise, the same one for each example."""

    place: int
    size: int = 0

    def draw(self, shape: Sequence[int], like: Tensor, kind: Kind) -> Tensor:
        """Zeros but for a one in each row."""
        found = torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
        rows = found.reshape(shape[0], -1)
        self.size = rows.shape[1]
        rows[:, self.place % self.size] = 1
        return found
