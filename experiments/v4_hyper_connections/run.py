"""Do mixed streams run away in depth when they are trained, and does the constraint hold them?

mHC (2512.24880) section 3.1, table 1, figures 3 and 7; HC (2409.19606) is the form without the constraint. The claims
with the paper's numbers stand in paper_notes/v4_hyper_connections.md. Gains at random weights are measured by amax.py,
beside this file, without training.

    deepseek-jax experiment v4_hyper_connections     # 21 runs, 3 seeds; 1 to 8 minutes of one core each

Dense models, 64 wide, of 8, 16 and 32 layers, on 300,000 tokens. What is compared of the trained models is the
largest gain of a product of mixing matrices (the probe `streams`), on held-out text. The plain residual is there at the
largest depth alone, for the loss.
"""

from dataclasses import replace

from deepseek_jax.configs.schema import MLA, HyperConnections, ModelConfig, Rope
from deepseek_jax.lab.bases import MICRO
from deepseek_jax.lab.rules import Ordering, Separation, Trend
from deepseek_jax.lab.study import Claim, Setup, Study
from deepseek_jax.train.recipe import LearningRate

TOKENS, ROWS, LENGTH, PEAK = 300 * 8 * 128, 8, 128, 2e-3
MODEL = ModelConfig(
    name="streams",
    vocab_size=2048,
    dim=64,
    n_layers=32,
    n_dense_layers=32,
    ffn_dim=160,
    attention=MLA(n_heads=4, q_rank=None, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=16, rope=Rope(10000.0)),
    moe=None,
    max_length=LENGTH,
    init_std=0.02,
)
RATE = LearningRate(PEAK, warmup_steps=15, decay_from=TOKENS // 20, decay_until=TOKENS, decay_to=PEAK / 20, drops=())
RECIPE = replace(
    MICRO.recipe, tokens=TOKENS, batch_rows=ROWS, length=LENGTH, rate=RATE, bias_speed=0.0, bias_until=None
)
KINDS = {"hc": HyperConnections(constrained=False), "mhc": HyperConnections()}
DEPTHS = (8, 16, 32)


def streams(kind: str, depth: int) -> dict:
    """A model of so many layers, with its streams measured at the end."""
    model = replace(MODEL, n_layers=depth, n_dense_layers=depth, residual=KINDS[kind])
    return {"model": model, "probes": ("streams",)}


STUDY = Study(
    stem="v4_hyper_connections",
    question="do mixed streams run away in depth, and does the constraint hold them?",
    scales={"cpu": Setup(MODEL, RECIPE, replace(MICRO.text, held_out_bytes=100_000))},
    variants={f"{kind}-{depth}": streams(kind, depth) for kind in KINDS for depth in DEPTHS} | {"plain-32": {}},
    minutes=4,
    seeds=(0, 1, 2),
    claims=(
        Claim(
            "C4",
            source="2512.24880 3.1, figure 3",
            says="without the constraint the streams' gain grows with depth",
            expected="it rises from 8 to 32 layers in every seed; the paper's 27B comes to 3,000",
            rule=Trend("stream_gain", levels=tuple(f"hc-{depth}" for depth in DEPTHS)),
            paper={"hc-32": 3000.0},
        ),
        Claim(
            "C5",
            source="2512.24880 figure 7",
            says="the constraint keeps the gain near 1",
            expected="the paper's 27B: 1.6 against 3,000; here a factor of 2 between the two at 32 layers",
            rule=Separation("stream_gain", low="mhc-32", high="hc-32", factor=2.0),
            paper={"mhc-32": 1.6, "hc-32": 3000.0},
        ),
        Claim(
            "C6",
            source="2512.24880 4.3, figure 5",
            says="with the constraint the loss is lower than with a plain residual",
            expected="the paper's 27B: by 0.021 nats, 1.2% or so; here nothing can be seen",
            rule=Ordering("bits_per_byte", low="mhc-32", high="plain-32"),
            mechanism_only=(
                "three seeds of so short a run, whose paired noise a pilot put at 1 to 2.5% of the loss, see no less "
                "than 1.5%, more than the paper's"
            ),
        ),
    ),
)
