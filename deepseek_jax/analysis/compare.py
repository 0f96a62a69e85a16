"""Several runs beside each other: what differs in their settings, their figures, one picture with a line for each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek_jax.analysis.run_records import Run, Series, read_run
from deepseek_jax.version import __version__

# Of run.json: what a run is. The rest says when and how it was started.
SETTINGS = ("model", "recipe")
# So many differences stand in a line's label; all of them stand in the table.
LABELLED = 3
# statistic, where it is, title, unit, on a logarithmic axis
PANELS = (
    ("loss", "steps", "Training loss, total", "nats a token", False),
    ("main", "steps", "Training loss, next token", "nats a token", False),
    ("mtp", "steps", "Training loss, MTP", "nats a token", False),
    ("bits_per_byte", "evaluations", "Held-out text", "bits a byte", False),
    ("reward", "steps", "Reward", "weighted sum of its parts", False),
    ("pass_at_1", "evaluations", "Held-out problems, pass@1", "share", False),
    ("pass_at_k", "evaluations", "Held-out problems, pass@k", "share", False),
    ("length", "steps", "Length of the answers", "tokens", False),
    ("max_violation", "steps", "Imbalance within a batch, mean of the layers", "MaxVio", False),
    ("grad_norm", "steps", "Gradient of all parameters, before clipping", "norm", True),
    ("lr", "steps", "Learning rate", "learning rate", False),
    ("tokens_per_second", "steps", "Speed of training", "tokens a second", False),
)


@dataclass(frozen=True)
class Compared:
    """A run among others. ``label``: its name and what it has unlike them; ``differing``: all of that, in every run
    the same fields, None where a run has no such field. ``figures``: `figures`."""

    name: str
    label: str
    run: Run
    differing: dict[str, object]
    figures: dict[str, float | None]


def compare(folders: Sequence[str | Path]) -> list[Compared]:
    """Reads runs' folders. Raises ValueError for a folder that is no run or has nothing on record yet."""
    folders = [Path(folder) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    runs, settings = [read_run(folder) for folder in folders], [_settings(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if not run:
            raise ValueError(f"{folder}: no step and no evaluation is on record yet.")
    fields = list(dict.fromkeys(name for found in settings for name in found))
    differing = [n for n in fields if any(found.get(n) != settings[0].get(n) for found in settings)]
    short = _shortened(differing)
    compared = []
    for name, run, found in zip(names, runs, settings, strict=True):
        told = [f"{short[n]}={_text(found.get(n))}" for n in differing[:LABELLED]]
        told += ["..."] if len(differing) > LABELLED else []
        label = f"{name} ({', '.join(told)})" if told else name
        compared.append(Compared(name, label, run, {short[n]: found.get(n) for n in differing}, figures(run)))
    return compared


def figures(run: Run) -> dict[str, float | None]:
    """The end of a run and the best of it: steps and tokens trained, losses in nats a token (mean of the last 20
    records), held-out bits per byte at the end and at best with the step of that, the share of MTP drafts that agree,
    the median of tokens a second."""
    steps, found = run.steps, run.evaluations
    last = max((s.at[-1] for s in (*steps.values(), *found.values()) if s.at), default=(None, None, None))
    bits = found["bits_per_byte"].array() if "bits_per_byte" in found else np.array([])
    best = int(np.nanargmin(bits)) if np.isfinite(bits).any() else None
    return {
        "steps": last[0],
        "tokens": last[1],
        "minutes": last[2],
        "loss": _end(steps.get("loss")),
        "main_loss": _end(steps.get("main")),
        "mtp_loss": _end(steps.get("mtp")),
        "pass_at_1": float(found["pass_at_1"].array()[-1]) if "pass_at_1" in found else None,
        "pass_at_k": float(found["pass_at_k"].array()[-1]) if "pass_at_k" in found else None,
        "bits_per_byte": float(bits[-1]) if len(bits) else None,
        "best_bits_per_byte": None if best is None else float(bits[best]),
        "best_at_step": None if best is None else found["bits_per_byte"].at[best][0],
        "max_violation": _end(steps.get("max_violation")),
        "draft_agreement": float(found["draft_agreement"].array()[-1]) if "draft_agreement" in found else None,
        "tokens_per_second": _median(steps.get("tokens_per_second")),
    }


def table(runs: Sequence[Compared]) -> str:
    """Lines of text: a column a run, first the settings that differ, then the figures. Numbers are never cut."""
    rows = [["", *(one.name for one in runs)]]
    rows += [[field, *(_text(one.differing[field]) for one in runs)] for field in runs[0].differing]
    shown = [name for name in runs[0].figures if any(one.figures[name] is not None for one in runs)]
    rows += [[name.replace("_", " "), *(_text(one.figures[name]) for one in runs)] for name in shown]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def draw(runs: Sequence[Compared], folder: str | Path, axis: str = "tokens") -> Path:
    """Draws ``compare.png`` into ``folder``, which is made: a panel a statistic, a line a run."""
    from matplotlib import colormaps
    from matplotlib.axes import Axes

    from deepseek_jax.analysis.run_panels import line, robust, stacked

    colors = colormaps["tab10" if len(runs) <= 10 else "turbo"]
    shades = [colors(i if len(runs) <= 10 else i / len(runs)) for i in range(len(runs))]

    def panel(lines: Mapping[int, Series], labelled: set[int], title: str, unit: str, log: bool):
        def draw_panel(ax: Axes) -> None:
            for i, series in lines.items():
                line(ax, series, axis, runs[i].label if i in labelled else "", shades[i], smooth=True)
            ax.set(ylabel=unit, title=title, yscale="log" if log else "linear")
            if not log:
                robust(ax, [series.array() for series in lines.values()])

        return draw_panel

    panels, every = [], {}
    for name, kind, *texts in PANELS:
        lines = {
            i: _scalar(getattr(one.run, kind)[name]) for i, one in enumerate(runs) if name in getattr(one.run, kind)
        }
        if lines:
            # A run's label stands beside the first panel that has the run.
            seen = {int(key.split("/")[1]) for key in every}
            panels.append(panel(lines, set(lines) - seen, *texts))
            every |= {f"{name}/{i}": series for i, series in lines.items()}
    figure = stacked(f"{len(runs)} runs", Run(steps=every), axis, panels)
    if figure is None:
        raise ValueError("the runs have no statistic on record that is compared.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / "compare.png", folder / "compare.png.part"
    try:
        figure.savefig(
            part, format="png", dpi=110, bbox_inches="tight", metadata={"Software": f"deepseek_jax {__version__}"}
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _scalar(series: Series) -> Series:
    """A statistic of layers as their mean."""
    return Series(series.at, [float(np.mean(value)) for value in series.values])


def _end(series: Series | None) -> float | None:
    if series is None or not len(series):
        return None
    return float(np.mean([np.mean(value) for value in series.values[-20:]]))


def _median(series: Series | None) -> float | None:
    return None if series is None or not len(series) else float(np.median(series.array()))


def _settings(folder: Path) -> dict[str, object]:
    """The dotted settings of a run; nothing for a run without a run.json."""
    file = folder / "run.json"
    if not file.is_file():
        return {}
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None
    begun = about.get("settings", {})
    # The model and the recipe as they were run come first, beside what was asked for.
    settled = {name: about.get(name, begun.get(name)) for name in SETTINGS}
    return dict(_flat("", {**settled, **{name: value for name, value in begun.items() if name not in SETTINGS}}))


def _flat(prefix: str, value):
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else name, part)
    else:
        yield prefix, value


def _shortened(names: Sequence[str]) -> dict[str, str]:
    """The last word of each dotted name, with the ones before it where others end alike."""
    short = {}
    for name in names:
        words = name.split(".")
        count = next(
            n
            for n in range(1, len(words) + 1)
            if n == len(words) or sum((f".{other}").endswith("." + ".".join(words[-n:])) for other in names) == 1
        )
        short[name] = ".".join(words[-count:])
    return short


def _text(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(map(_text, value)) or "-"
    return str(value)
