"""Gradients estimated from directional derivatives along guesses: forward mode alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradmon._types import Batch, Loss
from gradmon_integrations.workloads.guessers.guesser import Guesser
from gradmon_integrations.workloads.guessers.keeper import Keeper
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.settings import Normalize, Settings


def estimate_gradient(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    guesser: Guesser,
    *,
    guesses: int = 1,
    per_layer: bool = False,
    exact_last: bool = False,
    normalize: Normalize = "none",
    generator: torch.Generator | None = None,
    hold: bool = False,
) -> dict[str, Tensor]:
    """Estimate the gradient of the batch loss by forward-mode automatic differentiation.

    A guess y_b at the pre-activations z of all layers gives, by one Jacobian-vector product for each example, its
    directional derivative ``d_b = sum_i dl_b/dz_i . y_ib``, and with the inputs x_i of the layers the estimate
    ``g^_i = 1/B sum_b d_b y_ib x_ib^T`` (arXiv 2312.04709, section 2). Where ``E[y y^T] = I`` its mean is the gradient.
    All examples run in one pass, since they do not interact; a pass of its own makes sure of that. There is no backward
    pass and no autograd graph: a plain pass finds the layers, and where one guess can be made as a pass goes along,
    another one with tangents gives d, and keeps the inputs. Otherwise one more draws the same guesses again, so that
    nothing of the size of a pass is held meanwhile.

    *Layers* are calls of `linear`, of convolutions and of products with a matrix that is a parameter, on tensors whose
    first dimension counts the examples, as modules or functions. Parameters of other kinds (of normalisations,
    embeddings, scales), and those of layers whose rows are not examples, are guessed directly in the same pass, by
    independent normal numbers for the whole batch: without bias, too. A parameter used several times gets the sum of
    its uses. Frozen ones are left out; those that the loss does not depend on get zeros.

    The model, its buffers and modes are left as found; without a generator, one number is drawn from torch's global
    one.

    Args:
        model: The model, in the mode in which it is to be measured.
        loss: ``loss(model, batch)``: one value per example, (B,), of which the mean counts, or a scalar. A scalar does
            not tell the examples apart, so that guesses at pre-activations then take B passes instead of one.
        batch: The batch.
        guesser: What to guess.
        guesses: How many guesses are averaged.
        per_layer: Whether every layer gets a pass of its own instead of sharing one: as many times the work, and no
            noise from other layers.
        exact_last: Whether the last layer to be called gets its true gradient, by one tangent for each of its
            outputs, and is left out of the guess. The paper takes the error vector of the last layer as known.
        normalize: ``"example"`` scales each example's guess, taken over all layers' pre-activations, to length 1 (and
            a guess of weights as a whole), which makes the estimate a projection of the gradient; ``"none"`` leaves it.
        generator: Where the seeds of the guesses come from; None for torch's global generator, of which one number is
            used before the model draws any of its own.
        hold: Whether to hold the guesses until their derivatives are known, instead of making them a second time:
            faster, with the memory of a backward pass. Less than 16 MiB are held in any case.

    Returns:
        One tensor per trainable parameter, by its name in ``model.named_parameters()``.

    Raises:
        ArgumentError: An argument is not what it must be; or examples interact, as under BatchNorm in training mode,
            and the loss is one value per example.
    """
    settings = Settings(guesser, guesses, per_layer, exact_last, normalize, hold)
    with Passes(model, loss, batch) as passes:
        return Keeper(settings).estimate(passes, generator)[0]


class Estimator:
    """`estimate_gradient` for one model and many batches: what an estimate finds out about the model is kept.

    ``estimator = Estimator(model, loss, guesser)``, and then ``estimator(batch)``. The layers, and that examples do not
    interact, are found once, and seen to anew after 100 estimates. Every pass is compared, function by function, with
    the one that was kept: where other functions or layers are called, or in other modes, or other parameters are there,
    trained or read, it does not count, and everything is found anew. The numbers are those of `estimate_gradient` with
    the same seeds.

    Args:
        model: The model.
        loss: As in `estimate_gradient`; so are the following.
        guesser: Likewise.
        guesses: Likewise.
        per_layer: Likewise.
        exact_last: Likewise.
        normalize: Likewise.
        hold: Likewise.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        guesser: Guesser,
        *,
        guesses: int = 1,
        per_layer: bool = False,
        exact_last: bool = False,
        normalize: Normalize = "none",
        hold: bool = False,
    ) -> None:
        self._model, self._loss = model, loss
        self._keeper = Keeper(Settings(guesser, guesses, per_layer, exact_last, normalize, hold))

    def __call__(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """An estimate, one tensor per trainable parameter.

        Args:
            batch: The batch.
            generator: As in `estimate_gradient`.

        Raises:
            ArgumentError: See `estimate_gradient`.
        """
        with Passes(self._model, self._loss, batch) as passes:
            return self._keeper.estimate(passes, generator)[0]
