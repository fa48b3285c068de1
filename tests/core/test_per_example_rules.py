"""Every rule against the gradients of single examples."""

import pytest
import torch

import gradmon
from gradmon.per_example import RULES, ways
from tests import references, zoo
from tests.core.rules import CALLS, by_hooks, close, problem_of, truth

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


SLOW = {torch.bmm: ("replay", "repeat")}
"""Where one of the slow ways may stand in: a product with several matrices of parameters at once."""


def name_of(function):
    return f"{getattr(function, '__qualname__', function.__name__)}".replace("_VariableFunctionsClass", "torch")


KINDS = [(function, build) for function, builds in CALLS.items() for build in builds]
KIND_IDS = [f"{name_of(function)}-{number}" for function in CALLS for number in range(len(CALLS[function]))]


def test_every_rule_is_tried():
    assert set(RULES) <= set(CALLS)


@pytest.mark.parametrize(("function", "build"), KINDS, ids=KIND_IDS)
def test_rule_is_right_and_used(function, build):
    problem, own = problem_of(build)
    H = truth(build)
    arguments = (problem.model, problem.loss, problem.batch)
    close(gradmon.per_example_gradients(*arguments), H)
    close(gradmon.per_example_gram(*arguments), references.gram(H))
    found, coverage = by_hooks(problem)
    assert {coverage[name] for name in own} <= {function.__name__.strip("_"), *SLOW.get(function, ())}
    close(found.gram, references.gram(H))
    close(found.means, H.mean(0))
    close(found.variances, H.var(0, ddof=1))


@pytest.mark.parametrize("way", ["replay", "repeat"])
@pytest.mark.parametrize(("function", "build"), KINDS, ids=KIND_IDS)
def test_without_rules_there_are_two_slow_ways(function, build, way, monkeypatch):
    if way == "repeat":
        monkeypatch.setattr(ways, "replay", lambda part: None)
    problem, own = problem_of(build)
    H = truth(build)
    found, coverage = by_hooks(problem, {})
    assert {coverage[name] for name in own} <= {way, "repeat"}
    close(found.gram, references.gram(H))
    close(found.variances, H.var(0, ddof=1))
    arguments = (problem.model, problem.loss, problem.batch)
    close(gradmon.per_example_gradients(*arguments, rules={}), H)
    close(gradmon.per_example_gram(*arguments, rules={}), references.gram(H))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_in_both_modes(training):
    case = zoo.interacting.batch_norm_mlp if training else zoo.plain.batch_norm_eval
    problem = case.make(0, torch.float64)
    H = references.shares(problem)
    found, coverage = by_hooks(problem)
    norms = {name for name in coverage if problem.model.get_submodule(name.rpartition(".")[0]).__class__.__name__
             .startswith("BatchNorm")}  # fmt: skip
    assert norms
    assert {coverage[name] for name in norms} == {"batch_norm"}
    close(found.gram, references.gram(H))
