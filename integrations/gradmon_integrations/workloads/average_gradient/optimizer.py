"""An optimizer around an optimizer: its step lengths, and the signs of the gradient averaged over the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradmon._errors import ArgumentError, GradmonError
from gradmon_integrations.workloads.average_gradient.averaging import Averaging, place
from gradmon_integrations.workloads.average_gradient.buffers import Buffers
from gradmon_integrations.workloads.average_gradient.graph import check_graph
from gradmon_integrations.workloads.average_gradient.measurement import Measurement
from gradmon_integrations.workloads.average_gradient.randomness import RandomStates
from gradmon_integrations.workloads.average_gradient.recording import Recorder
from gradmon_integrations.workloads.average_gradient.secants import Secants
from gradmon_integrations.workloads.average_gradient.slopes import FUNCTIONS, Function, Slope, is_seen
from gradmon_integrations.workloads.average_gradient.update import Candidate, copy_all, descends
from gradmon_integrations.workloads.average_gradient.watching import Table, Watch

Closure = Callable[[], Tensor]
Linear = Literal["plain", "midpoint"]

_ADVANCED = "The base optimizer's state may have taken up the gradient of this step; the weights are those before it."
_RETURNS = "be a function that returns the loss, and leaves the backward pass to the optimizer"


class AverageGradient(Optimizer):
    """Steps of the base optimizer's lengths, with the signs of the gradient averaged over the step.

    From w the base optimizer goes to w' with the gradient g at w. Then the graph of the loss at w is run backwards
    again, with the derivative of each nonlinearity f replaced by the slope ``(f(x') - f(x)) / (x' - x)`` between its
    inputs x at w and x' at w' (f'(x) where ``|x' - x| <= 1.19e-7``): this gives the average gradient a, and

        ``w <- w - |w' - w| sgn(a)``.

    With n iterations the slopes are taken again, n - 2 more times, to where the last ones led; the lengths are always
    those of the base optimizer's step. 1 iteration is the base optimizer, 2 take about twice the time of its step.

    What is averaged: the functions of `functions`, however they are called (modules, functions, methods, in place).
    What is not: the loss, softmax, attention's products, normalizations, gates' products, pooling, and by default
    functions that are linear in pieces, such as ReLU; they keep their Jacobians at w, and so do linear layers (the
    paper's Eq. 6) unless ``linear="midpoint"`` (Eq. 5). A function of `functions` that the closure applies after the
    model, as part of the loss, is averaged like any other.

    The base optimizer makes its own step once per step, with the ordinary gradient: its state (momentum, averages of
    squares) never sees the average gradient, and weight decay is part of its step's length. Where sgn(a) = sgn(g) its
    step stands as it is, bit by bit, with whatever momentum and weight decay made of it; where not, the weight moves by
    the length of that step, against a (along a in groups with ``maximize=True``). Where a is zero and g is not, it
    stays. Hence a network without nonlinearities trains as with the base optimizer alone, whichever that is. Where a is
    not a number, the base's step stands.

    The closure is called once for each iteration, with the same random numbers (torch's; also numpy's and Python's, if
    it draws from them the first time), and buffers as the first call found them: dropout repeats its mask, and the
    statistics of BatchNorm change once. It must use the same batch, and change no state but buffers. If it fails, in
    whichever call, weights, random states and buffers are put back, and there are no gradients. In the first step of
    all the base's state is put back, too; later it may have taken up the gradient, and a note on the exception says so.

    Beside what the base optimizer takes, one more copy of the weights is kept from step to step, and a step holds the
    inputs, outputs and slopes of the nonlinearities. With more than 2 iterations it holds a second copy, which is kept
    up to 64 MiB. The average gradient of the last iteration is there as a whole while the base optimizer's own scratch
    memory is not; before that, those of weights of more than 131072 elements are used up one by one.

    After the step `grad` holds what the base optimizer left there, the ordinary gradient; what it held before is
    replaced, so there is no need for `zero_grad`. Gradients of other leaves, such as another optimizer's parameters,
    accumulate as by one backward pass. Gradients can be clipped in a hook on the base optimizer:
    ``base.register_step_pre_hook``. Hooks of modules and tensors on gradients are called in each backward pass. One
    process only: gradients are not reduced over processes.

    Source: "Efficient gradient-based algorithm for training deep learning models with many nonlinear activations",
    algorithm 2, whose update lacks the minus, and Eq. 5 to 7.

    Args:
        base_optimizer: Any optimizer that steps without a closure. Its parameter groups and its state are shared.
        iterations: n, at least 1.
        functions: The functions that are averaged, each with its slope. They are functions of torch, or your own if
            ``torch.overrides.wrap_torch_function`` decorates them: calls of others are not seen.
        linear: Whether linear layers keep their Jacobians ("plain") or take those of the step's middle ("midpoint").
        measure: Whether to compare each step with the base optimizer's, for one more forward pass a step.

    Attributes:
        base: The base optimizer.
        measurement: What was measured.
        several_passes: That a step has several backward passes: a monitor needs a loss of its own.

    Raises:
        ArgumentError: An argument is not what it must be.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> optimizer = AverageGradient(torch.optim.RMSprop(model.parameters(), lr=1e-3))
        >>> inputs, targets = torch.randn(16, 4), torch.randint(2, (16,))
        >>> loss = optimizer.step(lambda: F.cross_entropy(model(inputs), targets))
        >>> loss.requires_grad
        False
    """

    several_passes = True

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        iterations: int = 2,
        functions: Mapping[Function, Slope] = FUNCTIONS,
        linear: Linear = "plain",
        measure: bool = False,
    ) -> None:
        _check(base_optimizer, iterations, functions, linear)
        self.base = base_optimizer
        self.iterations, self.functions, self.linear, self.measure = iterations, dict(functions), linear, measure
        self.measurement = Measurement()
        self._prepare()

    def _prepare(self) -> None:
        """Make what is not part of a copy of this optimizer."""
        # As after unpickling: the parameter groups are the base's, so there are none to add.
        super().__setstate__({})
        base = cast("Any", self.base)
        self._optimizer_state_dict_pre_hooks = base._optimizer_state_dict_pre_hooks
        self._optimizer_state_dict_post_hooks = base._optimizer_state_dict_post_hooks
        self._optimizer_load_state_dict_pre_hooks = base._optimizer_load_state_dict_pre_hooks
        self._optimizer_load_state_dict_post_hooks = base._optimizer_load_state_dict_post_hooks
        self._table = Table(self.functions, self.linear == "midpoint")
        self._secants: Secants | None = Secants()
        self._buffers = Buffers()
        self._candidate: Candidate | None = None
        self._known: set[tuple[Any, ...]] = set()
        self._explore, self._copying, self._all_random, self._writing = True, False, True, False

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's parameter groups, the very same."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's state, the very same."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's defaults, the very same."""
        return self.base.defaults

    @property
    def relative_difference(self) -> float:
        """RD over all steps since the start, or since ``measurement.reset()``; NaN where nothing was measured."""
        return self.measurement.relative_difference

    def step(self, closure: Closure) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make a step.

        Args:
            closure: Computes the loss of the batch at the current weights, and returns it, a real scalar. It does not
                call `backward`.

        Returns:
            The loss at the weights before the step, without its graph.

        Raises:
            ArgumentError: The closure is not one, or does not return such a loss.
            GradmonError: A gradient is sparse or complex, a function hides nonlinearities, or the closure did not do
                the same when it was called again.
        """
        if not callable(closure):
            raise ArgumentError("closure", _RETURNS, closure)
        parameters = [parameter for group in self.base.param_groups for parameter in group["params"]]
        random = RandomStates(all_kinds=self._explore or self._all_random)
        self._buffers.keep()
        recorder = Recorder(self._table, copying=self._copying)
        explored, self._explore = self._explore, False
        try:
            for parameter in parameters:
                parameter.grad = None
            versions = [parameter._version for parameter in parameters] if explored else None
            loss = self._forward(closure, recorder, explored)
            if versions is not None:
                self._writing = versions != [parameter._version for parameter in parameters]
            if any(parameter.grad is not None for parameter in parameters):
                raise ArgumentError("closure", _RETURNS, "one that ran a backward pass")
            averaged = [call for call in recorder.calls if call.averaged]
            news = self._look(loss, recorder, explored, random)
            plain = self.iterations == 1 or not (averaged or self.measure)
            loss.backward(retain_graph=not plain)
            gradients = {parameter: found for parameter in parameters if (found := parameter.grad) is not None}
            active = list(gradients)
            _check_gradients(gradients.values())
            if plain:
                self.base.step()
            elif active:
                averaging = Averaging(closure, loss, recorder, self._table, random, self._buffers, news, self._secants)
                self._average(averaging, active)
                self._secants = averaging.secants
        except BaseException:
            self._explore = self._explore or explored  # what was to be found may not have been called
            for parameter in parameters:
                parameter.grad = None
            random.restore()
            self._buffers.restore()
            raise
        finally:
            recorder.release()
            self._buffers.release()
            if self._secants is not None:
                self._secants.clear()
        return loss.detach()

    def _forward(self, closure: Closure, recorder: Recorder, explore: bool) -> Tensor:
        """The loss, with its graph.

        Raises:
            ArgumentError: It is no loss.
        """
        torch.clear_autocast_cache()  # it holds the weights of the last step
        with self._buffers.exploring() if explore else nullcontext(), torch.enable_grad(), Watch(self._table, recorder):
            loss: Any = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            got = f"a tensor {tuple(loss.shape)} of {loss.dtype}" if isinstance(loss, Tensor) else repr(loss)
            raise ArgumentError("closure", "return the loss, a real scalar", got)
        if not loss.requires_grad:
            raise ArgumentError("closure", "return a loss that depends on a parameter", "one without a graph")
        return loss

    def _look(self, loss: Tensor, recorder: Recorder, explored: bool, random: RandomStates) -> bool:
        """Look closely at a forward pass of a new kind; whether modules may be called that are not known yet."""
        kind = recorder.kind()
        if explored:
            self._all_random = self._all_random and random.others_drawn
        if kind in self._known:
            return False
        check_graph(loss, recorder.calls, set() if recorder.opaque else self._table.names)
        self._known.add(kind)
        # The next step looks at the modules and random numbers from its start.
        self._explore = not explored
        self._all_random = self._all_random or not explored
        return not explored

    def _average(self, averaging: Averaging, active: Sequence[Tensor]) -> None:
        """From the gradient to the weights after the step."""
        with torch.no_grad():
            if averaging.prepare():
                self._copying = True
            candidate = self._candidate
            if candidate is None or not candidate.fits(active):
                candidate = self._candidate = Candidate(active)
            origin, fresh = candidate.origin, not self.base.state
            try:
                candidate.begin(self._ascending(active))
                place(active, candidate.values)
                # Behind the hooks of others, which may change the gradients, and before the base, which may, too.
                noting = (
                    nullcontext()
                    if descends(self.base)
                    else self.base.register_step_pre_hook(
                        lambda *_: candidate.note([parameter.grad for parameter in active])
                    )
                )
                # The graph still needs these parameters, and will find them as they were.
                with noting, cast("Any", torch.autograd)._unsafe_preserve_version_counter(tuple(active)):
                    self.base.step()
                after = RandomStates(all_kinds=self._all_random)
                gradients = [parameter.grad for parameter in active]
                candidate.collect(active)
                if candidate.lost:
                    place(active, origin)
                    candidate.note(averaging.gradient(active, last=False))
                    place(active, candidate.values)
                self._iterate(averaging, candidate, active)
            except BaseException as error:
                place(active, origin)
                if fresh:
                    self.base.state.clear()
                else:
                    error.add_note(_ADVANCED)
                raise
            finally:
                candidate.release()
            torch.autograd.graph.increment_version(active)
            for parameter, gradient in zip(active, gradients, strict=True):
                parameter.grad = gradient
            after.restore()

    def _iterate(self, averaging: Averaging, candidate: Candidate, active: Sequence[Tensor]) -> None:
        """From the base's candidate, which is in place, to the weights after the step, which are then."""
        losses, origin = list[Tensor](), candidate.origin
        point: Sequence[Tensor] = origin
        for left in range(self.iterations - 2, -1, -1):
            losses.append(self._replayed(averaging, active))
            place(active, origin)
            final = not (left or self.measure)
            point = candidate.aim(last=final)
            averaging.take_gradient(active, candidate, last=left == 0)
            if not final:
                place(active, point)
        if self.measure:
            losses.append(self._replayed(averaging, active))
            place(active, origin)
            self.measurement.add(*(float(loss.detach()) for loss in (averaging.loss, losses[0], losses[-1])))
        copy_all(origin, point)

    def _replayed(self, averaging: Averaging, active: Sequence[Tensor]) -> Tensor:
        """The loss at the weights in place, which stay as they are, even if the closure writes to them."""
        if not self._writing:
            return averaging.replay()
        held = [parameter.clone() for parameter in active]
        with cast("Any", torch.autograd)._unsafe_preserve_version_counter(tuple(active)):
            loss = averaging.replay()
            copy_all(active, held)
        return loss

    def _ascending(self, active: Sequence[Tensor]) -> list[int]:
        """The places of the parameters that are stepped along their gradients."""
        groups = [group for group in self.base.param_groups if group.get("maximize")]
        of_groups = {id(parameter) for group in groups for parameter in group["params"]}
        return [place for place, parameter in enumerate(active) if id(parameter) in of_groups] if groups else []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, with what was measured as ``"average_gradient"``; the base can load it, too."""
        return {**self.base.state_dict(), "average_gradient": self.measurement.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what was saved by this optimizer, or by the base alone.

        Args:
            state_dict: What `state_dict` returned.
        """
        rest = {name: value for name, value in state_dict.items() if name != "average_gradient"}
        self.base.load_state_dict(rest)
        self.measurement.load_state_dict(state_dict.get("average_gradient") or Measurement().state_dict())

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "iterations", "functions", "linear", "measure", "measurement")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()


def _check(base: Any, iterations: Any, functions: Mapping[Function, Slope], linear: Any) -> None:
    if not isinstance(base, Optimizer):
        raise ArgumentError("base_optimizer", "be a torch.optim.Optimizer", base)
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        got = f"{type(base).__name__}, which needs one"
        raise ArgumentError("base_optimizer", "make its step without a closure", got)
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ArgumentError("iterations", "be a whole number of at least 1", repr(iterations))
    if linear not in ("plain", "midpoint"):
        raise ArgumentError("linear", 'be "plain" or "midpoint"', repr(linear))
    if not isinstance(cast("Any", functions), Mapping):
        raise ArgumentError("functions", "lead from functions to their slopes", repr(functions))
    for function, slope in functions.items():
        if not callable(function) or not callable(slope):
            raise ArgumentError("functions", "lead from functions to their slopes", f"{function!r}: {slope!r}")
        if not is_seen(function):
            must = "be functions of torch, or decorated with torch.overrides.wrap_torch_function: others are not seen"
            raise ArgumentError("functions", must, repr(function))


def _check_gradients(gradients: Iterable[Tensor]) -> None:
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            message = (
                "The average gradient needs dense gradients, and one is sparse: pass sparse=False to the embedding."
            )
            raise GradmonError(message)
