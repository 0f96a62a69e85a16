"""The live view in terminals of every kind, and without one."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from deepseek_jax.runs.live import LiveView, duration, load_map, sparkline

STEP = {
    "kind": "step",
    "step": 20,
    "tokens": 250_000,
    "loss": 2.5,
    "mtp": 3.0,
    "max_violation": [0.25, 0.75],
    "tokens_per_second": 12_500.0,
    "mfu": 0.41,
    "data_wait": 0.002,
    "load": [[10] * 16, [0, 40] * 8],
}
EVALUATION = {"kind": "evaluation", "step": 20, "bits_per_byte": 1.25, "trigram_bits_per_byte": 1.5}


def console(width=80, height=24, **settings) -> Console:
    settings = {"force_terminal": True, "color_system": None, "_environ": {"TERM": "xterm"}, **settings}
    return Console(file=io.StringIO(), width=width, height=height, **settings)


def panel_lines(width: int, height: int, records=(STEP, EVALUATION), **settings) -> list[str]:
    """What the view draws, at a given size, a minute into the run."""
    now = [0.0]
    to = console(width, height, **{"force_terminal": False, **settings})
    view = LiveView(1_000_000, "tiny-v3", console=to, clock=lambda: now[0])
    now[0] = 60.0
    for record in records:
        view.record(record)
    with to.capture() as shown:
        to.print(view.panel)
    return shown.get().rstrip("\n").split("\n")


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_loses_no_figure(width):
    lines = panel_lines(width, 40)
    assert max(map(len, lines)) < width
    figures = {*re.findall(r"[\d.:]+[kM%]?", "\n".join(line for line in panel_lines(120, 40)[1:5]))}
    assert len(figures) > 8
    assert figures <= {*re.findall(r"[\d.:]+[kM%]?", "\n".join(lines))}


def test_it_shows_what_matters():
    text = "\n".join(panel_lines(100, 30))
    for part in (
        "25.0%",
        "step 20",
        "250k of 1M tokens",
        "1:00 gone",
        "1:00 left",
        "loss 2.5000",
        "MaxVio 0.50",
        "12.5k tokens/s",
        "MFU 41.0%",
        "data wait 2 ms/step",
        "held-out 1.2500 bits/byte",
        "trigram 1.5000",
        "0 ▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄",
        "1  █ █ █ █ █ █ █ █",
    ):
        assert part in text


def test_it_shows_what_takes_time_beside_steps():
    now = [0.0]
    to = console(100, 30, force_terminal=False)
    view = LiveView(1_000_000, console=to, clock=lambda: now[0])

    def shown():
        with to.capture() as text:
            to.print(view.panel)
        return text.get()

    assert "starting" in shown()
    for record, phase in ((None, "compiling"), (STEP, "measuring")):
        if record is not None:
            view.record(record)
        view.record({"kind": "phase", "phase": phase})
        now[0] += 75.0
        assert f"{phase} 1:15" in shown()
        assert "starting" not in shown()
        view.record({"kind": "phase", "phase": None})
        assert phase not in shown()
    assert "phase" not in to.file.getvalue()


@pytest.mark.parametrize("size", [(40, 24), (40, 10), (20, 6), (200, 60)])
@pytest.mark.parametrize("shape", [(2, 16), (58, 256)])
def test_it_fits_the_terminal(size, shape):
    width, height = size
    step = STEP | {"load": np.ones(shape, int).tolist(), "step": 123_456_789, "tokens": 999_999}
    lines = panel_lines(width, height, [step | {"loss": 2.0 + 1 / n} for n in range(1, 100)] + [EVALUATION])
    assert max(map(len, lines)) <= width
    assert len(lines) < height


def test_time_left_is_that_of_what_happened():
    now = [0.0]
    view = LiveView(1000, console=console(force_terminal=False), clock=lambda: now[0])
    for now[0], tokens in ((100.0, 100), (200.0, 300)):
        view.record(STEP | {"tokens": tokens, "tokens_per_second": 1e6})
    # 200 tokens in the 100 seconds since the first step: 700 more need 350.
    assert view.panel.left - now[0] == 350


def test_without_a_terminal_each_record_is_a_line():
    to = console(force_terminal=False)
    view = LiveView(1_000_000, console=to)
    view.say("hello [bold]there[/bold]")
    for record in (STEP, EVALUATION):
        view.record(record)
    view.close()
    lines = to.file.getvalue().splitlines()
    assert [line.split("min  ")[1] for line in lines] == [
        "hello [bold]there[/bold]",
        "step 20: loss 2.5000, MTP 3.0000, MaxVio 0.50, tokens a second 12.5k, MFU 41.0%",
        "step 20: held-out bits per byte 1.2500, trigram on the same tokens 1.5000",
    ]


def test_on_a_terminal_lines_scroll_and_the_cursor_comes_back():
    to = console(80, 30)
    stdout = sys.stdout
    view = LiveView(1_000_000, console=to)
    view.say("hello")
    for record in (STEP, EVALUATION):
        view.record(record)
    view.close()
    view.close()
    written = to.file.getvalue()
    assert "hello" in written
    # A step is in the view only; its line would scroll everything else away.
    assert "step 20: loss" not in written
    assert "step 20: held-out" in written.replace("\n", " ")
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert sys.stdout is stdout


def test_no_color_is_followed():
    colored = panel_lines(80, 30, color_system="standard")
    plain = panel_lines(80, 30, color_system="standard", no_color=True)
    assert re.search("\x1b\\[3[0-9]m", "\n".join(colored))
    assert not re.search("\x1b\\[[349][0-9]m", "\n".join(plain))


def test_a_new_size_is_drawn_afresh():
    to = console(80, 30)
    view = LiveView(1_000_000, console=to)
    view.say("hello")
    view.record(STEP)
    to.size = (40, 20)
    to.file.truncate(0)
    view.record(STEP)
    view.close()
    written = to.file.getvalue()
    assert "\x1b[2J" in written
    assert "hello" in written[written.index("\x1b[2J") :]


def test_an_interrupt_leaves_the_terminal_clean(tmp_path):
    """As a process of its own: an error that nobody catches, no `close`."""
    code = (
        "from rich.console import Console; from deepseek_jax.runs.live import LiveView\n"
        "LiveView(1000, console=Console(force_terminal=True)).say('hello')\n"
        "raise KeyboardInterrupt\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "LINES": "20"}
    folder = Path(__file__).parent.parent.parent
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)
    assert "hello" in found.stdout
    assert found.stdout.rindex("\x1b[?25h") > found.stdout.rindex("\x1b[?25l")


def test_letters_that_a_terminal_lacks_do_not_end_the_run():
    class Ascii(io.StringIO):
        encoding = "ascii"

    to = Console(file=Ascii(), width=60, force_terminal=False)
    view = LiveView(1000, "tiny", console=to)
    view.say("naïve")
    view.record(STEP)
    to.print(view.panel)
    assert to.file.getvalue().isascii()


def test_bars():
    assert sparkline([0, 1, 2], 10) == "▁▅█"
    assert sparkline([1, 1], 10) == "▁▁"
    assert sparkline([0, float("nan"), 2], 10) == "▁!█"
    assert sparkline([float("nan")], 10) == "!"
    assert len(sparkline(range(1000), 33)) == 33
    rows = [line.plain for line in load_map([[4, 0], [2, 2], [0, 4]], 40, 3)]
    # Two rows for three layers: the first two share one, the larger load of an expert counts.
    assert rows[1:] == ["0-1 █▄", "  2  █"]


def test_durations():
    assert [duration(s) for s in (7, 723, 11_045, 400_000)] == ["0:07", "12:03", "3:04:05", "4 d 15 h"]
