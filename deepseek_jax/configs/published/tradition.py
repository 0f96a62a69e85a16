"""What differs between the naming traditions of config.json: one value of `Tradition` each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.published.fields import Fields
from deepseek_jax.configs.schema import GQA, MLA, Compressed, HyperConnections, ModelConfig, MoE


@dataclass(frozen=True)
class Networks:
    """The networks of a model's layers: the first ``dense`` are dense, the others ``moe``; ``mtp_depth`` follow.
    ``residual``: what they read from and write to."""

    dense: int
    moe: MoE | None = None
    mtp_depth: int = 0
    residual: HyperConnections | None = None


@dataclass(frozen=True)
class Tradition:
    """How the config.json of one model_type is read and written.

    ``architecture``: the class that it names. ``attention``: reads that. ``networks``: reads these, given the number of
    layers. ``write``: the fields that these two read, of a model whose attention is of ``kind``. ``fixed``: fields with
    one value that is built; any other is refused. ``known``: what is read besides, and need not be spoken of.
    ``defaults``: of fields that may be missing, as the reference has them. ``ffn``: the field of the dense networks'
    width.
    """

    architecture: str
    kind: type
    attention: Callable[[Fields], MLA | GQA | Compressed]
    networks: Callable[[Fields, int], Networks]
    write: Callable[[ModelConfig], dict[str, Any]]
    fixed: dict[str, Any]
    known: frozenset[str]
    defaults: dict[str, Any]
    ffn: str = "intermediate_size"


def check_following(fields: Fields, follows: dict[str, tuple[Any, str]]) -> None:
    """``follows``: a field that need not be there -> what it has to be, and why. Raises ConfigError for another."""
    for name, (value, why) in follows.items():
        found = fields.integer(name, None)
        if found is not None and found != value:
            raise fields.contradiction(f"{name} is {found}, but {why} is {value}")


def head_size(fields: Fields, heads: int) -> int:
    """The size of a head where no field says it: heads share the width. Raises ConfigError where it does not divide."""
    dim = fields.integer("hidden_size")
    if heads < 1 or dim % heads:
        raise ConfigError(f"{fields.where}: hidden_size {dim} does not divide into num_attention_heads {heads}.")
    return dim // heads


def written(owner, names: dict[str, str]) -> dict[str, Any]:
    """A config's fields under the file's names."""
    return {theirs: getattr(owner, ours) for ours, theirs in names.items()}
