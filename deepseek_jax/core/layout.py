"""Layouts: the table from logical axes to the axes of a device mesh, and what follows from it without a context.

A parameter names its axes where it is made (`core.params.param`), an activation where ``ctx.ops.constrain`` is called.
A `Layout` has two tables from those names to mesh axes: ``rest``, where parameters, gradients and optimizer state lie,
and ``use``, how activations lie and what stays split of a parameter while it is multiplied. The difference between
the two is gathered when a layer is read (FSDP).
"""

import math
from dataclasses import dataclass

from jax.sharding import Mesh, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
# Of parameters.
PARAMETER_AXES = (
    "vocab",
    "embed",
    "embedding",
    "heads",
    "head_dim",
    "q_rank",
    "kv_rank",
    "ffn",
    "expert",
    "expert_ffn",
    "scores",
)
# Of activations.
BATCH, SEQUENCE = "batch", "sequence"

# At the end of a name in a rule: of an array's last axis only, which is a matrix' output.
LAST = " last"

Rules = tuple[tuple[str, tuple[str, ...]], ...]
Axes = tuple[str | tuple[str, ...] | None, ...]


class LayoutError(ValueError):
    """A layout that does not fit the mesh, the model or the batch."""


@dataclass(frozen=True)
class Layout:
    """Where arrays lie on a mesh; hashable.

    ``rest``, ``use``: pairs (logical axis, mesh axes), as the module says. A mesh axis that an earlier pair took for
    the same array is left out; a logical axis without an entry is not split. Parameters of one axis (norms, router
    biases) are whole on every device.

    Raises LayoutError for unknown names and for a mesh axis listed twice.
    """

    name: str
    rest: Rules
    use: Rules

    def __post_init__(self):
        for rules in (self.rest, self.use):
            for logical, axes in rules:
                if logical.removesuffix(LAST) not in (*PARAMETER_AXES, BATCH, SEQUENCE):
                    raise LayoutError(f"layout {self.name}: {logical!r} is no logical axis.")
                if not set(axes) <= set(MESH_AXES) or len(set(axes)) != len(axes):
                    raise LayoutError(
                        f"layout {self.name}: {logical} is mapped to {axes}; choose among {', '.join(MESH_AXES)}."
                    )

        use = dict(self.use)
        if not set(use.get("expert", ())) <= {"expert"} or not set(use.get("expert", ())) <= set(use.get(BATCH, ())):
            raise LayoutError(
                f"layout {self.name}: experts are split over the mesh axis 'expert' or none, and the batch with them, "
                f"not over {use.get('expert')} with the batch over {use.get(BATCH, ())}."
            )

    @property
    def mesh_axes(self) -> set[str]:
        """The mesh axes that the layout splits anything over."""
        return {axis for rules in (self.rest, self.use) for _, axes in rules for axis in axes}


def spec(axes: Axes, shape: tuple[int, ...], rules: Rules, mesh: Mesh, what: str) -> PartitionSpec:
    """The mesh axes of each axis of an array; ``axes`` names its trailing ones, with a tuple where some are merged.

    Raises LayoutError, naming ``what``, the axis and the sizes, where a size does not divide.
    """
    lead = len(shape) - len(axes)
    names = [name if isinstance(name, tuple) else (name,) for name in axes]
    mine: list[tuple[str, ...]] = [()] * len(axes)
    taken: set[str] = set()
    for logical, wanted in rules:
        for place, found in enumerate(names):
            if logical in found or (place == len(names) - 1 and logical.removesuffix(LAST) in found):
                free = tuple(a for a in wanted if mesh.shape[a] > 1 and a not in taken)
                mine[place], taken = mine[place] + free, taken | set(free)
    for name, size, over in zip(axes, shape[lead:], mine, strict=True):
        parts = math.prod(mesh.shape[a] for a in over)
        if size % parts:
            raise LayoutError(
                f"{what}: its axis {name!r} of size {size} does not divide over the mesh axes "
                f"{' x '.join(f'{a}={mesh.shape[a]}' for a in over)}."
            )
    return PartitionSpec(*[None] * lead, *(over or None for over in mine))


def parts(split: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each axis, as tuples: a PartitionSpec holds a lone one as a string, and none as None."""
    return tuple((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in split)
