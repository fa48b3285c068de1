"""Ways to train of which every passive number must be right."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.core.passive import data, mlp, mse, shares
from tests.zoo.problem import net


class Scene(NamedTuple):
    """A way to train: `train(model, batch)` makes a gradient, the sum of the shares is that gradient."""

    model: nn.Module
    batch: Any
    train: Callable[[nn.Module, Any], None]
    shares: np.ndarray
    loss: Callable[[nn.Module, Any], Tensor] = mse
    watched: nn.Module | None = None


def plain(loss):
    return lambda model, batch: loss(model, batch).backward()


def scene(model, loss, batch=None, train=None, **more):
    batch = data(6)[0] if batch is None else batch
    return Scene(model, batch, train or plain(loss), shares(model, batch, loss), loss, **more)


class Keywords(nn.Module):
    """Takes its tensors by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, *, scale: float, inputs: Tensor) -> Tensor:
        return self.body(inputs) * scale


def keyword_arguments():
    return scene(Keywords(), lambda model, batch: F.mse_loss(model(scale=2.0, inputs=batch[0]), batch[1]))


def user_hook_that_changes_the_output():
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: 2 * out.square())
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * torch.tensor([1.0, 2.0, 3.0, 4.0]),))
    return scene(model, mse)


def user_full_backward_hooks():
    model = mlp()
    for module in model[1:]:  # the first one's input has no gradient, of which torch warns
        module.register_full_backward_hook(lambda module, grads, outs: None)
    return scene(model, mse)


def user_hooks_that_change_gradients():
    model = mlp()
    model[2].register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],))
    model[1].register_full_backward_pre_hook(lambda module, grads: (3 * grads[0],))
    made = scene(mlp(), mse)
    made.shares[:, :16] *= 6
    made.shares[:, 16:] *= 2
    return made._replace(model=model)


def gradient_given_to_backward():
    def train(model, batch):
        out = model(batch[0])
        out.backward((out.detach() - batch[1]) * (2 / out.numel()))

    return scene(mlp(), mse, train=train)


def two_losses_at_once():
    def train(model, batch):
        out = model(batch[0])
        first = F.mse_loss(out[:, 0], batch[1][:, 0])
        torch.autograd.backward([first, F.mse_loss(out[:, 1], batch[1][:, 1])], [torch.tensor(0.5).double()] * 2)

    return scene(mlp(), mse, train=train)


def retained_graph():
    return scene(mlp(), mse, train=lambda model, batch: mse(model, batch).backward(retain_graph=True))


def anomaly_detection():
    def train(model, batch):
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            mse(model, batch).backward()

    return scene(mlp(), mse, train=train)


def part_of_a_model():
    torch.manual_seed(3)
    body, head = mlp(), nn.Linear(2, 2).double()
    whole = nn.Sequential(body, head)
    made = scene(whole, mse, watched=body)
    return made._replace(shares=made.shares[:, : sum(p.numel() for p in body.parameters())])


def batch_in_a_dict_of_lists():
    def loss(model, batch):
        return F.mse_loss(model(batch["inputs"][0]), batch["labels"])

    x, y = data(6)[0]
    return scene(mlp(), loss, {"id": "seven", "labels": y, "inputs": [x]})


def two_dtypes():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.body(x.float())).double())

    torch.manual_seed(1)
    model = net(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 2).double())
    return scene(model, mse)


def weights_that_were_loaded():
    model = mlp()
    model.load_state_dict({name: value.flip(0) for name, value in mlp().state_dict().items()}, assign=True)
    return scene(model, mse)


def one_power_iteration_of_spectral_norm():
    torch.manual_seed(1)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(4, 3))
    return scene(model, mse)


RIGHT = [keyword_arguments, user_hook_that_changes_the_output, user_full_backward_hooks, gradient_given_to_backward]
RIGHT += [two_losses_at_once, retained_graph, anomaly_detection, part_of_a_model, batch_in_a_dict_of_lists, two_dtypes]
RIGHT += [weights_that_were_loaded, one_power_iteration_of_spectral_norm, user_hooks_that_change_gradients]
