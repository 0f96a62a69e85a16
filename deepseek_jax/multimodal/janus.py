"""Janus (2410.13848; Janus-Pro 2501.17811): a decoder of the family that is shown pictures and draws them.

Pictures that are shown go through a vision tower and an aligner; pictures that are drawn are codes of a VQ, embedded by
an aligner of their own and predicted by a head of their own. In between is the language model, as it is.

Suffixes: B rows, T tokens, D width, I pictures, Y and X pixels, C colours, P a picture's tokens, K codes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import drawn, map_variables, matrix_of, param
from deepseek_jax.model import transformer
from deepseek_jax.model.arguments import check_init, known
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.outputs import Output
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.multimodal.layers import Perceptron
from deepseek_jax.multimodal.vision import COLOURS, Vision
from deepseek_jax.multimodal.vq import VQ


class Janus(nnx.Module):
    """A pytree of parameters with ``cfg``; calling it is pure. ``language``: a `Transformer` of ``cfg.language``."""

    def __init__(self, cfg: JanusConfig, dtype):
        self.cfg = cfg
        dim, hidden = cfg.language.dim, [cfg.language.dim] * cfg.depth
        self.vision = Vision(cfg.vision, dtype)
        self.aligner = Perceptron(dtype, cfg.vision.dim, *hidden)
        self.vq = VQ(cfg.vq, dtype)
        self.gen_embed = param(dtype, (cfg.vq.n_codes, cfg.vq.code_dim), ("place", None), inputs=1)
        self.gen_aligner = Perceptron(dtype, cfg.vq.code_dim, *hidden)
        self.gen_head = Perceptron(dtype, dim, cfg.head_dim, cfg.vq.n_codes, last=("embed", "vocab"))
        self.language = Transformer(cfg.language, dtype)

    def __call__(
        self,
        tokens_BT: jax.Array,
        images: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
        logits: str = "all",
        capture=(),
        ctx: Context | None = None,
    ) -> Output:
        """Runs tokens int32 [B, T], in which ``cfg.image_id`` stands for a token of a picture.

        ``images``: [I, Y, X, 3], values from -1 to 1 (`pictures.shown`), in the order in which their tokens stand, row
        by row; I is whatever the rows have together. All else is as in a call of the language model.

        Raises ValueError where pictures and their places do not match, and as the language model does.
        """
        embeddings = self.embed(tokens_BT, images, ctx)
        return self.language(
            tokens_BT, positions, segments, None, cache, logits=logits, capture=capture, ctx=ctx, embeddings=embeddings
        )

    def embed(self, tokens_BT: jax.Array, images: jax.Array | None = None, ctx: Context | None = None) -> jax.Array:
        """[B, T, D]: tokens' embeddings, and in the places of pictures theirs."""
        ctx = ctx or DEFAULT
        tokens_BT = jnp.asarray(tokens_BT)
        x_BTD = self.embed_text(tokens_BT, ctx)
        if images is None:
            return x_BTD
        self._check_images(tokens_BT, images)
        feature_PD = self.embed_images(images, ctx).reshape(-1, x_BTD.shape[-1])
        is_image_BT = tokens_BT == self.cfg.image_id
        place_BT = jnp.cumsum(is_image_BT.reshape(-1)).reshape(is_image_BT.shape) - 1
        # Under jit nothing can be raised: a place beyond the pictures should not pass for one of theirs.
        found_BTD = feature_PD.at[place_BT].get(mode="fill", fill_value=jnp.nan)
        return jnp.where(is_image_BT[..., None], found_BTD.astype(x_BTD.dtype), x_BTD)

    def embed_text(self, tokens_BT: jax.Array, ctx: Context | None = None) -> jax.Array:
        """[B, T, D]."""
        ctx = ctx or DEFAULT
        return ctx.ops.lookup(self.language.embed, tokens_BT, self.compute_dtype(ctx))

    def embed_images(self, images: jax.Array, ctx: Context | None = None) -> jax.Array:
        """[I, P, D]: pictures [I, Y, X, 3] that are shown, for the language model."""
        ctx = ctx or DEFAULT
        return self.aligner(self.vision(jnp.asarray(images, self.compute_dtype(ctx)), ctx), ctx)

    def embed_codes(self, code_BT: jax.Array, ctx: Context | None = None) -> jax.Array:
        """[B, T, D]: int32 codes of pictures that are drawn, for the language model."""
        ctx = ctx or DEFAULT
        return self.gen_aligner(ctx.ops.lookup(self.gen_embed, code_BT, self.compute_dtype(ctx)), ctx)

    def code_logits(self, hidden_BTD: jax.Array, ctx: Context | None = None) -> jax.Array:
        """float32 [B, T, K]: of the next code, from hidden states after the final norm."""
        return self.gen_head(hidden_BTD, ctx or DEFAULT).astype(jnp.float32)

    def init_cache(self, batch: int, length: int, ctx: Context | None = None) -> Cache:
        """That of the language model, for ``length`` tokens a row, those of pictures and codes among them."""
        return self.language.init_cache(batch, length, ctx=ctx)

    def compute_dtype(self, ctx: Context | None = None):
        return self.language.compute_dtype(ctx)

    def _check_images(self, tokens_BT, images) -> None:
        side, P = self.cfg.vision.image_size, self.cfg.vision.n_tokens
        shape = tuple(np.shape(images))
        if len(shape) != 4 or shape[1:] != (side, side, COLOURS):
            raise ValueError(f"images must have shape [pictures, {side}, {side}, {COLOURS}], not {list(shape)}.")
        if known(tokens_BT) and (places := int((np.asarray(tokens_BT) == self.cfg.image_id).sum())) != P * shape[0]:
            raise ValueError(
                f"{shape[0]} pictures have {P} tokens each, but image_id {self.cfg.image_id} stands {places} times: "
                "repeat it where a picture is to stand."
            )


def with_language(model: Janus, language: Transformer) -> Janus:
    """The same Janus around another form of its language model, such as `generation` makes of it."""
    leaves, structure = jax.tree.flatten(model)
    result = jax.tree.unflatten(structure, leaves)
    result.language = language
    return result


def abstract(cfg: JanusConfig, dtype=jnp.float32) -> Janus:
    """The model's tree with shapes and dtypes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda: Janus(cfg, jnp.dtype(dtype)))


def init(cfg: JanusConfig, key: jax.Array, dtype=jnp.float32, ctx: Context | None = None) -> Janus:
    """A fresh model: the language model is that of `transformer.init`; of the other parts each linear map has values
    from N(0, 1 / its inputs) that follow from the key, its name and shape, gains are 1 and biases 0. On a mesh every
    device makes its own shards.

    Raises ValueError for what is no key or dtype of weights, LayoutError where the context's layout does not divide the
    model.
    """
    dtype = check_init(cfg.language, key, dtype)
    return (ctx or DEFAULT).ops.made(partial(_init, cfg, dtype=dtype), key)


@partial(jax.jit, static_argnums=(0, 2))
def _init(cfg: JanusConfig, key: jax.Array, dtype) -> Janus:
    def draw(path, variable):
        name, form = ".".join(map(str, path)), matrix_of(variable, ".".join(map(str, path)))
        if path[0] == "language" or not form.inputs:
            return variable
        shape = variable.get_value().shape
        layers = jnp.arange(shape[0]) if path[:2] == ("vision", "layers") else None
        return drawn(variable, key, name, _std(variable, form), layers)

    return with_language(map_variables(draw, Janus(cfg, dtype)), transformer.init(cfg.language, key, dtype))


def _std(variable, form) -> float:
    """Rows that are looked up have entries of deviation 1 / sqrt(their length), sums the same of their terms."""
    shape, axes = variable.get_value().shape, variable.get_metadata()["axes"]
    looked_up = axes[form.inputs[0]] == "place"
    return float(np.prod([shape[a] for a in (form.outputs if looked_up else form.inputs)])) ** -0.5
