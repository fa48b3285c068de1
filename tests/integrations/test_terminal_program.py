"""The panel and the program around it: each scene runs in a forked process on a pseudo-terminal."""

import logging
import os
import random
import re
import sys
import threading

import pytest
import tqdm

from tests.integrations.emulator import Gate, Terminal
from tests.integrations.terminals import FIRING, opened, probe, titles


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
