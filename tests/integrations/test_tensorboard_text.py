import re
import warnings

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmon._reading import Alert, Reading
from gradmon_integrations.sinks._tensorboard_text import AlertLog
from gradmon_integrations.sinks.tensorboard import TensorBoardSink

with warnings.catch_warnings():
    # A library inside TensorBoard says that it is deprecated; this is what makes the text tab's HTML.
    warnings.simplefilter("ignore", DeprecationWarning)
    from tensorboard.plugin_util import markdown_to_safe_html

FIRING = Alert("ill_conditioned", "warning", "firing", 12.5, 10, "fc", "12.5 is above 10.", "Lower the learning rate.")
RESOLVED = FIRING._replace(state="resolved", step=20, value=3.0)
BLAMED = Alert("exploding", "critical", "firing", 1e5, 15, None, "grad_norm jumped.", "Clip.", ("a.0", "b.1"))


def texts(logdir, tag):
    accumulator = EventAccumulator(str(logdir), size_guidance={"tensors": 0})
    accumulator.Reload()
    found = accumulator.Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def cells(markdown):
    """The table as TensorBoard shows it: one list of texts a row."""
    html = markdown_to_safe_html(markdown)
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    assert rows
    return [
        [re.sub(r"<br>|\s+", " ", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)]
        for row in rows
    ]


def test_each_rule_has_its_text_readable_at_once(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.alert(FIRING)
    sink.alert(FIRING._replace(state="resolved", step=20, layer=None, remedy="", blame=("a", "b")))
    assert texts(tmp_path, "alerts/ill_conditioned") == [
        (
            10,
            "**firing** (warning) in `fc`, value 12.5\n\n12.5 is above 10.\n\n**Remedy:** Lower the learning rate.",
        ),
        (20, "**resolved** (warning), value 12.5\n\n12.5 is above 10.\n\n**Layers to blame:** `a`, `b`"),
    ]
    sink.close()


def test_the_log_is_a_table_of_all_alerts_so_far(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for alert in (FIRING, BLAMED, RESOLVED):
        sink.alert(alert)
    sink.close()
    (_, first), (_, second), (step, last) = texts(tmp_path, "alerts/log")
    assert step == 20
    assert [len(cells(log)) for log in (first, second, last)] == [2, 3, 4]
    assert cells(last) == [
        ["step", "state", "severity", "rule", "value", "message", "remedy", "layers"],
        [
            *("20", "resolved", "warning", "<code>ill_conditioned</code>", "3"),
            *("12.5 is above 10.", "Lower the learning rate.", "<code>fc</code>"),
        ],
        [
            *("15", "<strong>firing</strong>", "critical", "<code>exploding</code>", "1e+05"),
            *("grad_norm jumped.", "Clip.", "<code>a.0</code>, <code>b.1</code>"),
        ],
        [
            *("10", "<strong>firing</strong>", "warning", "<code>ill_conditioned</code>", "12.5"),
            *("12.5 is above 10.", "Lower the learning rate.", "<code>fc</code>"),
        ],
    ]
    assert "**Firing now:** `ill_conditioned` in `fc`, `exploding`\n" in second
    assert "**Firing now:** `exploding`\n" in last


def test_the_log_says_when_nothing_fires():
    log = AlertLog()
    log.add(FIRING)
    log.add(RESOLVED)
    assert log.markdown().startswith("Nothing fires now.")


def test_the_log_does_not_grow_without_end():
    log = AlertLog()
    for step in range(250):
        log.add(FIRING._replace(step=step))
    table = cells(log.markdown())
    assert len(table) == 1 + 100
    assert table[1][0] == "249"
    assert log.markdown().endswith("150 older ones are left out.")


@pytest.mark.parametrize("text", ["a | b", "1 < 2 & <script>x</script>", "two\nlines", "`code | here`", "a`b"])
def test_no_text_breaks_the_table(text):
    log = AlertLog()
    log.add(FIRING._replace(layer=text, message=text, remedy=text, blame=(text,)))
    header, row = cells(log.markdown())
    assert len(row) == len(header) == 8
    assert "script>" not in markdown_to_safe_html(log.markdown()).replace("&lt;script&gt;", "").replace(
        "/script&gt;", ""
    )


def test_a_long_remedy_is_wrapped_but_no_code_span_is_torn():
    log = AlertLog()
    code = "`Monitor(model, optimizer, loss, schedule=budget(0.03))`"
    log.add(FIRING._replace(remedy=f"Look less often, and in the end perhaps not at all: {code} keeps to a part."))
    assert code in log.markdown()
    assert "<code>Monitor(model, optimizer, loss, schedule=budget(0.03))</code>" in markdown_to_safe_html(
        log.markdown()
    )
    assert "<br>" in log.markdown()


def test_what_the_run_is_is_a_table(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.bind("mlp-1", 0)
    sink.describe({"model": "Sequential", "learning_rate": 0.5, "passive": False})
    sink.write([Reading("loss", 1.0, 1)])
    sink.close()
    ((step, text),) = texts(tmp_path, "run")
    assert step == 0
    assert "`mlp-1`" in text
    assert cells(text) == [
        ["what", "value"],
        ["model", "Sequential"],
        ["learning_rate", "0.5"],
        ["passive", "False"],
    ]
