"""FLOPs a second of grouped matmul and attention kernels, from the measurements of others in `measured/`.

The tables there have a line a measurement, with its source. A call is priced by those nearest to it: `grouped` and
`attention` say what is taken for near. Nothing else is in the price; where no measurement is near there is None.
"""

import csv
import math
from functools import cache
from importlib.resources import files

import numpy as np

# Products of a block of queries with one of keys: with keys' width, with values' width.
PRODUCTS = {"fwd": (1, 1), "dkv": (2, 2), "dq": (2, 1), "dqkv": (3, 2)}


@cache
def measured(name: str) -> tuple[dict, ...]:
    """The lines of a table, ``grouped`` or ``attention``: column -> int, float or text."""
    text = files("deepseek_jax.aot").joinpath("measured", f"{name}.csv").read_text(encoding="utf-8")
    lines = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return tuple({key: _value(value) for key, value in line.items()} for line in lines)


def _value(text: str) -> int | float | str:
    return int(text) if text.isdigit() else float(text) if text.replace(".", "", 1).isdigit() else text


def grouped(
    chip: str, form: str, product: str, rows: float, groups: int, inner: int, outer: int
) -> tuple[float, str] | None:
    """FLOPs a second of a grouped matmul, of real rows, and the form of the measurements; None where there are none.

    ``form``, ``product``, ``inner``, ``outer``: of the table. The widths measured that are nearest, by their ratios to
    those of the call; between two numbers of rows a group the rate goes with the logarithm of rows a group, and beyond
    the smallest and largest it stays. Where a form's product has no measurement, megablox' stands for it.
    """
    for measured_form in dict.fromkeys((form, "megablox")):
        wanted = {"chip": chip, "form": measured_form, "product": product}
        found = [m for m in measured("grouped") if all(m[name] == value for name, value in wanted.items())]
        if found:
            break
    else:
        return None

    def distance(m: dict) -> float:
        return round(abs(math.log(m["inner"] / inner)) + abs(math.log(m["outer"] / outer)), 6)

    nearest = min(map(distance, found))
    points: dict[float, list[float]] = {}
    for m in found:
        if distance(m) == nearest:
            rate = 2 * m["rows"] * m["inner"] * m["outer"] / m["ms"] * 1e3
            points.setdefault(m["rows"] / m["groups"], []).append(rate)
    sizes = sorted(points)
    rates = [float(np.mean(points[size])) for size in sizes]
    return float(np.interp(math.log(rows / groups), np.log(sizes), rates)), measured_form


def attention(chip: str, cores: int, kernel: str, sums: bool, length: int, key_dim: int, value_dim: int):
    """FLOPs a second of a causal attention kernel, of the pairs that causality leaves; None without a measurement.

    ``kernel``: of `PRODUCTS`. ``sums``: a forward kernel returns the softmax's sums too. ``cores``: of a device.

    Between measured lengths the rate goes with their logarithm, and between widths, of a key and a value together,
    with the width; beyond the smallest and largest it stays. The line for 192 and 128 is not among these points: it
    tests them. For the backward pass only v7x has measurements: beside the forward's its rate is taken for that of one
    core, because the kernel's grid is not split over two (JAX's splash attention, ``dimension_semantics``).
    """
    product = "forward with sums" if sums or kernel != "fwd" else "forward"
    found = [m for m in measured("attention") if m["chip"] == chip and m["product"] == product and _alike(m)]
    if not found:
        return None
    widths = sorted({m["key_dim"] + m["value_dim"] for m in found})
    at_width = []
    for width in widths:
        line = sorted((m["length"], _causal_rate(m)) for m in found if m["key_dim"] + m["value_dim"] == width)
        at_width.append(np.interp(math.log(length), np.log([n for n, _ in line]), [rate for _, rate in line]))
    rate = float(np.interp(key_dim + value_dim, widths, at_width))
    return rate if kernel == "fwd" else rate * backward_ratio() / cores


def _alike(m: dict) -> bool:
    return m["heads"] == m["key_heads"] and m["key_dim"] == m["value_dim"]


def backward_ratio() -> float:
    """Rate of the fused backward kernel over that of the forward one with sums: measured on v7x, 192 and 128 wide."""
    rate = {
        m["product"]: _causal_rate(m)
        for m in measured("attention")
        if (m["chip"], m["key_dim"], m["value_dim"]) == ("v7x", 192, 128) and m["heads"] == m["key_heads"]
    }
    return rate["backward"] / rate["forward with sums"]


def _causal_rate(m: dict) -> float:
    return causal_flops(m, "dqkv" if m["product"] == "backward" else "fwd") / m["ms"] * 1e3


def causal_flops(shape: dict, kernel: str) -> float:
    """FLOPs of a kernel of `PRODUCTS` on the pairs that causality leaves, half of all."""
    by_key, by_value = PRODUCTS[kernel]
    pairs = shape["batch"] * shape["heads"] * shape["length"] ** 2 / 2
    return 2 * pairs * (by_key * shape["key_dim"] + by_value * shape["value_dim"])
