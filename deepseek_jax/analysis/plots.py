"""Pictures, drawn with matplotlib into files. Suffixes: L layers, T tokens, K chosen experts, E experts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepseek_jax.version import __version__


def routing_picture(pieces: Sequence[str], index_LTK: np.ndarray, n_experts: int, path: str | Path) -> None:
    """Which experts each token went to: a panel a MoE layer, a column a token, a filled cell a chosen expert.

    ``pieces``: the tokens' text. ``index_LTK``: int, expert numbers. ``path``: an image file; its suffix is the
    format.
    """
    from matplotlib.figure import Figure

    L, T, _ = index_LTK.shape
    figure = Figure(figsize=(2.5 + 0.26 * T, 1.2 + 0.12 * n_experts * L + 0.3 * L), layout="constrained")
    axes = figure.subplots(L, 1, sharex=True, squeeze=False)[:, 0]
    for layer, axis in enumerate(axes):
        chosen_ET = np.zeros((n_experts, T))
        chosen_ET[index_LTK[layer].T, np.arange(T)] = 1
        axis.imshow(chosen_ET, cmap="Blues", vmin=0, vmax=1.25, aspect="auto", interpolation="nearest")
        axis.set_ylabel(f"MoE layer {layer}\nexpert")
        axis.set_yticks(range(0, n_experts, 5))
        axis.set_yticks(np.arange(n_experts) - 0.5, minor=True)
        axis.set_xticks(np.arange(T) - 0.5, minor=True)
        axis.grid(which="minor", color="0.85", linewidth=0.5)
        axis.tick_params(which="minor", length=0)
    axes[-1].set_xticks(range(T), list(pieces), rotation=90, family="monospace", fontsize=8)
    axes[-1].set_xlabel("token")
    axes[0].set_title(f"Experts that each token was sent to ({index_LTK.shape[2]} of {n_experts} a layer)")
    figure.savefig(path, dpi=110, metadata={"Software": f"deepseek_jax {__version__}"})
