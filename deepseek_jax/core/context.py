"""How a model runs, apart from what it is: one frozen, hashable value handed down explicitly."""

from dataclasses import dataclass
from typing import Any

# Activations that `remat` may name: these are kept for the backward pass, all else is computed again.
REMAT = {
    "none": None,
    "full": (),
    "attention": ("attn",),
    "sublayers": ("attn", "ffn"),
}
EXPERTS = ("auto", "dense", "blocks", "ragged")
MLA_FORMS = ("auto", "expanded", "absorbed")


@dataclass(frozen=True)
class Context:
    """How a model runs. Frozen and hashable, so that it is part of every jit cache key.

    ``dtype``: compute dtype, None for that of the parameters. ``experts``: the form of the expert
    computation, "auto" for block-wise on CPU and `jax.lax.ragged_dot` elsewhere. ``mla``: "auto" takes the
    form with fewer operations. ``remat``: what the backward pass keeps of a layer, a key of `REMAT`.

    Raises ValueError for a mesh or layout (sharding is not built yet) and for unknown choices.
    """

    mesh: Any = None
    layout: str | None = None
    dtype: Any = None
    experts: str = "auto"
    mla: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        if self.mesh is not None or self.layout is not None:
            raise ValueError("Context(mesh=..., layout=...): sharding over a mesh is not built yet; leave both None.")
        for name, choices in (("experts", EXPERTS), ("mla", MLA_FORMS), ("remat", tuple(REMAT))):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"Context({name}={value!r}): choose one of {', '.join(choices)}.")


DEFAULT = Context()
