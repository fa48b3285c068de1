"""The engines that benchmarks/per_example.py compares: gradmon and its peers.

Every engine does a whole training step of cross-entropy with SGD. A peer is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from overhead import Batch, loss
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon import Mask, Monitor, every

Work = Callable[[], Tensor | None]
"""One training step; the Gram matrix, (B, B), where the engine gives one."""
Engine = Callable[[nn.Module, Batch], Work]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Plain SGD: every engine pays the same for it, and it keeps no state that would blur the memory."""
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def gram_of(rows: Iterable[Tensor]) -> Tensor:
    """The sum of the parameters' Gram matrices, so that no (B, P) matrix is ever put together.

    Args:
        rows: (B, *shape of a parameter) of every parameter.
    """
    flat = (of.flatten(1) for of in rows)
    return torch.stack([of @ of.T for of in flat]).sum(0)


def plain(model: nn.Module, batch: Batch) -> Work:
    """The training step that all others are compared with."""
    return trained(model, batch, optimizer_of(model))


def trained(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A training step, and nothing else."""

    def work() -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    return work


def unarmed(model: nn.Module, batch: Batch) -> Work:
    """A monitor that is there, and has nothing to do."""
    optimizer = optimizer_of(model)
    step = trained(model, batch, optimizer)
    monitor = Monitor(model, optimizer, schedule=every(10**9))

    def work() -> None:
        step()
        monitor.step(batch)

    return work


def gradmon_gram(model: nn.Module, batch: Batch) -> Work:
    """The full Gram matrix from hooks in the training's own backward."""
    step = listening(model, batch, gram=True, moments=False, mask=None)
    return lambda: step().gram


def gradmon_mask(model: nn.Module, batch: Batch) -> Work:
    """Mean and variance of 5 % of the coordinates, from the same hooks."""
    step = listening(model, batch, gram=False, moments=True, mask=Mask(0.05))

    def work() -> None:
        step()

    return work


def listening(model: nn.Module, batch: Batch, **options: object) -> Callable[[], Any]:
    """A training step that is listened to, as every step is where all are scheduled; what was found."""
    from gradmon.per_example import Listener

    optimizer = optimizer_of(model)
    listener = Listener(model, **options)

    def work() -> object:
        optimizer.zero_grad()
        listener.arm()
        loss(model, batch).backward()
        found = listener.collect(batch)
        optimizer.step()
        return found

    return work


def torch_func(model: nn.Module, batch: Batch) -> Work:
    """vmap(grad) and no backward pass: the mean of the rows is the gradient, up to rounding.

    For whoever writes the training step anew: hooks on gradients, accumulation, mixed precision and the very bits of
    the training are gone.
    """
    optimizer = optimizer_of(model)
    rows_of = vmapped(model)

    def work() -> Tensor:
        optimizer.zero_grad()
        rows = rows_of(batch)
        for name, parameter in model.named_parameters():
            parameter.grad = rows[name].mean(0)
        gram = gram_of(rows.values())
        optimizer.step()
        return gram

    return work


def torch_func_beside(model: nn.Module, batch: Batch) -> Work:
    """vmap(grad) beside the training's own backward pass, which stays as it is."""
    optimizer = optimizer_of(model)
    rows_of = vmapped(model)

    def work() -> Tensor:
        optimizer.zero_grad()
        gram = gram_of(rows_of(batch).values())
        loss(model, batch).backward()
        optimizer.step()
        return gram

    return work


def vmapped(model: nn.Module) -> Callable[[Batch], dict[str, Tensor]]:
    """The gradients of the examples' losses, (B, *shape) of every parameter."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def one(weights: dict[str, Tensor], example: Batch) -> Tensor:
        def call(x: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (x,))

        return loss(call, (example[0][None], example[1][None]))  # type: ignore[arg-type]

    rows_of = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))
    return lambda batch: rows_of(parameters, batch)


def opacus(model: nn.Module, batch: Batch) -> Work:
    """`p.grad_sample`, which Opacus fills beside `p.grad`; with "mean" it is already multiplied by B.

    Opacus cannot do `nn.MultiheadAttention`, and its own tool replaces it by its `DPMultiheadAttention` with the same
    weights. In Opacus 1.6.0 that one mixes up heads and tokens where ``batch_first=True``: its G is right for the model
    it has made, but this is not the model that it was given.
    """
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    sampled = GradSampleModule(ModuleValidator.fix(model), loss_reduction="mean")
    optimizer = optimizer_of(sampled)

    def work() -> Tensor:
        optimizer.zero_grad()
        loss(sampled, batch).backward()
        gram = gram_of(parameter.grad_sample for parameter in sampled.parameters())
        for parameter in sampled.parameters():
            parameter.grad_sample = None
        optimizer.step()
        return gram

    return work


def backpack(model: nn.Module, batch: Batch) -> Work:
    """`p.grad_batch`, which BackPACK fills beside `p.grad`; its rows are those of the mean loss, without B."""
    from backpack import backpack as active
    from backpack import extend
    from backpack.extensions import BatchGrad

    extended = extend(model)
    criterion = extend(nn.CrossEntropyLoss())
    optimizer = optimizer_of(extended)
    pieces: list[Tensor] = []

    def reduce(module: nn.Module) -> None:  # called after each module's backward
        # Module by module, as BackPACK advises, to save memory: right where no two modules share a parameter.
        for parameter in module.parameters(recurse=False):
            if not hasattr(parameter, "grad_batch"):
                # BatchGrad itself only warns.
                raise NotImplementedError(f"BatchGrad has no rule for {type(module).__name__}")
            pieces.append(gram_of([parameter.grad_batch]))  # type: ignore[list-item]
            del parameter.grad_batch

    def work() -> Tensor:
        optimizer.zero_grad()
        pieces.clear()
        with active(BatchGrad(), extension_hook=reduce):
            criterion(extended(batch[0]), batch[1]).backward()
        optimizer.step()
        return torch.stack(pieces).sum(0) * len(batch[1]) ** 2

    return work


def torchjd(model: nn.Module, batch: Batch) -> Work:
    """The Gramian from TorchJD's engine, then the backward pass of the mean from the same graph."""
    from torchjd.autogram import Engine as Autogram

    autogram = Autogram(model, batch_dim=0)
    optimizer = optimizer_of(model)

    def work() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none").reshape(len(batch[1]), -1).mean(1)
        gram = autogram.compute_gramian(losses)
        losses.mean().backward()
        optimizer.step()
        return gram

    return work


ENGINES: dict[str, Engine] = {
    "plain step": plain,
    "gradmon, unarmed": unarmed,
    "gradmon, full Gram": gradmon_gram,
    "gradmon, 5 % mask": gradmon_mask,
    "vmap(grad) instead of the backward": torch_func,
    "vmap(grad) beside the backward": torch_func_beside,
    "Opacus": opacus,
    "BackPACK": backpack,
    "TorchJD": torchjd,
}
