"""What differs between the naming traditions of config.json: one value of `Tradition` each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.published.fields import COMMON, STREAMS, UNCONSTRAINED, Fields
from deepseek_jax.configs.schema import GQA, MLA, Compressed, HyperConnections, ModelConfig, MoE


@dataclass(frozen=True)
class Networks:
    """The networks of a model's layers: the first ``dense`` are dense, the others ``moe``; ``mtp_depth`` follow."""

    dense: int
    moe: MoE | None = None
    mtp_depth: int = 0


@dataclass(frozen=True)
class Tradition:
    """How the config.json of one model_type is read and written.

    ``architecture``: the class that it names. ``attention``: reads that. ``networks``: reads these, given the number of
    layers. ``write``: the fields that these two read, of a model whose attention is of ``kind``. ``fixed``: fields with
    one value that is built; any other is refused. ``known``: what is read besides, and need not be spoken of.
    ``defaults``: of fields that may be missing, as the reference has them. ``ffn``: the field of the dense networks'
    width. ``residual``: reads what layers read from and write to, if there is more than one kind.
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
    residual: Callable[[Fields], HyperConnections | None] | None = None

    @property
    def fields(self) -> frozenset[str]:
        """All that is read."""
        of_residual = () if self.residual is None else (*STREAMS.values(), UNCONSTRAINED)
        return frozenset({*COMMON, *self.known, *self.fixed, *of_residual})


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


def streams(fields: Fields) -> HyperConnections:
    """A residual of several streams, as V4's files have it; unconstrained where `UNCONSTRAINED` says so."""
    if not fields.flag(UNCONSTRAINED, True):
        return fields.make(HyperConnections, n_streams=fields.integer("hc_mult"), constrained=False)
    return fields.make(
        HyperConnections,
        n_streams=fields.integer("hc_mult"),
        sinkhorn_steps=fields.integer("hc_sinkhorn_iters", 20),
        eps=fields.number("hc_eps", 1e-6),
    )


def streams_if_any(fields: Fields) -> HyperConnections | None:
    """No release of these model_types has one: where ``hc_mult`` is missing the residual is plain."""
    return streams(fields) if fields.value("hc_mult", None) is not None else None


def written_streams(residual: HyperConnections | None) -> dict[str, Any]:
    if residual is None:
        return {}
    if not residual.constrained:
        return {"hc_mult": residual.n_streams, UNCONSTRAINED: False}
    return written(residual, STREAMS)


def written(owner, names: dict[str, str]) -> dict[str, Any]:
    """A config's fields under the file's names."""
    return {theirs: getattr(owner, ours) for ours, theirs in names.items()}
