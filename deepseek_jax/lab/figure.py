"""A study in one picture: every seed of every variant, and the paper's numbers where it has some."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deepseek_jax.lab.records import LABELS, MEASURES
from deepseek_jax.lab.study import TUNING_SEED, Claim, Study
from deepseek_jax.lab.verdicts import Judged, measures_of
from deepseek_jax.runs.run_folder import unfinished
from deepseek_jax.version import __version__

OURS, PAPERS = "C0", "C3"
# A panel whose values lie further apart than this is drawn on a logarithmic axis.
SPAN = 10.0


def draw(study: Study, found: Mapping[tuple[str, int], dict], judged: list[Judged], path: Path) -> Path:
    """Draws a panel a measure: a dot a seed, a bar at their mean, a diamond where the paper has a value, a ring for the
    seed on which a side was tuned; one for `Study.against`; and one of curves, where a claim is about them.

    ``found``: as `records.Runs.of` gives it. ``path``: a PNG file, written whole or not at all.
    """
    from matplotlib.figure import Figure

    measures, names = measures_of(study), list(study.variants)
    curves = [one for one in judged if one.claim.rule.measure == "curve"]
    panels = len(measures) + (study.against is not None) + bool(curves)
    wide = 1.6 + 0.75 * len(names)
    figure = Figure(figsize=(max(wide * panels, 5.0), 4.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=False):
        everything = []
        for at, variant in enumerate(names):
            if values := _values(found, variant, study.seeds, measure):
                around = at + np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [at]
                axis.plot(around, values, "o", color=OURS, alpha=0.6, markersize=5)
                axis.plot([at - 0.25, at + 0.25], [np.mean(values)] * 2, color=OURS, linewidth=2)
            if tuned := _values(found, variant, (TUNING_SEED,), measure):
                axis.plot([at], tuned, "o", color=OURS, fillstyle="none", markersize=7)
            everything += values + tuned
        here = [one for one in judged if one.claim.rule.measure == measure]
        everything += _papers(axis, names, [one.claim for one in here])
        above = [value for value in everything if value > 0]
        if above and len(above) == len(everything) and max(above) > SPAN * min(above):
            axis.set_yscale("log")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.set_ylabel(LABELS[measure])
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(_verdicts(here), fontsize=9, loc="left")
    if study.against is not None:
        _against(axes[len(measures)], study, found)
    if curves:
        _curves(axes[-1], study, found)
        axes[-1].set_title(_verdicts(curves), fontsize=9, loc="left")
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=OURS, marker="o", label="ours, a dot a seed")]
    if any(seed == TUNING_SEED for _, seed in found):
        told = {"marker": "o", "fillstyle": "none", "linestyle": "", "label": "the seed of tuning"}
        handles.append(Line2D([], [], color=OURS, **told))
    if any(one.claim.paper for one in judged):
        told = {"marker": "D", "fillstyle": "none", "linestyle": "", "label": "the paper, at its own size"}
        handles.append(Line2D([], [], color=PAPERS, **told))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{study.stem}: {study.question}", fontsize=10, wrap=True)
    part = unfinished(path)
    try:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": f"deepseek_jax {__version__}"})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _verdicts(judged: list[Judged]) -> str:
    return "\n".join(f"{one.claim.id}: {one.verdict.word}" for one in judged)


def _values(found: Mapping[tuple[str, int], dict], variant: str, seeds: Sequence[int], measure: str) -> list[float]:
    """A variant's finite values, a seed each."""
    runs = [found[variant, seed] for seed in seeds if (variant, seed) in found]
    return [value for run in runs if np.isfinite(value := MEASURES[measure](run))]


def _papers(axis, names: list[str], claims: list[Claim]) -> list[float]:
    """Draws the paper's values, a line through those of a claim; those of another measure have an axis of their own at
    the right. Returns those that stand on the panel's."""
    look = {"color": PAPERS, "markersize": 8, "fillstyle": "none", "markeredgewidth": 1.8, "linewidth": 0.8}
    other, shown = None, []
    for claim in claims:
        if claim.paper_as is not None and other is None:
            other = axis.twinx()
            other.margins(y=0.3)
            other.set_ylabel(f"the paper: {claim.paper_as}", color=PAPERS)
            other.tick_params(axis="y", colors=PAPERS)
        values = sorted((names.index(variant), value) for variant, value in claim.paper.items())
        if values:
            (axis if claim.paper_as is None else other).plot(*zip(*values, strict=True), "D:", **look)
        shown += [value for _, value in values if claim.paper_as is None]
    return shown


def _curves(axis, study: Study, found: Mapping[tuple[str, int], dict]) -> None:
    """Draws a variant's curve, the mean over its seeds, without its first fifth, in which all fall fast."""
    for variant in study.variants:
        runs = [found[variant, seed] for seed in study.seeds if (variant, seed) in found]
        curves = [run["curve"] for run in runs if run["diverged"] is None]
        if curves:
            tokens, losses = np.mean(curves, 0).T
            kept = slice(len(tokens) // 5, None)
            axis.plot(tokens[kept], losses[kept], ".-", label=variant)
    axis.set_xlabel("tokens")
    axis.set_ylabel(LABELS["curve"])
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


def _against(axis, study: Study, found: Mapping[tuple[str, int], dict]) -> None:
    """Draws one measure over another: a dot a seed that has both, a cross at a variant's mean."""
    for at, variant in enumerate(study.variants):
        runs = [found[variant, seed] for seed in study.seeds if (variant, seed) in found]
        pairs = np.array([[MEASURES[measure](run) for measure in study.against] for run in runs]).reshape(-1, 2)
        pairs = pairs[np.isfinite(pairs).all(1)]
        if len(pairs):
            axis.plot(*pairs.T, "o", color=f"C{at}", alpha=0.4, markersize=5)
            axis.plot(*pairs.mean(0), "X", color=f"C{at}", markersize=9, label=variant)
    axis.set_xlabel(LABELS[study.against[0]])
    axis.set_ylabel(LABELS[study.against[1]])
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
