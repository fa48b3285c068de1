"""Where the examples lie in the tensors that a model is called with."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradmon import Unavailable
from tests.core.passive import (
    assert_gram,
    assert_right,
    assert_right_or_silent,
    assert_silent,
    data,
    listened,
    mlp,
    mse,
    sgd,
    shares,
    watching,
)
from tests.zoo.problem import net


def time_first():
    torch.manual_seed(1)
    return net(lambda m, x: m.head(m.rnn(x)[0]).mean(0), rnn=nn.RNN(3, 4), head=nn.Linear(4, 3)).double()


def transposed(model, batch):
    """The loss of a batch whose examples lie along axis 0, on a model that wants them along axis 1."""
    return F.cross_entropy(model(batch[0].transpose(0, 1)), batch[1])


def sequences(length):
    return torch.randn(5, length, 3, dtype=torch.float64), torch.randint(3, (5,))


@pytest.mark.parametrize("length", [4, 5, 7])
@pytest.mark.parametrize("told", ["time_first", "batch_first"])
def test_examples_along_dimension_one(length, told):
    model, batch = time_first(), sequences(length)
    H = shares(model, batch, transposed)
    given = (batch[0].transpose(0, 1).contiguous(), batch[1]) if told == "time_first" else batch

    def run():
        F.cross_entropy(model(batch[0].transpose(0, 1)), batch[1]).backward()

    assert_gram(listened(model, given, run, example_dim=1), H)
    model.zero_grad()
    optimizer = sgd(model)
    monitor = watching(model, optimizer, example_dim=1)
    run()
    optimizer.step()
    monitor.step(given)
    assert_right(monitor.readings, H)


@pytest.mark.parametrize("length", [4, 5, 7])
def test_examples_along_dimension_one_that_nobody_tells_of(length):
    model, batch = time_first(), sequences(length)
    H = shares(model, batch, transposed)
    optimizer = sgd(model)
    monitor = watching(model, optimizer)
    transposed(model, batch).backward()
    optimizer.step()
    monitor.step(batch)
    if length == 5:
        assert_silent(monitor.readings)
    else:
        assert_right_or_silent(monitor.readings, H)
    assert not monitor.failures


@pytest.mark.parametrize("example_dim", [None, 0])
def test_square_input_that_is_no_tensor_of_the_batch(example_dim):
    def loss(model, batch):
        return F.mse_loss(model(2 * batch[0]), batch[1])

    model, (batch,) = mlp(), data(3)
    options = {} if example_dim is None else {"example_dim": example_dim}
    for run, given in ((lambda: loss(model, batch).backward(), batch), (lambda: mse(model, batch).backward(), None)):
        model.zero_grad()
        if example_dim is None:
            with pytest.raises(Unavailable, match=r"."):
                listened(model, given, run, **options)
        else:
            H = shares(model, batch, loss if given is not None else mse)
            assert_gram(listened(model, given, run, **options), H)


def test_square_input_that_equals_a_tensor_of_the_batch():
    model, (batch,) = mlp(), data(3)
    same = (batch[0].clone(), batch[1])
    assert_gram(listened(model, same, lambda: mse(model, batch).backward()), shares(model, batch))
