"""What a run of reinforcement learning has beside other runs, as pictures: rewards, held-out problems, the policy."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepseek_jax.analysis.run_panels import BLUE, GREEN, GREY, ORANGE, PALETTE, PURPLE, RED, SKY, Panel, line, stacked
from deepseek_jax.analysis.run_records import Run, Series

Lines = dict[str, tuple[str, str]]


def rewards_picture(run: Run, axis: str) -> Figure | None:
    """Rewards by part, held-out problems, the answers' length, groups without signal."""
    parts = {name: name.removeprefix("rewards/") for name in run.steps if name.startswith("rewards/")}
    colors = dict(zip(parts, (BLUE, *PALETTE), strict=False))
    rewards: Lines = {name: (parts[name], colors.get(name, GREY)) for name in parts}
    held_out: Lines = {
        "pass_at_1": ("pass@1", BLUE),
        "maj_at_k": ("maj@k", GREEN),
        "pass_at_k": ("pass@k", ORANGE),
        "format": ("format", GREY),
        "language": ("language", SKY),
    }
    shares: Lines = {"silent": ("groups without signal", PURPLE), "truncated": ("truncated answers", RED)}
    panels = [
        *_shares(run.steps, axis, rewards, "Rewards by part, mean over a rollout", "reward (%)"),
        *_shares(run.evaluations, axis, held_out, "Held-out problems", "problems (%)"),
        *_values(run.steps, axis, {"length": ("", BLUE)}, "Length of the answers", "tokens"),
        *_shares(run.steps, axis, shares, "Groups whose rewards are equal, answers that met their limit", "share (%)"),
    ]
    return stacked("rewards", run, axis, panels) if rewards else None


def policy_picture(run: Run, axis: str) -> Figure | None:
    """What the objective leaves out by side, the KLs, the entropy."""
    left_out: Lines = {
        "clipped_low": ("clipped below (bad answers)", ORANGE),
        "clipped_high": ("clipped above (good answers)", BLUE),
        "masked": ("masked as off-policy (answers)", PURPLE),
        "cut": ("ratio cut", RED),
    }
    panels = [
        *_shares(run.steps, axis, left_out, "Tokens without a gradient, by reason", "share (%)"),
        *_values(run.steps, axis, {"reverse_kl": ("", GREEN)}, "KL of the student to the teacher", "nats a token"),
        *_values(run.steps, axis, {"kl": ("", GREEN)}, "KL to the reference, by the form's estimate", "nats"),
        *_values(run.steps, axis, {"mismatch": ("", RED)}, "Mismatch: KL of what wrote the answers", "nats a token"),
        *_values(run.steps, axis, {"entropy": ("", SKY)}, "Entropy of what was drawn from", "nats a token"),
    ]
    return stacked("policy", run, axis, panels) if {"clipped_low", "reverse_kl"} & set(run.steps) else None


def _shares(found: dict[str, Series], axis: str, lines: Lines, title: str, unit: str) -> list[Panel]:
    return _values(found, axis, lines, title, unit, 100, (-3, 103))


def _values(found: dict[str, Series], axis: str, lines: Lines, title: str, unit: str, factor=1, ylim=None):
    there = [name for name in lines if name in found]

    def panel(ax: Axes) -> None:
        for name in there:
            label, color = lines[name]
            line(ax, found[name], axis, label, color, factor=factor, smooth=True)
        ax.set(ylabel=unit, title=title)
        ax.set_ylim(*(ylim or (None, None)))

    return [panel] if there else []
