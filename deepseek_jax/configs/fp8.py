"""Which products are emulated in FP8, and how. Loads no JAX: `core.fp8` does the work."""

from dataclasses import dataclass

from deepseek_jax.configs.checks import check_types

KINDS = ("e4m3", "e5m2")
# Of a contraction, what a tensor core sums in one instruction.
INSTRUCTION = 32


@dataclass(frozen=True)
class Fp8:
    """Which products of linear maps and experts are emulated in FP8, and how; the defaults are V3's.

    ``forward``, ``input_gradient``, ``weight_gradient``: the products. ``tile``: values of an input or a gradient along
    a product's contraction that share a scale; for weight gradients so many tokens. ``block``: rows and columns of a
    weight that do. None: a scale a tensor, of experts' weights a scale an expert. ``gradient``: the format of output
    gradients, "e4m3" or "e5m2"; all else is E4M3. ``gradient_blocks``: output gradients in blocks as weights are, which
    diverges in V3's appendix B.2. ``powers_of_two``: scales are rounded up to one.

    ``accumulation_bits``: significant bits of sums, cut off after every 32 products, 14 on an H100 (V3 §3.5.2); None
    for float32. ``promotion``: after how many products such a sum is added to one in float32; None for never.

    Raises ValueError for values that mean nothing.
    """

    forward: bool = True
    input_gradient: bool = True
    weight_gradient: bool = True
    tile: int | None = 128
    block: int | None = 128
    gradient: str = "e4m3"
    gradient_blocks: bool = False
    powers_of_two: bool = False
    accumulation_bits: int | None = None
    promotion: int | None = 128

    def __post_init__(self):
        check_types(self, ValueError)
        if not (self.forward or self.input_gradient or self.weight_gradient):
            raise ValueError("Fp8: all three products are left out; for none of them, give Context(fp8=None).")
        for name in ("tile", "block"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"Fp8({name}={size}): must be at least 1, or None for a scale a tensor.")
        if self.gradient not in KINDS:
            raise ValueError(f"Fp8(gradient={self.gradient!r}): choose one of {', '.join(KINDS)}.")
        if self.gradient_blocks and self.block is None:
            raise ValueError("Fp8(gradient_blocks=True, block=None): say how large the blocks are.")
        if self.accumulation_bits is not None and not 2 <= self.accumulation_bits <= 24:
            raise ValueError(f"Fp8(accumulation_bits={self.accumulation_bits}): must lie in [2, 24], or be None.")
        if self.promotion is not None and (self.promotion < INSTRUCTION or self.promotion % INSTRUCTION):
            raise ValueError(f"Fp8(promotion={self.promotion}): must be a multiple of {INSTRUCTION}, or None.")

    @property
    def gradient_sizes(self) -> tuple[int | None, int | None]:
        """Extents along a contraction and across it in which output gradients share a scale; None: a scale a tensor."""
        if self.gradient_blocks:
            return self.block, self.block
        return self.tile, (None if self.tile is None else 1)
