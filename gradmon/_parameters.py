"""The trainable parameters of a model as one vector `w`, and the coordinates of it that are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmon._errors import ArgumentError
from gradmon._tensors import Coordinates


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that make up `w`, in order; a tied parameter counts once, under its first name.

    Raises:
        ArgumentError: `model` is not a module, has nothing to train, or a parameter is not real and dense.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError("model", "be a torch.nn.Module", type(model).__name__)
    model = unwrapped(model)
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in found.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ArgumentError("model", "have run once, so that lazy parameters are initialised", f"`{name}` lazy")
        if not parameter.is_floating_point():
            raise ArgumentError("model", "have real floating-point parameters", f"`{name}` of {parameter.dtype}")
    if not found:
        raise ArgumentError("model", "have at least one trainable parameter", "none")
    return found


def wrapper_of(model: nn.Module) -> nn.Module:
    """The `DistributedDataParallel` that a model is wrapped in, also where this is compiled; else the model itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.parallel.DistributedDataParallel) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `DistributedDataParallel`, whose forward pass talks to other ranks; else the model itself."""
    wrapper = wrapper_of(model)
    return wrapper.get_submodule("module") if isinstance(wrapper, nn.parallel.DistributedDataParallel) else model


def check_trains(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Accept an optimizer that trains at least one of some parameters.

    Raises:
        ArgumentError: `optimizer` holds none of them.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in parameters):
        raise ArgumentError("optimizer", "hold parameters of `model`", "none of them")


def layer_of(name: str) -> str:
    """The module that owns a parameter; the parameter's own name where the model itself owns it."""
    return name.rpartition(".")[0] or name


class Weights:
    """`w`: the trainable parameters of a model, and which of its coordinates are looked at.

    Args:
        model: The model.
        picks: For each parameter's name, the coordinates to look at, sorted; None for all.
    """

    def __init__(self, model: nn.Module, picks: dict[str, Tensor] | None = None) -> None:
        named = trainable(model)
        self.names = list(named)
        self.parameters = list(named.values())
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.total = sum(self.sizes)
        self.device = self.parameters[0].device
        dtype = self.parameters[0].dtype
        for parameter in self.parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        self.dtype = dtype
        self.element_size = dtype.itemsize
        # The coarsest type decides how far a difference of gradients can be trusted.
        self.epsilon = max(torch.finfo(parameter.dtype).eps for parameter in self.parameters)
        self.picks = None if picks is None else [picks[name].to(self.device) for name in self.names]
        held = self.sizes if self.picks is None else [pick.numel() for pick in self.picks]
        self._held = held
        layers = [layer_of(name) for name in self.names]
        self.coordinates = self._layout(layers, self.sizes) if picks is None else self._layout(layers, held)
        self.full = self._layout(layers, self.sizes)

    def _layout(self, layers: list[str], held: list[int]) -> Coordinates:
        weight = None
        if held is not self.sizes:
            weight = torch.cat(
                [torch.full((k,), n / max(k, 1), dtype=torch.float64) for n, k in zip(self.sizes, held, strict=True)]
            ).to("cpu" if self.device.type == "mps" else self.device)
        return Coordinates(tuple(zip(layers, held, self.sizes, strict=True)), weight, self.total)

    @property
    def signature(self) -> list[str]:
        """What `w` consists of: each parameter's name, type and shape."""
        pairs = zip(self.names, self.parameters, strict=True)
        return [f"{name} {parameter.dtype} {list(parameter.shape)}" for name, parameter in pairs]

    def values(self) -> list[Tensor]:
        """Copies of the parameters' values, one tensor each."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def flatten(self, parts: Sequence[Tensor]) -> Tensor:
        """One tensor per parameter as one vector, (P,)."""
        return torch.cat([part.detach().reshape(-1).to(self.device, self.dtype) for part in parts])

    def pick(self, parts: Sequence[Tensor]) -> Tensor:
        """One tensor per parameter as the vector of the coordinates that are looked at, (k,)."""
        if self.picks is None:
            return self.flatten(parts)
        flat = [part.detach().reshape(-1).to(self.device, self.dtype) for part in parts]
        return torch.cat([part[pick] for part, pick in zip(flat, self.picks, strict=True)])

    def pick_flat(self, vector: Tensor) -> Tensor:
        """The coordinates that are looked at of a vector, (P,) -> (k,)."""
        if self.picks is None:
            return vector
        return torch.cat([part[pick] for part, pick in zip(self._pieces(vector), self.picks, strict=True)])

    def pick_columns(self, rows: Tensor) -> Tensor:
        """The coordinates that are looked at of rows over all of w, (n, P) -> (n, k)."""
        if self.picks is None:
            return rows
        parts = torch.split(rows, self.sizes, dim=1)
        return torch.cat([part[:, pick] for part, pick in zip(parts, self.picks, strict=True)], dim=1)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """A vector, (P,), as one tensor per parameter, with its shape, type and device.

        Raises:
            ArgumentError: The vector's length is not P.
        """
        if vector.numel() != self.total:
            raise ArgumentError("perturbations", f"have {self.total} columns, one per weight", vector.numel())
        return [
            piece.reshape(parameter.shape).to(parameter.device, parameter.dtype)
            for piece, parameter in zip(self._pieces(vector), self.parameters, strict=True)
        ]

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        return list(torch.split(vector.reshape(-1), self.sizes))
