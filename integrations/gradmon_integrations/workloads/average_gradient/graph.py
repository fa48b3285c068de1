"""Whether the graph of a forward pass holds functions that were not seen being called."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from torch import Tensor

from gradmon._errors import GradmonError
from gradmon_integrations.workloads.average_gradient.calls import Call

_HIDING = {
    "CompiledFunctionBackward": "torch.compile hides the functions that the model calls. Give the closure the model as "
    "it was before: `model._orig_mod`.",
    "DifferentiableGraphBackward": "TorchScript hides the functions that the model calls. Give the closure the model "
    "itself.",
    "CheckpointFunctionBackward": "torch.utils.checkpoint(use_reentrant=True) hides the functions that it calls. Pass "
    "use_reentrant=False.",
}
_UNSEEN = (
    "The graph of the loss holds {name}, which was not seen being called: TorchScript, torch.func and tensors of other "
    "classes hide the functions of which the slopes are averaged. So does a function that calls one of them itself, as "
    "F.selu does F.elu: add that one to `functions`, or leave the inner one out."
)


def check_graph(loss: Tensor, calls: Iterable[Call], names: Set[str]) -> None:
    """Check that every function whose derivative is to be averaged was seen.

    Args:
        loss: The loss, with its graph.
        calls: The calls that were seen.
        names: The names of these functions, in lower case.

    Raises:
        GradmonError: One of them is in the graph all the same, or something that hides them is.
    """
    ways = {call.outer: call.inner for call in calls if call.outer is not None}
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        hiding = name.rpartition("::")[2]  # TorchScript's is in a namespace
        if hiding in _HIDING:
            raise GradmonError(_HIDING[hiding])
        inner = ways.get(node)
        if inner is None and name.partition("Backward")[0].lower() in names:
            raise GradmonError(_UNSEEN.format(name=name))
        waiting.extend(edge for edge, _ in (node if inner is None else inner).next_functions)
