"""The part of a model that one optimizer trains, where there are several."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer


class Part(nn.Module):
    """Some of a model's modules under the names that they have there; it is never called itself."""


def trained_by(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """The modules and parameters of a model that an optimizer trains.

    Args:
        model: The model.
        optimizer: The optimizer.

    Returns:
        The model itself where all that is trained belongs to the optimizer; else a `Part`, in which a module of which
        that is true is the model's own.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return _pruned(model, held) or Part()


def name_of(part: nn.Module, number: int) -> str:
    """What to call an optimizer: by the one module that it trains, else by its number."""
    names = {name.split(".")[0] for name, _ in part.named_parameters()} if isinstance(part, Part) else set[str]()
    return names.pop() if len(names) == 1 else f"optimizer{number}"


def _pruned(module: nn.Module, held: set[int]) -> nn.Module | None:
    """What of a module is held; None for nothing."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not any(id(parameter) in held for parameter in trained):
        return None
    if all(id(parameter) in held for parameter in trained):
        return module
    part = Part()
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in held:
            part.register_parameter(name, parameter)
    for name, child in module.named_children():
        kept = _pruned(child, held)
        if kept is not None:
            part.add_module(name, kept)
    return part
