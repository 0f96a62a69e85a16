"""How far mixed streams are amplified by depth, with and without the constraint, at random weights.

mHC (2512.24880) section 3.1, figures 3 and 7. No training; seeded weights and tokens.

    python experiments/v4_hyper_connections/amax.py    # 3 minutes of one core; writes results.json and amax.png

Models of 8 to 64 layers, 64 wide, on 2 x 64 random tokens. What is mixed starts from an identity (without the
constraint) or from a matrix near it (with it). The part that depends on the token is drawn so that it has a deviation
of 1 before its scale; the scale is the papers' 0.01, at which training begins, and larger ones, to which training may
bring it. "composite" is the largest gain of a product of matrices from some sublayer to the last, in either direction;
"single" that of one matrix. The Amax gain is the paper's: the largest sum of absolute weights, a mean over tokens.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.analysis.streams import stream_gains
from deepseek_jax.configs.schema import MLA, HyperConnections, ModelConfig, Rope
from deepseek_jax.core.params import map_variables
from deepseek_jax.model.transformer import Transformer, init

HERE = Path(__file__).parent
DEPTHS, SEEDS = (8, 16, 32, 64), (0, 1, 2)
# Without the constraint larger scales make streams whose squares no float32 holds.
SCALES = {"HC": (0.01, 0.03, 0.1, 0.3), "mHC": (0.01, 0.1, 0.3, 1.0, 3.0)}
KINDS = {"HC": HyperConnections(constrained=False), "mHC": HyperConnections()}
# Of the paper's 27B, 30 layers deep: figures 3 and 7.
PAPERS = {"HC": 3000.0, "mHC": 1.6}
BASE = ModelConfig(
    name="streams",
    vocab_size=512,
    dim=64,
    n_layers=8,
    n_dense_layers=8,
    ffn_dim=160,
    attention=MLA(n_heads=4, q_rank=None, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=16, rope=Rope(10000.0)),
    moe=None,
    max_length=256,
    init_std=0.02,
)


def drawn(cfg: ModelConfig, seed: int, scale: float) -> Transformer:
    """A model whose maps give numbers with a deviation of 1, times ``scale``."""

    def change(path, variable):
        if path[-2:-1] not in (("attn_streams",), ("ffn_streams",)):
            return variable
        value = variable.get_value()
        if path[-1] == "scale":
            return variable.replace(jnp.full_like(value, scale))
        return variable.replace(value / (cfg.init_std * value.shape[-2] ** 0.5)) if path[-1] == "map" else variable

    return map_variables(change, init(cfg, jax.random.key(seed)))


def measured(kind: str, depth: int, scale: float, seed: int) -> dict:
    cfg = replace(BASE, n_layers=depth, n_dense_layers=depth, residual=KINDS[kind])
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, cfg.vocab_size, (2, 64)), jnp.int32)
    gains = stream_gains(drawn(cfg, seed, scale), tokens)
    single = float(max(gains.single_forward_S.max(), gains.single_backward_S.max()))
    return {"composite": gains.largest, "single": single}


def table() -> dict:
    """kind -> scale -> depth -> a figure -> its values, one a seed."""
    found: dict = {}
    for kind in KINDS:
        for scale in SCALES[kind]:
            for depth in DEPTHS:
                each = [measured(kind, depth, scale, seed) for seed in SEEDS]
                here = {name: [one[name] for one in each] for name in each[0]}
                found.setdefault(kind, {}).setdefault(str(scale), {})[str(depth)] = here
    return found


def draw(found: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, (kind, scales) in zip((left, right), found.items(), strict=True):
        for at, (scale, depths) in enumerate(scales.items()):
            x = [int(depth) for depth in depths]
            each = np.array([here["composite"] for here in depths.values()])
            axis.plot(x, each.mean(1), f"C{at}-", label=f"scale {scale}")
            axis.plot(x, each, f"C{at}.", markersize=4)
        axis.plot(30, PAPERS[kind], "D", color="C3", fillstyle="none", label="the paper, 27B, trained")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("layers")
        axis.set_title(f"{kind}: {'with' if kind == 'mHC' else 'without'} the constraint", fontsize=10, loc="left")
        axis.set_ylabel("largest composite Amax gain")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    left.set_yscale("log")
    right.set_ylim(0.9, 1.7)
    figure.suptitle("Mixed streams at random weights (2512.24880 figures 3 and 7)", fontsize=11)
    figure.savefig(path, format="png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to")
    out = parser.parse_args().out
    record = provenance() | {"gains": table()}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record["gains"], out / "amax.png")


if __name__ == "__main__":
    main()
