"""What is learned: the next token of answers and of text, the next code of pictures to draw, and a VQ's own loss.

Suffixes: B rows, T tokens, S codes of a picture, I pictures, Y and X pixels, C colours, V vocabulary, K codes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core.context import Context
from deepseek_jax.core.params import named, renamed
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.multimodal.janus import Janus
from deepseek_jax.multimodal.stages import Stage
from deepseek_jax.multimodal.vq import VQ
from deepseek_jax.train.optim import make


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Text:
    """Rows of text, with pictures or without. ``tokens``: int32 [B, T], with ``cfg.image_id`` where ``images`` [I, Y,
    X, C] stand (None: nowhere). ``weight``: float32 [B, T], of each token as a target: 0 at questions, pictures and
    padding, which stands at the end of a row."""

    tokens: jax.Array
    weight: jax.Array
    images: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pictures:
    """Rows to draw. ``tokens``: int32 [B, T], prompts that end where the picture begins, padded in front, where
    ``segments`` is 0; of some rows the words are replaced by padding tokens, which is what guidance draws without.
    ``codes``: int32 [B, S]."""

    tokens: jax.Array
    segments: jax.Array
    codes: jax.Array


Batch = tuple[Text | Pictures, ...]


def text_nats(model: Janus, rows: Text, ctx: Context | None = None) -> tuple[jax.Array, jax.Array]:
    """The targets' nats together, and their weight."""
    logits_BTV = model(rows.tokens, rows.images, ctx=ctx).logits[:, :-1]
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows.tokens[:, 1:])
    return (nats_BT * rows.weight[:, 1:]).sum(), rows.weight[:, 1:].sum()


def picture_nats(model: Janus, rows: Pictures, ctx: Context | None = None) -> tuple[jax.Array, jax.Array]:
    """The codes' nats together, and their number."""
    S = rows.codes.shape[1]
    words, drawn = model.embed_text(rows.tokens, ctx), model.embed_codes(rows.codes[:, :-1], ctx)
    x_BTD = jnp.concatenate([words, drawn], axis=1)
    segments = jnp.concatenate([rows.segments, jnp.ones_like(rows.codes[:, :-1])], axis=1)
    ids = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    hidden = model.language(ids, None, segments, logits="none", ctx=ctx, embeddings=x_BTD).hidden[:, -S:]
    nats_BS = optax.softmax_cross_entropy_with_integer_labels(model.code_logits(hidden, ctx), rows.codes)
    return nats_BS.sum(), jnp.asarray(nats_BS.size, jnp.float32)


def loss(model: Janus, batch: Batch, ctx: Context | None = None) -> jax.Array:
    """float32: the mean over all targets, tokens and codes alike (2501.17811 §2.1 adds them up)."""
    parts = [(text_nats if isinstance(rows, Text) else picture_nats)(model, rows, ctx) for rows in batch]
    return sum(nats for nats, _ in parts) / jnp.maximum(sum(weight for _, weight in parts), 1.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Training:
    """What learns, what is frozen, and the optimizer's state."""

    params: Any
    rest: Any
    state: Any

    @property
    def model(self):
        return combine(self.params, self.rest)


def begin(model, stage: Stage) -> Training:
    """A model at the start of a stage, with a fresh optimizer. Raises ValueError where nothing learns."""
    params, rest = partition(model, stage.trains)
    values = named(params)
    if not values:
        raise ValueError(f"no parameter's path matches one of {', '.join(stage.trained)}: nothing would learn.")
    return Training(params, rest, make(stage.optimizer, params).init(values))


@partial(jax.jit, static_argnames=("stage", "objective"), donate_argnums=(0,))
def step(training: Training, batch, rate: jax.Array, *, stage: Stage, objective=loss) -> tuple[Training, jax.Array]:
    """One step at a learning rate; and the loss before it. ``objective(model, batch)``: what falls; on a mesh
    ``partial(loss, ctx=ctx)``, of rows that `laid.place_rows` placed."""

    def falls(params):
        return objective(combine(params, training.rest), batch)

    value, gradients = jax.value_and_grad(falls)(training.params)
    values, gradients = named(training.params), named(gradients)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients.values()))
    gradients = jax.tree.map(lambda g: g * jnp.minimum(1.0, stage.optimizer.clip / jnp.maximum(norm, 1e-12)), gradients)
    changes, state = make(stage.optimizer, training.params).update(gradients, training.state, values)
    values = {name: (v + rate * changes[name]).astype(v.dtype) for name, v in values.items()}
    return Training(renamed(training.params, values), training.rest, state), value


# Weight of what moves the encoder to its code, beside what moves the code (2406.06525: beta).
COMMITMENT = 0.25


def vq_loss(vq: VQ, image_IYXC: jax.Array) -> jax.Array:
    """float32: the pictures' mean squared error, and that of codes and what they stand for, both ways; gradients pass
    the choice of codes as if it were not there (1711.00937 §3.2). LlamaGen's perceptual and adversarial losses are not
    here: they need networks of their own."""
    z = vq.vectors(image_IYXC)
    code = vq.look_up(vq.nearest(z))
    book = jnp.mean(jnp.square(code - jax.lax.stop_gradient(z)))
    commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(code) - z))
    drawn = vq.draw(z + jax.lax.stop_gradient(code - z))
    return jnp.mean(jnp.square(drawn - image_IYXC)) + book + COMMITMENT * commitment
