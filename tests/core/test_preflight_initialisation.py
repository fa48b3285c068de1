"""Data-dependent orthogonal initialisation, layer by layer, and what it leaves alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm

from gradmon import ArgumentError, reinitialize

SIZE = 40


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def square(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def labelled(*shape, classes=3):
    return torch.randn(SIZE, *shape, dtype=torch.float64), torch.randint(classes, (SIZE,))


def made_by(model, x):
    """What every leaf module makes of a batch, by name."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if not list(module.children()):
            keep = lambda module, inputs, output, name=name: seen.__setitem__(name, output.detach())  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def test_every_layer_has_orthogonal_weights_unit_deviation_and_centred_units():
    model, batch = mlp(), labelled(6)
    found = reinitialize(model, entropy, batch)
    assert list(found.changed) == ["0.weight", "2.weight", "4.weight"]
    assert found.head == "4.weight"
    assert not found.kept
    outputs = made_by(model, batch[0])
    for place, size in ((0, 1.0), (2, 1.0), (4, 0.5)):
        made = outputs[str(place)]
        assert float(made.std(unbiased=False)) == pytest.approx(size, rel=1e-5)
        assert made.mean(0).abs().max() < 1e-5
        weight = model[place].weight.detach()
        short = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        assert torch.allclose(short, short[0, 0] * torch.eye(len(short), dtype=torch.float64), atol=1e-5 * short[0, 0])
    assert found.changed["4.weight"][1] == pytest.approx(0.5, rel=1e-5)


def test_the_head_of_a_regression_has_half_of_the_targets_deviation():
    model = mlp()
    x = torch.randn(SIZE, 6, dtype=torch.float64)
    y = 200 * torch.randn(SIZE, 3, dtype=torch.float64) + 1000
    reinitialize(model, square, (x, y))
    deviation = float((y - y.mean(0)).square().mean().sqrt())
    assert float(model(x).detach().std(unbiased=False)) == pytest.approx(deviation / 2, rel=1e-2)


def test_convolutions_with_and_without_groups_and_transposed_ones():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 64, 3),
    ).double()
    batch = labelled(4, 5, 5)
    found = reinitialize(model, entropy, batch)
    assert len(found.changed) == 4
    outputs = made_by(model, batch[0])
    for place in (0, 2):
        assert float(outputs[str(place)].std(unbiased=False)) == pytest.approx(1, rel=1e-5)
        assert outputs[str(place)].mean((0, 2, 3)).abs().max() < 1e-5
    # Without a bias the units keep their means.
    assert float(outputs["4"].std(unbiased=False)) == pytest.approx(1, rel=1e-5)
    for group in range(2):
        block = model[0].weight.detach()[3 * group : 3 * group + 3].reshape(3, -1)
        assert torch.allclose(block @ block.T, (block @ block.T)[0, 0] * torch.eye(3, dtype=torch.float64), atol=1e-6)
        block = model[2].weight.detach()[3 * group : 3 * group + 3].transpose(0, 1).reshape(4, -1)
        assert torch.allclose(block @ block.T, (block @ block.T)[0, 0] * torch.eye(4, dtype=torch.float64), atol=1e-6)
    norms = model[4].weight.detach().reshape(8, -1).norm(dim=1)
    assert torch.allclose(norms, norms[:1].expand(8), rtol=1e-5)


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.symbols = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 7, bias=False)
        if tied:
            self.head.weight = self.symbols.weight

    def forward(self, x):
        return self.head(self.block(self.symbols(x))).transpose(1, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_transformer_and_a_head_that_is_its_embedding(tied):
    model = Language(tied).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randint(7, (SIZE, 5))
    found = reinitialize(model, entropy, (x, x.roll(1, 1)))
    inner = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert list(found.changed) == [f"block.{name}" for name in inner] + ([] if tied else ["head.weight"])
    assert found.kept == {"symbols.weight": "embeddings and recurrent layers are not set"}
    assert torch.equal(model.symbols.weight, before["symbols.weight"])
    assert found.head == (None if tied else "head.weight")


class Turned(nn.Module):
    """A linear map with its weight the other way round, as some language models have it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_a_weight_that_is_the_other_way_round():
    model, batch = nn.Sequential(Turned(6, 9), nn.Tanh(), nn.Linear(9, 3)).double(), labelled(6)
    found = reinitialize(model, entropy, batch)
    assert list(found.changed) == ["0.weight", "2.weight"]
    made = made_by(model, batch[0])["0"]
    assert float(made.std(unbiased=False)) == pytest.approx(1, rel=1e-5)
    assert made.mean(0).abs().max() < 1e-5
    gram = model[0].weight.detach() @ model[0].weight.detach().T
    assert torch.allclose(gram, gram[0, 0] * torch.eye(6, dtype=torch.float64), atol=1e-5 * float(gram[0, 0]))


def test_what_is_asked_to_be_kept_frozen_or_made_anew_stays():
    model = nn.Sequential(
        nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5), weight_norm(nn.Linear(5, 5)), nn.Linear(5, 3)
    ).double()
    model[0].requires_grad_(False)
    batch = labelled(6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = reinitialize(model, entropy, batch, keep=["1", model[2].weight])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"4.weight", "4.bias"}
    assert found.kept["1.weight"] == found.kept["2.weight"] == "as asked"
    assert "was called with it" in found.kept["3.parametrizations.weight.original1"]
    assert "left alone, as asked" in str(found)


def test_a_module_that_is_used_twice_is_set_at_its_first_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    model, batch = Twice().double(), labelled(6)
    found = reinitialize(model, entropy, batch)
    assert list(found.changed) == ["inner.weight", "head.weight"]
    assert float(model.inner(batch[0]).detach().std(unbiased=False)) == pytest.approx(1, rel=1e-5)


def test_a_layer_that_makes_a_constant_is_left_alone():
    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x + self.gate(0 * x))

    model = Zero().double()
    before = [p.detach().clone() for p in model.gate.parameters()]
    found = reinitialize(model, entropy, labelled(6))
    assert found.kept == {"gate.weight": "what it makes of the batch is constant or not finite"}
    assert all(torch.equal(a, b) for a, b in zip(before, model.gate.parameters(), strict=True))


def test_the_same_seed_is_the_same_initialisation_and_a_generator_moves_on():
    batch = labelled(6)

    def weights(generator):
        model = mlp()
        reinitialize(model, entropy, batch, generator=generator)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    assert torch.equal(weights(4), weights(4))
    assert not torch.equal(weights(4), weights(5))
    source = torch.Generator().manual_seed(4)
    assert torch.equal(weights(source), weights(4))
    assert not torch.equal(weights(source), weights(4))


def test_depth_thirty_trains_after_it():
    layers = [part for _ in range(30) for part in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(nn.Linear(6, 16), *layers, nn.Linear(16, 3)).double()
    for parameter in model.parameters():
        parameter.data.mul_(0.3)
    batch = labelled(6)
    vanished = float(model(batch[0]).detach().std(0).mean())
    found = reinitialize(model, entropy, batch)
    assert vanished < 1e-9
    assert all(size == pytest.approx(1, rel=1e-4) for _, size in list(found.changed.values())[:-1])
    entropy(model, batch).backward()
    ratio = float(model[0].weight.grad.norm() / model[-1].weight.grad.norm())
    assert 0.01 < ratio < 100


def test_bad_arguments():
    model, batch = mlp(), labelled(6)
    with pytest.raises(ArgumentError, match=r"`keep` must be a sequence of modules, parameters or their names"):
        reinitialize(model, entropy, batch, keep="0")
    with pytest.raises(ArgumentError, match=r"`keep` must name modules or parameters of `model`\. Got 'nine'\."):
        reinitialize(model, entropy, batch, keep=["nine"])
    with pytest.raises(ArgumentError, match=r"`generator` must be a torch.Generator or an integer\. Got str\."):
        reinitialize(model, entropy, batch, generator="4")
    with pytest.raises(ArgumentError, match=r"`loss` must run on `model` and `batch`\. Got RuntimeError"):
        reinitialize(model, entropy, labelled(5))
    with pytest.raises(ArgumentError, match=r"`loss` must be callable"):
        reinitialize(model, None, batch)


def test_a_failure_leaves_the_model_as_it_was():
    model, batch = mlp(), labelled(6)
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def failing(model, batch):
        value = entropy(model, batch)
        calls.append(value)
        if len(calls) > 2:
            raise ValueError("no more")
        return value

    with pytest.raises(ArgumentError, match="no more"):
        reinitialize(model, failing, batch)
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(math.isfinite(float(value)) for value in map(torch.detach, calls))
