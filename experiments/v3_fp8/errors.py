"""What FP8 loses without training: scales beside outliers, formats of gradients, narrow sums, a model's gradients.

DeepSeek-V3 (2412.19437) section 3.3, 3.5.2, B.2. Seeded numbers and float32 on a CPU: the same everywhere, to rounding.

    python experiments/v3_fp8/errors.py       # 5 minutes of one core; writes results.json and errors.png beside itself

- Channels: four channels of an input [256, 1024] are larger than the others by a factor; the error of the others.
- Tokens: two tokens of 256 have larger output gradients than the others, as B.2 has it; the error of the others.
- Formats: gradients whose sizes spread over so many powers of two (standard deviation of a normal exponent): the mean
  relative error of a value, and the share that becomes zero.
- Sums: the largest error of sums of 14 bits, as a share of the sum where all products are positive, and of the sums'
  root mean square where their signs are random.
- Model: the base of the training study at its first weights, on random tokens: its loss and gradient beside float32's.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.configs.fp8 import Fp8
from deepseek_jax.core.context import Context
from deepseek_jax.core.fp8 import HIGHEST, accumulated, rounded
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.lab.bases import MICRO
from deepseek_jax.train.begin import fresh
from deepseek_jax.train.loss import loss

HERE = Path(__file__).parent
# Extents that share a scale, of [tokens, channels].
SIZES = {"tensor": (None, None), "block 128x128": (128, 128), "tile 1x128": (1, 128), "tile 128x1": (128, 1)}
FACTORS = (1, 10, 100, 1_000, 10_000, 100_000)
SPREADS = (0, 2, 4, 6, 8)
WIDTHS = (256, 1024, 4096, 16384)
PROMOTIONS = (None, 512, 256, 128, 64)
# The training study's: its model is 128 wide.
EMULATED = {
    "tiles and blocks": Fp8(tile=32, block=32),
    "powers of two": Fp8(tile=32, block=32, powers_of_two=True),
    "a scale a tensor": Fp8(tile=None, block=None),
    "gradients in blocks": Fp8(tile=32, block=32, gradient_blocks=True),
    "gradients in E5M2": Fp8(tile=32, block=32, gradient="e5m2"),
    "E5M2, a scale a tensor": Fp8(tile=None, block=None, gradient="e5m2"),
}
# Section 3.3.2: the largest relative error of a product of random matrices, K = 4096.
PAPERS_ERROR = 0.02

fast_rounded = jax.jit(rounded, static_argnums=(1, 2, 3))


def norm_error(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def beside(axis: int, large: list[int], factor: float, kind: str, fp8: Fp8 | None = None) -> dict[str, float]:
    """The error of what is not among the ``large`` of an axis, for each way to share a scale."""
    x = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    x[(slice(None),) * axis + (large,)] *= factor
    others = np.delete(x, large, axis)
    found = {name: np.delete(fast_rounded(x, sizes, fp8 or Fp8(), kind), large, axis) for name, sizes in SIZES.items()}
    return {name: norm_error(a, others) for name, a in found.items()}


def channels(factors=FACTORS) -> dict:
    at = partial(beside, 1, [5, 300, 610, 900])
    powers = Fp8(powers_of_two=True)
    return {
        "e4m3": {str(f): at(f, "e4m3") for f in factors},
        "e4m3, powers of two": {str(f): at(f, "e4m3", powers) for f in factors},
        "e5m2": {str(f): at(f, "e5m2") for f in factors},
    }


def tokens(factors=FACTORS) -> dict:
    return {kind: {str(f): beside(0, [70, 200], f, kind) for f in factors} for kind in ("e4m3", "e5m2")}


def formats(spreads=SPREADS) -> dict:
    """Values of either sign whose exponent is normal; a scale a tensor and a tile."""
    found = {}
    for spread in spreads:
        rng = np.random.default_rng(1)
        x = (rng.normal(size=(256, 1024)) * np.exp2(spread * rng.normal(size=(256, 1024)))).astype(np.float32)
        for kind in ("e4m3", "e5m2"):
            for name in ("tensor", "tile 1x128"):
                a = np.asarray(fast_rounded(x, SIZES[name], Fp8(), kind))
                found.setdefault(f"{kind}, {name}", {})[str(spread)] = {
                    "norm": norm_error(a, x),
                    "mean": float(np.mean(np.abs(a - x) / np.abs(x))),
                    "zero": float(np.mean(a == 0)),
                }
    return found


def sums(widths=WIDTHS, promotions=PROMOTIONS) -> dict:
    """Of products of FP8 operands [32, K] and [K, 32]."""
    multiply = partial(jnp.einsum, "mk,kz->mz", precision=HIGHEST)
    draws: dict[str, Callable] = {"positive": lambda rng, shape: rng.random(shape, np.float32)}
    draws["either sign"] = lambda rng, shape: rng.normal(size=shape).astype(np.float32)
    found = {}
    for name, draw in draws.items():
        for K in widths:
            rng = np.random.default_rng(0)
            x, w = (
                np.asarray(fast_rounded(draw(rng, shape), (128, 128), Fp8(), "e4m3")) for shape in ((32, K), (K, 32))
            )
            exact = x.astype(np.float64) @ w.astype(np.float64)
            size = np.abs(exact) if name == "positive" else np.sqrt(np.mean(np.square(exact)))
            for promotion in promotions:
                fp8 = Fp8(accumulation_bits=14, promotion=promotion)
                a = jax.jit(partial(accumulated, multiply, axes=(1, 0), fp8=fp8))(x, w)
                label = "never" if promotion is None else str(promotion)
                found.setdefault(name, {}).setdefault(label, {})[str(K)] = float(np.max(np.abs(a - exact) / size))
    return found


def model(emulated=None) -> dict:
    """Loss and gradient at the first weights, over 2,048 random tokens, beside float32's."""
    cfg, recipe = MICRO.model, MICRO.recipe
    ids = np.random.default_rng(0).zipf(1.3, size=(recipe.batch_rows, recipe.length)) % cfg.vocab_size
    params, rest = partition(fresh(cfg, recipe, Context()))

    @partial(jax.jit, static_argnums=1)
    def of(params, ctx):
        def value(params):
            return loss(combine(params, rest), {"tokens": jnp.asarray(ids, jnp.int32)}, recipe.weights, ctx=ctx)[0]

        nats, gradient = jax.value_and_grad(value)(params)
        return nats, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(gradient)])

    exact, true = (np.asarray(a, np.float64) for a in of(params, Context()))
    found = {}
    for name, fp8 in (emulated or EMULATED).items():
        nats, gradient = (np.asarray(a, np.float64) for a in of(params, Context(fp8=fp8)))
        cosine = gradient @ true / (np.linalg.norm(gradient) * np.linalg.norm(true))
        found[name] = {
            "loss": float(abs(nats / exact - 1)),
            "gradient": norm_error(gradient, true),
            "cosine": float(cosine),
        }
    return found


def draw(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    plots = (
        ("channels", "C2: four of 1,024 channels are larger", ("tensor", "block 128x128", "tile 1x128")),
        ("tokens", "C4: two of 256 tokens have larger gradients", ("tensor", "block 128x128", "tile 1x128")),
    )
    for axis, (part, title, names) in zip(axes, plots, strict=False):
        for at, name in enumerate(names):
            for kind, line in (("e4m3", "-"), ("e5m2", ":")):
                values = record[part][kind]
                axis.plot(
                    [int(f) for f in values],
                    [100 * v[name] for v in values.values()],
                    line,
                    color=f"C{at}",
                    marker=".",
                    label=f"{name}, {kind.upper()}",
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("times as large")
        axis.set_ylabel("error of the others, %")
        axis.set_title(title, fontsize=10, loc="left")
        axis.legend(fontsize=7)
    for axis, measure, title in ((axes[2], "mean", "mean error of a value"), (axes[3], "zero", "values that become 0")):
        for at, (name, values) in enumerate(record["formats"].items()):
            axis.plot([int(s) for s in values], [100 * v[measure] for v in values.values()], f"C{at}.-", label=name)
        axis.set_xlabel("spread of gradients, powers of two")
        axis.set_ylabel(f"{title}, %")
        axis.set_title("C2: the format of gradients", fontsize=10, loc="left")
        axis.legend(fontsize=7)
    axis = axes[4]
    for signs, line in (("positive", ".-"), ("either sign", ".:")):
        for at, (promotion, values) in enumerate(record["sums"][signs].items()):
            x, y = [int(K) for K in values], [100 * v for v in values.values()]
            axis.plot(x, y, f"C{at}{line}", label=f"{promotion}, {signs}")
    axis.plot(4096, 100 * PAPERS_ERROR, "D", color="C3", fillstyle="none", label="never, the paper, on an H800")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("products in a sum (K)")
    axis.set_ylabel("largest error of a sum, %")
    axis.set_title("C3: sums of 14 bits, promoted after so many products", fontsize=10, loc="left")
    axis.legend(fontsize=6, ncols=2)
    axis.set_ylim(top=60)
    axis, found = axes[5], record["model"]
    axis.barh(range(len(found)), [100 * v["gradient"] for v in found.values()], color="C0")
    axis.set_yticks(range(len(found)), list(found), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("error of a small model's gradient, %")
    axis.set_title("at its first weights, tiles and blocks of 32", fontsize=10, loc="left")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle("What FP8 loses without training (2412.19437 sections 3.3, 3.5.2, B.2)", fontsize=11)
    figure.savefig(path, format="png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write to")
    out = parser.parse_args().out
    parts = {"channels": channels, "tokens": tokens, "formats": formats, "sums": sums, "model": model}
    record = provenance() | {name: part() for name, part in parts.items()}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record, out / "errors.png")


if __name__ == "__main__":
    main()
