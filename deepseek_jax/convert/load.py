"""`load_pretrained`: a published checkpoint as a model.

Tensors are read one at a time into the leaves' final, stacked arrays: memory is the model and one tensor.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.hf import config_from_json, eos_ids
from deepseek_jax.configs.schema import ConfigError, ModelConfig
from deepseek_jax.convert.folders import why_no_checkpoint
from deepseek_jax.convert.layers import RECORD, LayerEntry, Layers
from deepseek_jax.convert.names import BLOCK, IGNORED, SCALE, Leaf, Tensor, check_size, layout, widest
from deepseek_jax.convert.other_config import with_config
from deepseek_jax.convert.safetensors import Checkpoint, CheckpointError, Entry, load_json
from deepseek_jax.convert.shards import load_leaf
from deepseek_jax.convert.training import is_training, load_training
from deepseek_jax.core.axes import shardings
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import RouterBias, map_variables
from deepseek_jax.core.quant import FP8, Quantized, dequantize_matrix
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.notes import cut, shown
from deepseek_jax.parallel.placement import place

FLOATS = tuple(np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16))
SCALES = tuple(np.dtype(d) for d in (jnp.float32, jnp.float8_e8m0fnu))
# dtype -> mask of the bits without the sign, the smallest pattern of these that is not finite.
NOT_FINITE = {
    np.dtype(jnp.float32): (0x7FFF_FFFF, 0x7F80_0000),
    np.dtype(jnp.bfloat16): (0x7FFF, 0x7F80),
    np.dtype(jnp.float16): (0x7FFF, 0x7C00),
    np.dtype(jnp.float8_e4m3fn): (0x7F, 0x7F),
    np.dtype(jnp.float8_e8m0fnu): (0xFF, 0xFF),
}
# So many problems of one kind are named; the rest are counted.
NAMED = 5
ALIGNMENT = 64
COMPARED_ROWS = 4096
STRIP = 64
CHECKED = 2**18


def load_pretrained(
    path: str | Path,
    dtype=jnp.bfloat16,
    ctx: Context | None = None,
    cfg: ModelConfig | None = None,
    key: jax.Array | None = None,
) -> Transformer:
    """A model from a published folder (``config.json`` and safetensors files, with or without an index), from
    a folder that `deepseek_jax.convert.stream.convert` made of one, or from a checkpoint of a training run
    (``RUN/checkpoints/STEP``: the weights themselves, not their moving average).

    ``dtype``: of all parameters; FP8 weights are dequantised in float32 (value times its block's scale) and
    cast. None keeps every tensor as it is stored, FP8 as `Quantized` leaves. The router bias is
    float32 always. ``ctx``: as in a model's call. With a mesh every process reads, of each tensor of a published
    folder, the bytes that its devices' shards are made of and no others; nothing is ever whole on a device or host.
    ``cfg``: the same weights under another config, what is new drawn from ``key`` (`with_config`); every process then
    reads all of them.

    Raises CheckpointError for tensors that are missing, unexpected, of a wrong shape or dtype, truncated or
    not finite, and for copies of the embedding or head that differ; ConfigError for an unsupported config;
    LayoutError, before any tensor is read, where the context's layout does not divide the model.
    """
    if cfg is None or cfg == read_config(Path(path))[0]:
        return _as_stored(Path(path), dtype, ctx or DEFAULT)
    return with_config(_as_stored(Path(path), dtype, DEFAULT), cfg, key, ctx)


def _as_stored(folder: Path, dtype, ctx: Context) -> Transformer:
    cfg, block = read_config(folder)
    if dtype is not None:
        dtype = np.dtype(dtype)
        if dtype not in FLOATS:
            raise ValueError(f"dtype {dtype} is not supported: choose float32, bfloat16 or float16, or None.")
    if is_training(folder):
        return place(load_training(folder, cfg, dtype), ctx)
    return _load(open_checkpoint(folder, cfg, block), cfg, block, dtype, ctx)


def load_first_layers(path: str | Path, n_layers: int, dtype=jnp.float32) -> Transformer:
    """The first layers of a published or converted folder, between its embedding and its head; no MTP modules.

    What the model computes means nothing; it serves to compare a part of a model too large for a machine. Only
    these tensors are read, and only their files have to be there. Raises as `load_pretrained`, and ValueError when
    the model has fewer layers.
    """
    folder = Path(path)
    cfg, block = read_config(folder)
    if not 1 <= n_layers <= cfg.n_layers:
        raise ValueError(f"{folder} has {cfg.n_layers} layers; its first {n_layers} cannot be taken.")
    cut = replace(cfg, n_layers=n_layers, n_dense_layers=min(cfg.n_dense_layers, n_layers), mtp_depth=0)
    others = tuple(f"model.layers.{i}." for i in range(n_layers, cfg.n_layers + cfg.mtp_depth))
    return _load(open_checkpoint(folder, cut, block, others), cut, block, np.dtype(dtype))


def open_checkpoint(
    folder: Path, cfg: ModelConfig, block: tuple[int, int], without: tuple[str, ...] = ()
) -> Checkpoint | Layers:
    """A published or converted folder, its tensors not yet read; ``without``: prefixes of names to leave out."""
    if (folder / RECORD).exists():
        return Layers(folder, cfg, block)
    checkpoint = Checkpoint(folder, lambda name: not name.startswith(without))
    check_size(cfg, checkpoint.entries, folder)
    return checkpoint


def _load(
    checkpoint: Checkpoint | Layers,
    cfg: ModelConfig,
    block: tuple[int, int],
    dtype: np.dtype | None,
    ctx: Context = DEFAULT,
) -> Transformer:
    if ctx.mesh is not None:
        shardings(abstract(cfg), ctx)
    tensors, leaves = layout(cfg, block)
    check_tensors(checkpoint, cfg, tensors, block)
    by_leaf: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.copy:
            by_leaf.setdefault(tensor.path, []).append(tensor)
        elif isinstance(checkpoint, Checkpoint):
            check_copy(checkpoint, tensor, tensors, ctx)

    def fill(path, variable):
        leaf_dtype = np.dtype(np.float32) if isinstance(variable, RouterBias) else dtype
        arguments = (checkpoint, by_leaf[path], leaves[path], leaf_dtype, block)
        value = _load_leaf(*arguments) if ctx.mesh is None else _load_shards(*arguments, variable, ctx)
        return type(variable)(value, **variable.get_metadata())

    return map_variables(fill, abstract(cfg))


def read_config(folder: Path) -> tuple[ModelConfig, tuple[int, int]]:
    """A folder's config and the rows and columns of its FP8 blocks.

    The tokens that end a text are those of generation_config.json, where it names any.
    """
    if (why := why_no_checkpoint(folder)) is not None:
        raise CheckpointError(why)
    data = load_json(folder / "config.json")
    generation = folder / "generation_config.json"
    stops = load_json(generation) if generation.exists() else {}
    try:
        cfg = config_from_json(data, name=folder.resolve().name)
        if "eos_token_id" in stops:
            cfg = replace(cfg, eos_ids=eos_ids(stops["eos_token_id"], generation.name))
        return cfg, block_size(data, cfg)
    except ConfigError as e:
        raise ConfigError(f"{folder}: {e}") from None


def block_size(data: dict, cfg: ModelConfig) -> tuple[int, int]:
    """The FP8 block of a config.json's quantization_config, 128 x 128 without one.

    A block beyond every tensor means one scale a tensor, as the smallest such block does, which is returned for it.
    Raises ConfigError for another format than block-wise FP8 E4M3.
    """
    quantization = data.get("quantization_config")
    if quantization is None:
        return BLOCK
    if not isinstance(quantization, dict):
        raise ConfigError(f"config.json: quantization_config must be an object, not {shown(quantization)}.")
    for field, built in (("quant_method", "fp8"), ("fmt", "e4m3")):
        value = quantization.get(field, built if field == "fmt" else None)
        if value != built:
            raise ConfigError(
                f"config.json: quantization_config {field} {shown(value)} is not supported, only {built!r}."
            )
    block = quantization.get("weight_block_size", list(BLOCK))
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ConfigError(f"config.json: weight_block_size must be two positive integers, not {shown(block)}.")
    return tuple(min(n, widest(cfg)) for n in block)


def scale_shape(tensor: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    """The published shape of a quantised tensor's scales; blocks at the edges are partial."""
    return tuple(-(-n // b) for n, b in zip(tensor.shape, block, strict=True))


def check_tensors(checkpoint: Checkpoint | Layers, cfg: ModelConfig, tensors, block: tuple[int, int]) -> None:
    """Compares the names, shapes and dtypes of a checkpoint with those that its config implies.

    Raises one CheckpointError that names what is missing, unexpected and wrong.
    """
    entries, problems = checkpoint.entries, []
    expected, missing = set(), []
    for tensor in tensors:
        expected.add(tensor.name)
        entry = entries.get(tensor.name)
        if entry is None:
            missing.append(tensor.name)
            continue
        if entry.shape != tensor.shape:
            problems.append(f"{entry.file}: {tensor.name} has shape {entry.shape}, the config implies {tensor.shape}")
            continue
        if entry.dtype == FP8 and tensor.fp8:
            expected.add(tensor.name + SCALE)
            scale, shape = entries.get(tensor.name + SCALE), scale_shape(tensor, block)
            if scale is None:
                missing.append(tensor.name + SCALE)
            elif scale.shape != shape:
                problems.append(f"{scale.file}: {scale.name} has shape {scale.shape}, blocks of {block} imply {shape}")
            elif scale.dtype not in SCALES:
                problems.append(f"{scale.file}: {scale.name} has dtype {scale.dtype}, not float32 or float8_e8m0fnu")
        elif entry.dtype not in FLOATS:
            problems.append(f"{entry.file}: {tensor.name} has dtype {entry.dtype}, which is not read here")
    unexpected = [n for n in entries if n not in expected and not n.endswith(IGNORED)]
    problems = _some(problems)
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {', '.join(_some(missing))}")
        prefixes = tuple(f"model.layers.{cfg.n_layers + d}." for d in range(cfg.mtp_depth))
        if all(name.startswith(prefixes) for name in missing) and not any(n.startswith(prefixes) for n in entries):
            problems[-1] += " (no MTP layer is here: num_nextn_predict_layers in config.json should be 0)"
    if unexpected:
        files = [f"{name} in {entries[name].file.name}" for name in unexpected]
        problems.append(f"{len(unexpected)} tensors are unexpected: {', '.join(_some(files))}")
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: " + "; ".join(problems) + ".")


def _some(items: list[str]) -> list[str]:
    named = [cut(item) for item in items[:NAMED]]
    return named if len(items) <= NAMED else [*named, f"and {len(items) - NAMED} more"]


def check_finite(entry: Entry | LayerEntry, array: np.ndarray) -> None:
    """Raises CheckpointError naming the first value that is not finite, and for a negative scale."""
    scale = entry.name.endswith(SCALE)
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


def not_finite(array: np.ndarray) -> np.ndarray:
    """Where a float array is NaN or infinite."""
    magnitude, limit = _magnitude(array)
    return magnitude >= limit


def has_bad(array: np.ndarray) -> bool:
    """Whether any value is NaN or infinite; several times faster than `not_finite`, and without its memory."""
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


def read_tensor(checkpoint: Checkpoint | Layers, name: str) -> np.ndarray:
    """A tensor's stored values, checked to be finite."""
    array = checkpoint.read(name)
    check_finite(checkpoint.entries[name], array)
    return array


def check_copy(checkpoint: Checkpoint, copy: Tensor, tensors, ctx: Context = DEFAULT) -> None:
    """The MTP layer's copy of the embedding or head equals the original, byte for byte; on a mesh every process
    compares its part of the rows."""
    original = next(t for t in tensors if t.path == copy.path and not t.copy)
    ours, theirs = checkpoint.entries[copy.name], checkpoint.entries[original.name]
    if ours.dtype != theirs.dtype:
        raise CheckpointError(
            f"{ours.file}: {copy.name} is a copy of {original.name}, but its dtype is {ours.dtype}, not {theirs.dtype}."
        )
    me, processes = (0, 1) if ctx.mesh is None else (jax.process_index(), jax.process_count())
    start, stop = (ours.shape[0] * i // processes for i in (me, me + 1))
    for first in range(start, stop, COMPARED_ROWS):
        a, b = (entry.read(first, min(first + COMPARED_ROWS, stop)) for entry in (ours, theirs))
        differ = a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")
        if differ.any():
            row, column = (int(i) for i in np.unravel_index(int(differ.argmax()), differ.shape))
            raise CheckpointError(
                f"{ours.file}: {copy.name} is a copy of {original.name}, but they differ: at "
                f"[{first + row}, {column}] {float(a[row, column])} stands against {float(b[row, column])}."
            )


def _load_leaf(checkpoint: Checkpoint | Layers, tensors: list[Tensor], leaf: Leaf, dtype, block: tuple[int, int]):
    """One leaf: an array, or with ``dtype`` None and FP8 tensors a `Quantized`."""
    stored = _same_dtype(checkpoint, [t.name for t in tensors]) if dtype is None else dtype
    values = aligned(leaf.matrix, stored)
    scales = None
    if stored == FP8:
        scales = aligned(leaf.scale, _same_dtype(checkpoint, [t.name + SCALE for t in tensors]))
    for tensor in tensors:
        array = read_tensor(checkpoint, tensor.name)
        if array.dtype == FP8:
            scale = read_tensor(checkpoint, tensor.name + SCALE)
            if scales is None:
                array = dequantize_matrix(array, scale, block, stored)
            else:
                scales[tensor.index] = scale.T
        if tensor.transposed:
            _transpose_into(values[tensor.index], array.astype(stored, copy=False))
        else:
            values[tensor.index] = array
    if scales is None:
        return jax.device_put(values.reshape(leaf.shape))
    return Quantized(jax.device_put(values), jax.device_put(scales), leaf.block, leaf.dims)


def _load_shards(checkpoint, tensors, leaf: Leaf, dtype, block: tuple[int, int], variable, ctx: Context):
    """`_load_leaf` into the leaf's shards."""
    stored = _same_dtype(checkpoint, [t.name for t in tensors]) if dtype is None else dtype
    if stored == FP8:
        kind = _same_dtype(checkpoint, [t.name + SCALE for t in tensors])
        shapes = (jax.ShapeDtypeStruct(leaf.matrix, FP8), jax.ShapeDtypeStruct(leaf.scale, kind))
        variable = variable.replace(Quantized(*shapes, leaf.block, leaf.dims))
    where = shardings(variable, ctx).get_value()
    return load_leaf(checkpoint.entries, tensors, leaf, stored, block, where, check_finite)


def _transpose_into(out: np.ndarray, array: np.ndarray) -> None:
    """``out[...] = array.T`` in strips that stay in the cache: four times faster than at once."""
    raw = f"u{array.itemsize}"
    out, array = out.view(raw), array.view(raw)
    for first in range(0, array.shape[0], STRIP):
        out[:, first : first + STRIP] = array[first : first + STRIP].T


def _same_dtype(checkpoint: Checkpoint | Layers, names: list[str]) -> np.dtype:
    """The dtype of tensors that share a leaf."""
    first = checkpoint.entries[names[0]]
    for name in names:
        entry = checkpoint.entries[name]
        if entry.dtype != first.dtype:
            raise CheckpointError(
                f"{first.file}: {first.name} is stored as {first.dtype} and {name} as {entry.dtype}; they "
                "share one leaf, so dtype=None cannot keep both: load with a dtype."
            )
    return first.dtype


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose start JAX can take over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
