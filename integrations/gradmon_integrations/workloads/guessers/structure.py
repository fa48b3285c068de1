"""What makes gradients guessable: low rank of the weights, the span of the activations, the spectra of Jacobians."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradmon._errors import ArgumentError, Unavailable
from gradmon._tensors import wide
from gradmon._types import Batch, Loss
from gradmon_integrations.workloads.guessers.bias import site_gradients
from gradmon_integrations.workloads.guessers.passes import Passes


def effective_rank(matrix: Tensor) -> float:
    """``exp(H(p))`` with p the singular values over their sum (Roy & Vetterli 2007).

    Between 1 and the smaller dimension; n for n equal singular values; unchanged by scaling. Tensors of more than two
    dimensions count as (first dimension, rest).

    Raises:
        ArgumentError: The tensor has fewer than two dimensions.
        Unavailable: It is zero, or not finite.
    """
    if matrix.ndim < 2:
        raise ArgumentError("matrix", "have at least two dimensions", tuple(matrix.shape))
    flat = wide(matrix.detach()).flatten(1)
    if not bool(flat.isfinite().all()):
        raise Unavailable("non-finite weights")
    values = torch.linalg.svdvals(flat / flat.abs().max()) if bool(flat.any()) else flat.new_zeros(1)
    total = float(values.sum())
    if total == 0:
        raise Unavailable("zero weights")
    shares = values / total
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def effective_ranks(model: nn.Module) -> dict[str, float]:
    """`effective_rank` of every parameter of two or more dimensions, by name; NaN where there is none."""
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            try:
                found[name] = effective_rank(parameter)
            except Unavailable:
                found[name] = math.nan
    return found


def subspace_shares(model: nn.Module, loss: Loss, batch: Batch) -> dict[int, tuple[float, float]]:
    """How much of the gradient lies in the span of the batch's activations, and how much in a random subspace.

    For each layer, with e_b the gradient of the loss by its z and A the post-activations of the batch, (B, n): the
    share ``sum_b ||P e_b||^2 / sum_b ||e_b||^2``, P the projection onto the leading right singular vectors of A, as
    many as the effective rank of A, rounded up; and the mean share of as many random directions, which is r / n (arXiv
    2312.04709, figure 2).

    Args:
        model: The model.
        loss: One value per example, (B,), or a scalar.
        batch: The batch.

    Returns:
        By the layer's number, in the order of the calls; NaN where the gradient or the activations are zero.
    """
    with Passes(model, loss, batch) as passes:
        structure = passes.record(True, True)
        errors = site_gradients(passes, structure)
        found: dict[int, tuple[float, float]] = {}
        for site in structure.sites:
            assert site.value is not None
            activations, error = wide(site.value).flatten(1), wide(errors[site.number]).flatten(1)
            size, total = activations.shape[1], float(error.square().sum())
            if total == 0 or not bool(activations.any()):
                found[site.number] = math.nan, math.nan
                continue
            rank = math.ceil(effective_rank(activations) - 1e-9)
            basis = torch.linalg.svd(activations, full_matrices=False)[2][:rank]
            found[site.number] = float((error @ basis.T).square().sum()) / total, rank / size
        return found


def jacobian_spectra(model: nn.Module, loss: Loss, batch: Batch, layers: int = 4) -> dict[tuple[int, int], Tensor]:
    """The singular values of ``dz_{i+l} / dz_i``, along the layer that follows each (arXiv 2312.04709, figure 5).

    Only what goes through the following layers counts: a shortcut past them does not.

    Args:
        model: The model, small: there is one pull for each of z_{i+l}'s entries.
        loss: The loss, which tells which layers there are.
        batch: The batch.
        layers: The largest l.

    Returns:
        By (i, l): the singular values of each example, in descending order, averaged over the examples.

    Raises:
        ArgumentError: `layers` is not at least 1.
    """
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ArgumentError("layers", "be an integer of at least 1", layers)
    found: dict[tuple[int, int], Tensor] = {}
    with Passes(model, loss, batch) as passes:
        for site in passes.record(True, False).sites:
            chain = [site]
            while len(chain) <= layers and chain[-1].following is not None:
                chain.append(chain[-1].following)
                end = chain[-1]
                size = math.prod(end.shape[1:])
                rows: list[Tensor] = []
                for place in range(size):
                    y = torch.zeros((end.shape[0], size), dtype=end.like.dtype, device=end.like.device)
                    y[:, place] = 1
                    y = y.reshape(end.shape)
                    for before, after in zip(reversed(chain[:-1]), reversed(chain[1:]), strict=True):
                        y = before.back(after.layer.pull(y, after.input_shape))
                    rows.append(y.flatten(1))
                found[site.number, len(chain) - 1] = torch.linalg.svdvals(wide(torch.stack(rows, 1))).mean(0)
    return found
