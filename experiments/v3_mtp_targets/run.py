"""Does an MTP module predict a token better than the main head does, and why?

Main head and MTP module are scored on the *same* held-out tokens, each given all tokens before the target: the module
at position i and the main head at position i + 1, both on token i + 2. In the first shipped model, whose embedding was
drawn like every matrix (deviation 0.02) and which was trained with Muon, the module was the better one.

C1, pairs: the module is handed (state of token i, embedding of token i + 1), from which one attention layer can copy
    what followed an earlier occurrence of the same token; the main model has to make such pairs in one layer and copy
    in a later one. Rule: in every run the module's difference to the main head is smaller (better) on targets whose
    pair (token before it, target) has occurred before in the row than on the others.
C2, size of the embedding: beside Muon's first steps a small embedding is soon hidden under the first layer's output,
    which the module's own norm of the embedding avoids. Rule: with `embed_std` of 1 the main head's nats are lower in
    every seed, and so are they in comparison with the module's.

Variants: the tiny recipe scaled to `TOKENS` on `MODEL` (1.4 million parameters), `embed_std` as the matrices' (small)
or 1 (unit); same text, order and seeds. Besides: what replacing the token 1 or 8 places back changes of each layer's
attention output, relative to that output; root mean square of the embedding and of the stream after each layer.

Each run is written whole to runs/VARIANT-SEED.json and not repeated; results.json is made from these files.

    python experiments/v3_mtp_targets/run.py                        # 6 runs of 2 minutes on 2 idle cores
    python experiments/v3_mtp_targets/run.py --measure CHECKPOINT   # the measures of any published folder with MTP
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as dsj
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.pipeline import load_data
from deepseek_jax.runs.live import LiveView
from deepseek_jax.runs.pretrain import train
from deepseek_jax.train.recipes import recipe as named_recipe
from deepseek_jax.train.scaling import scaled

HERE = Path(__file__).parent
MODEL = replace(
    dsj.zoo("tiny-v3"),
    name="tiny-v3 of half the width",
    dim=128,
    n_layers=4,
    ffn_dim=160,
    attention=replace(dsj.zoo("tiny-v3").attention, q_rank=64, kv_rank=32, nope_dim=16, v_dim=16),
    moe=replace(dsj.zoo("tiny-v3").moe, n_experts=8, top_k=2, expert_dim=64),
)
TOKENS, SEEDS, VARIANTS = 600 * 4 * 512, (0, 1, 2), {"small": None, "unit": 1.0}
LENGTH, WINDOWS, VOCABULARY = 512, 96, 2048


@jax.jit
def same_target_nats(model, tokens_BT):
    """Nats of token i + 2 by the main head at i + 1 and by the first MTP module at i: two float32 [B, T - 2]."""
    out = model(tokens_BT, with_mtp=True)

    def nats(logits_BTV):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[:, 2:, None], axis=-1)[..., 0]

    return nats(out.logits[:, 1:-1]), nats(out.mtp_logits[0][:, :-2])


def repeated_pairs(tokens_BT: np.ndarray) -> np.ndarray:
    """bool [B, T - 2]: whether (token i + 1, token i + 2) has occurred before in the row."""
    seen_BT = np.zeros((len(tokens_BT), tokens_BT.shape[1] - 2), bool)
    for row, seen in zip(tokens_BT.tolist(), seen_BT, strict=True):
        pairs = {(row[0], row[1])}
        for i, pair in enumerate(pairwise(row[1:])):
            seen[i] = pair in pairs
            pairs.add(pair)
    return seen_BT


@partial(jax.jit, static_argnames="back")
def attention_change(model, tokens_BT, other_BT, back: int):
    """float32 [L]: change of each layer's attention output when the token ``back`` places before is another one."""
    # Every 16th position is looked at, so that what is replaced for one of them is far from the others.
    at = jnp.arange(32, tokens_BT.shape[1], 16)
    changed_BT = tokens_BT.at[:, at - back].set(other_BT[:, at - back])
    a, b = (model(t, logits="none", capture=("attn",)).captured["attn"][:, :, at] for t in (tokens_BT, changed_BT))
    return jnp.sqrt(jnp.square(a - b).sum((1, 2, 3)) / jnp.square(a).sum((1, 2, 3)))


def measure(model, windows_WT: np.ndarray) -> dict:
    """The figures of one model on held-out rows."""
    parts = [same_target_nats(model, part) for part in windows_WT.reshape(-1, 16, windows_WT.shape[1])]
    main, mtp = (np.concatenate([np.asarray(p[i], np.float64) for p in parts]) for i in (0, 1))
    pair = repeated_pairs(windows_WT)
    some = jnp.asarray(windows_WT[:16])
    # Other tokens of the same text: each row takes the next one's.
    other = jnp.roll(some, 1, axis=0)
    norms = jax.jit(lambda m, t: m(t, logits="none", capture=("block_norm",)).captured["block_norm"].mean((1, 2)))
    where = {"all": np.ones_like(pair), "repeated pairs": pair, "new pairs": ~pair}
    return {
        "targets": {name: int(at.sum()) for name, at in where.items()},
        "main": {name: round(float(main[at].mean()), 4) for name, at in where.items()},
        "mtp": {name: round(float(mtp[at].mean()), 4) for name, at in where.items()},
        "attention_change": {str(back): rounded(attention_change(model, some, other, back)) for back in (1, 8)},
        "embedding_rms": round(float(jnp.sqrt(jnp.square(model.embed.get_value()[some]).mean())), 4),
        "stream_rms": rounded(norms(model, some)),
    }


def rounded(a) -> list[float]:
    return [round(float(value), 4) for value in a]


def held_out_windows(tokenizer) -> np.ndarray:
    """The first `WINDOWS` whole rows of the standard library's held-out text."""
    with tempfile.TemporaryDirectory() as folder:
        held_out = load_data(DataConfig(), tokenizer, Path(folder), lambda _: None).held_out(LENGTH)
    return held_out.windows_WT[:WINDOWS]


def run(variant: str, seed: int) -> dict:
    """One training run and its figures."""
    began = time.monotonic()
    recipe = replace(scaled(named_recipe("tiny"), TOKENS), embed_std=VARIANTS[variant], seed=seed, evaluate_every=10**6)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        view = LiveView(recipe.tokens, f"{variant}, seed {seed}", began=began)
        result = train(MODEL, recipe, DataConfig(), VOCABULARY, folder, view=view, began=began)
        model = dsj.load_pretrained(result.checkpoint, dtype=jnp.float32)
        found = measure(model, held_out_windows(dsj.load_tokenizer(result.checkpoint)))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "variant": variant,
        "seed": seed,
        "embed_std": recipe.embed_std or recipe.init_std,
        "tokens": recipe.tokens,
        "steps": result.steps,
        "minutes": round(result.minutes, 1),
        "bits_per_byte": round(result.model_bits, 4),
        "training": [
            {key: round(line[key], 4) for key in ("step", "main", "mtp")} for line in lines if line["kind"] == "step"
        ],
        **found,
        **provenance(),
    }


def verdict(runs: list[dict]) -> dict:
    """The rules of this file's docstring on the runs that are there."""

    def gap(r: dict, targets: str) -> float:
        return round(r["mtp"][targets] - r["main"][targets], 4)

    by = {(r["variant"], r["seed"]): r for r in runs}
    seeds = [s for s in SEEDS if all((variant, s) in by for variant in VARIANTS)]
    pairs = {f"{v}-{s}": {t: gap(r, t) for t in ("all", "repeated pairs", "new pairs")} for (v, s), r in by.items()}
    size = [(by["small", s], by["unit", s]) for s in seeds]
    holds = {
        "C1": all(g["repeated pairs"] < g["new pairs"] for g in pairs.values()),
        "C2": all(b["main"]["all"] < a["main"]["all"] and gap(b, "all") > gap(a, "all") for a, b in size),
    }
    whole = len(seeds) == len(SEEDS)
    return {
        "commit": ", ".join(sorted({r["commit"] for r in runs})),
        "date": max(r["date"] for r in runs),
        "cores": runs[0]["machine"]["cores"],
        "mtp_minus_main": pairs,
        "main": {f"{v}-{s}": r["main"]["all"] for (v, s), r in by.items()},
        "verdict": {c: ("holds" if h else "does not hold") if whole else "open" for c, h in holds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=Path, help="a published folder with MTP: print its figures, train nothing")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the seeds, so many")
    args = parser.parse_args()
    if args.measure is not None:
        model = dsj.load_pretrained(args.measure, dtype=jnp.float32)
        print(json.dumps(measure(model, held_out_windows(dsj.load_tokenizer(args.measure))), indent=2))
        return
    folder = HERE / "runs"
    folder.mkdir(exist_ok=True)
    for seed in SEEDS[: args.seeds]:
        for variant in VARIANTS:
            path = folder / f"{variant}-{seed}.json"
            if not path.exists():
                text = json.dumps(run(variant, seed), indent=1) + "\n"
                path.with_suffix(".part").write_text(text)
                path.with_suffix(".part").replace(path)
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    (HERE / "results.json").write_text(json.dumps(verdict(runs), indent=2) + "\n")
    print(json.dumps(verdict(runs), indent=2))


if __name__ == "__main__":
    main()
