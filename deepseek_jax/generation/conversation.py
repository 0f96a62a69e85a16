"""A row whose cache stays from prompt to prompt, as a chat's turns or a program's calls make them.

It runs what the batcher's slots run, `loop.prefill` and `loop.decode`, and decodes as fast. It stands beside them for
what slots do not do: it runs on a mesh; it takes every cache back, V4's windows and compressors too, for which it pays
with room that many slots would pay for many times; and it hands over a turn's first token after one step. On the
shipped checkpoint and two busy cores a second turn's came after 38 ms, from a batcher of one slot after 70; with drafts
after 40 and 118. Both then gave 205 tokens a second, 175 with drafts.
"""

import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.generation.arguments import (
    check_count,
    check_counts,
    check_drafts,
    check_length,
    check_model,
    check_prompts,
)
from deepseek_jax.generation.choices import shared
from deepseek_jax.generation.running import Generation, begun, filled, prepared, stops
from deepseek_jax.generation.sampling import make_sampling
from deepseek_jax.model.transformer import Transformer


class Conversation:
    """Continues one prompt after another; what a prompt shares with the tokens before it is not fed again.

    The tokens are those of `generate` up to near-ties: of generated tokens the cache holds what was computed one by
    one.
    """

    def __init__(self, model: Transformer, length: int, use_mtp: bool = False, ctx: Context | None = None):
        """``length``: tokens that the cache holds, at most ``cfg.max_length``; they bound a prompt with its answer.

        Raises ValueError for what is no model or length, and where MTP modules are asked for that are not there.
        """
        self._ctx = ctx = check_model(model, ctx).whole_rows()
        check_count("length", length)
        check_length(model.cfg, 1, length - 1)
        self.length, self._drafts = length, check_drafts(model.cfg, use_mtp, 1)
        self._model = prepared(model, ctx)
        self._before: Generation | None = None

    def stream(
        self,
        prompt: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """As `engine.stream`, of one prompt. It ends the stream before it, whose ``result()`` stays."""
        cfg, ctx, depth = self._model.cfg, self._ctx, int(self._drafts[0])
        prompts = check_prompts([prompt], cfg.vocab_size)
        new = check_counts("max_new_tokens", max_new_tokens, 1)
        check_length(cfg, len(prompts[0]), max_new_tokens, self.length)
        sampling = make_sampling(1, temperature, top_k, top_p, min_p, seed)
        rows, capacity = filled(1, ctx), self.length + depth
        if self._before is None:
            fed, cache = 0, self._model.init_cache(rows, capacity, rewind=capacity - 1, ctx=ctx)
        else:
            cache, known = self._before.given_up()
            held = int(np.asarray(cache.length)[0])
            # The last token is decoding's first; the MTP modules have seen the end of what is held with drafts in
            # the place of tokens, or not at all where a text has ended.
            fed = max(0, min(shared(known, prompts[0]), held, len(prompts[0]) - 1) - 2 * depth)
            cache = cache.rewind(np.pad(np.array([held - fed], np.int32), (0, rows - 1)))
        stop_BN = stops(cfg, None, 1)
        self._before = begun(self._model, cache, prompts, new, sampling, stop_BN, self._drafts, ctx, fed=fed)
        return self._before
