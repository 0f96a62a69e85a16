"""Meshes of devices; the one place that makes them."""

import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from deepseek_jax.core.axes import MESH_AXES, LayoutError


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with all five axes; one of the sizes may be -1 for what the others leave of the devices.

    The order of the axes is that of the traffic they carry: neighbouring devices share a ``context``, then a
    ``tensor`` group. ``devices``: default all.

    Raises LayoutError when the sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, expert, tensor, context]
    fixed = math.prod(n for n in sizes if n != -1)
    if sizes.count(-1) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        described = " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise LayoutError(f"a mesh of {described} does not make up {len(devices)} devices.")
    # Auto: the compiler follows the constraints. `jax.make_mesh` would make axes Explicit by default.
    return jax.make_mesh(tuple(sizes), MESH_AXES, (AxisType.Auto,) * len(sizes), devices=devices)


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes of ``make_mesh`` from text such as ``fsdp=64,expert=8``; what is not named is 1.

    Raises LayoutError for anything else.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES or name in sizes or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise LayoutError(
                f"mesh {text!r}: {part.strip()!r} is not AXIS=SIZE, with each of {', '.join(MESH_AXES)} at most once "
                "and a positive size, or -1 for what the others leave."
            )
        sizes[name] = int(size)
    return sizes
