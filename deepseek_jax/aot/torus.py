"""Time of collectives on a torus of chips: loads of its links, and rings along its axes.

Suffixes: G groups that communicate at the same time, P devices of a group, A axes of the torus.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

# From one chip to its neighbour, which small collectives consist of.
HOP_SECONDS = 1e-6
# Times that the gathered array crosses the wires: an all-reduce is a reduce-scatter and an all-gather.
RING = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "collective-broadcast": 1}


@dataclass(frozen=True)
class Torus:
    """``shape``: chips along each axis. ``rings``: whether the axis closes. ``link``: bytes a second of one link in
    one direction."""

    shape: tuple[int, ...]
    rings: tuple[bool, ...]
    link: float

    def seconds(self, kind: str, groups_GPA: np.ndarray, nbytes: float) -> float:
        """Time of a collective among groups of chips, given by their coordinates.

        ``nbytes``: of a device; of the gathered array in all-gathers, of what is reduced in reduce-scatters and
        all-reduces, of all that is sent in all-to-alls and permutations. An all-to-all sends each device an equal part.
        """
        if groups_GPA.shape[1] == 1:
            return 0.0
        if kind in RING:
            return RING[kind] * (nbytes * self._ring_load(groups_GPA) / self.link + self._hops(groups_GPA))
        if kind == "collective-permute":
            load = self.load(groups_GPA[:, 0], groups_GPA[:, 1])
        else:
            P = groups_GPA.shape[1]
            sources = np.repeat(groups_GPA, P, axis=1).reshape(-1, len(self.shape))
            load = self.load(sources, np.tile(groups_GPA, (1, P, 1)).reshape(-1, len(self.shape))) / P
        return nbytes * load / self.link + self._hops(groups_GPA)

    def load(self, sources_NA: np.ndarray, targets_NA: np.ndarray) -> float:
        """Messages over the busiest link in one direction when each source sends one to its target.

        They travel along one axis after another, the shorter way round; half of them each way where both are equal.
        """
        busiest, at_NA = 0.0, sources_NA.copy()
        for axis, size in enumerate(self.shape):
            loads = np.zeros((2, *self.shape))
            forward = (targets_NA[:, axis] - at_NA[:, axis]) % size
            if not self.rings[axis]:
                ways = [(targets_NA[:, axis] - at_NA[:, axis]).clip(0), (at_NA[:, axis] - targets_NA[:, axis]).clip(0)]
                shares = [np.ones(len(forward)), np.ones(len(forward))]
            else:
                half = forward * 2 == size
                ways = [np.where(forward * 2 <= size, forward, 0), np.where(forward * 2 >= size, (-forward) % size, 0)]
                shares = [np.where(half, 0.5, 1.0)] * 2
            for direction, (hops, share) in enumerate(zip(ways, shares, strict=True)):
                for step in range(int(hops.max(initial=0))):
                    moving = hops > step
                    place = at_NA[moving].copy()
                    place[:, axis] = (place[:, axis] + (step if direction == 0 else -step)) % size
                    np.add.at(loads[direction], tuple(place.T), share[moving])
            busiest = max(busiest, float(loads.max(initial=0)))
            at_NA[:, axis] = targets_NA[:, axis]
        return busiest

    def _ring_load(self, groups_GPA: np.ndarray) -> float:
        """Bytes over the busiest link for a byte gathered: rings along all axes of the group at once.

        The array is cut into a part for each axis; each part is gathered along all axes, beginning with its own.
        """
        axes = self._rings_of(groups_GPA[0])
        if axes is None:
            group_PA = groups_GPA.reshape(-1, len(self.shape))
            P = groups_GPA.shape[1]
            following = np.roll(groups_GPA, -1, axis=1).reshape(-1, len(self.shape))
            return (P - 1) / P * max(self.load(group_PA, following), self.load(following, group_PA)) / 2
        P, parts, total = math.prod(n for n, _ in axes), len(axes), 0.0
        held = [1.0] * parts
        for phase in range(parts):
            worst = 0.0
            for part in range(parts):
                n, slowness = axes[(part + phase) % parts]
                worst = max(worst, held[part] * (n - 1) * slowness)
                held[part] *= n
            total += worst
        return total / parts / P

    def _rings_of(self, group_PA: np.ndarray) -> list[tuple[int, float]] | None:
        """(devices, slowness) along each axis, for a group that is a grid of chips; None for another.

        Slowness: 1/2 for a ring of neighbours, which has two directions, 1 for a line; times the distance of
        neighbours, for other groups' chips stand between them and use the same links.
        """
        axes, count = [], 1
        for axis, size in enumerate(self.shape):
            places = np.unique(group_PA[:, axis])
            steps = set(np.diff(places).tolist())
            if len(steps) > 1:
                return None
            if len(places) > 1:
                step = steps.pop()
                closed = self.rings[axis] and len(places) * step == size
                axes.append((len(places), step * (0.5 if closed else 1.0)))
            count *= len(places)
        return axes if count == len(group_PA) else None

    def _hops(self, groups_GPA: np.ndarray) -> float:
        spans = (groups_GPA.max(axis=1) - groups_GPA.min(axis=1)).max(axis=0)
        return HOP_SECONDS * sum(s / 2 if ring else s for s, ring in zip(spans.tolist(), self.rings, strict=True))


def replica_groups(text: str, n_devices: int) -> np.ndarray:
    """int [G, P]: the devices of each group, from a collective's ``replica_groups``.

    Raises ValueError for a form that is not known.
    """
    text = text.strip()
    everyone = np.arange(n_devices)
    if text in ("", "{}"):
        return everyone[None]
    if text.startswith("{{"):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])
    if match := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        to, dims, order = ([int(n) for n in part.split(",")] if part else None for part in match.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        return (devices.transpose(order) if order else devices).reshape(to)
    if match := re.match(
        r"mesh\[([^\]]*)\](?:,? *device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?\)?)? *\{([^}]*)\}$", text
    ):
        sizes, dims, order, wanted = match.groups()
        if dims:
            devices = np.arange(n_devices).reshape([int(n) for n in dims.split(",")])
            everyone = (devices.transpose([int(n) for n in order.split(",")]) if order else devices).reshape(-1)
        return _by_axes(everyone, re.findall(r"'([^']+)'=(\d+)", sizes), wanted)
    raise ValueError(f"replica_groups={text[:80]} has a form that is not known.")


def _by_axes(devices: np.ndarray, sizes: list[tuple[str, str]], wanted: str) -> np.ndarray:
    """Groups along axes of a mesh; ``'a':(2)4`` is the part of axis a of size 4 that 2 others come before."""
    parts = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXIS.findall(wanted)}
    shape, inside = [], []
    for name, size in ((name, int(size)) for name, size in sizes):
        before, part = parts.get(name, (1, 1))
        part = part or size
        shape += [before, part, size // before // part]
        inside.append(len(shape) - 2)
    outside = [i for i in range(len(shape)) if i not in inside]
    return devices.reshape(shape).transpose(outside + inside).reshape(-1, math.prod(shape[i] for i in inside))


_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def axes_of(groups_GP: np.ndarray, sizes: dict[str, int]) -> str:
    """The mesh axes along which groups of devices lie, such as ``fsdp+expert``; "mixed" where they follow none."""
    places = np.stack(np.unravel_index(groups_GP[0], tuple(sizes.values())), axis=-1)
    names = [name for i, name in enumerate(sizes) if len(set(places[:, i].tolist())) > 1]
    whole = math.prod(sizes[name] for name in names) == groups_GP.shape[1]
    return "+".join(names) if whole else "mixed"


def pairs_of(text: str) -> list[tuple[int, int]]:
    """The pairs of a collective-permute's ``source_target_pairs``."""
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text)]
