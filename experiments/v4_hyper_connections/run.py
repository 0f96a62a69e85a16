"""Do mixed streams run away in depth when they are trained, and does the constraint hold them?

mHC (2512.24880) section 3.1, table 1, figures 3 and 7; HC (2409.19606) is the form without the constraint. The claims
with the paper's numbers stand in paper_notes/v4_hyper_connections.md. Gains at random weights are measured by amax.py,
beside this file, without training.

    deepseek-jax experiment v4_hyper_connections     # 21 runs, 3 seeds; 1 to 8 minutes of one core each

Dense models, 64 wide, of 8, 16 and 32 layers, on 300,000 tokens. What is compared of the trained models is the
largest gain of a product of mixing matrices (the probe `streams`), on held-out text. The plain residual is there at the
largest depth alone, for the loss. At scale gpu the same depths are 1,152 wide: 101M to 297M parameters.
"""

from dataclasses import replace

from deepseek_jax.configs.schema import MLA, HyperConnections, ModelConfig, Rope
from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import Ordering, Separation, Trend
from deepseek_jax.lab.study import Claim, Scale, Setup, Study, changed
from deepseek_jax.train.recipe import LearningRate

SMALL = MLA(n_heads=4, q_rank=None, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=16, rope=Rope(10000.0))
LARGE = changed(GPU, {"recipe.micro_rows": 4})
KINDS = {"hc": HyperConnections(constrained=False), "mhc": HyperConnections()}
DEPTHS = (8, 16, 32)


def deep(size: Setup, dim: int, ffn_dim: int, attention: MLA, rows: int, length: int, steps: int) -> Scale:
    """Dense models with the vocabulary and the rate of this size, trained on so many rows a step."""
    model = ModelConfig(
        name="streams",
        vocab_size=size.model.vocab_size,
        dim=dim,
        n_layers=32,
        n_dense_layers=32,
        ffn_dim=ffn_dim,
        attention=attention,
        moe=None,
        max_length=length,
        init_std=0.02,
    )
    tokens, peak = steps * rows * length, size.recipe.rate.peak
    rate = LearningRate(peak, steps // 20, tokens // 20, tokens, decay_to=peak / 20, drops=())
    recipe = replace(
        size.recipe, tokens=tokens, batch_rows=rows, length=length, rate=rate, bias_speed=0.0, bias_until=None
    )

    def streams(kind: str, depth: int) -> dict:
        """A model of so many layers, with its streams measured at the end."""
        own = replace(model, n_layers=depth, n_dense_layers=depth, residual=KINDS[kind])
        return {"model": own, "probes": ("streams",)}

    variants = {f"{kind}-{depth}": streams(kind, depth) for kind in KINDS for depth in DEPTHS}
    return Scale(Setup(model, recipe, replace(size.text, held_out_bytes=100_000)), variants | {"plain-32": {}})


STUDY = Study(
    stem="v4_hyper_connections",
    question="do mixed streams run away in depth, and does the constraint hold them?",
    scales={
        "cpu": deep(MICRO, dim=64, ffn_dim=160, attention=SMALL, rows=8, length=128, steps=300),
        "gpu": deep(LARGE, dim=1152, ffn_dim=1760, attention=GPU.model.attention, rows=64, length=1024, steps=750),
    },
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
