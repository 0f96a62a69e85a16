"""The rules table from logical axes to mesh axes, and the named layouts made of it.

A layout is the table restricted to some mesh axes. At rest a parameter is split over ``fsdp``, and besides over
``expert`` and ``context`` where it is no expert's: those devices hold different tokens, so each layer is gathered
over them when it is read, and its gradient is scattered back (ZeRO). What ``tensor`` and, for experts, ``expert``
split stays split in use.
"""

from dataclasses import replace

from jax.sharding import Mesh

from deepseek_jax.core.layout import BATCH, MESH_AXES, SEQUENCE, Layout, LayoutError, Rules

# Parameters and activations in use. Every device of data x fsdp x expert has rows of its own.
USE: Rules = (
    (BATCH, ("data", "fsdp", "expert")),
    (SEQUENCE, ("context",)),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("ffn", ("tensor",)),
    ("expert", ("expert",)),
    ("expert_ffn", ("tensor",)),
)
# What is gathered for use lies apart at rest, along the first of these that an array has.
GATHERED = ("fsdp", "expert", "context")
REST: Rules = (
    *((name, axes) for name, axes in USE if name not in (BATCH, SEQUENCE)),
    ("embed", GATHERED),
    ("q_rank", GATHERED),
    ("kv_rank", GATHERED),
    # What `parallel.embedding.lookup` gathers is the minor part: the columns of a device that shares it are neighbours.
    ("embedding", ("expert", "context", "fsdp")),
)
# Where few tokens at a time are run (decoding): what `serve` would hold whole on each device of an expert group lies
# apart on it by its outputs. The group's tokens are brought there, and each token's outputs back to it; sums over
# devices would move more, and in float32.
APART: Rules = (
    ("expert", ("expert",)),
    ("expert_ffn", ("tensor",)),
    ("embed last", ("expert",)),
    ("heads", ("tensor", "expert")),
    ("ffn", ("tensor", "expert")),
    ("embedding", ("expert",)),
    ("vocab", ("tensor", "expert")),
    ("q_rank", ("expert",)),
    ("kv_rank", ("expert",)),
)


def _restricted(name: str, axes: tuple[str, ...], resident: bool = False) -> Layout:
    """The table's part that speaks of ``axes``; ``resident``: parameters rest as they are used."""

    def only(rules: Rules) -> Rules:
        return tuple((logical, tuple(a for a in mine if a in axes)) for logical, mine in rules)

    use = only(USE)
    rest = tuple(rule for rule in use if rule[0] not in (BATCH, SEQUENCE)) if resident else only(REST)
    return Layout(name, rest, use)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        _restricted("all", MESH_AXES),
        _restricted("data", ("data",)),
        _restricted("fsdp", ("data", "fsdp")),
        _restricted("tensor", ("data", "tensor"), resident=True),
        _restricted("fsdp_tp", ("data", "fsdp", "tensor")),
        _restricted("fsdp_ep", ("data", "fsdp", "expert")),
        _restricted("ep_tp", ("data", "expert", "tensor")),
        _restricted("context", ("data", "fsdp", "context")),
        _restricted("serve", ("data", "expert", "tensor"), resident=True),
        replace(_restricted("decode", ("data", "expert", "tensor")), rest=APART),
    )
}


def find_layout(layout: str | Layout | None, mesh: Mesh) -> Layout:
    """The layout of that name, "all" for None; a `Layout` is taken as it is.

    Raises LayoutError for an unknown name, and for a mesh with other axes or with one that a named layout leaves idle.
    """
    if isinstance(layout, str) and layout not in LAYOUTS:
        raise LayoutError(f"there is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}, or make a Layout.")
    if tuple(mesh.axis_names) != MESH_AXES:
        raise LayoutError(f"the mesh has the axes {mesh.axis_names}; make it with make_mesh, which gives {MESH_AXES}.")
    if isinstance(layout, Layout):
        return layout
    layout = LAYOUTS[layout or "all"]
    idle = [f"{a}={n}" for a, n in mesh.shape.items() if n > 1 and a not in layout.mesh_axes]
    if idle:
        raise LayoutError(
            f"layout {layout.name} splits nothing over the mesh's {', '.join(idle)}; "
            "choose another layout, or give those axes size 1."
        )
    return layout
