"""A model to begin from."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.rl.tasks import Tags
from deepseek_jax.rl.traces import write_traces
from deepseek_jax.train.objective import Knobs, NextToken
from deepseek_jax.train.schedule import Setting
from deepseek_jax.train.step import start, train_step
from deepseek_jax.train.weights import LossWeights

TASK = Tags(documents=1280)


def tagged(folder: Path) -> Path:
    """The folder of a model that has seen the tags in any order, one text in ten in theirs, with its tokenizer."""
    write_traces(TASK, folder / "traces")
    words = dsj.load_tokenizer(folder / "traces/tokenizer")
    texts = [json.loads(line)["text"] for line in (folder / "traces/traces.jsonl").read_text().splitlines()]
    rows = np.array([[*ids, words.eos_id] for ids in words.encode_batch(texts)], np.int32)
    cfg = tiny_config(n_layers=1, n_dense_layers=0, mtp_depth=0, vocab_size=words.vocab_size)
    adam = optax.chain(optax.scale_by_adam(0.9, 0.95), optax.scale(-1.0))
    step = jax.jit(train_step, static_argnames=("optimizer", "objective", "ctx"))
    state = start(random_model(cfg), adam)
    for i in range(50):
        batch = {"tokens": rows[None, i % 20 * 64 : i % 20 * 64 + 64]}
        knobs = Knobs.of(Setting(3e-3, 0.0, 0.0, 1, rows=64))
        state, _ = step(state, batch, knobs, optimizer=adam, objective=NextToken(LossWeights(), 0), ctx=DEFAULT)
    dsj.save_pretrained(state.model, folder / "base")
    words.backend.save(str(folder / "base/tokenizer.json"))
    (folder / "base/tokenizer_config.json").write_text((folder / "traces/tokenizer/tokenizer_config.json").read_text())
    return folder / "base"
