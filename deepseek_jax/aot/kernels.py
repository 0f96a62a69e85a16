"""FLOPs of the kernels that programs call: grouped matmul and attention, which the compiler knows no cost of."""

import math
import re
from dataclasses import dataclass

from deepseek_jax.aot.hlo import Array, Instruction
from deepseek_jax.kernels.attention import BLOCK

GROUPED = ("ragged-dot", "ragged_dot", "gmm")
# Products of a block of queries with one of keys: with keys' width, with values' width.
ATTENTION = {"fwd": (1, 1), "dkv": (2, 2), "dq": (2, 1), "dqkv": (3, 2)}


@dataclass(frozen=True)
class KernelFlops:
    """``fill``: the part of a grouped matmul's rows that balanced routing fills."""

    fill: float

    def __call__(self, call: Instruction, operands: list[Array]) -> float | None:
        """FLOPs of a custom call; None for one that is not known."""
        if call.source.endswith("metadata"):
            return 0.0
        # What these declare is for all rows of their buffers.
        if any(name in call.source for name in GROUPED):
            return self._grouped(call, operands)
        if kind := re.search(r"splash_m[hq]a_(fwd|dkv|dq)", call.source):
            return _attention(kind[1], call, operands)
        declared = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', call.text)
        return float(declared[1]) if declared else None

    def _grouped(self, call: Instruction, operands: list[Array]) -> float | None:
        """Rows that are filled, and for every group but the first one tile that it shares with the one before."""
        matrices = [a for a in operands if len(a.dims) >= 2]
        out = call.arrays[0].dims
        if len(matrices) < 2:
            return None
        rows = matrices[0].dims[0]
        groups = out[0] if len(out) == 3 else next((a.dims[0] for a in matrices if len(a.dims) == 3), 1)
        tile = re.search(r'ragged_dot_tiling="(\d+)', call.text)
        done = min(rows * self.fill + (groups - 1) * (int(tile[1]) if tile else 0), rows)
        width = matrices[0].dims[1]
        return 2.0 * done * width * out[-1]


def _attention(kind: str, call: Instruction, operands: list[Array]) -> float | None:
    """Causal attention in blocks, of which those above the diagonal are left out."""
    arrays = [a.dims for a in operands if len(a.dims) >= 3 and a.dtype[0] in "bf"]
    if len(arrays) < 3:
        return None
    q, k, v = arrays[:3]
    length, block = q[-2], math.gcd(q[-2], BLOCK)
    if re.search(r"use_fused_bwd_kernel\W+true", call.text):
        kind = {"dkv": "dqkv"}.get(kind, kind)
    by_key, by_value = ATTENTION[kind]
    pairs = math.prod(q[:-2]) * length * (k[-2] + block) / 2
    return 2.0 * pairs * (by_key * q[-1] + by_value * v[-1])
