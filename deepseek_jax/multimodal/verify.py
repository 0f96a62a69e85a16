"""A Janus's checkpoint against the reference: towers, aligners, every layer, logits, decoding, the code both ways."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.configs.published.janus import named
from deepseek_jax.convert.ladder import Row, compare
from deepseek_jax.convert.pickles import weight_files
from deepseek_jax.convert.references import VerifyError
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.multimodal.checkpoint import load_pretrained, read_config
from deepseek_jax.multimodal.janus import Janus, abstract
from deepseek_jax.multimodal.reference import observe, reference_model
from deepseek_jax.small_files import SMALL


@dataclass(frozen=True)
class Inputs:
    """``tokens``: int32 [1, T], a picture among random words; ``image``: float32 [1, side, side, 3], random; ``codes``:
    int32 [1, S], random."""

    tokens: np.ndarray
    image: np.ndarray
    codes: np.ndarray


def random_inputs(cfg: JanusConfig, words: int, seed: int = 0) -> Inputs:
    """``words``: tokens of text, half of them before the picture. Raises ValueError for fewer than 2."""
    if words < 2:
        raise ValueError(f"{words} tokens of text are too few: a picture stands between two.")
    rng, side = np.random.default_rng(seed), cfg.vision.image_size
    ids = rng.integers(0, cfg.language.vocab_size - 1, words)
    ids += ids >= cfg.image_id  # any but a picture's
    tokens = np.concatenate([ids[: words // 2], np.full(cfg.vision.n_tokens, cfg.image_id), ids[words // 2 :]])
    image = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    return Inputs(tokens[None].astype(np.int32), image, rng.integers(0, cfg.vq.n_codes, (1, cfg.n_codes)))


def janus_ladder(
    path: str | Path, words: int = 96, steps: int = 8, seed: int = 0, against: str | Path | None = None
) -> Iterator[Row]:
    """Compares a checkpoint with transformers on a random picture among ``words`` random tokens, float32 on both sides.

    The reference runs first and is freed before our model is loaded; decoding follows its greedy choices for ``steps``
    tokens. ``against``: the folder that PyTorch reads, in either layout; default ``path``.

    Raises VerifyError for what the reference cannot read and without PyTorch; CheckpointError and ConfigError as
    `checkpoint.load_pretrained` does; ValueError for sizes that do not fit, and for two different models.
    """
    path, against = Path(path), Path(against or path)
    cfg, theirs = read_config(path), read_config(against)
    if _alike(cfg) != _alike(theirs):
        raise ValueError(f"{path} and {against} hold different models, by their config.json.")
    inputs = random_inputs(cfg, words, seed)
    longest = max(inputs.tokens.shape[1] + steps, words // 2 + cfg.n_codes)
    if steps < 1 or longest > cfg.language.max_length:
        raise ValueError(
            f"{words} tokens of text and {steps} decoding steps: give at least 1 step, and with pictures no more than "
            f"the model's {cfg.language.max_length} tokens."
        )
    values = sum(leaf.size for leaf in jax.tree.leaves(abstract(cfg)))
    if values > 2 * (held := sum(file.stat().st_size for file in weight_files(against))) + SMALL:
        raise VerifyError(f"{against}: config.json describes {values} values; its files of weights have {held} bytes.")
    reference = reference_model(against)
    seen = observe(reference, inputs.tokens, inputs.image, inputs.codes, steps)
    del reference

    with jax.default_matmul_precision("highest"):
        model = load_pretrained(path, jnp.float32)
        ours, blocks = _values(model, inputs)
        for name in ("vision tower", "aligner"):
            yield compare(ours[name], seen.values[name], None, name)
        for layer, block in enumerate(seen.blocks):
            yield compare(blocks[layer], block, layer, "block")
        for name in ("final norm", "logits"):
            yield compare(ours[name], seen.values[name], None, name)
        yield max(_decoded(model, inputs, seen), key=lambda row: row.relative)
        for name in ("codes embedded", "logits of codes", "VQ encoder", "VQ vectors", "VQ decoder"):
            yield compare(ours[name], seen.values[name], None, name)


def _alike(cfg: JanusConfig):
    """A config apart from names, the tokens that begin and end a text, and the layout of its files."""
    language = replace(cfg.language, bos_id=None, eos_ids=())
    return named(replace(cfg, language=language, model_type="janus"), "")


def _values(model: Janus, inputs: Inputs) -> tuple[dict[str, jax.Array], jax.Array]:
    """What `reference.observe` makes, by the same names, and the output of every layer, [L, 1, T, D]."""

    @jax.jit
    def run(model, tokens, image, codes):
        out = model(tokens, image, capture=("block",))
        tower = model.vision(image, DEFAULT)
        embedded = model.embed_codes(codes)
        first = int(np.argmax(inputs.tokens[0] == model.cfg.image_id))
        x = jnp.concatenate([model.embed_text(tokens[:, :first]), embedded], axis=1)
        drawn = model.language(jnp.zeros(x.shape[:2], jnp.int32), embeddings=x, logits="none").hidden
        return {
            "vision tower": tower,
            "aligner": model.aligner(tower, DEFAULT),
            "final norm": out.hidden,
            "logits": out.logits,
            "codes embedded": embedded,
            "logits of codes": model.code_logits(drawn),
            "VQ encoder": model.vq.encoder(image),
            "VQ vectors": model.vq.vectors(image),
            "VQ decoder": model.vq.decode(codes),
        }, out.captured["block"]

    return run(model, inputs.tokens, inputs.image, inputs.codes.astype(np.int32))


@partial(jax.jit, static_argnames=("logits",))
def _call(model: Janus, tokens, images, cache, logits: str):
    return model(tokens, images, cache=cache, logits=logits)


def _decoded(model: Janus, inputs: Inputs, seen) -> Iterator[Row]:
    T = inputs.tokens.shape[1]
    cache = _call(model, inputs.tokens, inputs.image, model.init_cache(1, T + len(seen.chosen)), "none").cache
    for token, theirs in zip(seen.chosen, seen.decoded, strict=True):
        out = _call(model, np.asarray([[token]], np.int32), None, cache, "all")
        cache = out.cache
        yield compare(out.logits, theirs, None, "decoded logits")
