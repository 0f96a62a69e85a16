"""One config a release; numbers cite their source. ``dsj.zoo()`` lists what is built."""

import difflib
from dataclasses import replace

from deepseek_jax.configs.schema import MLA, ConfigError, ModelConfig, MoE, Rope, Yarn
from deepseek_jax.notes import shown


def _deepseek_v3(name: str) -> ModelConfig:
    """DeepSeek-V3 technical report (2412.19437) §4.2 and the released config.json."""
    yarn = Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
    return ModelConfig(
        name=name,
        vocab_size=129280,
        dim=7168,
        n_layers=61,
        n_dense_layers=3,
        ffn_dim=18432,
        attention=MLA(
            n_heads=128,
            q_rank=1536,
            kv_rank=512,
            nope_dim=128,
            rope_dim=64,
            v_dim=128,
            rope=Rope(10000.0, yarn),
        ),
        moe=MoE(n_experts=256, top_k=8, expert_dim=2048, n_shared=1, n_groups=8, top_groups=4, scale=2.5),
        mtp_depth=1,
        max_length=163840,
    )


def _moonlight_16b(name: str) -> ModelConfig:
    """Moonlight-16B-A3B: V3's architecture at 16B (2502.16982, table 4, and its config.json)."""
    return ModelConfig(
        name=name,
        vocab_size=163840,
        dim=2048,
        n_layers=27,
        n_dense_layers=1,
        ffn_dim=11264,
        attention=MLA(n_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, rope=Rope(50000.0)),
        moe=MoE(n_experts=64, top_k=6, expert_dim=1408, n_shared=2, scale=2.446),
        norm_eps=1e-5,
        max_length=8192,
        bos_id=163584,
        eos_ids=(163585,),
    )


def _kimi_k2(name: str) -> ModelConfig:
    """Kimi-K2: V3's architecture with 384 experts and 64 heads (2507.20534, table 2, and its config.json).

    Its beta_fast is 1, as beta_slow is: YaRN's ramp is one frequency wide.
    """
    yarn = Yarn(factor=32.0, original_length=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    return ModelConfig(
        name=name,
        vocab_size=163840,
        dim=7168,
        n_layers=61,
        n_dense_layers=1,
        ffn_dim=18432,
        attention=MLA(
            n_heads=64,
            q_rank=1536,
            kv_rank=512,
            nope_dim=128,
            rope_dim=64,
            v_dim=128,
            rope=Rope(50000.0, yarn),
        ),
        moe=MoE(n_experts=384, top_k=8, expert_dim=2048, n_shared=1, scale=2.827),
        norm_eps=1e-6,
        max_length=131072,
        model_type="kimi_k2",
        bos_id=163584,
        eos_ids=(163585,),
    )


def _tiny_v3(name: str) -> ModelConfig:
    """V3 in every mechanism at 6 million parameters: what `checkpoints/tiny-v3` holds, trained on 2 CPU cores."""
    yarn = Yarn(factor=4.0, original_length=512, mscale=1.0, mscale_all_dim=1.0)
    return ModelConfig(
        name=name,
        vocab_size=2048,
        dim=256,
        n_layers=5,
        n_dense_layers=1,
        ffn_dim=320,
        attention=MLA(n_heads=4, q_rank=128, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32, rope=Rope(10000.0, yarn)),
        moe=MoE(n_experts=16, top_k=4, expert_dim=64, n_shared=1, n_groups=4, top_groups=2, scale=2.5),
        mtp_depth=1,
        max_length=2048,
        init_std=0.02,
    )


_BUILT = {
    "deepseek-v3": _deepseek_v3,
    "deepseek-r1": _deepseek_v3,
    "deepseek-v3.1": _deepseek_v3,
    "moonlight-16b": _moonlight_16b,
    "kimi-k2": _kimi_k2,
    "tiny-v3": _tiny_v3,
}

# Releases of the family whose mechanisms are not built yet; asking for one says so.
_PLANNED = (
    "deepseek-llm-7b",
    "deepseek-llm-67b",
    "deepseek-moe-16b",
    "deepseek-v2-lite",
    "deepseek-v2",
    "deepseek-v2.5",
    "deepseek-coder-v2",
    "deepseek-v3.2",
    "deepseek-v4-flash",
    "deepseek-v4-pro",
    "r1-distill-qwen-1.5b",
    "r1-distill-qwen-7b",
    "r1-distill-qwen-14b",
    "r1-distill-qwen-32b",
    "r1-distill-llama-8b",
    "r1-distill-llama-70b",
    "janus-pro-1b",
    "janus-pro-7b",
    "tiny-llm",
    "tiny-moe",
    "tiny-v2-lite",
    "tiny-v2",
    "tiny-v3.2",
    "tiny-v4",
    "tiny-distill-qwen",
    "tiny-distill-llama",
    "tiny-janus",
)


def zoo(name: str | None = None, **changes) -> ModelConfig | tuple[str, ...]:
    """The config of a release, with ``changes`` applied to it; without a name, all names.

    Raises ConfigError for a name that is unknown or not built yet.
    """
    if name is None:
        return tuple(_BUILT)
    if name in _PLANNED:
        raise ConfigError(f"{name!r} belongs to the family but is not built yet; built are: {', '.join(_BUILT)}.")
    if name not in _BUILT:
        near = meant(name)
        guess = f"did you mean {' or '.join(near)}? B" if near else "b"
        raise ConfigError(f"there is no model {shown(name)}; {guess}uilt are: {', '.join(_BUILT)}.")
    return replace(_BUILT[name](name), **changes)


def meant(name: str) -> list[str]:
    """The releases that a name may stand for: as their publishers write it (DeepSeek-V3-Base), a part of it (v3, kimi),
    or one with a slip of the pen; the likeliest first, three at most."""
    words = str(name).lower().rstrip("/").rsplit("/", 1)[-1].replace("_", "-")
    known = [*_BUILT, *_PLANNED]
    # Whatever follows a release's name is a form of it: -base, -chat, -0324, -instruct.
    forms = (f"{words}-", f"{words.removeprefix('deepseek-')}-")
    longest = [found for found in known if any(form.startswith(f"{found}-") for form in forms)]
    if longest:
        return [max(longest, key=len)]
    if words and (part := [found for found in known if f"-{words}-" in f"-{found}-"]):
        return part[:3]
    return difflib.get_close_matches(words, known, n=3, cutoff=0.75)
