"""The panel beside progress bars and displays of others: each scene runs in a forked process on a pseudo-terminal."""

import io
import os
import re
import sys

import pytest
import tqdm
from rich.console import Console
from rich.live import Live
from rich.progress import Progress

from tests.integrations.emulator import Gate, Terminal
from tests.integrations.terminals import FIRING, opened, panel_is_last, probe, titles


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
