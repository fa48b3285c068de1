"""Models that change as they run, and all that a probe might leave behind."""

import copy
import random

import numpy as np
import torch
from torch import Tensor, nn

import gradmon
from gradmon._batches import map_tensors, tensors

SIZE = 6


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def regression(width=3):
    return torch.randn(SIZE, width), torch.randn(SIZE, 2)


def tokens():
    return torch.randint(9, (SIZE, 2)), torch.randn(SIZE, 2)


class Body(nn.Module):
    """Two layers, and something else that a forward pass does."""

    def __init__(self, act, **parts):
        super().__init__()
        self.act = act
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        for name, part in parts.items():
            if isinstance(part, Tensor) and name.startswith("buffer"):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        change = self.act(self, x)
        return self.second(torch.tanh(self.first(x if change is None else change)))


def reassign_buffer(model, x):
    model.buffer = model.buffer * 0.9 + x.detach().mean(0)


def change_attributes(model, x):
    model.calls += 1
    model.last = x.detach()
    model.plain.add_(1)
    model.history.append(float(x.detach().sum()))
    model.seen["calls"] = model.calls
    model.sizes.add(len(model.sizes))
    model.new = "appears in forward"


def draw(model, x):
    noise = torch.randn(x.shape, generator=model.generator) + torch.randn_like(x)
    return x + noise * float(np.random.rand()) * random.random()


def change_modes(model, x):
    model.eval()
    model.second.train()


def change_weights(model, x):
    model.first.weight.data.clamp_(-0.1, 0.1)


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    return model


def partly_frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[1].eval()
    return model


MODELS = {
    "norm_and_dropout": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4, 2)),
        regression,
    ),
    "reassigned_buffer": (lambda: Body(reassign_buffer, buffer=torch.ones(3)), regression),
    "attributes": (
        lambda: Body(change_attributes, calls=0, last=None, plain=torch.zeros(2), history=[], seen={}, sizes=set()),
        regression,
    ),
    "generators": (lambda: Body(draw, generator=torch.Generator().manual_seed(3)), regression),
    "modes": (lambda: Body(change_modes), regression),
    "weights": (lambda: Body(change_weights), regression),
    "overwrites_its_input": (lambda: Body(lambda model, x: x.mul_(0.5)), regression),
    "tied": (tied, regression),
    "partly_frozen": (partly_frozen, regression),
    "max_norm": (
        lambda: nn.Sequential(nn.Embedding(9, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6, 2)),
        tokens,
    ),
    "spectral_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        regression,
    ),
}
ACTIONS = {
    "measure": lambda model, loss, batch, optimizer: gradmon.measure(
        model, loss, batch, metrics=list(gradmon.METRICS), optimizer=optimizer, next_batch=batch, layers=True
    ),
    "exact": lambda model, loss, batch, optimizer: gradmon.measure(
        model, loss, batch, metrics=["weight_condition", "sharpness"], derivative="exact"
    ),
    "batch_gradient": lambda model, loss, batch, optimizer: gradmon.batch_gradient(model, loss, batch),
    "per_example_gradients": lambda model, loss, batch, optimizer: gradmon.per_example_gradients(model, loss, batch),
    "per_example_gram": lambda model, loss, batch, optimizer: gradmon.per_example_gram(model, loss, batch),
}


class Found:
    """Everything that must be as it was."""

    def __init__(self, model, batch, optimizer):
        self.model, self.batch, self.optimizer = model, batch, optimizer
        self.parameters = [
            (p, p.data_ptr(), p._version, p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone())
            for p in model.parameters()
        ]
        self.flags = [p.requires_grad for p in model.parameters()]
        self.buffers = [(name, b, b.data_ptr(), b.clone()) for name, b in model.named_buffers()]
        self.modes = [module.training for module in model.modules()]
        self.attributes = [dict(vars(module)) for module in model.modules()]
        self.contents = [self.plain(module) for module in model.modules()]
        self.hooks = [
            [list(getattr(module, name)) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for module in model.modules()
        ]
        self.state = copy.deepcopy(optimizer.state_dict())
        self.tensors = [(t, t._version, t.clone(), t.requires_grad) for t in tensors(batch)]
        self.random = self.generators()
        self.context = self.contexts()

    @staticmethod
    def plain(module):
        kinds = (int, float, str, list, dict, set, Tensor)
        return {
            name: value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
            for name, value in vars(module).items()
            if isinstance(value, kinds) and not name.startswith("_")
        }

    def generators(self):
        own = [v.get_state() for m in self.model.modules() for v in vars(m).values() if isinstance(v, torch.Generator)]
        return [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy()), *own], random.getstate()

    @staticmethod
    def contexts():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
        )

    def check(self):
        """Compare everything, tensors bit by bit."""
        now = list(self.model.parameters())
        assert len(now) == len(self.parameters)
        for p, (same, pointer, version, value, grad, content) in zip(now, self.parameters, strict=True):
            assert p is same
            assert p.data_ptr() == pointer
            assert torch.equal(p, value)
            assert p._version == version or self.renormalised(p)
            assert p.grad is grad
            assert grad is None or torch.equal(grad, content)
        assert [p.requires_grad for p in now] == self.flags
        buffers = dict(self.model.named_buffers())
        assert list(buffers) == [name for name, *_ in self.buffers]
        for name, buffer, pointer, value in self.buffers:
            assert buffers[name] is buffer
            assert buffer.data_ptr() == pointer
            assert torch.equal(buffer, value), name
        assert [module.training for module in self.model.modules()] == self.modes
        for module, attributes, contents in zip(self.model.modules(), self.attributes, self.contents, strict=True):
            assert list(vars(module)) == list(attributes)
            assert all(vars(module)[name] is value for name, value in attributes.items())
            for name, value in contents.items():
                other = vars(module)[name]
                assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, name
        for module, hooks in zip(self.model.modules(), self.hooks, strict=True):
            names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            assert [list(getattr(module, name)) for name in names] == hooks
        assert_equal(self.optimizer.state_dict(), self.state)
        for tensor, version, value, requires_grad in self.tensors:
            assert tensor._version == version
            assert torch.equal(tensor, value)
            assert tensor.requires_grad == requires_grad
        (states, python), (before, python_before) = self.generators(), self.random
        assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))
        assert python == python_before
        assert self.contexts() == self.context

    def renormalised(self, parameter):
        """Whether an embedding with max_norm overwrites it in forward, which counts up its version, and no more."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.max_norm is not None]
        return any(module.weight is parameter for module in norms)


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def make(name):
    """A model in the middle of its training, its batch, and its optimizer."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    build, data = MODELS[name]
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        mse(model, map_tensors(data(), torch.clone)).backward()
        optimizer.step()
    return model, data(), optimizer
