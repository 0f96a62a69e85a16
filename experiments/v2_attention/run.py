"""What does a smaller cache of keys and values cost: all heads' own, two groups, one, or a latent?

DeepSeek-V2 (2405.04434) appendices on attention, tables 8 and 9; the claims with the paper's numbers stand in
paper_notes/v2_attention.md.

    deepseek-jax experiment v2_attention      # 20 runs of 5 minutes of one core, of which 5 are those of experts too

The model is the base with a dense network in every layer, as the paper's table 8 has it. All variants have four query
heads of 32 dimensions, 16 of them rotated with the latent and all 32 otherwise. Parameters are matched layer by layer,
to a tenth of a percent, by the width of the dense network: what a variant saves in attention it has there. At scale gpu
there are twelve heads of 64 dimensions, in proportion, and 106M parameters.
"""

from deepseek_jax.configs.schema import GQA, MLA, Rope
from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.rules import NoWorse, Ordering, Trend
from deepseek_jax.lab.study import Claim, Scale, Setup, Study, changed

MMLU = "MMLU, a line a table (8: 7B; 9: small)"
LATENT = MLA(n_heads=12, q_rank=None, kv_rank=64, nope_dim=32, rope_dim=32, v_dim=64, rope=Rope(10000.0))
WIDER = {"model.dim": 768, "model.n_layers": 14, "model.ffn_dim": 1920, "model.attention": LATENT}
LARGE = changed(GPU, WIDER | {"recipe.micro_rows": 32})


def variants(base: Setup, mha: int, gqa: int, mqa: int) -> dict:
    """Attention in four forms, three of them beside dense networks so wide."""
    mla, dense = base.model.attention, {"model.n_dense_layers": base.model.n_layers}

    def grouped(n_kv_heads: int, ffn_dim: int) -> dict:
        """The latent's query heads, which share so many key heads."""
        attention = GQA(mla.n_heads, n_kv_heads, head_dim=mla.v_dim, rope=Rope(10000.0, interleaved=False))
        return dense | {"model.attention": attention, "model.ffn_dim": ffn_dim}

    return {"mha": grouped(mla.n_heads, mha), "gqa": grouped(2, gqa), "mqa": grouped(1, mqa), "mla": dense}


STUDY = Study(
    stem="v2_attention",
    question="what does a smaller cache cost at equal parameters?",
    scales={
        "cpu": Scale(MICRO, variants(MICRO, mha=267, gqa=309, mqa=331)),
        "gpu": Scale(LARGE, variants(LARGE, mha=1472, gqa=1899, mqa=1941)),
    },
    minutes=5,
    claims=(
        Claim(
            "C3",
            source="2405.04434 table 8",
            says="one key head for all is worse than one each",
            expected="the paper's 7B, MMLU: 37.9 against 45.2; others find 1 to 2% of the loss between them",
            rule=Ordering("bits_per_byte", low="mha", high="mqa"),
        ),
        Claim(
            "C4",
            source="2405.04434 table 8",
            says="the fewer key heads, the worse the model",
            expected="the paper's 7B, MMLU: 45.2, 41.2 with 8 groups, 37.9 with one; in every seed by steps of 0.5%",
            rule=Trend("bits_per_byte", levels=("mha", "gqa", "mqa")),
            paper={"mha": 45.2, "gqa": 41.2, "mqa": 37.9},
            paper_as=MMLU,
        ),
        Claim(
            "C5",
            source="2405.04434 table 9",
            says="a latent is no worse than a key head each, at a fraction of the cache",
            expected="the paper's small model, MMLU: 48.7, with the latent 50.0; here worse by less than 1%",
            rule=NoWorse("bits_per_byte", variant="mla", control="mha", margin=0.01),
            paper={"mha": 48.7, "mla": 50.0},
            paper_as=MMLU,
        ),
        Claim(
            "C6",
            source="2405.04434 table 9",
            says="it is better than a key head each",
            expected="others find it alike or slightly worse at their size: open, or the opposite",
            rule=Ordering("bits_per_byte", low="mla", high="mha"),
        ),
        Claim(
            "C7",
            source="2405.04434 2.1.4, table 8",
            says="it is better than one key head for all, whose cache is larger here",
            expected="48 numbers a token and layer against 64, and fewer bits per byte",
            rule=Ordering("bits_per_byte", low="mla", high="mqa"),
        ),
    ),
)
