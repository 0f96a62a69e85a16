"""A run's metrics as pictures, one file a question. Suffixes: N points in time, L layers, E experts."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deepseek_jax.analysis.rl_panels import policy_picture, rewards_picture
from deepseek_jax.analysis.run_panels import (
    BLUE,
    GREY,
    MEDIANS,
    ORANGE,
    PALETTE,
    RED,
    edges,
    layers,
    line,
    marks,
    robust,
    shaded,
    short,
    smoothed,
    spread,
    stacked,
    time_axis,
)
from deepseek_jax.analysis.run_records import Run
from deepseek_jax.version import __version__


def draw_run(run: Run, folder: str | Path, name: str, axis: str = "tokens") -> list[Path]:
    """Draws every picture that the run has values for into ``folder``, which is made; returns their paths.

    ``name``: for the titles. ``axis``: "tokens", "step" or "minutes". A picture appears whole or not at all.

    Raises ValueError for a run without values, OSError for a folder that cannot be written.
    """
    if not run:
        raise ValueError("the run has no step and no evaluation on record yet: there is nothing to draw.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, draw in PICTURES.items():
        figure = draw(run, axis)
        if figure is None:
            continue
        figure.suptitle(f"{name}: {figure.get_suptitle()}", fontsize=13)
        path, part = folder / f"{stem}.png", folder / f"{stem}.png.part"
        try:
            figure.savefig(part, format="png", dpi=110, metadata={"Software": f"deepseek_jax {__version__}"})
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        written.append(path)
    return written


def loss_picture(run: Run, axis: str) -> Figure | None:
    steps, found = run.steps, run.evaluations
    losses = [n for n in ("mtp", "loss", "main") if n in steps]
    baselines = [n for n in ("trigram_bits_per_byte", "ema_bits_per_byte", "bits_per_byte") if n in found]
    domains = [n for n in found if n.startswith("domains/")]
    if len(domains) == 1 and baselines:
        # One domain is the whole of the text.
        domains = []

    def training(ax: Axes) -> None:
        shown = {"mtp": ("MTP", ORANGE), "loss": ("total", GREY), "main": ("next token", BLUE)}
        for name in losses:
            line(ax, steps[name], axis, *shown[name], smooth=True)
        # Of GRPO it is no likelihood: near 0 on policy, whatever is learned.
        title, unit = ("Minus GRPO's objective", "") if "surrogate" in steps else ("Training loss", "nats a token")
        ax.set(ylabel=unit, title=title)
        robust(ax, [steps[n].array() for n in losses])

    def held_out(ax: Axes) -> None:
        for place, name in enumerate(domains):
            # A colour that comes again has another mark and dash.
            again, color = divmod(place, len(PALETTE))
            style = {
                "marker": "os^Dv"[again % 5],
                "markevery": 0.03,
                "markersize": 4,
                "linestyle": ("-", "-.", ":")[again % 3],
            }
            line(ax, found[name], axis, name.removeprefix("domains/"), PALETTE[color], linewidth=1, **style)
        shown = {
            "trigram_bits_per_byte": ("trigram on the same tokens", "black", {"linestyle": "--"}),
            "ema_bits_per_byte": ("averaged parameters", RED, {"linestyle": ":", "linewidth": 2}),
            "bits_per_byte": ("model", BLUE, {"linewidth": 2}),
        }
        for name in baselines:
            label, color, style = shown[name]
            line(ax, found[name], axis, label, color, **style)
        ax.set(ylabel="bits a byte", title="Held-out text")
        robust(ax, [found[n].array() for n in (*baselines, *domains)])

    def drafts(ax: Axes) -> None:
        line(ax, found["draft_agreement"], axis, "", BLUE, factor=100)
        ax.set(ylabel="tokens (%)", title="MTP drafts that agree with the model's own choice", ylim=(0, 100))

    panels = {training: losses, held_out: baselines + domains, drafts: "draft_agreement" in found}
    return stacked("loss", run, axis, [draw for draw, there in panels.items() if there])


def schedule_picture(run: Run, axis: str) -> Figure | None:
    kinds = {
        "lr": ("Learning rate", "learning rate"),
        "batch_rows": ("Batch", "rows a step"),
        "bias_speed": ("Speed of the router bias", "change a step"),
        "mtp_weight": ("Weight of the MTP loss", "factor"),
    }

    def panel(name: str, title: str, unit: str):
        def draw(ax: Axes) -> None:
            # All but the rate go in jumps, and a record tells what its own step was taken with.
            line(ax, run.steps[name], axis, "", BLUE, drawstyle="default" if name == "lr" else "steps-pre")
            ax.set(ylabel=unit, title=title)
            ax.set_ylim(bottom=0)

        return draw

    panels = [panel(name, *texts) for name, texts in kinds.items() if name in run.steps]
    return stacked("schedules", run, axis, panels, height=2.2)


def balance_picture(run: Run, axis: str) -> Figure | None:
    steps, found = run.steps, run.evaluations
    terms = [n for n in steps if n.startswith("balance/")]

    def batch(ax: Axes) -> None:
        layers(ax, steps["max_violation"], axis)
        ax.set(ylabel="MaxVio", title="Imbalance within a batch: (largest load - mean) / mean")
        robust(ax, [steps["max_violation"].array()], bottom=0)

    def whole(ax: Axes) -> None:
        layers(ax, found["max_violation_global"], axis)
        ax.set(ylabel="MaxVio", title="Imbalance over all of the held-out text (global)")
        robust(ax, [found["max_violation_global"].array()], bottom=0)

    def entropy(ax: Axes) -> None:
        layers(ax, steps["routing_entropy"], axis)
        if "load" in steps:
            even = np.log(steps["load"].values[-1].shape[-1])
            ax.axhline(even, color="black", linestyle="--", linewidth=1)
            place = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "bottom", "fontsize": 8}
            ax.annotate(f"even load: {even:.3g}", (0.005, even), **place)
            ax.margins(y=0.12)
        ax.set(ylabel="entropy (nats)", title="Entropy of the experts' shares of the load")

    def losses(ax: Axes) -> None:
        for place, name in enumerate(terms):
            line(ax, steps[name], axis, name.removeprefix("balance/"), PALETTE[place % len(PALETTE)], smooth=True)
        ax.set(ylabel="loss", title="Balance losses, unweighted, summed over the layers")

    def dropped(ax: Axes) -> None:
        line(ax, steps["dropped"], axis, "", BLUE)
        ax.set(ylabel="assignments", title="Assignments of tokens to experts that were dropped")

    panels = {
        batch: "max_violation" in steps,
        whole: "max_violation_global" in found,
        entropy: "routing_entropy" in steps,
        losses: terms,
        dropped: "dropped" in steps and steps["dropped"].array().any(),
    }
    return stacked("balance of the experts", run, axis, [draw for draw, there in panels.items() if there])


def load_picture(run: Run, axis: str) -> Figure | None:
    """The last load of all layers, and how that of some of them came about."""
    if "load" not in run.steps:
        return None
    load_NLE = run.steps["load"].array()
    ratio_NLE = load_NLE / np.maximum(load_NLE.mean(-1, keepdims=True), 1e-9)
    _, L, E = ratio_NLE.shape
    chosen = spread(L)
    heights = [max(min(0.35 * L, 5), 0.8), *[1.4] * len(chosen)]
    figure = Figure(figsize=(10, 1.8 + sum(heights) + 0.2 * len(chosen)), layout="constrained")
    axes = figure.subplots(1 + len(chosen), 1, height_ratios=heights, squeeze=False)[:, 0]
    colors = {"cmap": "PuOr_r", "norm": Normalize(0, 2)}
    last = axes[0].imshow(ratio_NLE[-1], aspect="auto", interpolation="nearest", **colors)
    axes[0].set(ylabel="MoE layer", xlabel="expert", title="Load of each expert in the last step on record")
    axes[0].yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes[0].xaxis.set_major_locator(MaxNLocator(16, integer=True))
    borders = edges(run.steps["load"].along(axis))
    for ax, layer in zip(axes[1:], chosen, strict=True):
        ax.pcolormesh(borders, np.arange(E + 1) - 0.5, ratio_NLE[:, layer].T, **colors)
        ax.set(ylabel="expert", title=f"MoE layer {layer} over time")
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        time_axis(ax, run, axis)
        if ax is not axes[-1]:
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
    bar = figure.colorbar(last, ax=axes, aspect=50, fraction=0.03, pad=0.01, extend="max")
    bar.set_label("load, times the mean of the layer")
    figure.suptitle(f"load of the experts{_some(chosen, L)}")
    return figure


def bias_picture(run: Run, axis: str) -> Figure | None:
    if "bias" not in run.steps:
        return None
    bias_NLE, x = run.steps["bias"].array(), run.steps["bias"].along(axis)
    _, L, E = bias_NLE.shape
    chosen, shades = spread(L), colormaps["viridis"](np.linspace(0, 0.92, E))

    def panel(layer: int):
        def draw(ax: Axes) -> None:
            bias_NE = bias_NLE[:, layer]
            for shade, expert in zip(shades, np.argsort(bias_NE[-1]), strict=True):
                ax.plot(x, bias_NE[:, expert], color=shade, linewidth=max(0.25, 1.2 - E / 200), **marks(x))
            ax.axhline(0, color="black", linewidth=0.6)
            ax.set(ylabel="bias", title=f"MoE layer {layer}")

        return draw

    title = f"router bias{_some(chosen, L)}: a line an expert, dark where it ends lowest"
    return stacked(title, run, axis, [panel(layer) for layer in chosen], height=1.9)


def norms_picture(run: Run, axis: str) -> Figure | None:
    groups = {n.removeprefix("gradient_norms/"): s for n, s in run.steps.items() if n.startswith("gradient_norms/")}
    numbered = sorted((n for n in groups if n.startswith("layer.")), key=lambda n: int(n.split(".")[1]))
    others = [n for n in groups if n not in numbered]

    def whole(ax: Axes) -> None:
        line(ax, run.steps["grad_norm"], axis, "", BLUE, smooth=True)
        ax.set(ylabel="norm", title="Gradient of all parameters, before clipping", yscale="log")

    def by_group(ax: Axes) -> None:
        if numbered:
            shaded(ax, [(n.split(".")[1], *smoothed(groups[n], axis)) for n in numbered], "layer")
        for place, name in enumerate(others):
            color = (ORANGE, RED, *PALETTE[2:])[place % 5]
            x, y = smoothed(groups[name], axis)
            ax.plot(x, y, label=name.replace(".", " ").replace("mtp", "MTP"), color=color, linestyle="--", **marks(x))
        note = ", moving median" if max(map(len, groups.values())) >= 2 * MEDIANS else ""
        ax.set(ylabel="norm", title=f"Gradient by part of the model{note}", yscale="log")

    def activations(ax: Axes) -> None:
        layers(ax, run.steps["activation_norm"], axis, "layer")
        ax.set(ylabel="root mean square", title="Residual stream after each layer", yscale="log")

    panels = {whole: "grad_norm" in run.steps, by_group: groups, activations: "activation_norm" in run.steps}
    title = "gradients and activations"
    return stacked(title, run, axis, [draw for draw, there in panels.items() if there], height=3)


def throughput_picture(run: Run, axis: str) -> Figure | None:
    kinds = {
        "tokens_per_second": ("Speed of training", "tokens a second", 1),
        "mfu": ("Model FLOPs utilisation (MFU)", "peak of the devices (%)", 100),
        "data_wait": ("Wait for data", "ms a step", 1000),
    }

    def panel(name: str, title: str, unit: str, factor: float):
        def draw(ax: Axes) -> None:
            line(ax, run.steps[name], axis, "", BLUE, factor=factor, smooth=True)
            ax.set(ylabel=unit, title=title)
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter(FuncFormatter(short))

        return draw

    panels = [panel(name, *texts) for name, texts in kinds.items() if name in run.steps]
    return stacked("throughput", run, axis, panels)


def _some(chosen: list[int], layers: int) -> str:
    return f", {len(chosen)} of {layers} MoE layers" if len(chosen) < layers else ""


PICTURES: Mapping[str, Callable[[Run, str], Figure | None]] = {
    "loss": loss_picture,
    "rewards": rewards_picture,
    "policy": policy_picture,
    "schedule": schedule_picture,
    "balance": balance_picture,
    "load": load_picture,
    "bias": bias_picture,
    "norms": norms_picture,
    "throughput": throughput_picture,
}
