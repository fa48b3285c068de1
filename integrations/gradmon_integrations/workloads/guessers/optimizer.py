"""An optimizer that guesses its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradmon._errors import ArgumentError
from gradmon_integrations.workloads.guessers.guesser import Guesser
from gradmon_integrations.workloads.guessers.keeper import Keeper
from gradmon_integrations.workloads.guessers.passes import Passes
from gradmon_integrations.workloads.guessers.settings import Normalize, Settings


class GuessedGradient(Optimizer):
    """Trains by guessed gradients, with the steps of another optimizer.

    ``loss = optimizer.step(closure)``: the closure runs the model on the batch and returns one loss per example, (B,),
    or a scalar (which takes B passes with guesses at pre-activations, see `estimate_gradient`). It calls neither
    `backward` nor `zero_grad`, is called once or a few times, and must do the same each time; random numbers and
    buffers are put back between the calls, so that a step leaves them as one forward pass does. What is found out about
    the model is kept from step to step, as by `Estimator`. The estimate is in ``parameter.grad`` after the step;
    parameters that the base does not hold, and frozen ones, are left alone.

    Parameter groups, state and schedulers are those of an ordinary optimizer: the groups and the state are the base's
    own. Hooks go to the base, around whose step the gradients are there. It can be given to `gradmon.Monitor` as any
    other: with a loss, the monitor's own metrics are those of the true gradient.

    Args:
        base: The optimizer that makes steps of the gradients; built on the model's parameters.
        guesser: What to guess.
        model: The model.
        examples: How many examples a batch has, for a closure that returns a scalar; None to count the losses.
        guesses: As in `estimate_gradient`; so are the following.
        per_layer: Likewise.
        exact_last: Likewise.
        normalize: Likewise.
        hold: Likewise.
        generator: Likewise. Its state is part of `state_dict`.

    Raises:
        ArgumentError: An argument is not what it must be.
    """

    def __init__(
        self,
        base: Optimizer,
        guesser: Guesser,
        model: nn.Module,
        *,
        examples: int | None = None,
        guesses: int = 1,
        per_layer: bool = False,
        exact_last: bool = False,
        normalize: Normalize = "none",
        hold: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(base, Optimizer):
            raise ArgumentError("base", "be a torch.optim.Optimizer", type(base).__name__)
        if isinstance(base, torch.optim.LBFGS):
            raise ArgumentError("base", "make a step of one gradient", "LBFGS, which asks for several")
        if examples is not None and (isinstance(examples, bool) or not isinstance(examples, int) or examples < 1):
            raise ArgumentError("examples", "be an integer of at least 1, or None", examples)
        self._keeper = Keeper(Settings(guesser, guesses, per_layer, exact_last, normalize, hold))
        self.base, self.model, self.generator = base, model, generator
        self._examples = examples
        self._share()

    def _share(self) -> None:
        base = cast("Any", self.base)
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults
        # As after unpickling: the parameter groups are the base's, so there are none to add.
        super().__setstate__({})
        self._optimizer_state_dict_pre_hooks = base._optimizer_state_dict_pre_hooks
        self._optimizer_state_dict_post_hooks = base._optimizer_state_dict_post_hooks
        self._optimizer_load_state_dict_pre_hooks = base._optimizer_load_state_dict_pre_hooks
        self._optimizer_load_state_dict_post_hooks = base._optimizer_load_state_dict_post_hooks

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "model", "generator", "_keeper", "_examples")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add one to the base."""
        self.base.add_param_group(param_group)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Guess the gradient, and make the base's step of it.

        Args:
            closure: Runs the model, and returns one loss per example, (B,), or a scalar.

        Returns:
            The batch loss before the step, a scalar.

        Raises:
            ArgumentError: There is no closure, or it returns something else.
        """
        if closure is None:
            raise ArgumentError("closure", "be given: it returns one loss per example", None)
        if not callable(closure):
            raise ArgumentError("closure", "be callable", type(closure).__name__)
        with Passes.of(self.model, closure, self._examples) as passes:
            found, value = self._keeper.estimate(passes, self.generator)
        held = {id(p) for group in self.param_groups for p in group["params"]}
        for name, parameter in passes.parameters.items():
            if id(parameter) in held:
                parameter.grad = found[name]
        self.base.step()
        return value.mean()

    step.hooked = True  # type: ignore[attr-defined]  # torch would have the hooks of all optimizers called twice

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """A hook on the base's step: the one place where the gradients are there and the weights still the old ones."""
        return self.base.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """A hook on the base's step."""
        return self.base.register_step_post_hook(hook)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and that of the generator."""
        state = self.base.state_dict()
        state["generator"] = None if self.generator is None else self.generator.get_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        state = dict(state_dict)
        generator = state.pop("generator", None)
        self.base.load_state_dict(state)
        self._share()
        if self.generator is not None and generator is not None:
            self.generator.set_state(generator)
