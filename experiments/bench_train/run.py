"""How soon a tiny V3 trained from scratch beats a Kneser-Ney trigram on held-out text, with nothing else running.

`deepseek-jax train` with its defaults and fewer steps, so that the learning rate has come down within the quarter of
an hour that is the aim on two cores. The trigram (interpolated, discount 0.75) is counted on exactly the tokens that
the model has been trained on so far. Writes every measurement and the minute of crossing into results.json.

    python experiments/bench_train/run.py          # about 13 minutes on 2 cores
    python experiments/bench_train/run.py --smoke  # four steps of a smaller model on this project's notes
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import deepseek_jax as dsj
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.data.config import DataConfig
from deepseek_jax.runs.live import LiveView
from deepseek_jax.runs.pretrain import train
from deepseek_jax.train.recipes import recipe as named_recipe
from deepseek_jax.train.scaling import scaled

HERE = Path(__file__).parent
VOCABULARY, AIM_MINUTES = 2048, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps; the default takes 11 minutes")
    parser.add_argument("--smoke", action="store_true", help="toy size; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    given = parser.parse_args()
    cfg, data, vocabulary, steps = dsj.zoo("tiny-v3"), DataConfig(), VOCABULARY, given.steps
    recipe = replace(scaled(named_recipe("tiny"), steps * 4 * 512), evaluate_every=150)
    if given.smoke:
        cfg = replace(cfg, n_layers=2, dim=64, moe=replace(cfg.moe, expert_dim=16))
        data, vocabulary = DataConfig(data=(f"notes={HERE.parents[1] / 'paper_notes'}",)), 300
        recipe = replace(scaled(named_recipe("tiny"), 4 * 4 * 64), length=64, evaluate_every=2)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        view = LiveView(recipe.tokens, "tiny-v3", began=began)
        result = train(cfg, recipe, data, vocabulary, folder, view=view, began=began)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        data = json.loads((folder / "run.json").read_text())["data"]
    record = {
        **provenance(),
        "steps": result.steps,
        "minutes": round(result.minutes, 2),
        "crossed_at_minute": None if result.crossed_at is None else round(result.crossed_at, 2),
        "aim_minutes": AIM_MINUTES,
        "tokens_a_step": recipe.batch_rows * recipe.length,
        "data": data,
        "evaluations": [
            {k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "evaluation"
        ],
    }
    out = given.out or (None if given.smoke else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
