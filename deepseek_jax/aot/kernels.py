"""What the kernels cost that programs call: grouped matmul and attention, which the compiler knows no cost of.

Their FLOPs follow from their operands; their time from measurements of such kernels on the chip, where `aot.rates` has
any.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from deepseek_jax.aot import rates
from deepseek_jax.aot.hlo import Array, Instruction
from deepseek_jax.kernels.attention import BLOCK

# The form that a call is of, by its name: XLA's own, and Pallas' megablox.
GROUPED = {"ragged-dot": "ragged", "ragged_dot": "ragged", "gmm": "megablox"}


@dataclass(frozen=True)
class Timed:
    """A call at a measured rate: the shape that it was priced for, and its ``flops`` and ``seconds``.

    ``kernel``: the form of a grouped matmul, or "attention". ``measured``: that of the measurements. ``product``:
    forward, transposed, gradient; fwd, dkv, dq, dqkv.
    """

    kernel: str
    measured: str
    product: str
    shape: dict[str, int]
    flops: float
    seconds: float


Kernel = Callable[[Instruction, list[Array]], "float | Timed | None"]


@dataclass(frozen=True)
class Kernels:
    """``fill``: the part of a grouped matmul's rows that balanced routing fills. ``chip``, ``cores``: whose
    measurements count, and how many cores it has."""

    fill: float
    chip: str
    cores: int = 1

    def __call__(self, call: Instruction, operands: list[Array]) -> float | Timed | None:
        """A custom call with its time, its FLOPs where nothing like it was measured, None for one that is not known."""
        if call.source.endswith("metadata"):
            return 0.0
        # What these declare is for all rows of their buffers.
        for name, form in GROUPED.items():
            if name in call.source:
                return self._grouped(form, call, operands)
        if kind := re.search(r"splash_m[hq]a_(fwd|dkv|dq)", call.source):
            return self._attention(kind[1], call, operands)
        declared = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', call.text)
        return float(declared[1]) if declared else None

    def _grouped(self, form: str, call: Instruction, operands: list[Array]) -> float | Timed | None:
        """Measured rates are of real rows; without one, each group but the first has a tile more, which it shares."""
        matrices = [a for a in operands if len(a.dims) >= 2]
        if len(matrices) < 2:
            return None
        out = call.arrays[0].dims
        stacked = [a.dims for a in (call.arrays[0], *matrices) if len(a.dims) == 3]
        groups, outer = stacked[0][0] if stacked else 1, out[-1]
        if len(out) == 3:
            # The first of megablox' operands is transposed.
            product, inner, rows = "gradient", out[1], matrices[1].dims[0]
        else:
            rows, inner = matrices[0].dims[:2]
            product = "forward" if not stacked or stacked[0][1:] == (inner, outer) else "transposed"
        filled = rows * self.fill
        flops = 2.0 * filled * inner * outer
        if found := rates.grouped(self.chip, form, product, filled, groups, inner, outer):
            rate, measured = found
            shape = {"rows": round(filled), "groups": groups, "inner": inner, "outer": outer}
            return Timed(form, measured, product, shape, flops, flops / rate)
        tile = re.search(r'ragged_dot_tiling="(\d+)', call.text)
        done = min(filled + (groups - 1) * (int(tile[1]) if tile else 0), rows)
        return 2.0 * done * inner * outer

    def _attention(self, kind: str, call: Instruction, operands: list[Array]) -> float | Timed | None:
        """Measured rates are of the pairs that causality leaves. Without one all blocks up to the diagonal count."""
        arrays = [a.dims for a in operands if len(a.dims) >= 3 and a.dtype[0] in "bf"]
        if len(arrays) < 3:
            return None
        q, k, v = arrays[:3]
        length, block = q[-2], math.gcd(q[-2], BLOCK)
        if re.search(r"use_fused_bwd_kernel\W+true", call.text):
            kind = {"dkv": "dqkv"}.get(kind, kind)
        by_key, by_value = rates.PRODUCTS[kind]
        pairs = math.prod(q[:-2]) * length * (k[-2] + block) / 2
        flops = 2.0 * pairs * (by_key * q[-1] + by_value * v[-1])
        sums = "no_residuals" not in call.source
        rate = rates.attention(self.chip, self.cores, kind, sums, length, q[-1], v[-1])
        if rate is None or k[-2] != length:
            return flops
        shape = {"batch": math.prod(q[:-3]), "heads": q[-3], "length": length, "key_dim": q[-1], "value_dim": v[-1]}
        return Timed("attention", "attention", kind, shape, flops, rates.causal_flops(shape, kind) / rate)
