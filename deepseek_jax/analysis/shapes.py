"""The parameters of `counts`, counted on the full-size model's own tree, with shapes in place of arrays."""

import math

from deepseek_jax.analysis.counts import Counts
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.params import map_variables
from deepseek_jax.model.transformer import abstract

# What ends the paths of leaves that are no parameters.
STATE = {("router", "bias"): "router_bias", ("router", "table"): "hash_tables"}


def shape_counts(cfg: ModelConfig) -> dict[str, dict[str, int]]:
    """component -> parameters, for "main" and "mtp", from `jax.eval_shape` of the model; allocates nothing.

    Components are named as in `Counts`; "router_bias" and "hash_tables" stand beside them.
    """
    found: dict[str, dict[str, int]] = {"main": {}, "mtp": {}}

    def count(path, variable):
        part = found["mtp" if path[0] == "mtp" else "main"]
        name = STATE.get(path[-2:]) or _component(path, variable)
        part[name] = part.get(name, 0) + math.prod(variable.get_value().shape)
        return variable

    map_variables(count, abstract(cfg))
    return found


def disagreements(cfg: ModelConfig, figures: Counts) -> list[str]:
    """A line for each component in which ``figures`` and the model's own tree differ; empty: they agree."""
    found = shape_counts(cfg)
    expected = {
        "main": {**figures.components, "router_bias": figures.router_bias, "hash_tables": figures.hash_tables},
        "mtp": {**figures.mtp_components, "router_bias": figures.mtp_router_bias},
    }
    lines = []
    for part in expected:
        for name in sorted(expected[part] | found[part]):
            ours, tree = expected[part].get(name, 0), found[part].get(name, 0)
            if ours != tree:
                lines.append(f"{part} {name}: {ours:,} by the config, {tree:,} in the model")
    return lines


def _component(path: tuple, variable) -> str:
    if path == ("embed",):
        return "embedding"
    if path == ("head",):
        return "head"
    if "attn" in path:
        return "attention"
    if "shared" in path:
        return "shared_experts"
    if "router" in path:
        return "router"
    if "ffn" in path:
        return "routed_experts" if "expert" in variable.get_metadata()["axes"] else "dense_ffn"
    if {"attn_streams", "ffn_streams", "collapse"} & set(path):
        return "hyper_connections"
    if path[-1] in ("proj", "embed_proj", "hidden_proj"):
        return "projection"
    return "norms"
