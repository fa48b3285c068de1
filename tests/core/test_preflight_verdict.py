"""The verdict: its causes and remedies, in words, on a page, as plain types and as readings."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gradmon import ArgumentError, preflight, reinitialize, suggest_lr
from gradmon.preflight._coefficients import COEFFICIENTS, KNOTS, LIMIT
from gradmon.preflight.causes import EVIDENCE, NOTABLE, TITLES
from gradmon.preflight.page import MEANINGS
from gradmon.preflight.score import CAP, Signs, early, hinges, parts, probability


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def data(count=64):
    x = torch.randn(count, 8)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def mlp(depth=2, gain=1.0, width=16):
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), *layers, nn.Linear(width, 4))
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=gain / math.sqrt(parameter.shape[1]))
        else:
            nn.init.zeros_(parameter)
    return model


def checked(model, lr=0.1, kind=torch.optim.SGD, **options):
    return preflight(model, kind(model.parameters(), lr=lr), entropy, [data(), data()], **options)


def names(found):
    return [cause.name for cause in found.causes]


def test_the_headline_is_as_strong_as_the_risk():
    import dataclasses

    found = checked(mlp(), lr=30.0)
    assert names(found)
    for risk, words in ((0.2, "probably trains"), (0.55, "may fail"), (0.9, "will probably fail")):
        assert words in dataclasses.replace(found, risk=risk).verdict


def test_a_sound_network_raises_nothing_and_is_not_called_healthy():
    found = checked(mlp(), lr=0.3)
    assert not found.flagged
    assert found.causes == ()
    assert found.verdict.startswith("Nothing found that would make this run fail")
    assert found.initialisation is None
    assert 0 < found.risk < LIMIT


@pytest.mark.parametrize(("lr", "cause", "verb"), [(300.0, "rate_too_high", "lower"), (1e-6, "rate_too_low", "raise")])
def test_the_direction_of_the_learning_rate(lr, cause, verb):
    found = checked(mlp(), lr=lr)
    assert names(found)[0] == cause
    assert found.flagged
    assert found.causes[0].remedy.startswith(f"{verb} the learning rate to ")
    suggested = found.learning_rates.groups[0]
    assert (suggested < lr) == (cause == "rate_too_high")
    # With it, the cause is gone.
    again = checked(mlp(), lr=suggested)
    assert not {"rate_too_high", "rate_too_low"}.intersection(names(again))


def test_a_vanishing_signal_and_its_remedy():
    model = mlp(depth=12, gain=0.1)
    found = checked(model)
    assert "vanishing" in names(found)
    assert found.flagged
    assert "gradmon.reinitialize" in found.initialisation
    reinitialize(model, entropy, data())
    again = checked(model, lr=suggest_lr(model, torch.optim.SGD(model.parameters(), lr=0.1), entropy, data()).groups[0])
    assert "vanishing" not in names(again)
    assert again.risk < found.risk


def test_exploding_outputs():
    model = mlp()
    model[-1].weight.data.mul_(1000)
    found = checked(model)
    assert "exploding" in names(found)
    assert found.flagged


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_verdict(value):
    model = mlp()
    model[-1].bias.data.fill_(value)
    found = checked(model)
    assert names(found) == ["not_finite"]
    assert found.risk == 1
    assert found.risk_after(1.0) == 1
    assert found.learning_rates.groups is None
    assert "not finite" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_gradient_that_is_not_finite_is_a_verdict():
    model = nn.Linear(3, 1)
    loss = lambda m, b: (m(b) * 0).abs().sqrt().sum()  # noqa: E731
    found = preflight(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, torch.ones(8, 3))
    assert names(found) == ["not_finite"]
    assert "its gradient is not finite" in found.causes[0].evidence


def test_no_gradient_is_a_verdict():
    model = mlp()
    loss = lambda m, b: entropy(m, b) * 0  # noqa: E731
    found = preflight(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, data())
    assert names(found) == ["no_gradient"]
    assert found.risk == 1


def test_learning_rates_of_zero_are_a_verdict_and_a_warm_up_is_not():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = preflight(model, optimizer, entropy, data())
    assert names(found) == ["rate_zero"]
    assert found.learning_rates.groups[0] > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert "rate_zero" not in names(preflight(model, optimizer, entropy, data()))


def test_without_a_part_there_is_no_risk_and_the_rest_is_said():
    model = mlp()

    def penal(model, batch):
        return entropy(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())

    found = preflight(model, torch.optim.SGD(model.parameters(), lr=300.0), penal, data())
    assert found.risk is None
    assert not found.flagged
    assert names(found) == ["rate_too_high"]
    assert found.verdict == "The risk cannot be told"
    assert found.risk_after(1.0) is None
    assert "missing" in str(found)
    assert found.reason == found.look.reasons["out_sd"]
    found = preflight(model, torch.optim.LBFGS(model.parameters()), entropy, data())
    assert found.risk is None
    assert found.look.scan.reason.startswith("no trial step with LBFGS")


def test_a_network_that_has_learned_something_has_no_risk():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = data()
    for _ in range(40):
        optimizer.zero_grad()
        entropy(model, batch).backward()
        optimizer.step()
    low = preflight(model, torch.optim.Adam(model.parameters(), lr=1e-6), entropy, batch)
    assert low.look.begun
    assert (low.risk, low.causes) == (None, ())
    assert "start from nothing" in low.reason
    assert "start from nothing" in " ".join(str(low).split())
    high = preflight(model, torch.optim.SGD(model.parameters(), lr=1e4), entropy, batch)
    assert names(high) == ["rate_too_high"]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_has_a_scan_and_no_risk():
    model = torch.jit.script(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)))
    found = preflight(model, torch.optim.SGD(model.parameters(), lr=0.1), entropy, data())
    assert found.risk is None
    assert found.reason == found.look.reasons["out_sd"]
    assert found.learning_rates.groups is not None


def test_the_risk_is_the_sum_of_its_parts():
    found = checked(mlp(depth=12, gain=0.1), lr=30.0)
    assert found.risk == pytest.approx(1 / (1 + math.exp(-sum(found.parts.values()))))
    for cause in found.causes:
        assert found.parts[cause.name] == cause.weight >= NOTABLE
    weights = [cause.weight for cause in found.causes]
    assert weights == sorted(weights, reverse=True)


def test_the_risk_after_some_steps_rises_with_the_loss():
    found = checked(mlp())
    chance = found.look.chance.loss
    risks = [found.risk_after(part * chance) for part in (0.1, 0.5, 1.0, 5.0)]
    assert risks == sorted(risks)
    assert risks[0] < risks[-1]
    assert found.risk_after(math.inf) == found.risk_after(math.nan) == found.risk_after(10 * chance)
    with pytest.raises(ArgumentError, match=r"`loss` must be a number\. Got str\."):
        found.risk_after("1")


def test_hinges_are_decades_beyond_their_knots():
    inside = Signs(0.0, 0.3, 0.5, 1.0, -3.0)
    assert set(hinges(inside).values()) == {0.0}
    high, low = KNOTS["rate_too_high"], KNOTS["rate_too_low"]
    assert hinges(Signs(high + 0.5, 0.3, 0.5, 1.0, -3.0))["rate_too_high"] == pytest.approx(0.5)
    assert hinges(Signs(low - 0.25, 0.3, 0.5, 1.0, -3.0))["rate_too_low"] == pytest.approx(0.25)
    assert hinges(Signs(0.0, 0.3, 0.5, 1.0, KNOTS["sharp"] + 1))["sharp"] == pytest.approx(1)
    chaotic = hinges(Signs(0.0, 0.3, 0.99, 10 ** (KNOTS["chaotic"] + 1), -3.0))
    assert chaotic == pytest.approx({**hinges(inside), "chaotic": 1.0})
    assert hinges(Signs(-math.inf, 0.0, 0.5, 1.0, -3.0)) == pytest.approx(
        {**hinges(inside), "rate_too_low": CAP, "vanishing": CAP}
    )
    assert hinges(Signs(None, None, None, None, None)) == pytest.approx(hinges(inside))
    assert (early(1.0), early(math.nan), early(math.inf), early(0.0)) == (0.0, 1.0, 1.0, -1.0)
    assert probability(0.0) == 0.5
    assert probability(-1e6) == 0.0


def test_the_coefficients_are_what_the_score_needs():
    assert set(COEFFICIENTS["start"]) == {*hinges(Signs(0.0, 0.3, 0.5, 1.0, -3.0)), "base"}
    assert set(COEFFICIENTS["early"]) == {*COEFFICIENTS["start"], "loss"}
    assert set(EVIDENCE) == set(COEFFICIENTS["start"]) - {"base"}
    assert set(EVIDENCE) <= set(TITLES)
    assert 0 < LIMIT < 1
    assert all(weight >= 0 for of in COEFFICIENTS.values() for name, weight in of.items() if name != "base")
    assert parts(Signs(0.0, 0.3, 0.5, 1.0, -3.0))["base"] == COEFFICIENTS["start"]["base"]


def failing():
    return checked(mlp(depth=12, gain=0.1), lr=30.0)


def test_the_terminal_has_eighty_columns():
    for found in (checked(mlp()), failing(), checked(mlp(), kind=torch.optim.Adam, lr=1e-3)):
        lines = str(found).splitlines()
        assert max(map(len, lines)) <= 80
        assert lines[0] == f"gradmon preflight: {found.verdict}"
        assert f"{found.look.passes} passes" in lines[-1]


def test_the_notebook_has_the_same_words_escaped():
    found = failing()
    page = found._repr_html_()
    assert found.verdict in page
    assert "standard deviation between examples" in page
    assert "-&gt;" in page
    assert page.count("<tr>") == page.count("</tr>") > 4


def test_plain_types_survive_json():
    for found in (checked(mlp()), failing()):
        plain = found.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert plain["risk"] == found.risk
        assert [cause["name"] for cause in plain["causes"]] == names(found)
        assert plain["chance"]["classes"] == 4


def test_readings_have_a_number_or_a_reason():
    for found in (checked(mlp()), failing(), checked(mlp(), budget=8, lr=1e-6)):
        readings = {reading.name: reading for reading in found.to_readings(7)}
        assert readings.keys() == MEANINGS.keys()
        for reading in readings.values():
            assert reading.step == 7
            assert math.isnan(reading.value) <= (reading.reason is not None)
        assert readings["preflight_risk"].value == pytest.approx(found.risk or math.nan, nan_ok=True)
        assert readings["preflight_chance"].value == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize(("batch", "noise", "words"), [(4, 100.0, "mostly noise"), (64, 3.0, "more than enough")])
def test_the_batch_size_is_a_note_on_quality(batch, noise, words):
    import dataclasses

    from gradmon.preflight.verdict import judged

    seen = dataclasses.replace(checked(mlp()).look, batch=batch, noise_scale=noise)
    assert words in judged(seen).batch_size
    assert judged(dataclasses.replace(seen, batch=16, noise_scale=20.0)).batch_size.startswith(
        "a batch of 16 is sensible"
    )
    assert "do not tell" in judged(dataclasses.replace(seen, noise_scale=math.inf)).batch_size
    assert judged(dataclasses.replace(seen, noise_scale=None)).batch_size is None
    assert judged(dataclasses.replace(seen, noise_scale=1e9)).risk == judged(seen).risk
