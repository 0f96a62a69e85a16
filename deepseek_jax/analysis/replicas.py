"""Which experts lie on which device for serving, the busiest of them several times. Loads no JAX.

V3 (2412.19437 §3.4) copies experts under high load. The README of EPLB, DeepSeek's load balancer, says how copies are
placed; its example is one of the published figures.
"""

from collections.abc import Sequence


def placed(loads: Sequence[float], slots: int, groups: int, nodes: int, devices: int) -> list[int]:
    """The expert in each slot of a layer's devices, device by device; every expert has a slot.

    ``loads``: tokens of each expert, those of a router's group side by side. Where groups can be shared out evenly over
    nodes, each node holds whole groups and copies stay on it (hierarchical); otherwise groups and nodes do not count
    (global). Nodes, copies and devices go to the largest load first, which need not give the best placement.

    Raises ValueError for sizes below 1 or of which one does not divide the other, and for fewer slots than experts.
    """
    for what, number in {"groups": groups, "nodes": nodes, "devices": devices}.items():
        if number < 1:
            raise ValueError(f"{what} must be at least 1, not {number}.")
    if groups % nodes:
        groups = nodes = 1
    experts = len(loads)
    for what, number, over, parts in (
        ("experts", experts, "groups", groups),
        ("slots", slots, "devices", devices),
        ("devices", devices, "nodes", nodes),
    ):
        if number % parts:
            raise ValueError(f"{number} {what} cannot be shared out evenly over {parts} {over}.")
    if slots < experts:
        raise ValueError(f"{slots} slots are too few for {experts} experts.")
    size = experts // groups
    by_group = [sum(loads[group * size : (group + 1) * size]) for group in range(groups)]
    found = []
    for chosen in shared_out(by_group, nodes):
        held = copied([group * size + i for group in chosen for i in range(size)], loads, slots // nodes)
        load = [loads[expert] / held.count(expert) for expert in held]
        found += [held[i] for part in shared_out(load, devices // nodes) for i in part]
    return found


def copied(experts: list[int], loads: Sequence[float], slots: int) -> list[int]:
    """The experts, and again and again the one with the largest load a copy, until there are so many."""
    copies = list(experts)
    while len(copies) < slots:
        copies.append(max(experts, key=lambda expert: loads[expert] / copies.count(expert)))
    return copies


def shared_out(loads: Sequence[float], parts: int) -> list[list[int]]:
    """Numbers of items in equally many parts of a like sum: the heaviest first, each to the lightest part with room."""
    found, sums = [[] for _ in range(parts)], [0.0] * parts
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        part = min((p for p in range(parts) if len(found[p]) < len(loads) // parts), key=sums.__getitem__)
        found[part].append(item)
        sums[part] += loads[item]
    return found
