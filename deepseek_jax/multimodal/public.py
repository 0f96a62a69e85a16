"""The public functions for the whole family: a config, folder or model is a Janus's, or a language model's alone.

Each hands on to the one of its kind; what is said here is what differs. `deepseek_jax` has these under the same names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert import load, save
from deepseek_jax.core.context import Context
from deepseek_jax.generation import engine
from deepseek_jax.generation.running import CHUNK, Info
from deepseek_jax.model import transformer
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.multimodal import checkpoint, janus, understand
from deepseek_jax.multimodal.janus import Janus

if TYPE_CHECKING:
    from deepseek_jax.text.tokenizer import Tokenizer


def init(
    cfg: ModelConfig | JanusConfig, key: jax.Array, dtype=jnp.float32, ctx: Context | None = None
) -> Transformer | Janus:
    """A fresh model. A language model's matrices are drawn from N(0, cfg.init_std**2), those around it in a Janus from
    N(0, 1 / their inputs); gains are 1, biases 0 (a router's always float32), tables of hash routing random and
    balanced.

    Each matrix follows from the key, its name and shape, its layer's number and its experts': two configs with one key
    have equal values in all that they share. On a mesh every device makes its own shards; the numbers are those of one
    device.

    Raises ValueError for what is no config, key or dtype of weights, LayoutError where the context's layout does not
    divide the model.
    """
    kind = janus if isinstance(cfg, JanusConfig) else transformer
    return kind.init(cfg, key, dtype, ctx)


def load_pretrained(
    path: str | Path,
    dtype=jnp.bfloat16,
    ctx: Context | None = None,
    cfg: ModelConfig | None = None,
    key: jax.Array | None = None,
) -> Transformer | Janus:
    """A model from a published folder (``config.json`` and safetensors files, with or without an index), from one that
    ``deepseek-jax convert`` made of it, or from a checkpoint of a training run (``RUN/checkpoints/STEP``: the weights
    themselves, not their moving average). A folder whose config.json is a Janus's, in DeepSeek's layout or in
    transformers', gives a `Janus`.

    ``dtype``: of all parameters, a router's bias apart, which is float32; quantised weights are multiplied by their
    scales in float32 and cast. None keeps every tensor as it is stored, quantised ones as they are. ``ctx``: as in a
    model's call. With a mesh every process reads what its devices' shards are made of and no other bytes. ``cfg``: the
    same weights of a language model under another config, what is new drawn from ``key``.

    Raises CheckpointError for tensors that are missing, unexpected, of a wrong shape or dtype, truncated or not finite,
    and for copies of the embedding or head that differ; ConfigError for an unsupported config; LayoutError, before any
    tensor is read, where the context's layout does not divide the model; ValueError for a Janus with ``cfg``.
    """
    if not checkpoint.holds_janus(Path(path)):
        return load.load_pretrained(path, dtype, ctx, cfg, key)
    if cfg is not None:
        raise ValueError(f"{path} holds a Janus, which is loaded under its own config: leave cfg out.")
    return checkpoint.load_pretrained(path, dtype, ctx)


def save_pretrained(
    model: Transformer | Janus,
    path: str | Path,
    quantize: str | None = None,
    like: str | Path | None = None,
    tokenizer: "str | Path | Tokenizer | None" = None,
    dtype=None,
) -> None:
    """Writes ``config.json`` and safetensors files, with an index when there are several; whole or not at all.

    ``quantize="fp8"``: a language model's linear maps of attention and networks as FP8 E4M3 with a scale for each block
    of 128 x 128, all else bfloat16. ``dtype``: float32, bfloat16 or float16 for every tensor, but for what no model has
    in another dtype (a router's bias, a table of hash routing). Neither: as the model holds it, or, of a model that was
    loaded with dtype=None, each tensor as it was stored. ``like``: a folder whose dtypes, scales, file split, tokenizer
    files and further config fields are taken; ``quantize`` and ``dtype`` come before it. ``tokenizer``: a folder, or a
    tokenizer loaded from one, whose files are copied.

    A Janus is written in the layout of ``like``, else of ``model.cfg.model_type``.

    Raises, before anything is written, FileExistsError when ``path`` is there and not empty, ConfigError for a model
    that the layout cannot carry, CheckpointError when ``like`` does not hold the model's tensors, ValueError for
    options that do not fit; later ValueError for values that are not finite.
    """
    if not isinstance(model, Janus):
        save.save_pretrained(model, path, quantize, like, tokenizer, dtype)
        return
    if quantize is not None:
        raise ValueError(f"quantize={quantize!r}: a Janus's files have no quantised tensors; give dtype, or neither.")
    checkpoint.save_pretrained(model, path, like, dtype, tokenizer)


def generate(
    model: Transformer | Janus,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int] = 64,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    use_mtp: bool | Sequence[bool] = False,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ctx: Context | None = None,
    *,
    images: Sequence[Sequence[np.ndarray]] | None = None,
    cache_length: int | None = None,
    chunk: int = CHUNK,
    record: Sequence[str] = (),
) -> tuple[list[list[int]], Info]:
    """Continues prompts (lists of token ids, of any lengths); returns the new tokens of each, and `Info`. Arguments and
    errors are those of `deepseek_jax.generation.engine.generate`; of a Janus its language model goes on.

    ``images``: for each prompt the pictures that a Janus is shown (`multimodal.pictures.shown`), in the order of their
    places in it (`multimodal.prompts.PromptWriter.about_pictures`). Such prompts are fed at once: ``use_mtp``,
    ``cache_length``, ``chunk`` and ``record`` stay as they are by default.

    Raises ValueError as said there, and for pictures that do not fit their prompts or a model that is shown none.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    settings |= {"stop_ids": stop_ids, "ctx": ctx}
    if images is None:
        settings |= {"use_mtp": use_mtp, "cache_length": cache_length, "chunk": chunk, "record": record}
        return engine.generate(language_model(model), prompts, max_new_tokens, **settings)
    if not isinstance(model, Janus):
        raise ValueError("images are given, but the model is no Janus, and no other model here is shown pictures.")
    if (use_mtp, cache_length, chunk, tuple(record)) != (False, None, CHUNK, ()):
        raise ValueError("with images, use_mtp, cache_length, chunk and record stay as they are: leave them out.")
    return understand.generate(model, prompts, images, max_new_tokens, **settings)


def language_model(model: Transformer | Janus) -> Transformer:
    """A Janus's; another model itself."""
    return model.language if isinstance(model, Janus) else model
