"""Answers to learn from: groups of them, with what they were drawn from, and as a batch of arrays.

Tokens stay tokens: an answer is never decoded and encoded again. Suffixes: N answers, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.generation.arguments import check_count
from deepseek_jax.generation.engine import generate
from deepseek_jax.generation.running import Info
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.rl.advantage import Advantages
from deepseek_jax.rl.objective import answer_mask
from deepseek_jax.rl.variants import Grpo


@dataclass(frozen=True, eq=False)
class Rollout:
    """``prompts``, ``answers``: ids, a list an answer. ``group``: int [N], each answer's prompt. ``info``: what
    generation said of them. ``stop_ids``: what ended an answer."""

    prompts: list[list[int]]
    answers: list[list[int]]
    group: np.ndarray
    info: Info
    stop_ids: tuple[int, ...]


def rollout(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    size: int,
    cfg: Grpo,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] | None = None,
    ctx: Context | None = None,
    width: int | None = None,
) -> Rollout:
    """``size`` answers to each prompt, of a temperature above 0. What ``cfg`` keeps is recorded: the experts of every
    token that was fed, the tokens that the filters left. ``width``: tokens of the longest prompt that there will be:
    calls of as many rows then run one compiled program, with a cache of just what is needed. Errors are those of
    `generation.engine.generate`."""
    check_count("size", size)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r}: greedy answers to a prompt are all the same; sample them.")
    record = ["routing"] * (cfg.keep_routing and model.cfg.moe is not None) + ["kept_mask"] * cfg.keep_sampling_mask
    stop_ids = tuple(model.cfg.eos_ids if stop_ids is None else stop_ids)
    rows = [list(prompt) for prompt in prompts for _ in range(size)]
    sampling = (temperature, top_k, top_p, min_p, seed)
    shape = {} if width is None else {"cache_length": width + max_new_tokens, "chunk": width}
    answers, info = generate(model, rows, max_new_tokens, *sampling, stop_ids=stop_ids, ctx=ctx, record=record, **shape)
    return Rollout(rows, answers, np.repeat(np.arange(len(prompts)), size), info, stop_ids)


def batch(found: Rollout, advantage: Advantages, cfg: Grpo, length: int) -> Mapping[str, np.ndarray]:
    """The entries of `policy.Policy`, [N, length] each but "reference", which a reference model gives.

    Entry t of each is of the token at t. An answer without a reward has no token that counts.

    Raises ValueError where a prompt with its answer is longer than ``length``.
    """
    rows = [p + a for p, a in zip(found.prompts, found.answers, strict=True)]
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(f"a prompt and its answer have {longest} tokens, more than length={length}.")
    tokens = np.zeros((len(rows), length), np.int32)
    segments, old = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    kept = {}
    if found.info.routing is not None:
        layers, _, chosen = found.info.routing[0].shape
        kept["routing"] = np.full((*tokens.shape, layers, chosen), -1, np.int32)
    if found.info.kept_mask is not None:
        kept["kept"] = np.zeros((*tokens.shape, found.info.kept_mask[0].shape[-1]), np.uint32)
    for i, row in enumerate(rows):
        answer = slice(len(found.prompts[i]), len(row))
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        old[i, answer] = found.info.behaviour_logprobs[i]
        if "routing" in kept:  # the last token was not fed, and nothing is predicted from it
            kept["routing"][i, : len(row) - 1] = found.info.routing[i].transpose(1, 0, 2)
        if "kept" in kept:
            kept["kept"][i, answer] = found.info.kept_mask[i]
    start, stop = np.array([len(p) for p in found.prompts]), np.array([len(row) for row in rows])
    counted, _ = answer_mask(tokens, start, stop, found.stop_ids, cfg.truncated)
    answer = np.where(advantage.scored[:, None], np.asarray(counted), 0).astype(np.float32)
    every = np.repeat(advantage.value[:, None], length, 1)
    return {"tokens": tokens, "segments": segments, "answer": answer, "old": old, "advantage": every, **kept}
