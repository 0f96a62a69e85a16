"""Keys in the formats that releases are served in: FP8 or FP4 in blocks with a scale each, what is rotated in bfloat16.

V3 and V3.2: FP8 in blocks of 128 with float32 scales (V3.2-Exp's inference: 656 bytes of a token and layer); V4: FP8 in
blocks of 64 and, of the indexer's keys, FP4 in blocks of 32, with a byte of exponent each (2606.19348). A scale
is a block's largest magnitude over the format's; V3's inference takes magnitudes of at least 1e-4.

All of a key is held in 32-bit words, as serving engines hold it: its values, its scales, what is rotated. No compiler
then converts what it has no type for. A TPU's pads a key to whole lines of 128 words, so that V4's take more there than
in bfloat16.

Suffixes: K values of a key, W of them rounded, M words.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from deepseek_jax.core.product import product
from deepseek_jax.core.quant import SMALLEST_SCALE


@dataclass(frozen=True)
class _Float:
    """A sign, an exponent of at least ``least``, ``mantissa`` bits; the smallest exponent's code has no leading one."""

    bits: int
    mantissa: int
    least: int
    largest: float
    smallest_magnitude: float


_FLOATS = {8: _Float(8, 3, -6, 448.0, 1e-4), 4: _Float(4, 1, 0, 6.0, 6.0 * float(SMALLEST_SCALE))}


@dataclass(frozen=True)
class Form:
    """How a key is kept. ``width``: its first values, which are rounded to FP8 or FP4, of so many ``bits``, in blocks
    of ``block``, the last one perhaps shorter; the others stay bfloat16. ``powers_of_two``: scales are, and take a
    byte. ``turned``: values are multiplied by a Hadamard matrix first, which spreads what stands out, and stay so: so
    are the queries."""

    width: int
    block: int
    bits: int = 8
    powers_of_two: bool = False
    turned: bool = False

    def __post_init__(self):
        if self.turned and self.width & (self.width - 1):
            raise ValueError(
                'Context(cache="served"): an indexer\'s keys are turned by a Hadamard matrix, whose size is a power of '
                f"two; index_dim is {self.width}."
            )

    @property
    def blocks(self) -> int:
        return -(-self.width // self.block)

    def words(self, rest: int) -> tuple[int, int, int]:
        """Of the values, of their scales, and of ``rest`` more values in bfloat16."""
        return _words(self.width, self.bits), _words(self.blocks, 8 if self.powers_of_two else 32), _words(rest, 16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Served:
    """Keys [layers, B, S, K] as ``words``, uint32 [layers, B, S, M]; ``width``: K."""

    words: jax.Array
    form: Form = field(metadata={"static": True})
    width: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-1], self.width)


def kept(x: jax.Array, like: Served) -> jax.Array:
    """Keys [..., K] as words [..., M], as ``like`` keeps them."""
    form, kind = like.form, _FLOATS[like.form.bits]
    rounded, rest = x[..., : form.width].astype(jnp.float32), x[..., form.width :].astype(jnp.bfloat16)
    if form.turned:
        rounded = turned(rounded)
    blocks = jnp.pad(rounded, [(0, 0)] * (x.ndim - 1) + [(0, form.blocks * form.block - form.width)])
    blocks = blocks.reshape(*x.shape[:-1], form.blocks, form.block)
    magnitude = jnp.maximum(jnp.abs(blocks).max(-1), kind.smallest_magnitude)
    if form.powers_of_two:
        stored = _exponent(magnitude, kind.largest)
        scale, bits = _power_of_two(stored), 8
    else:
        scale = magnitude / kind.largest
        stored, bits = jax.lax.bitcast_convert_type(scale, jnp.uint32), 32
    codes = _codes(blocks / scale[..., None], kind).reshape(*x.shape[:-1], -1)[..., : form.width]
    parts = [_packed(codes, kind.bits), _packed(stored, bits)]
    if rest.shape[-1]:
        parts.append(_packed(jax.lax.bitcast_convert_type(rest, jnp.uint16), 16))
    return jnp.concatenate(parts, axis=-1)


def read(words: jax.Array, like: Served, dtype) -> jax.Array:
    """What `kept` gave for ``like``, as an array [..., K] of ``dtype``."""
    form, rest = like.form, like.width - like.form.width
    of_values, of_scales, _ = form.words(rest)
    codes, stored, others = jnp.split(words, [of_values, of_values + of_scales], axis=-1)
    values = _values(_unpacked(codes, form.width, form.bits), _FLOATS[form.bits])
    if form.powers_of_two:
        scale = _power_of_two(_unpacked(stored, form.blocks, 8))
    else:
        scale = jax.lax.bitcast_convert_type(stored, jnp.float32)
    scale = jnp.repeat(scale, form.block, axis=-1)[..., : form.width]
    values = (values * scale).astype(dtype)
    if not rest:
        return values
    others = jax.lax.bitcast_convert_type(_unpacked(others, rest, 16) << 16, jnp.float32)
    return jnp.concatenate([values, others.astype(dtype)], axis=-1)


def turned(x: jax.Array) -> jax.Array:
    """float32 ``x`` [..., K] times the Hadamard matrix of size K over its root: orthogonal, and its own inverse."""
    size = x.shape[-1]
    matrix = jnp.ones((1, 1), jnp.float32)
    for _ in range(size.bit_length() - 1):
        matrix = jnp.block([[matrix, matrix], [matrix, -matrix]])
    return product("...K,KI->...I", x, matrix / math.sqrt(size), jax.lax.Precision.HIGHEST)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _packed(codes: jax.Array, bits: int) -> jax.Array:
    """uint32 [..., ceil(n bits / 32)] of n unsigned codes. A word has codes that lie as far apart as there are words,
    so that nothing within a key changes its place: the first codes of all words, then the second ones."""
    count, words = codes.shape[-1], _words(codes.shape[-1], bits)
    codes = jnp.pad(codes.astype(jnp.uint32), [(0, 0)] * (codes.ndim - 1) + [(0, words * (32 // bits) - count)])
    pieces = jnp.split(codes, 32 // bits, axis=-1)
    return sum((piece << bits * place for place, piece in enumerate(pieces[1:], 1)), pieces[0])


def _unpacked(words: jax.Array, count: int, bits: int) -> jax.Array:
    """uint32 [..., count], the codes of `_packed`."""
    mask = jnp.uint32((1 << bits) - 1)
    return jnp.concatenate([words >> bits * place & mask for place in range(32 // bits)], axis=-1)[..., :count]


def _codes(x: jax.Array, kind: _Float) -> jax.Array:
    """uint32, the nearest values of ``kind``, of two the one whose last bit is 0; larger ones the largest."""
    size = jnp.minimum(jnp.abs(x), kind.largest)
    exponent = (jax.lax.bitcast_convert_type(size, jnp.uint32) >> 23).astype(jnp.int32) - 127
    above = jnp.maximum(exponent - kind.least, 0)
    steps = jnp.round(size * _power_of_two(127 + kind.mantissa - kind.least - above)).astype(jnp.uint32)
    # A mantissa that is rounded up to the next power carries into the exponent.
    code = (above.astype(jnp.uint32) << kind.mantissa) + steps
    return code | (x < 0).astype(jnp.uint32) << kind.bits - 1


def _values(code: jax.Array, kind: _Float) -> jax.Array:
    """float32 of `_codes`."""
    mantissa = code & (1 << kind.mantissa) - 1
    exponent = (code & (1 << kind.bits - 1) - 1) >> kind.mantissa
    one = _power_of_two(exponent + (126 + kind.least)) * (1 + mantissa.astype(jnp.float32) / (1 << kind.mantissa))
    small = mantissa.astype(jnp.float32) * 2.0 ** (kind.least - kind.mantissa)
    size = jnp.where(exponent == 0, small, one)
    return jnp.where(code >> kind.bits - 1 != 0, -size, size)


def _exponent(magnitude: jax.Array, largest: float) -> jax.Array:
    """uint32, 127 more than that of the smallest power of two by which ``magnitude`` is at most ``largest``. Of the
    bits, for a quotient could be off in the last and pass a power."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.uint32)
    mantissa, exponent = math.frexp(largest)
    more = (bits & 0x7FFFFF) > round((mantissa * 2 - 1) * (1 << 23))
    return jnp.maximum((bits >> 23) + more, exponent) - (exponent - 1)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """float32, of an exponent that is 127 more."""
    return jax.lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)
