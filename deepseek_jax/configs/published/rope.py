"""RoPE in config.json: ``rope_theta`` with ``rope_scaling``, as released files have it, or ``rope_parameters``."""

from typing import Any

from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.published.fields import LLAMA3, YARN, Fields
from deepseek_jax.configs.schema import Llama3, Rope, Yarn
from deepseek_jax.notes import shown

_PLAIN = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
ROPE_KEYS = {
    "default": _PLAIN,
    "yarn": (*_PLAIN, *YARN.values(), "attention_factor", "truncate"),
    "llama3": (*_PLAIN, *LLAMA3.values()),
}


def read_rope(fields: Fields, kinds: tuple[str, ...], interleaved: bool) -> Rope:
    """The RoPE, one of ``kinds``. Both spellings, as transformers writes them for older readers, have to agree."""
    found = {}
    for spelling in ("rope_parameters", "rope_scaling"):
        if fields.value(spelling, None) is not None:
            inner = Fields(fields.data[spelling], f"config.json {spelling}")
            found[spelling] = _rope_spelled(fields, inner, kinds, interleaved)
    if len(set(found.values())) > 1:
        raise ConfigError(
            "config.json contradicts itself: rope_parameters and rope_scaling describe different RoPEs, "
            f"{shown(fields.data['rope_parameters'])} and {shown(fields.data['rope_scaling'])}."
        )
    for rope in found.values():
        return rope
    return fields.make(Rope, theta=fields.number("rope_theta", 10000.0), interleaved=interleaved)


def _rope_spelled(fields: Fields, rope: Fields, kinds: tuple[str, ...], interleaved: bool) -> Rope:
    said = [rope.data[key] for key in ("rope_type", "type") if rope.data.get(key) is not None]
    if len(said) == 2 and said[0] != said[1]:
        raise ConfigError(
            f"{rope.where} contradicts itself: rope_type and type are {shown(said[0])} and {shown(said[1])}."
        )
    kind = said[0] if said else "default"
    if kind not in kinds:
        built = " and ".join(map(repr, kinds))
        raise ConfigError(f"{rope.where}: rope type {shown(kind)} is not supported, only {built}.")
    rope.note_unknown(ROPE_KEYS[kind], frozenset())
    for name, built in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        value = rope.value(name, built)
        if value is not None and value != built:
            raise ConfigError(f"{rope.where}: {name} {shown(value)} is not supported.")
    theta = rope.number("rope_theta", None)
    outer = fields.number("rope_theta", None)
    if theta is not None and outer is not None and theta != outer:
        raise ConfigError(f"config.json contradicts itself: rope_theta is {outer} and, in {rope.where}, {theta}.")
    theta = next((t for t in (theta, outer) if t is not None), 10000.0)
    extended: dict[str, Any] = {}
    if kind == "yarn":
        # Without mscale_all_dim the softmax is not scaled; 0 says so here as it does in the reference.
        extended["yarn"] = rope.make(
            Yarn,
            factor=rope.number("factor"),
            original_length=rope.integer("original_max_position_embeddings"),
            beta_fast=rope.number("beta_fast", None) or 32.0,
            beta_slow=rope.number("beta_slow", None) or 1.0,
            mscale=rope.number("mscale", None) or 0.0,
            mscale_all_dim=rope.number("mscale_all_dim", None) or 0.0,
        )
    elif kind == "llama3":
        extended["llama3"] = rope.make(
            Llama3,
            factor=rope.number("factor"),
            original_length=rope.integer("original_max_position_embeddings"),
            low_turns=rope.number("low_freq_factor"),
            high_turns=rope.number("high_freq_factor"),
        )
    return fields.make(Rope, theta=theta, interleaved=interleaved, **extended)


def write_rope(rope: Rope) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``."""
    scaling = None
    if rope.yarn is not None:
        scaling = {"type": "yarn", **{theirs: getattr(rope.yarn, ours) for ours, theirs in YARN.items()}}
    elif rope.llama3 is not None:
        # As Llama's files have it, which know no "type".
        scaling = {"rope_type": "llama3", **{theirs: getattr(rope.llama3, ours) for ours, theirs in LLAMA3.items()}}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
