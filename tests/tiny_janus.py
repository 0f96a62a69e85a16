"""A tiny Janus whose every tensor is random, and transformers' model with the same weights."""

from functools import lru_cache

import jax
import numpy as np
from tiny import fill_randomly

from deepseek_jax.configs.multimodal import VQ, JanusConfig, Vision
from deepseek_jax.configs.schema import GQA, ModelConfig
from deepseek_jax.multimodal.janus import Janus, abstract
from deepseek_jax.multimodal.objective import Pictures, Text

IMAGE = 250


def tiny_config() -> JanusConfig:
    """Pictures of 8 pixels: 16 tokens shown, 16 codes drawn; widths that tell every axis from every other."""
    language = ModelConfig(
        name="tiny",
        vocab_size=256,
        dim=64,
        n_layers=3,
        n_dense_layers=3,
        ffn_dim=96,
        attention=GQA(4, 2, 16),
        moe=None,
        max_length=256,
        model_type="llama",
        bos_id=1,
        eos_ids=(2,),
    )
    vision = Vision(image_size=8, patch=2, dim=32, n_layers=2, n_heads=4, ffn_dim=64)
    vq = VQ(n_codes=48, code_dim=8, z_dim=24, channels=32, multipliers=(1, 2), n_blocks=1)
    return JanusConfig("tiny-janus", language, vision, vq, head_dim=64, image_id=IMAGE)


@lru_cache
def tiny_janus() -> Janus:
    return fill_randomly(abstract(tiny_config()), seed=1)


def pictures(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    """float32 [count, side, side, 3], values from -1 to 1."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


@lru_cache
def batch() -> tuple[Text, Pictures]:
    """Rows of text with a picture in each, the answers' tokens as targets; and rows to draw, some padded in front."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, IMAGE, (2, 24)).astype(np.int32)
    tokens[:, 2:18] = IMAGE
    weight = np.zeros((2, 24), np.float32)
    weight[:, 20:] = 1
    prompts, segments = rng.integers(4, IMAGE, (3, 6)).astype(np.int32), np.ones((3, 6), np.int32)
    prompts[1, :2], segments[1, :2] = 0, 0
    codes = rng.integers(0, 48, (3, 16)).astype(np.int32)
    return Text(tokens, weight, pictures(2)), Pictures(prompts, segments, codes)


run = jax.jit(
    lambda model, tokens, images=None, segments=None, cache=None: model(tokens, images, None, segments, cache)
)
