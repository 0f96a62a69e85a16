"""The releases by name. ``dsj.zoo()`` lists what is built."""

import difflib
from dataclasses import replace
from functools import partial

from deepseek_jax.configs import twins
from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.configs.releases import dense, janus, v2, v3, v4
from deepseek_jax.configs.schema import ConfigError, ModelConfig
from deepseek_jax.notes import shown

_LANGUAGE = {
    "deepseek-llm-7b": partial(dense.deepseek_llm, sizes=(102400, 4096, 30, 11008), heads=(32, 32)),
    "deepseek-llm-67b": partial(dense.deepseek_llm, sizes=(102400, 8192, 95, 22016), heads=(64, 8)),
    "deepseek-moe-16b": v2.deepseek_moe_16b,
    "deepseek-v2-lite": v2.deepseek_v2_lite,
    "deepseek-v2": v2.deepseek_v2,
    "deepseek-v2.5": v2.deepseek_v2,
    "deepseek-coder-v2": v2.deepseek_v2,
    "deepseek-v3": v3.deepseek_v3,
    "deepseek-r1": v3.deepseek_v3,
    "deepseek-v3.1": v3.deepseek_v3,
    "deepseek-v3.2": v3.deepseek_v32,
    "deepseek-v4-flash": v4.deepseek_v4_flash,
    "deepseek-v4-pro": v4.deepseek_v4_pro,
    "r1-distill-qwen-1.5b": partial(
        dense.distill_qwen, sizes=(151936, 1536, 28, 8960), heads=(12, 2), theta=10000.0, eps=1e-6
    ),
    "r1-distill-qwen-7b": partial(
        dense.distill_qwen, sizes=(152064, 3584, 28, 18944), heads=(28, 4), theta=10000.0, eps=1e-6
    ),
    "r1-distill-qwen-14b": partial(
        dense.distill_qwen, sizes=(152064, 5120, 48, 13824), heads=(40, 8), theta=1000000.0, eps=1e-5
    ),
    "r1-distill-qwen-32b": partial(
        dense.distill_qwen, sizes=(152064, 5120, 64, 27648), heads=(40, 8), theta=1000000.0, eps=1e-5
    ),
    "r1-distill-llama-8b": partial(dense.distill_llama, sizes=(128256, 4096, 32, 14336), heads=(32, 8)),
    "r1-distill-llama-70b": partial(dense.distill_llama, sizes=(128256, 8192, 80, 28672), heads=(64, 8)),
    "moonlight-16b": v3.moonlight_16b,
    "kimi-k2": v3.kimi_k2,
    "tiny-llm": twins.tiny_llm,
    "tiny-moe": twins.tiny_moe,
    "tiny-v2-lite": twins.tiny_v2_lite,
    "tiny-v2": twins.tiny_v2,
    "tiny-v3": twins.tiny_v3,
    "tiny-v3.2": twins.tiny_v32,
    "tiny-v4": twins.tiny_v4,
    "tiny-distill-qwen": twins.tiny_distill_qwen,
    "tiny-distill-llama": twins.tiny_distill_llama,
}
_MULTIMODAL = {
    "janus-pro-1b": partial(janus.janus_pro, sizes=(102400, 2048, 24, 5632), n_heads=16),
    "janus-pro-7b": partial(janus.janus_pro, sizes=(102400, 4096, 30, 11008), n_heads=32),
    "tiny-janus": twins.tiny_janus,
}
_BUILT = _LANGUAGE | _MULTIMODAL

# Releases of the family whose mechanisms are not built yet; asking for one says so.
_PLANNED = ("deepseek-v4.1-flash",)


def zoo(name: str | None = None, **changes) -> ModelConfig | JanusConfig | tuple[str, ...]:
    """The config of a release, with ``changes`` applied to it; without a name, all names. Janus's are `JanusConfig`s,
    which `deepseek_jax.multimodal` runs.

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


def language_models() -> tuple[str, ...]:
    """The names of `zoo` whose configs are `ModelConfig`s."""
    return tuple(_LANGUAGE)


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
