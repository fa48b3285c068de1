"""The zoo: its ensembles train each variant as if it were alone, and a handful of its networks go the whole way."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import foresight
from benchmarks.zoo import fit
from benchmarks.zoo.configurations import DEFAULTS, FAMILIES, OWN_EXPONENTS, SIZES, configuration
from benchmarks.zoo.data import chance_of, data_of, limit_of, loss_of, order, probe
from benchmarks.zoo.ensemble import Ensemble, range_test, start_of
from benchmarks.zoo.measuring import anew, batches_of, optimizer_of
from benchmarks.zoo.networks import build
from benchmarks.zoo.policies import POLICIES, risk
from benchmarks.zoo.records import append, read, rounded
from benchmarks.zoo.run import mixed
from benchmarks.zoo.table import Run, networks
from gradmon import preflight
from gradmon.preflight._coefficients import COEFFICIENTS, KNOTS, LIMIT, RIDGE
from gradmon.preflight.score import parts

STEPS = 12


def small(family, optimizer):
    """The first configuration of a family with few layers and this optimizer."""
    return (
        next(
            of
            for number in range(SIZES[family])
            if (of := configuration(family, number)).depth <= 4 and of.optimizer == optimizer and of.norm != "none"
        )
        if family != "regression"
        else next(
            of
            for number in range(SIZES[family])
            if (of := configuration(family, number)).depth <= 6 and of.optimizer == optimizer
        )
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", DEFAULTS)
def test_every_variant_of_an_ensemble_trains_as_if_it_were_alone(family, optimizer):
    of = small(family, optimizer)
    model = build(of).double()
    inputs, targets = (t.double() if t.is_floating_point() else t for t in data_of(of))
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(0.7)
    rates = [DEFAULTS[optimizer], 0.1 * DEFAULTS[optimizer], math.nan]
    ensemble = Ensemble(model, [start_of(model), start_of(other), start_of(model)], optimizer, rates)
    for chosen in order(of, STEPS):
        ensemble.step((inputs[chosen], targets[chosen]))
    for place, alone in enumerate((model, other)):
        made = optimizer_of(of, alone)
        for group in made.param_groups:
            group["lr"] = rates[place]
        for chosen in order(of, STEPS):
            made.zero_grad()
            loss_of(alone, (inputs[chosen], targets[chosen])).backward()
            made.step()
        for name, parameter in alone.named_parameters():
            assert torch.allclose(ensemble.parameters[name][place], parameter, rtol=1e-7, atol=1e-9), name
    # One that is not a number does not touch its neighbours.
    assert all(not bool(torch.isfinite(p[2]).any()) for p in ensemble.parameters.values())


def test_configurations_are_the_same_every_time_and_both_halves_have_some():
    for family in FAMILIES:
        found = [configuration(family, number) for number in range(SIZES[family])]
        assert found == [configuration(family, number) for number in range(SIZES[family])]
        share = np.mean([of.half == "test" for of in found])
        assert 0.3 < share < 0.7
        assert {of.exponent for of in found} <= set(OWN_EXPONENTS)
    assert len(mixed(list(FAMILIES))) == sum(SIZES.values())


def test_a_network_is_the_same_every_time_and_leaves_the_random_state():
    for family in FAMILIES:
        of = configuration(family, 3)
        state = torch.get_rng_state()
        one, two = build(of), build(of)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_what_a_probe_holds_is_in_no_batch():
    of = configuration("mlp", 0)
    assert int(order(of, 400).max()) < len(data_of(of)[1]) - len(probe(of)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_chance_and_limit(family):
    of = configuration(family, 0)
    model = build(of)
    found = preflight(model, optimizer_of(of, model), loss_of, batches_of(of))
    # The targets' variance on 64 examples is not that of all.
    assert found.look.chance.loss == pytest.approx(chance_of(of), rel=0.35 if family == "regression" else 1e-5)
    assert limit_of(of) < chance_of(of)


def test_initialised_anew_it_is_the_same_network():
    of = configuration("conv", 0)
    one, two = anew(of), anew(of)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert [p.shape for p in one.parameters()] == [p.shape for p in build(of).parameters()]


def test_the_range_test_is_a_tenth_of_a_rate_that_it_tried():
    of = small("mlp", "sgd")
    found = range_test(of, build(of), 0.1, passes=40)
    assert 1e-6 <= found <= 1.0


def test_records_are_rounded_and_read_back(tmp_path):
    assert rounded({"a": [1.23456, math.nan, math.inf, 3, True, None, "x"]}) == {
        "a": [1.235, None, None, 3, True, None, "x"]
    }
    append("trained", {"name": "mlp-0", "final": [0.5, math.nan]}, tmp_path)
    append("trained", {"name": "mlp-1", "final": [1e-9]}, tmp_path)
    assert read("trained", tmp_path)["mlp-0"]["final"] == [0.5, None]
    assert read("measured", tmp_path) == {}
    assert json.loads((tmp_path / "trained.jsonl").read_text().splitlines()[1])["final"] == [1e-9]


def test_a_handful_of_networks_goes_the_whole_way(tmp_path, monkeypatch):
    """Trained, measured and treated with fewer steps, through the same code as the zoo."""
    import dataclasses

    from benchmarks.zoo import remedies
    from benchmarks.zoo.measuring import measured
    from benchmarks.zoo.training import excessive, trained

    monkeypatch.setattr(remedies, "read", lambda stage: read(stage, tmp_path))
    for family in FAMILIES:
        of = dataclasses.replace(configuration(family, 1), steps=25)
        append("trained", trained(of), tmp_path)
        append("excessive", excessive(of), tmp_path)
        append("measured", measured(of), tmp_path)
        append("remedied", remedies.remedied(of), tmp_path)
    found = networks(tmp_path)
    assert [network.of.family for network in found] == list(FAMILIES)
    for network in found:
        assert network.known
        assert 0 < network.seen["passes"] <= 40
        assert network.anew_best is not None
        for run in (*network.runs, *network.excessive):
            assert 0 < risk(run) < 1
            assert 0 < risk(run, with_loss=True) < 1
        for run in network.runs:
            for policy in POLICIES:
                assert isinstance(policy.final(run), float)


def test_the_committed_results_say_what_the_page_says():
    found = [network for network in networks() if network.of.half == "test" and network.known]
    assert len(found) > 60
    page = foresight.PAGE.read_text()
    by_family = {family: [n for n in found if n.of.family == family] for family in FAMILIES}
    assert foresight.detection(by_family) in page
    assert foresight.causes(found) in page


def test_the_committed_coefficients_are_those_of_the_development_half():
    coefficients, limit = fit.fitted(fit.development(), KNOTS, RIDGE)
    for stage, weights in coefficients.items():
        assert weights == pytest.approx(COEFFICIENTS[stage], abs=0.02)
    assert limit == pytest.approx(LIMIT, abs=0.02)
    assert fit.text_of(KNOTS, RIDGE, COEFFICIENTS, LIMIT) == fit.FILE.read_text()


def test_auroc_by_counting_pairs():
    scores, failed = np.array([1.0, 2.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0, 1.0])
    assert foresight.auroc(scores, failed) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert math.isnan(foresight.auroc(scores, np.zeros(4)))


def test_the_logistic_regression_finds_what_made_the_data():
    draw = np.random.default_rng(0)
    x = draw.uniform(0, 3, size=(20_000, 2))
    y = (draw.uniform(size=len(x)) < 1 / (1 + np.exp(2 - 1.5 * x[:, 0]))).astype(float)
    w = fit.logistic(x, y, 0.0)
    assert w == pytest.approx([1.5, 0.0, -2.0], abs=0.1)
    # What lowers the risk gets no weight rather than a negative one.
    assert fit.logistic(x, 1 - y, 0.0)[0] == 0


def test_the_limit_is_the_lowest_with_the_precision():
    odds, failed = np.array([3.0, 2.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0])
    # sigmoid(2) = 0.881 is flagged at 0.74 and above sigmoid(1) = 0.731.
    assert fit.limit_for(odds, failed, ["a"] * 4, 0.9) == 0.74
    assert fit.limit_for(odds, 1 - failed, ["a"] * 4, 0.9) == 1.0
    # A family that fails without exception makes up for one that does in four of five.
    odds, failed = np.array([3.0] * 6), np.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    assert fit.limit_for(odds, failed, ["a"] * 5 + ["b"], 0.9) == 0.01


def test_the_parts_are_those_of_the_check():
    found = networks()[:8]
    for network in found:
        model = build(network.of)
        seen = preflight(model, optimizer_of(network.of, model), loss_of, batches_of(network.of))
        run = Run(network, network.of.exponent)
        assert seen.parts == pytest.approx(parts(run.signs), abs=0.05)
        assert seen.risk == pytest.approx(risk(run), abs=0.02)
        assert seen.flagged == (seen.risk >= LIMIT)
