"""Tiny models whose every tensor is random, made with NumPy: jitted initialisation costs a compilation."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.schema import MLA, ModelConfig, MoE, Rope, Yarn
from deepseek_jax.core.params import HashTable, RouterBias, is_looked_up, map_variables, matrix_of
from deepseek_jax.model.tokens import Tokens, make_tokens
from deepseek_jax.model.transformer import Transformer, abstract


def tiny_config(**changes) -> ModelConfig:
    """V3 in every mechanism, as small as its blocks allow: YaRN acts beyond 64 tokens, FP8 blocks have edges."""
    cfg = ModelConfig(
        name="tiny",
        vocab_size=256,
        dim=64,
        n_layers=3,
        n_dense_layers=1,
        ffn_dim=160,
        attention=MLA(
            n_heads=4, q_rank=48, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=16, rope=Rope(yarn=Yarn(4.0, 64))
        ),
        moe=MoE(n_experts=8, top_k=2, expert_dim=48, n_shared=1, n_groups=4, top_groups=2, scale=2.5),
        mtp_depth=1,
        max_length=256,
        init_std=0.02,
    )
    return replace(cfg, **changes)


def random_model(cfg, seed: int = 0, bias_offset: float = 0.0, dtype=jnp.float32) -> Transformer:
    """Norm weights 1 +- 0.1, biases of both signs, those of routers around ``bias_offset``, logits of deviation ~1."""
    return fill_randomly(abstract(cfg, dtype), seed, bias_offset)


def fill_randomly(module, seed: int = 0, bias_offset: float = 0.0):
    """The module, or a tree of its shapes, with such values."""
    rng = np.random.default_rng(seed)

    def fill(path, variable):
        shape, inputs = variable.get_value().shape, matrix_of(variable).inputs
        if isinstance(variable, RouterBias):
            value = jnp.asarray(rng.normal(bias_offset, 0.1, shape), jnp.float32)
            return RouterBias(value, **variable.get_metadata())
        if isinstance(variable, HashTable):
            experts = variable.get_metadata()["n_experts"]
            value = rng.random((*shape[:-1], experts)).argsort(-1)[..., : shape[-1]]
            return HashTable(jnp.asarray(value, jnp.int32), **variable.get_metadata())
        if path[-1].endswith("bias") or path[-1] in ("base", "sink"):
            value = rng.normal(0, 0.5, shape)
        elif not inputs:
            value = rng.normal(1, 0.1, shape)
        elif is_looked_up(variable):
            value = rng.normal(0, 1, shape)
        else:
            value = rng.normal(0, math.prod(shape[a] for a in inputs) ** -0.5, shape)
        return variable.replace(jnp.asarray(value, variable.get_value().dtype))

    return map_variables(fill, module)


def random_tokens(cfg, batch: int, length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, length)), jnp.int32)


def tokens_of(segment, ids=None, cfg: ModelConfig | None = None) -> Tokens:
    """Tokens int32 [B, T] as a router is given them, at positions from 0 on."""
    segment = jnp.asarray(segment, jnp.int32)
    position = jnp.broadcast_to(jnp.arange(segment.shape[1]), segment.shape)
    return make_tokens(cfg or tiny_config(), position, segment, id_BT=ids)
