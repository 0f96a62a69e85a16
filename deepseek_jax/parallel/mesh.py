"""Meshes of devices; the one place that makes them."""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from deepseek_jax.core.layout import MESH_AXES, LayoutError


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
    ``tensor`` group. On a TPU torus an ``expert`` axis of 8 that has no axis within is a cube of 2 x 2 x 2 chips:
    all-to-all takes it half the time of a ring of 8. ``devices``: default all.

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
    types = (AxisType.Auto,) * len(sizes)
    if sizes[2:] == [8, 1, 1] and (cubes := _cubes(devices)) is not None:
        return Mesh(cubes.reshape(sizes), MESH_AXES, axis_types=types)
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, types, devices=devices)
    except NotImplementedError:
        # No product of the slice's own axes has these sizes: one of them has to be cut.
        cut = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
        return Mesh(cut, MESH_AXES, axis_types=types)


def _cubes(devices: Sequence[jax.Device]) -> np.ndarray | None:
    """The devices of a TPU slice in cubes of 2 x 2 x 2, one after the other; None where they do not make up any."""
    at = {tuple(getattr(d, "coords", None) or ()): d for d in devices}
    shape = tuple(max(c) + 1 for c in zip(*at, strict=True))
    if len(shape) != 3 or any(n % 2 for n in shape) or math.prod(shape) != len(devices) or len(at) != len(devices):
        return None
    grid = np.empty(shape, object)
    for place, device in at.items():
        grid[place] = device
    x, y, z = (n // 2 for n in shape)
    return grid.reshape(x, 2, y, 2, z, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1)


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
