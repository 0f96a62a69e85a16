"""The parameters of a Janus counted on its own tree, to compare with those that its config gives."""

import math

from deepseek_jax.analysis.counts import JanusCounts
from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.core.params import map_variables
from deepseek_jax.multimodal.janus import abstract


def shape_counts(cfg: JanusConfig) -> dict[str, int]:
    """component -> parameters, named as in `JanusCounts`, and "language"; allocates nothing."""
    found: dict[str, int] = {}

    def count(path, variable):
        name = path[0]
        if name == "vq":
            name = {"codebook": "codebook", "encoder": "vq_encoder", "quant_conv": "vq_encoder"}.get(
                path[1], "vq_decoder"
            )
        found[name] = found.get(name, 0) + math.prod(variable.get_value().shape)

    map_variables(count, abstract(cfg))
    return found


def disagreements(cfg: JanusConfig, figures: JanusCounts) -> list[str]:
    """A line for each component in which ``figures`` and the model's own tree differ; empty: they agree."""
    ours, tree = {**figures.components, "language": figures.language.total}, shape_counts(cfg)
    return [
        f"{name}: {ours.get(name, 0):,} by the config, {tree.get(name, 0):,} in the model"
        for name in sorted(ours | tree)
        if ours.get(name) != tree.get(name)
    ]
