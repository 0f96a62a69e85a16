"""A run seen in the terminal while it trains: progress, figures, the loss and the load of the experts."""

import atexit
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from deepseek_jax.runs.metrics import Record, describe, plain, short

BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
# A load of this many times the mean fills a cell.
FULL = 2.0
REMEMBERED = 500


class LiveView:
    """A `Reporter` for people. On a terminal: a view that stays at the bottom, with what is said scrolling above it.
    Elsewhere (a file, a pipe, TERM=dumb): one line for each record and each thing said.

    It fits itself to the terminal's size, also when that changes, and follows NO_COLOR.
    """

    def __init__(
        self,
        total_tokens: int,
        title: str = "",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ):
        """``total_tokens``: of the whole run. ``title``: what is trained. ``began``: the clock's time at the start."""
        self.console = console or Console(highlight=False)
        self.clock, self.began = clock, clock() if began is None else began
        self.panel = Panel(total_tokens, title, lambda: clock() - self.began)
        self.said: deque[str] = deque(maxlen=REMEMBERED)
        self.size = self.console.size
        self.live = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(get_renderable=self._current, console=self.console, refresh_per_second=2)
            self.live.start(refresh=True)
            # A run that ends without `close` must not leave the cursor hidden.
            atexit.register(self.close)

    def expect(self, total_tokens: int) -> None:
        """The whole run's tokens, where they are known only once the data is read."""
        self.panel.total = total_tokens

    def record(self, record: Record) -> None:
        record = plain(record)
        self.panel.take(record)
        line = describe(record)
        # On a terminal the steps' figures are in the view.
        if line and (self.live is None or record["kind"] != "step"):
            self.say(line)
        elif self.live is not None:
            self.live.refresh()

    def say(self, line: str) -> None:
        line = f"{(self.clock() - self.began) / 60:8.2f} min  {line}"
        # A log line must not end a run on a terminal that cannot write its letters.
        line = line.encode(self.console.encoding, "replace").decode(self.console.encoding)
        self.said.append(line)
        self.console.print(line, markup=False, highlight=False, soft_wrap=self.live is None)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
            atexit.unregister(self.close)

    def _current(self) -> "Panel":
        if self.console.size != self.size:
            # The terminal has wrapped the lines drawn before at other places than they are counted to be.
            self.size = self.console.size
            fits = list(self.said)[-max(self.size.height - 4, 1) :]
            self.console.file.write("\x1b[2J\x1b[H" + "".join(f"{line}\n" for line in fits))
            # Rich would go back up by the height that it drew before; it has no public way to forget that.
            self.live._live_render._shape = None
        return self.panel


class Panel:
    """What the view shows, drawn at whatever width and height there is."""

    def __init__(self, total_tokens: int, title: str, elapsed: Callable[[], float]):
        self.total, self.title, self.elapsed = total_tokens, title, elapsed
        self.step: Record = {}
        self.evaluation: Record = {}
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.first: tuple[float, int] | None = None
        self.phase: tuple[str, float] | None = None  # what goes on that is no step, and since when
        self.left: float | None = None

    def take(self, record: Record) -> None:
        if record["kind"] == "phase":
            self.phase = None if record["phase"] is None else (record["phase"], self.elapsed())
        elif record["kind"] == "evaluation":
            self.evaluation = record
        elif record["kind"] == "step":
            self.step = record
            if "loss" in record:
                self.losses.append(float(record["loss"]))
            self._estimate(record["tokens"], record.get("tokens_per_second"))

    def _estimate(self, tokens: int, rate: float | None) -> None:
        """Time left: by all that happened since the first step that was seen, evaluations and saving with it."""
        now = self.elapsed()
        if self.first is None:
            self.first = (now, tokens)
        elif tokens > self.first[1] and now > self.first[0]:
            rate = (tokens - self.first[1]) / (now - self.first[0])
        self.left = now + (self.total - tokens) / rate if rate else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - 1
        bars = ASCII_BARS if options.ascii_only else BARS
        lines = [
            self._progress(width, options.ascii_only),
            *wrapped(self._place(), width),
            *wrapped(self._figures(), width),
            *wrapped(self._held_out(), width),
        ]
        if len(self.losses) > 1 and width >= 16:
            shown = sparkline(list(self.losses), width - 6, bars)
            lines.append(Text.assemble("loss ", (shown, "cyan"), no_wrap=True))
        # The said lines above keep at least a third of the terminal.
        rows = options.size.height * 2 // 3 - len(lines) - 1
        if self.step.get("load") and rows >= 2:
            lines += load_map(self.step["load"], width, rows, bars)
        yield Text("\n").join(lines[: max(options.size.height - 2, 1)])

    def _progress(self, width: int, ascii_only: bool) -> Text:
        share = min(self.step.get("tokens", 0) / max(self.total, 1), 1.0)
        label = f" {share:6.1%}"
        room = max(width - len(label), 1)
        full = int(room * share)
        done, rest = ("#", "-") if ascii_only else ("━", "─")
        return Text.assemble((done * full, "green"), (rest * (room - full), "bright_black"), label, no_wrap=True)

    def _place(self) -> list[str]:
        items = [self.title] if self.title else []
        if self.step:
            items += [f"step {self.step['step']:,}", f"{short(self.step['tokens'])} of {short(self.total)} tokens"]
        else:
            items += [] if self.phase else ["starting"]
        if self.phase is not None:
            what, since = self.phase
            items.append(f"{what} {duration(self.elapsed() - since)}")
        items.append(f"{duration(self.elapsed())} gone")
        if self.left is not None:
            items.append(f"{duration(max(self.left - self.elapsed(), 0))} left")
        return items

    def _figures(self) -> list[str]:
        labels = (
            ("loss", "loss {:.4f}"),
            ("main", "main {:.4f}"),
            ("mtp", "MTP {:.4f}"),
            ("reward", "reward {:.3f}"),
            ("length", "length {:.1f}"),
            ("max_violation", "MaxVio {:.2f}"),
            ("grad_norm", "gradient {:.3g}"),
            ("lr", "rate {:.2e}"),
            ("mfu", "MFU {:.1%}"),
        )
        items = [text.format(_mean(self.step[name])) for name, text in labels if self.step.get(name) is not None]
        rate, wait = self.step.get("tokens_per_second"), self.step.get("data_wait")
        if rate is not None:
            items.insert(-1 if self.step.get("mfu") is not None else len(items), f"{short(float(rate))} tokens/s")
        if wait is not None:
            items.append(f"data wait {float(wait) * 1000:.3g} ms/step")
        return items

    def _held_out(self) -> list[str]:
        labels = (
            ("bits_per_byte", "held-out {:.4f} bits/byte"),
            ("pass_at_1", "held-out pass@1 {:.1%}"),
            ("pass_at_k", "pass@k {:.1%}"),
            ("ema_bits_per_byte", "average {:.4f}"),
            ("trigram_bits_per_byte", "trigram {:.4f}"),
            ("draft_agreement", "drafts agree {:.1%}"),
        )
        found = self.evaluation
        return [text.format(float(found[name])) for name, text in labels if found.get(name) is not None]


def wrapped(items: Sequence[str], width: int) -> list[Text]:
    """Items in as few lines as hold them whole; one that is longer than a line is cut."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + 2 + len(item) <= width:
            lines[-1] += f"  {item}"
        else:
            lines.append(item[:width])
    return [Text(line, no_wrap=True) for line in lines]


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Values from the smallest to the largest as bars, means of neighbours where there are more than fit.

    What is not finite is an exclamation mark.
    """
    parts = [np.mean(part) for part in np.array_split(np.asarray(values, float), min(width, len(values)))]
    finite = [v for v in parts if np.isfinite(v)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    steps = len(bars) - 2
    height = [1 + round(steps * (v - low) / span) if span and np.isfinite(v) else 1 for v in parts]
    return "".join(bars[h] if np.isfinite(v) else "!" for h, v in zip(height, parts, strict=True))


def load_map(load_LE: Sequence[Sequence[int]], width: int, rows: int, bars: str = BARS) -> list[Text]:
    """The load of each expert as a bar, a row a MoE layer; neighbours share a cell, which shows the largest of them,
    where there are more than fit. Blue: under half the mean; yellow: over one and a half.
    """
    load = np.asarray(load_LE, float)
    ratio_LE = load / np.maximum(load.mean(-1, keepdims=True), 1e-9)
    groups = np.array_split(np.arange(len(ratio_LE)), min(rows - 1, len(ratio_LE)))
    names = [f"{g[0]}" if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups]
    margin = max(map(len, names)) + 1
    columns = max(min(width - margin, ratio_LE.shape[1]), 1)
    title = f"load by MoE layer and expert ({bars[-1]} {FULL:g}x the mean)"
    lines = [Text(title if len(title) <= width else f"load ({bars[-1]} {FULL:g}x mean)", no_wrap=True)]
    for name, group in zip(names, groups, strict=True):
        line = Text(name.rjust(margin - 1) + " ", no_wrap=True)
        for cell in _largest(ratio_LE[group].max(0), columns):
            glyph = bars[min(round(cell / FULL * (len(bars) - 1)), len(bars) - 1)]
            line.append(glyph, "blue" if cell < 0.5 else "yellow" if cell > 1.5 else "")
        lines.append(line)
    return lines


def duration(seconds: float) -> str:
    """0:07, 12:03, 3:04:05, 12 d 3 h."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    if hour >= 100:
        return f"{hour // 24} d {hour % 24} h"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _largest(values: np.ndarray, columns: int) -> Iterable[float]:
    return (part.max() for part in np.array_split(values, columns))


def _mean(value) -> float:
    return float(np.mean([float(v) for v in value])) if isinstance(value, list) else float(value)
