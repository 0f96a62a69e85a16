"""How tensors are stored: dtypes, FP8 and FP4 blocks and their scales. The format is a property of each single tensor.

The tensors of one leaf may differ: a release keeps some layers in bfloat16 (``modules_to_not_convert``), a tool one
expert. Such a leaf holds them all in the dtype that represents each of them exactly, see `shared`; what each one was
is kept beside the leaf, for saving.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.schema import ConfigError, ModelConfig
from deepseek_jax.convert.names import Tensor, widest
from deepseek_jax.convert.safetensors import CheckpointError, load_json
from deepseek_jax.core.quant import BLOCK, FP4, FP4_BLOCK, FP8, PACKED, pack, unpack
from deepseek_jax.notes import shown

FLOATS = tuple(np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16))
# Read where a dtype is asked for: JAX holds no float64.
READ = (*FLOATS, np.dtype(np.float64))
SCALES = (*FLOATS, np.dtype(jnp.float8_e8m0fnu))
# Of a leaf that is state: a hash router's table, int32 here and int64 in files.
INTEGERS = tuple(np.dtype(d) for d in (np.int32, np.int64))
# dtype -> mask of the bits without the sign, the smallest pattern of these that is not finite.
NOT_FINITE = {
    np.dtype(np.float64): (0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    np.dtype(jnp.float32): (0x7FFF_FFFF, 0x7F80_0000),
    np.dtype(jnp.bfloat16): (0x7FFF, 0x7F80),
    np.dtype(jnp.float16): (0x7FFF, 0x7C00),
    np.dtype(jnp.float8_e4m3fn): (0x7F, 0x7F),
    np.dtype(jnp.float8_e8m0fnu): (0xFF, 0xFF),
}
CHECKED = 2**18
# The name under which a variable's metadata has its tensors' forms, in the order of `names.layout`.
STORED = "stored"


@dataclass(frozen=True)
class Stored:
    """The dtypes of a tensor and of its scales; None: it has none. FP4 is FP4, whatever its file's bytes are."""

    dtype: np.dtype
    scale: np.dtype | None = None

    def block(self, block: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns that share a scale, where those of FP8 are ``block``."""
        return block_of(self.dtype, block)

    def spec(self, shape: tuple[int, ...]) -> tuple[np.dtype, tuple[int, ...]]:
        """The dtype and shape in a file of a tensor of this shape."""
        return (np.dtype(PACKED), packed_shape(shape)) if self.dtype == FP4 else (self.dtype, shape)


def block_of(dtype: np.dtype, block: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns that share a scale among values of a dtype, in a model or in a file."""
    return FP4_BLOCK if dtype in (FP4, PACKED) else block


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a file of an FP4 matrix, two values a byte."""
    return (*shape[:-1], shape[-1] // 2)


def is_quantized(dtype: np.dtype) -> bool:
    """Whether values of a dtype have scales; of that which they have in a model, or in a file."""
    return dtype in (FP8, FP4, PACKED)


def stored(entries: Mapping, tensor: Tensor) -> Stored:
    """How a tensor is stored; ``entries``: of its checkpoint."""
    dtype = entries[tensor.name].dtype
    held = np.dtype(FP4) if dtype == PACKED else dtype
    return Stored(held, entries[tensor.scale].dtype if is_quantized(held) else None)


def as_held(array: np.ndarray) -> np.ndarray:
    """A tensor's stored values as a model has them."""
    return unpack(array) if array.dtype == PACKED else array


def as_stored(array: np.ndarray) -> np.ndarray:
    """Values as a file has them."""
    return pack(array) if array.dtype == FP4 else array


def usual(forms: Iterable[Stored]) -> Stored:
    """The most frequent form, of equally frequent ones FP8."""
    return max(Counter(forms).items(), key=lambda item: (item[1], item[0].scale is not None))[0]


def shared(forms: Iterable[Stored]) -> Stored:
    """The dtypes in which one leaf holds tensors of these forms, every value exactly.

    FP8 beside a wider float is held as that float, with its scales, and the others under scales of 1. Floats that do
    not hold each other are held as float32. Raises CheckpointError for float64, which JAX does not hold, and for FP4
    beside another, whose blocks differ.
    """
    forms = set(forms)
    if any(form.dtype == np.float64 for form in forms):
        raise CheckpointError("float64 cannot be held as it is stored, load with a dtype")
    if len(forms) == 1:
        return forms.pop()
    if any(form.dtype == FP4 for form in forms):
        raise CheckpointError("FP4 stands beside another form in one leaf and cannot be held as stored; use a dtype")
    floats = {form.dtype for form in forms if form.scale is None}
    scales = {form.scale for form in forms if form.scale is not None}
    dtype = np.dtype(np.float32) if len(floats) > 1 else floats.pop() if floats else np.dtype(FP8)
    # Scales of 1 would do in any dtype; float32 keeps one rule.
    return Stored(dtype, np.dtype(np.float32) if scales else None)


def block_size(folder: Path, cfg: ModelConfig) -> tuple[int, int]:
    """The rows and columns of a folder's FP8 blocks, by its config.json; 128 x 128 where that has none.

    A block beyond every tensor means one scale a tensor, as the smallest such block does, which is returned for it.
    Raises ConfigError for another format than block-wise FP8 E4M3.
    """
    quantization = load_json(folder / "config.json").get("quantization_config")
    if quantization is None:
        return BLOCK
    where = f"{folder}: config.json:"
    if not isinstance(quantization, dict):
        raise ConfigError(f"{where} quantization_config must be an object, not {shown(quantization)}.")
    for field, built in (("quant_method", "fp8"), ("fmt", "e4m3")):
        value = quantization.get(field, built if field == "fmt" else None)
        if value != built:
            raise ConfigError(f"{where} quantization_config {field} {shown(value)} is not supported, only {built!r}.")
    block = quantization.get("weight_block_size", list(BLOCK))
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ConfigError(f"{where} weight_block_size must be two positive integers, not {shown(block)}.")
    return tuple(min(n, widest(cfg)) for n in block)


def scale_shape(tensor: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    """The published shape of the scales of a tensor in such blocks; those at the edges are partial."""
    return tuple(-(-n // b) for n, b in zip(tensor.shape, block, strict=True))


def check_finite(entry, array: np.ndarray, scale: bool = False) -> None:
    """Raises CheckpointError naming the first value that is not finite; of scales the first that is negative, too.

    ``entry``: whose values they are, a `safetensors.Entry` or a `layers.LayerEntry`.
    """
    if not scale and not has_bad(array):
        return
    bad = not_finite(array)
    if scale:
        bad |= array.astype(np.float32) < 0
    if bad.any():
        where = np.unravel_index(int(bad.argmax()), array.shape)
        value = float(array[where])
        raise CheckpointError(
            f"{entry.file}: {entry.name} is {value} at {[int(i) for i in where]}; "
            f"{int(bad.sum())} of its values are not finite, or are negative scales."
        )


def cast(entry, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A tensor's values as ``dtype``. Raises CheckpointError for a float64 beyond it."""
    if array.dtype != np.float64:
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if has_bad(narrow):
        raise CheckpointError(f"{entry.file}: {entry.name} holds float64 values that are too large for {dtype}.")
    return narrow


def not_finite(array: np.ndarray) -> np.ndarray:
    """Where a float array is NaN or infinite."""
    magnitude, limit = _magnitude(array)
    return magnitude >= limit


def has_bad(array: np.ndarray) -> bool:
    """Whether any value is NaN or infinite; several times faster than `not_finite`, and without its memory."""
    if array.dtype not in NOT_FINITE:  # integers, and FP4, which has nothing else than numbers
        return False
    flat = array.ravel(order="K")
    for first in range(0, flat.size, CHECKED):
        magnitude, limit = _magnitude(flat[first : first + CHECKED])
        if magnitude.max() >= limit:
            return True
    return False


def _magnitude(array: np.ndarray) -> tuple[np.ndarray, int]:
    """The values' bits without the sign, and the first pattern that is not finite."""
    mask, limit = NOT_FINITE[array.dtype]
    bits = array.view(f"u{array.itemsize}")
    return bits & bits.dtype.type(mask), limit
