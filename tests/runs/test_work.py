"""A run of an objective that is not this package's: the same trainer, measurements, checkpoints and export."""

import json
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.pipeline import load_data
from deepseek_jax.runs.metrics import Reporters
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import make_tokenizer, open_run
from deepseek_jax.runs.reading import Reading
from deepseek_jax.runs.run import Work, carry_out
from deepseek_jax.train.begin import fresh
from deepseek_jax.train.objective import loads
from deepseek_jax.train.recipe import LearningRate, Recipe

CFG = tiny_config(n_layers=2, mtp_depth=0, vocab_size=280)
RECIPE = Recipe(
    model="tiny",
    tokens=768,
    length=32,
    batch_rows=4,
    first_rows=None,
    micro_rows=2,
    ramp_tokens=0,
    dtype="float32",
    fim_rate=0.0,
    rate=LearningRate(peak=6e-3, warmup_steps=1, decay_from=None, drops=()),
    mtp_change=None,
    bias_until=None,
    ema_decay=0.0,
    evaluate_every=3,
    log_every=1,
)


@dataclass(frozen=True)
class Smoothed:
    """Next-token cross-entropy in which every other token has its part of ``share`` too."""

    share: float

    entries = frozenset(("tokens", "segments", "positions"))

    def counts(self, batch):
        return (batch["segments"][..., 1:] != 0).sum().astype(jnp.float32)

    def __call__(self, model, part, counts, knobs, ctx):
        segments_BT = part.get("segments", jnp.ones_like(part["tokens"]))
        out = model(part["tokens"], segments=segments_BT, positions=part.get("positions"), ctx=ctx)
        log_p_BTV = jax.nn.log_softmax(out.logits[:, :-1])
        nats_BT = -jnp.take_along_axis(log_p_BTV, part["tokens"][:, 1:, None], axis=-1)[..., 0]
        mixed_BT = (1 - self.share) * nats_BT - self.share * log_p_BTV.mean(-1)
        real_BT = segments_BT[:, 1:] != 0
        sums = {name: jnp.where(real_BT, a, 0).sum() / counts for name, a in (("mix", mixed_BT), ("nats", nats_BT))}
        return sums["mix"], {"nats": sums["nats"], **loads(out)}


@pytest.mark.parametrize(("data_seed", "asked"), [(None, 3), (0, 0), (7, 7)])
def test_the_order_of_the_text_may_have_a_seed_of_its_own(data_seed, asked):
    class Asked(Exception):
        """With the seed."""

    class Text:
        def batches(self, *, seed, **rest):
            raise Asked(seed)

    with pytest.raises(Asked, match=f"^{asked}$"):
        Reading(Text(), None).open(None, replace(RECIPE, seed=3, data_seed=data_seed), Options(), DEFAULT)


@pytest.mark.slow
def test_a_run_of_another_objective(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"part{i}.txt").write_text(f"part {i} of the text says alpha beta gamma {i}\n" * 40)
    text = DataConfig(data=(f"t={tmp_path / 'text'}",), held_out_share=0.2, workers=0)

    def go(resume: bool):
        with open_run(tmp_path / "run", {}, resume, None, None) as run:
            words = make_tokenizer(run, CFG.vocab_size, text, CFG.max_length)
            data = load_data(text, words, run.tokens, lambda line: None)
            work = Work(
                CFG,
                RECIPE,
                Reading(data, dsj.save_pretrained, anew=True, objective=Smoothed(0.1)),
                make=lambda: fresh(CFG, RECIPE, DEFAULT),
                anew=True,
            )
            began = time.monotonic()
            return carry_out(run, work, options=Options(), view=Reporters([]), ctx=DEFAULT, began=began)

    result = go(resume=False)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert (result.steps, len(steps)) == (6, 6)
    assert {"loss", "nats", "load", "bias", "grad_norm", "skipped"} < set(steps[-1])
    assert not {"main", "targets", "activation_norm"} & set(steps[-1])
    # Of a model that knows nothing the two are the same: every token is as likely.
    assert steps[0]["loss"] == pytest.approx(steps[0]["nats"], rel=0.02)
    assert steps[-1]["nats"] < steps[-1]["loss"] < steps[0]["loss"] - 0.2
    assert result.stored_bits == pytest.approx(result.model_bits, rel=1e-3)
    assert result.trigram_bits is not None
    # Resumed at its end it measures the same.
    assert go(resume=True).model_bits == pytest.approx(result.model_bits, rel=1e-6)
