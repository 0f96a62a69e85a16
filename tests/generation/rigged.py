"""Tiny models for generation, and ones whose MTP modules agree with the model as often as a test needs."""

import jax
import numpy as np
from flax import nnx
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.params import map_variables

PROMPT_LENGTHS = (1, 7, 8, 9, 16, 17, 23)
CHUNK = 8


def config(mtp_depth: int = 1, **changes):
    return tiny_config(**{"n_layers": 2, "mtp_depth": mtp_depth, **changes})


def agreeing_model(cfg, mixing: float, seed: int = 0, reading: float = 0):
    """A random model whose layers add ``mixing`` times what they would, and whose MTP modules read the next
    token's embedding and ``reading`` times the hidden state: at 0 and 0 model and modules are the same function of one
    token, and agree always."""

    def scale(path, variable):
        value = variable.get_value()
        if path[-1] in ("o", "o_b", "down"):
            value = value * mixing
        elif path[-1] == "proj":
            D = cfg.dim
            value = jax.numpy.concatenate([jax.numpy.eye(D), reading * value[D:]])
        elif path[-1] in ("embed_proj", "hidden_proj"):
            value = jax.numpy.eye(cfg.dim) if path[-1] == "embed_proj" else reading * value
        elif path[-1] == "weight" and "router" not in path:
            value = jax.numpy.ones_like(value)
        return type(variable)(value, **variable.get_metadata())

    return map_variables(scale, random_model(cfg, seed))


def random_prompts(cfg, lengths=PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, cfg.vocab_size, n).tolist() for n in lengths]


def nan_model(model):
    return map_variables(lambda _, v: nnx.Param(v.get_value() * np.nan) if v is model.embed else v, model)


@jax.jit
def full_forward(model, tokens_BT):
    """float32 log-probabilities [B, T, V] without a cache, the margin between first and second logit, and the experts
    [L, B, T, K]."""
    out = model(tokens_BT)
    top = jax.lax.top_k(out.logits, 2)[0]
    return jax.nn.log_softmax(out.logits), top[..., 0] - top[..., 1], out.aux and out.aux.expert_index


# As many rows, and so long, as `test_engine` gives these: they then have its programs.
ROWS, LONGEST = len(PROMPT_LENGTHS), max(PROMPT_LENGTHS) + 30


def generated(model, prompt, new, temperature=0.0, seeds=(0,), use_mtp=False, stop_ids=(), **filters):
    """By `generate`: each seed's tokens and `Info`, of rows that draft or not beside one that does."""
    rest = ROWS - len(seeds)
    drafts = [use_mtp] * len(seeds) + [True] * rest
    seeds = [*map(int, seeds), *range(rest)]
    return dsj.generate(
        model,
        [prompt] * ROWS,
        new,
        temperature,
        seed=seeds,
        use_mtp=drafts,
        stop_ids=stop_ids,
        chunk=CHUNK,
        **filters,
    )


def forward_of(model, text):
    """log-probabilities [T, V] and experts [T, L, K] of one text, of at most LONGEST tokens."""
    logprobs, _, experts = full_forward(model, padded([text] * ROWS, LONGEST))
    return np.asarray(logprobs)[0, : len(text)], np.asarray(experts)[:, 0, : len(text)].transpose(1, 0, 2)


def padded(rows: list[list[int]], length: int) -> np.ndarray:
    tokens = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens
