import re

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from gradmon._reading import Reading
from gradmon.metrics import METRICS, OWN
from gradmon_integrations.sinks._tensorboard_layout import Charts, layout
from gradmon_integrations.sinks._tensorboard_tags import series
from gradmon_integrations.sinks.tensorboard import TensorBoardSink

EVERYTHING = {(name, False) for name in (*METRICS, *OWN)} | {
    (name, True) for name, metric in METRICS.items() if metric.layers is not None
}
OF_THE_MONITOR = set(OWN) - {"learning_rate", "batch_size", "monitor_overhead"}


def written(logdir):
    accumulator = EventAccumulator(str(logdir), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    found = accumulator.Tensors("custom_scalars__config__")
    layouts = [Layout.FromString(event.tensor_proto.string_val[0]) for event in found]
    return layouts, accumulator.Tags()["scalars"]


def expressions(categories):
    return [tag for charts in categories.values() for _, tags in charts.values() for tag in tags]


def charts_of(categories):
    return {title: chart for charts in categories.values() for title, chart in charts.items()}


def test_every_metric_has_a_chart():
    whole = layout(EVERYTHING)
    assert list(whole) == ["health", "two sources", "step-consistency", "batch-dissonance", "layers"]
    for name, layered in EVERYTHING:
        if name in OF_THE_MONITOR:
            continue
        tag, logarithm, _ = series(name, "blocks.0.fc" if layered else None)
        matching = [one for one in expressions(whole) if re.match(one, logarithm or tag)]
        assert len(matching) == 1, name


def test_charts_have_titles_of_their_own():
    titles = [title for charts in layout(EVERYTHING).values() for title in charts]
    assert len(titles) == len(set(titles))


def test_a_metric_that_there_is_not_has_no_chart():
    assert layout([("loss", False)]) == {"health": {"loss": ["Multiline", ["^health/loss$"]]}}
    assert layout([("probe_seconds", False)]) == {}
    assert list(layout([("grad_norm", True)])) == ["layers"]


def test_a_chart_is_the_same_in_every_run():
    everything = charts_of(layout(EVERYTHING))
    for entry in EVERYTHING:
        for title, chart in charts_of(layout([entry])).items():
            assert everything[title] == chart


def test_the_callers_own_metrics_have_charts_too():
    categories = layout([("a.b[0]", False), ("a.b[0]", True)])
    (whole,) = expressions({"": categories["others"]})
    (layers,) = expressions({"": categories["layers"]})
    assert re.match(whole, "gradmon/a.b[0]")
    assert not re.match(whole, "gradmon/aXb[0]")
    assert re.match(layers, "layer-a.b[0]/fc")


def test_one_name_that_begins_another_is_not_mixed_up():
    (condition,) = expressions(layout([("weight_condition", True)]))
    assert not re.match(condition, "layer-weight_condition_too/fc")
    (loss,) = expressions(layout([("loss", False)]))
    assert not re.match(loss, "health/loss_scale")


def test_the_layout_is_written_only_when_there_is_more_and_not_for_ever():
    charts = Charts()
    written = []
    for step in range(40):
        name = f"m{min(step // 2, 12)}"
        charts.see([Reading(name, 1.0, step)])
        written.append(charts.due())
    told = [step for step, one in enumerate(written) if one is not None]
    assert told == [0, 2, 4, 6, 8]
    assert list(written[8]["others"]) == ["m0", "m1", "m2", "m3", "m4"]


def test_every_expression_of_the_last_layout_finds_series(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(
        [Reading("loss", 1.0, 1), Reading("weight_condition", 2.0, 1), Reading("weight_condition", 2.0, 1, "fc")]
    )
    sink.write([Reading("loss", 1.0, 2)])
    sink.write([Reading("step_share", 0.5, 2), Reading("batch_share", 0.5, 2), Reading("loss", 1.0, 3)])
    sink.close()
    layouts, tags = written(tmp_path)
    assert len(layouts) == 2
    found = [
        (category.title, chart.title, chart.multiline.tag)
        for category in layouts[-1].category
        for chart in category.chart
    ]
    assert [category for category, _, _ in found] == ["health", "two sources", "step-consistency", "layers"]
    for _, title, wanted in found:
        assert all(any(re.match(one, tag) for tag in tags) for one in wanted), title
