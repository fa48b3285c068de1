"""Each scene runs in a forked process on a pseudo-terminal; an emulator shows what a person would see."""

import io
import logging
import math
import os
import random
import re
import sys
import threading
import time

import pytest
import tqdm
from rich.console import Console
from rich.live import Live
from rich.progress import Progress

from gradmon import Alert, Reading
from gradmon._errors import ArgumentError, GradmonError
from gradmon.sinks.base import RunAware, Sink
from gradmon_integrations.sinks import _terminal_displays as displays
from gradmon_integrations.sinks._terminal_screen import Unfinished
from gradmon_integrations.sinks.terminal import TerminalSink
from tests.integrations.emulator import Gate, Terminal

REMEDY = "Lower the learning rate; if that does not help, change the initialisation or add normalisation."
FIRING = Alert(
    "ill_conditioned", "warning", "firing", 2e3, 5, None, "weight_condition is 2000, above 1000.", REMEDY, ("0", "2")
)
RESOLVED = FIRING._replace(state="resolved", message="weight_condition is 20, not above 1000.", step=9)
NUMBERS = {"step_ratio": 0.02, "noise_ratio": 1.5, "grad_norm": 0.4, "monitor_overhead": 0.031, "gradient_rank": 0.2}


def opened(run="mlp-1", rank=0, **options):
    sink = TerminalSink(**{"refresh": 0, **options})
    sink.bind(run, rank)
    return sink


def probe(sink, step, condition=20.0):
    named = {"loss": 2.3 * math.exp(-step / 20), "weight_condition": condition, **NUMBERS}
    sink.write([Reading(name, value, step) for name, value in named.items()])


def titles(text):
    return [line for line in text.splitlines() if line.startswith("── gradmon")]


def panel_is_last(text, rows=4):
    return text.splitlines()[-rows - 1 :][0].startswith("── gradmon")


def test_it_is_a_sink_that_is_called_in_the_training():
    assert isinstance(TerminalSink(), Sink)
    assert isinstance(TerminalSink(), RunAware)
    assert TerminalSink.immediate is True


def test_prints_appear_above_the_panel():
    gate = Gate()

    def scene():
        sink = opened()
        sink.describe({"model": "Sequential", "optimizer": "SGD", "seed": 0})
        for step in range(1, 31):
            probe(sink, step)
            if step % 10 == 0:
                print("epoch", step // 10)
                print("to stderr", step // 10, file=sys.stderr)
        gate.wait()
        sink.finish(True)
        sink.close()
        print("after")

    terminal = Terminal(80, 24)
    terminal.start(scene)
    seen = gate.look(terminal)
    assert seen.splitlines()[:6] == [f"{word} {n}" for n in (1, 2, 3) for word in ("epoch", "to stderr")]
    assert len(titles(seen)) == 1
    assert titles(seen)[0].startswith("── gradmon mlp-1 step 30  Sequential SGD ───")
    assert panel_is_last(seen)
    assert re.search(r"  loss +0.513 [▁-█]+ +step_ratio +0.02 [▁-█]+$", seen, re.MULTILINE)
    assert re.search(r"overhead +3.1 % ", seen)
    assert seen.endswith("  no alert")
    assert terminal.end() == 0
    assert "finished ──" in titles(terminal.text)[0]
    assert terminal.lines[-1] == "after"


@pytest.mark.parametrize("columns", [20, 40, 79, 80, 120, 200])
def test_the_panel_fits_any_width(columns):
    gate = Gate()

    def scene():
        sink = opened()
        sink.alert(FIRING)
        for step in range(1, 60):
            probe(sink, step, 2e3)
        gate.wait()
        sink.close()

    terminal = Terminal(columns, 24)
    terminal.start(scene)
    seen = gate.look(terminal)
    assert len(titles(seen)) == 1
    assert max(map(len, seen.splitlines())) < columns
    panel = seen[seen.index("── gradmon") :].splitlines()
    assert len(panel) <= 10
    assert sum("weight_con" in line for line in panel if "since" not in line) >= 1
    assert sum(line.startswith("  loss") for line in panel) == 1
    assert any(line.startswith("! ill_cond") for line in panel)
    assert terminal.end() == 0
    assert " ".join(terminal.text.split()).endswith("or add normalisation.")
    assert len(titles(terminal.text)) == 1


def test_many_alerts_share_the_rows_and_are_all_told_in_the_end():
    gate = Gate()

    def scene():
        sink = opened()
        probe(sink, 1)
        for number in range(8):
            sink.alert(FIRING._replace(rule=f"rule_{number}", severity="critical" if number == 7 else "info"))
        gate.wait()
        sink.close()

    terminal = Terminal(100, 60)
    terminal.start(scene)
    panel = gate.look(terminal).split("── gradmon")[1].splitlines()
    assert len(panel) == 10
    assert panel[4].startswith("! rule_7: Lower the learning rate;")
    assert [line[:8] for line in panel[4:9]] == ["! rule_7", *(f"! rule_{n}" for n in range(4))]
    assert panel[9] == "  and 3 more alerts"
    assert terminal.end() == 0
    last = " ".join(terminal.text.split("── gradmon")[1].split())
    assert [f"! rule_{n} since step 5, mostly in 0, 2. {REMEDY}" in last for n in range(8)] == [True] * 8


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_the_panel_fits_a_low_terminal(rows):
    gate = Gate()

    def scene():
        sink = opened()
        for step in range(1, 20):
            probe(sink, step)
        gate.wait()
        sink.close()

    terminal = Terminal(60, rows)
    terminal.start(scene)
    seen = gate.look(terminal)
    assert len(titles(seen)) == 1
    assert len(seen.splitlines()) < rows
    assert terminal.end() == 0


def test_an_alert_is_told_once_and_stays_with_its_remedy():
    gate = Gate()

    def scene():
        sink = opened()
        probe(sink, 5, 2e3)
        sink.alert(FIRING)
        for layer in range(12):
            sink.alert(Alert("dead_layer", "warning", "firing", 0.0, 6, f"conv{layer}", "grad_norm is 0.", "Look."))
        probe(sink, 7, 2e3)
        gate.wait()
        sink.alert(RESOLVED)
        sink.close()

    terminal = Terminal(110, 24)
    terminal.start(scene)
    seen = gate.look(terminal)
    flat = " ".join(seen.split())
    assert (
        f"gradmon mlp-1 step 5 warning ill_conditioned: weight_condition is 2000, above 1000. {REMEDY} gradmon" in flat
    )
    assert f"! ill_conditioned since step 5, weight_condition now 2000, mostly in 0, 2. {REMEDY}" in flat
    assert flat.count("warning dead_layer") == 1
    assert "! dead_layer since step 6, in conv0, conv1, conv2 and 9 more. Look." in flat
    assert terminal.end() == 0
    assert "step 9  ill_conditioned resolved: weight_condition is 20, not above 1000." in terminal.text
    assert "! ill_conditioned" not in terminal.text


def test_three_nested_bars_of_tqdm_are_left_alone():
    gates = Gate(), Gate(), Gate()

    def scene():
        sink, step = opened(pause=0.0), 0
        for epoch in tqdm.tqdm(range(2), desc="epoch", mininterval=0):
            for batch in tqdm.tqdm(range(3), desc="batch", leave=False, mininterval=0):
                for micro in tqdm.tqdm(range(4), desc="micro", leave=False, mininterval=0):
                    step += 1
                    probe(sink, step, 2e3)
                    if step == 2:
                        sink.alert(FIRING)
                    if (epoch, batch, micro) == (1, 1, 2):
                        gates[0].wait()
        print("between")
        probe(sink, 25)
        gates[1].wait()
        for n in tqdm.tqdm(range(3), desc="valid", mininterval=0):
            if n == 1:
                gates[2].wait()
        probe(sink, 26)
        sink.close()

    terminal = Terminal(100, 50)
    terminal.start(scene)
    seen = gates[0].look(terminal).splitlines()
    assert [line.split(":")[0] for line in seen[-3:]] == ["epoch", "batch", "micro"]
    assert [re.search(r"(\d)/\d", line)[1] for line in seen[-3:]] == ["1", "1", "2"]
    assert seen[-4].startswith("gradmon mlp-1 step 19  loss ")
    above = seen[:-3]
    assert [line for line in above if not line.startswith(("gradmon mlp-1 step ", "  "))] == []
    assert sum("warning ill_conditioned" in line for line in above) == 1
    assert titles("\n".join(seen)) == []
    seen = gates[1].look(terminal)
    assert sum(line.startswith(("epoch", "batch", "micro")) for line in seen.splitlines()) == 1
    assert len(titles(seen)) == 1
    assert panel_is_last(seen, 5)
    seen = gates[2].look(terminal)
    assert seen.splitlines()[-1].startswith("valid:  33%")
    assert titles(seen) == []
    assert terminal.end() == 0
    assert terminal.text.count("valid") == 1
    assert panel_is_last(terminal.text, 5)


@pytest.mark.parametrize("own_console", [False, True])
def test_progress_of_rich_is_left_alone(own_console):
    gates = Gate(), Gate()

    def scene():
        sink = opened(pause=0.0)
        probe(sink, 1)
        console = Console() if own_console else None
        with Progress(console=console, auto_refresh=False) as progress:
            task = progress.add_task("training", total=10)
            for step in range(2, 12):
                progress.advance(task)
                progress.refresh()
                print("printed", step)
                probe(sink, step, 2e3)
                if step == 5:
                    sink.alert(FIRING)
                if step == 7:
                    gates[0].wait()
        probe(sink, 12)
        gates[1].wait()
        sink.close()
        assert type(sys.stdout) is io.TextIOWrapper

    terminal = Terminal(100, 60)
    terminal.start(scene)
    seen = gates[0].look(terminal)
    assert seen.count("training") == 1
    assert re.match(r"training +━+[ ╸╺━]+ +60%", seen.splitlines()[-1])
    assert [int(n) for n in re.findall(r"^printed (\d+)$", seen, re.MULTILINE)] == list(range(2, 8))
    assert [int(n) for n in re.findall(r"^gradmon mlp-1 step (\d+)  loss", seen, re.MULTILINE)] == list(range(2, 8))
    assert "warning ill_conditioned" in seen
    assert titles(seen) == []
    seen = gates[1].look(terminal)
    assert "100%" in seen
    assert len(titles(seen)) == 1
    assert panel_is_last(seen, 5)
    assert terminal.end() == 0


def test_a_live_display_that_redirects_nothing():
    gate = Gate()

    def scene():
        import rich

        sink, quiet = opened(pause=0.0), {"redirect_stdout": False, "redirect_stderr": False, "auto_refresh": False}
        with Live("line 1\nline 2", console=rich.get_console(), **quiet) as live:
            for step in range(1, 4):
                probe(sink, step)
                live.update(f"line 1 at {step}\nline 2 at {step}", refresh=True)
            gate.wait()
        sink.close()

    terminal = Terminal(100, 30)
    terminal.start(scene)
    seen = gate.look(terminal).splitlines()
    assert seen[-2:] == ["line 1 at 3", "line 2 at 3"]
    assert [line[:20] for line in seen[:-2]] == [f"gradmon mlp-1 step {n}" for n in (1, 2, 3)]
    assert terminal.end() == 0


def test_a_display_of_several_lines_that_nobody_knows_is_not_torn():
    gates = Gate(), Gate()

    def scene():
        sink = opened(pause=0.0)
        sys.stdout.write("one\ntwo")
        for step in range(1, 4):
            sys.stdout.write(f"\r\x1b[1Aone {step}\x1b[K\ntwo {step}\x1b[K")
            sys.stdout.flush()
            probe(sink, step)
            if step == 2:
                sink.alert(FIRING)
        gates[0].wait()
        print()
        probe(sink, 4)
        gates[1].wait()
        sink.close()

    terminal = Terminal(100, 30)
    terminal.start(scene)
    assert gates[0].look(terminal).splitlines() == ["one 3", "two 3"]
    seen = gates[1].look(terminal)
    assert seen.startswith("one 3\ntwo 3\n")
    assert len(titles(seen)) == 1
    assert terminal.end() == 0
    # What had to wait has been told.
    assert sum("warning ill_conditioned" in line for line in terminal.lines) == 1


def test_what_had_to_wait_is_told_at_the_end_at_the_latest():
    def scene():
        sink = opened(pause=0.0)
        sys.stdout.write("one\n\x1b[1Aone\ntwo")
        sys.stdout.flush()
        probe(sink, 1)
        sink.alert(FIRING)
        sink.close()

    lines = Terminal(100, 30).play(scene).splitlines()
    assert lines[:2] == ["one", "two"]
    assert [line[:20] for line in lines[2:] if not line.startswith("  ")] == [
        "gradmon mlp-1 step 1", "gradmon mlp-1 step 5", "gradmon mlp-1 step 1",
    ]  # fmt: skip


def test_a_forked_process_may_have_a_sink_of_its_own():
    def scene():
        sink = opened("parent")
        probe(sink, 1)
        child = os.fork()
        if not child:
            own = opened("child")
            probe(own, 2)
            print("from the child")
            own.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print("from the parent")
        sink.close()

    terminal = Terminal(80, 40)
    terminal.play(scene)
    assert "from the child" in terminal.raw.decode()
    assert terminal.text.index("from the parent") < terminal.text.rindex("gradmon parent step 1")


@pytest.mark.parametrize("form", ["\r{}", "{}\r"])
def test_a_bar_that_is_drawn_by_hand(form):
    gate = Gate()

    def scene():
        sink = opened(pause=0.0)
        for step in range(1, 6):
            print(form.format(f"step {step} of 5"), end="", flush=True)
            probe(sink, step)
        gate.wait()
        print()
        sink.close()

    terminal = Terminal(100, 30)
    terminal.start(scene)
    seen = gate.look(terminal).splitlines()
    assert [line[:20] for line in seen[:-1]] == [f"gradmon mlp-1 step {n}" for n in range(1, 6)]
    assert seen[-1] == "step 5 of 5"
    assert terminal.end() == 0
    assert terminal.lines[5] == "step 5 of 5"
    assert titles(terminal.text)


def test_an_unfinished_line_is_finished_where_it_was():
    def scene():
        sink = opened(pause=0.0)
        print("epoch 1 ... ", end="", flush=True)
        probe(sink, 1)
        print("x" * 120, end="")
        probe(sink, 2)
        print(" done")
        sink.close()

    text = Terminal(100, 30).play(scene)
    assert re.search(r"^epoch 1 \.\.\. x{88}\nx{32} done$", text, re.MULTILINE)
    assert text.count("epoch 1") == 1
    assert sum("xxx" in line for line in text.splitlines()) == 2


@pytest.mark.parametrize("seed", range(10))
def test_what_the_program_prints_is_what_it_would_be_without_the_sink(seed):
    """Any mixture of whole lines, pieces of lines, lines that wrap, and lines that are written again."""
    draw = random.Random(seed)
    actions = [
        draw.choice(
            ["line", "line", "piece", "long piece", "again", "wrapping", "error", "probe", "probe", "alert", "several"]
        )
        for _ in range(60)
    ]

    draw_width = draw.choice([95, 96, 97, 190, 250])

    def play(sink):
        for number, action in enumerate(actions):
            stream = sys.stderr if action == "error" else sys.stdout
            if action in ("line", "error"):
                print(f"<{number}>", file=stream)
            elif action == "piece":
                stream.write(f"<{number}>")
                stream.flush()
            elif action == "long piece":
                stream.write(f"<{number}>{'x' * draw_width}")
                stream.flush()
            elif action == "again":
                stream.write(f"\r<{number}>\x1b[K")
                stream.flush()
            elif action == "wrapping":
                stream.write(f"<{number}>{'x' * 150}|\n")
            elif action == "several":
                stream.write(f"<{number}>\n<again {number}>\n")
            elif action == "probe" and sink is not None:
                probe(sink, number)
            elif action == "alert" and sink is not None:
                sink.alert(FIRING._replace(rule=f"rule_{number}"))
        print()

    def watched():
        sink = opened(pause=0.0)
        play(sink)
        sink.close()

    def plain():
        play(None)

    def printed(text):
        return [line for line in text.splitlines() if re.match("[<x]", line)]

    assert printed(Terminal(100, 40).play(watched)) == printed(Terminal(100, 40).play(plain))


def test_a_traceback_is_not_torn():
    """The interpreter writes it piece by piece, each indentation by itself."""

    def scene():
        def wrong():
            return 1 / 0

        sink = opened()
        probe(sink, 1)
        try:
            wrong()
        except ZeroDivisionError:
            sys.__excepthook__(*sys.exc_info())
        probe(sink, 2)
        sink.close()

    terminal = Terminal(100, 40)
    text = terminal.play(scene)
    assert len(titles(text)) == 1
    assert "    return 1 / 0" in terminal.lines
    assert terminal.lines.index("ZeroDivisionError: division by zero") == terminal.lines.index(titles(text)[0]) - 1


def test_what_holds_the_stream_already_is_heard():
    """Such as a logging handler, which keeps the stream that it found."""

    def scene():
        logging.basicConfig(stream=sys.stderr, force=True, format="%(message)s", level=logging.INFO)
        sink = opened()
        for step in range(1, 6):
            probe(sink, step)
            logging.info("logged %d", step)
        sink.close()

    terminal = Terminal(100, 30)
    assert terminal.play(scene).splitlines()[:5] == [f"logged {n}" for n in range(1, 6)]
    assert len(titles(terminal.text)) == 1


def test_threads_that_print_and_bars_that_refresh_do_not_block():
    def scene():
        sink = opened(pause=0.0)

        def prints(number):
            for i in range(50):
                sys.stdout.write(f"thread {number} {i}.\n")

        threads = [threading.Thread(target=prints, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        with tqdm.tqdm(total=100, mininterval=0) as bar:
            for step in range(100):
                probe(sink, step)
                bar.update()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        sink.close()

    terminal = Terminal(120, 50)
    text = terminal.play(scene)
    # Of what passed: on the screen the bar, which moves the cursor by itself, may have overwritten some.
    assert len(set(re.findall(rb"thread (\d) (\d+)\.\r\n", terminal.raw))) == 200
    assert "100%" in text


@pytest.mark.parametrize(("narrow", "wide"), [((50, 20), (120, 30)), ((30, 8), (90, 24))])
def test_a_window_that_changes_its_size(narrow, wide):
    gates = Gate(), Gate(), Gate()

    def scene():
        sink = opened()
        for step in range(1, 10):
            probe(sink, step)
        gates[0].wait()
        for step in range(10, 20):
            probe(sink, step)
        gates[1].wait()
        for step in range(20, 30):
            probe(sink, step)
            print("printed", step)
        gates[2].wait()
        sink.close()

    terminal = Terminal(80, 24)
    terminal.start(scene)
    gates[0].look(terminal)
    terminal.resize(*narrow)
    seen = gates[1].look(terminal)
    assert max(map(len, seen.splitlines())) <= narrow[0]
    assert "step 19" in titles(seen)[-1]
    terminal.resize(*wide)
    seen = gates[2].look(terminal)
    assert "printed 29" in seen
    assert "step 29" in titles(seen)[-1]
    assert terminal.end() == 0


def test_two_runs_share_the_terminal():
    gate = Gate()

    def scene():
        first, second = opened("first"), opened("second")
        before = sys.stdout.write
        for step in range(1, 6):
            probe(first, step)
            probe(second, step)
            print("printed", step)
        gate.wait()
        first.close()
        print("one left")
        probe(second, 6)
        assert sys.stdout.write is before
        second.close()
        assert "write" not in vars(sys.stdout)
        assert "write" not in vars(sys.stderr)

    terminal = Terminal(80, 40)
    terminal.start(scene)
    seen = gate.look(terminal)
    assert seen.splitlines()[:5] == [f"printed {n}" for n in range(1, 6)]
    assert [re.search(r"gradmon (\w+) step 5", line)[1] for line in titles(seen)] == ["first", "second"]
    assert terminal.end() == 0
    assert len(titles(terminal.text)) == 2
    assert terminal.text.index("first step 5") < terminal.text.index("one left") < terminal.text.index("second step 6")


def test_a_forked_process_does_not_draw():
    def scene():
        sink = opened()
        probe(sink, 1)
        child = os.fork()
        if not child:
            print("from the child")
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        sink.close()

    terminal = Terminal(80, 24)
    terminal.play(scene)
    assert terminal.raw.count(b"\x1b[J") <= 3
    assert b"from the child" in terminal.raw


def test_a_hook_that_came_later_keeps_working():
    """Another program wraps `write` after us, and puts ours back when it is done."""

    def scene():
        sink = opened()
        probe(sink, 1)
        ours = sys.stdout.write
        sys.stdout.write = lambda text: ours(text.upper())
        print("loud")
        sink.close()
        print("still loud")
        sys.stdout.write = ours
        print("quiet")

    text = Terminal(80, 24).play(scene)
    assert re.findall("(?i)^.*(?:loud|quiet).*$", text, re.MULTILINE) == ["LOUD", "STILL LOUD", "quiet"]


def test_a_terminal_that_is_gone_does_no_harm_to_who_prints():
    def scene():
        sink = opened()
        probe(sink, 1)
        sys.stdout.close()
        print("printed to the other stream", file=sys.stderr)
        probe(sink, 2)
        sink.close()
        sys.stdout = sys.stderr

    assert "printed to the other stream" in Terminal(80, 24).play(scene)


def test_the_cursor_is_never_hidden():
    def scene():
        sink = opened()
        for step in range(5):
            probe(sink, step)
            print(step)
        sink.close()

    terminal = Terminal()
    terminal.play(scene)
    assert b"\x1b[?25l" not in terminal.raw


def play_plain(environ, **options):
    terminal = Terminal(80, 24)

    def scene():
        sink = opened(pause=0.0, **options)
        for step in (1, 2):
            probe(sink, step, 2e3)
        sink.alert(FIRING)
        sink.close()

    terminal.play(scene, environ)
    return terminal


def test_a_dumb_terminal_gets_plain_lines():
    terminal = play_plain({"TERM": "dumb"})
    assert b"\x1b" not in terminal.raw
    assert terminal.lines[0].startswith("gradmon mlp-1 step 1  loss 2.19  ")


def test_no_color():
    terminal = play_plain({"NO_COLOR": "1"})
    assert re.findall(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m", terminal.raw) == []
    assert titles(terminal.text)
    assert re.findall(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m", play_plain({}).raw)


def test_a_terminal_without_block_characters():
    terminal = play_plain({"PYTHONIOENCODING": "ascii"})
    assert terminal.raw.isascii()
    assert "-- gradmon mlp-1 step 2 ---" in terminal.text


def test_lines_on_a_terminal():
    terminal = play_plain({}, style="lines")
    assert [line[:20] for line in terminal.lines[:2]] == ["gradmon mlp-1 step 1", "gradmon mlp-1 step 2"]
    assert titles(terminal.text) == []


def told(**options):
    file = io.StringIO()
    sink = TerminalSink(file=file, **options)
    sink.bind("mlp-1", options.pop("rank", 0))
    return sink, file


def test_what_is_no_terminal_gets_plain_lines():
    sink, file = told(pause=0.0)
    probe(sink, 1, 2e3)
    sink.alert(FIRING)
    probe(sink, 2, 2e3)
    sink.finish(False)
    sink.close()
    assert file.getvalue().splitlines() == [
        "gradmon mlp-1 step 1  loss 2.19  step_ratio 0.02  noise_ratio 1.5  weight_condition 2000  grad_norm 0.4  "
        "overhead 3.1 %  no alert",
        f"gradmon mlp-1 step 5  warning ill_conditioned: weight_condition is 2000, above 1000. {REMEDY}",
        "gradmon mlp-1 step 2  loss 2.08  step_ratio 0.02  noise_ratio 1.5  weight_condition 2000  grad_norm 0.4  "
        "overhead 3.1 %  alerts ill_conditioned",
        "gradmon mlp-1 step 2  loss 2.08  step_ratio 0.02  noise_ratio 1.5  weight_condition 2000  grad_norm 0.4  "
        "overhead 3.1 %  alerts ill_conditioned  ended by an error",
    ]


def test_force_color_does_not_make_a_terminal_of_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    sink, file = told()
    probe(sink, 1)
    sink.close()
    assert "──" not in file.getvalue()
    assert "\x1b[J" not in file.getvalue()


def test_lines_keep_a_pause_and_alerts_do_not_repeat():
    sink, file = told(pause=1000.0)
    for step in range(1, 50):
        probe(sink, step)
        sink.alert(FIRING)
        sink.alert(RESOLVED)
    assert [re.search(r"step \d+ ( \w+ \w+)", line)[1] for line in file.getvalue().splitlines()] == [
        " loss 2", " warning ill_conditioned", " ill_conditioned resolved",
    ]  # fmt: skip
    sink.close()
    assert file.getvalue().splitlines()[-1].startswith("gradmon mlp-1 step 49  loss")


def test_drawing_keeps_a_pause():
    class Tty(io.StringIO):
        def isatty(self):
            return True

    file = Tty()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        sink = TerminalSink(file=file, refresh=1000.0)
        for step in range(1, 100):
            probe(sink, step)
    assert file.getvalue().count("── gradmon") == 1
    sink.close()
    assert "step 99" in file.getvalue()


def test_other_ranks_print_alerts_only():
    file = io.StringIO()
    sink = TerminalSink(file=file, pause=0.0)
    sink.bind("mlp-1", 3)
    probe(sink, 1)
    sink.alert(FIRING)
    probe(sink, 2)
    sink.close()
    (line,) = file.getvalue().splitlines()
    assert line.startswith("gradmon mlp-1 rank 3 step 5  warning ill_conditioned: ")


def test_names_and_messages_cannot_steer_the_terminal():
    file = io.StringIO()
    sink = TerminalSink(file=file, pause=0.0)
    sink.bind("[red]run[/red]\x1b[2J\n", 0)
    sink.describe({"model": "a\rb", "optimizer": "\x07"})
    sink.write([Reading("loss", 1.0, 1), Reading("gradient_rank\x1b[31m", 1.0, 1)])
    sink.alert(FIRING._replace(message="[bold]bad\x1b]0;title\x07", layer="a\nb", remedy=":smile:"))
    sink.close()
    text = file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "gradmon [red]run[/red]?[2J step 1  loss 1" in text
    assert "in a b: [bold]bad?]0;title? :smile:" in text


def test_nan_and_unknown_numbers():
    file = io.StringIO()
    sink = TerminalSink(file=file, pause=0.0)
    sink.write([Reading("loss", math.nan, None, reason="non-finite gradient"), Reading("step_ratio", math.inf, None)])
    sink.write([])
    sink.close()
    assert file.getvalue().splitlines() == ["gradmon  loss nan  step_ratio inf  no alert"] * 2


def test_a_run_without_a_word_leaves_no_trace():
    sink, file = told()
    sink.close()
    sink.close()
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    "use", [lambda sink: sink.write([]), lambda sink: sink.alert(FIRING), lambda sink: sink.bind("a", 0)]
)
def test_closed_is_closed(use):
    sink, _ = told()
    sink.close()
    with pytest.raises(GradmonError, match=r"The terminal sink is closed\."):
        use(sink)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "fancy"}, r"`style` must be one of auto, lines\. Got 'fancy'\."),
        ({"refresh": -1}, r"`refresh` must be a number of seconds, 0 or more\. Got -1\."),
        ({"pause": math.nan}, r"`pause` must be a number of seconds, 0 or more\. Got nan\."),
        ({"pause": True}, r"`pause` must be a number of seconds, 0 or more\. Got True\."),
        ({"pause": "1"}, r"`pause` must be a number of seconds, 0 or more\. Got '1'\."),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ArgumentError, match=message):
        TerminalSink(**options)


def test_specs():
    assert isinstance(TerminalSink.from_spec(""), TerminalSink)
    assert isinstance(TerminalSink.from_spec("lines"), TerminalSink)
    with pytest.raises(ArgumentError, match=r"`sinks` must be 'terminal' or 'terminal:lines'\. Got 'terminal:panel'\."):
        TerminalSink.from_spec("panel")


def test_without_rich(monkeypatch):
    monkeypatch.delitem(sys.modules, "gradmon_integrations.sinks._terminal_writer")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(GradmonError, match=r'needs rich .* pip install "gradmon\[terminal\]"'):
        TerminalSink()


def test_a_standard_output_that_is_closed_is_no_obstacle_before_the_first_line(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    sink = TerminalSink()
    sink.bind("mlp-1", 0)
    with pytest.raises(ValueError, match="closed file"):
        probe(sink, 1)


def test_without_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(GradmonError, match="needs a standard output"):
        TerminalSink()


def test_bars_that_are_no_bars_in_a_terminal(monkeypatch):
    assert not displays.busy()
    with tqdm.tqdm(total=3, file=io.StringIO()):
        assert not displays.busy()
    with tqdm.tqdm(total=3, disable=True):
        assert not displays.busy()
    assert not displays.print_above("nothing")
    monkeypatch.delitem(sys.modules, "tqdm.std")
    assert not displays.busy()


@pytest.mark.parametrize(
    ("texts", "is_open"),
    [
        (["a\n"], False), (["a"], True), (["a", "b\n"], False), (["\r50%"], True), (["50%\r"], True),
        (["\r50%", "\r   \r"], False), (["a\n\x1b[?25h"], False), (["\x1b[31mred\x1b[0m"], True), ([""], False),
        (["a\n", "\x1b[1A"], False), (["\x1b]0;title\x07"], False), (["  "], True),
        (["a\n", "    "], True), (["   \r"], False),
    ],
)  # fmt: skip
def test_unfinished_lines(texts, is_open):
    line = Unfinished()
    for text in texts:
        line.follow(text)
    assert line.open is is_open


def test_it_is_cheap():
    """What is not drawn costs microseconds; a panel that is drawn at most four times a second, about a millisecond."""
    sink, _ = told(pause=1000.0)
    for step in range(50):
        probe(sink, step)
    began = time.process_time()
    for step in range(1000):
        probe(sink, step)
    assert (time.process_time() - began) / 1000 < 500e-6
    sink.close()
