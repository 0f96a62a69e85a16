"""The bases that studies share, and with them their runs. Loads no JAX."""

from deepseek_jax.configs.schema import MLA, ModelConfig, MoE, Rope
from deepseek_jax.data.config import DataConfig
from deepseek_jax.lab.study import Setup
from deepseek_jax.train.recipe import LearningRate, Optimizer, Recipe
from deepseek_jax.train.weights import LossWeights


def _recipe(tokens: int, rows: int, length: int, peak: float, dtype: str, std: float, bias_speed: float) -> Recipe:
    """AdamW, 5% of warm-up, a cosine over all of the rest to a twentieth of the peak; the router bias moves for nine
    tenths of the run, so that what is evaluated at its end stands still. No MTP, no average, no balance loss."""
    return Recipe(
        model="",
        tokens=tokens,
        length=length,
        batch_rows=rows,
        first_rows=None,
        ramp_tokens=0,
        micro_rows=None,
        init_std=std,
        fim_rate=0.0,
        dtype=dtype,
        rate=LearningRate(
            peak,
            warmup_steps=tokens // (rows * length * 20),
            decay_from=tokens // 20,
            decay_until=tokens,
            decay_to=peak / 20,
            drops=(),
        ),
        optimizer=Optimizer(moments="float32"),
        weights=LossWeights(mtp=0.0, balance=0.0),
        mtp_change=None,
        bias_speed=bias_speed,
        bias_until=tokens * 9 // 10,
        ema_decay=0.0,
    )


# 2.09M parameters, 1.20M of them activated; 800 steps of 2,048 tokens, under one epoch of the standard library: five
# minutes of one core.
MICRO = Setup(
    ModelConfig(
        name="micro",
        vocab_size=2048,
        dim=128,
        n_layers=4,
        n_dense_layers=1,
        ffn_dim=320,
        attention=MLA(n_heads=4, q_rank=None, kv_rank=32, nope_dim=16, rope_dim=16, v_dim=32, rope=Rope(10000.0)),
        moe=MoE(n_experts=16, top_k=4, expert_dim=64, n_shared=1, scale=1.0),
        max_length=256,
        init_std=0.02,
    ),
    _recipe(800 * 8 * 256, 8, 256, 2e-3, "float32", 0.02, bias_speed=3e-3),
    DataConfig(held_out_bytes=750_000),
)

# For one accelerator: 129.26M parameters, 38.04M of them activated; 2,000 steps of 65,536 tokens, some fifty epochs of
# the standard library.
GPU = Setup(
    ModelConfig(
        name="gpu",
        vocab_size=16384,
        dim=512,
        n_layers=9,
        n_dense_layers=1,
        ffn_dim=1408,
        attention=MLA(n_heads=8, q_rank=None, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64, rope=Rope(10000.0)),
        moe=MoE(n_experts=64, top_k=6, expert_dim=128, n_shared=1, scale=1.0),
        max_length=1024,
        init_std=0.02,
    ),
    _recipe(2000 * 64 * 1024, 64, 1024, 6e-4, "bfloat16", 0.02, bias_speed=1e-3),
    DataConfig(held_out_bytes=1_500_000),
)
