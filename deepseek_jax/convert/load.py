"""`load_pretrained`: a published checkpoint as a model.

Tensors are read one at a time into the leaves' final, stacked arrays: memory is the model and one tensor.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.check import check_copy, check_tensors, some
from deepseek_jax.convert.checkpoint import Checkpoint, stored_names
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.formats import (
    FLOATS,
    STORED,
    Stored,
    as_held,
    block_of,
    block_size,
    cast,
    check_finite,
    is_quantized,
    shared,
    stored,
    usual,
)
from deepseek_jax.convert.held import held_as
from deepseek_jax.convert.layers import RECORD, Layers
from deepseek_jax.convert.names import Leaf, Tensor, check_size, layout
from deepseek_jax.convert.naming import find_prefix, fused_names, layer_of, published_entries
from deepseek_jax.convert.other_config import with_config
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.shards import load_leaf
from deepseek_jax.convert.training import is_training, load_training
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import RouterState, map_variables
from deepseek_jax.core.quant import FP4, Quantized, dequantize_matrix
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.notes import cut, note
from deepseek_jax.parallel.placement import place
from deepseek_jax.parallel.shardings import shardings

Tree = TypeVar("Tree")

ALIGNMENT = 64
STRIP = 64


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
    cast, and FP4 ones too. None keeps every tensor as it is stored, these as `Quantized` leaves. The router bias is
    float32 always. ``ctx``: as in a model's call. With a mesh every process reads, of each tensor of a published
    folder, the bytes that its devices' shards are made of and no others; nothing is ever whole on a device or host.
    ``cfg``: the same weights under another config, what is new drawn from ``key`` (`with_config`); every process then
    reads all of them.

    Raises CheckpointError for tensors that are missing, unexpected, of a wrong shape or dtype, truncated or
    not finite, and for copies of the embedding or head that differ; ConfigError for an unsupported config;
    LayoutError, before any tensor is read, where the context's layout does not divide the model.
    """
    if cfg is None or cfg == read_config(Path(path)):
        return _as_stored(Path(path), dtype, ctx or DEFAULT)
    return with_config(_as_stored(Path(path), dtype, DEFAULT), cfg, key, ctx)


def _as_stored(folder: Path, dtype, ctx: Context) -> Transformer:
    cfg = read_config(folder)
    if dtype is not None:
        dtype = np.dtype(dtype)
        if dtype not in FLOATS:
            raise ValueError(f"dtype {dtype} is not supported: choose float32, bfloat16 or float16, or None.")
    if is_training(folder):
        return place(load_training(folder, cfg, dtype), ctx)
    return _load(open_checkpoint(folder, cfg), cfg, dtype, ctx)


def load_first_layers(path: str | Path, n_layers: int, dtype=jnp.float32) -> Transformer:
    """The first layers of a published or converted folder, between its embedding and its head; no MTP modules.

    What the model computes means nothing; it serves to compare a part of a model too large for a machine. Only
    these tensors are read, and only their files have to be there. Raises as `load_pretrained`, and ValueError when
    the model has fewer layers.
    """
    folder = Path(path)
    cfg = read_config(folder)
    if not 1 <= n_layers <= cfg.n_layers:
        raise ValueError(f"{folder} has {cfg.n_layers} layers; its first {n_layers} cannot be taken.")
    cut = cfg.first_layers(n_layers)

    def wanted(name: str) -> bool:
        layer = layer_of(name, cfg.n_layers)
        return layer is None or layer < n_layers

    return _load(open_checkpoint(folder, cut, wanted), cut, np.dtype(dtype))


def open_checkpoint(
    folder: Path,
    cfg: ModelConfig,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Checkpoint | Layers:
    """A published or converted folder, its tensors not yet read; ``wanted``: of a published one, the names to take."""
    return Layers(folder, cfg) if (folder / RECORD).exists() else open_published(folder, cfg, wanted)


def open_published(folder: Path, cfg: ModelConfig, wanted: Callable[[str], bool] = lambda name: True) -> Checkpoint:
    """A folder of safetensors files under their published names, whatever names they are stored under.

    Raises CheckpointError as `Checkpoint` does, and where ``cfg`` implies far more tensors than there are; ConfigError
    as `block_size` does.
    """
    names, block = stored_names(folder), block_size(folder, cfg)
    prefix = find_prefix(names)
    checkpoint = Checkpoint(folder, lambda name: wanted(prefix.published(name)), block)
    if prefix.said:
        note(f"{folder}: {prefix.said}")
    fused = fused_names(map(prefix.published, checkpoint.entries))
    if fused:
        note(
            f"{folder}: the experts of a layer are stored in one tensor ({cut(fused[0])} and {len(fused) - 1} more), "
            "as transformers 5 writes them with save_original_format=False: read as each expert's published matrices."
        )
    checkpoint.entries = published_entries(checkpoint.entries, prefix, block)
    check_size(cfg, checkpoint.entries, folder)
    return checkpoint


def _load(
    checkpoint: Checkpoint | Layers,
    cfg: ModelConfig,
    dtype: np.dtype | None,
    ctx: Context = DEFAULT,
) -> Transformer:
    if ctx.mesh is not None:
        shardings(abstract(cfg), ctx)
    tensors, leaves = layout(cfg)
    check_tensors(checkpoint, cfg, tensors)
    by_leaf: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.copy:
            by_leaf.setdefault(tensor.path, []).append(tensor)
        elif isinstance(checkpoint, Checkpoint) and tensor.name in checkpoint.entries:
            check_copy(checkpoint, tensor, tensors, ctx)
    like = abstract(cfg, np.float32 if dtype is None else dtype)
    return filled(like, checkpoint, by_leaf, leaves, dtype, ctx)


def filled(
    like: Tree,
    checkpoint: Checkpoint | Layers,
    by_leaf: dict[tuple, list[Tensor]],
    leaves: dict[tuple, Leaf],
    dtype: np.dtype | None,
    ctx: Context = DEFAULT,
) -> Tree:
    """``like``, a tree of shapes, with the values of a checkpoint whose tensors are checked; ``by_leaf``: those of each
    leaf."""
    forms = {path: tuple(stored(checkpoint.entries, t) for t in group) for path, group in by_leaf.items()}
    if dtype is None:
        _tell_mixed(checkpoint, by_leaf, forms)

    def fill(path, variable):
        if dtype is not None or isinstance(variable, RouterState):
            # What is float32 whatever the model's dtype says so where it is made.
            form = Stored(np.dtype(variable.get_value().dtype))
        else:
            form = _shared(checkpoint, by_leaf[path], forms[path])
        arguments = (checkpoint, by_leaf[path], leaves[path], form)
        value = _load_leaf(*arguments) if ctx.mesh is None else _load_shards(*arguments, variable, ctx)
        kept = {} if dtype is not None or set(forms[path]) == {held_as(value)} else {STORED: forms[path]}
        return type(variable)(value, **variable.get_metadata(), **kept)

    return map_variables(fill, like)


def _shared(checkpoint: Checkpoint | Layers, tensors: list[Tensor], forms: tuple[Stored, ...]) -> Stored:
    try:
        return shared(forms)
    except CheckpointError as error:
        name = next(t.name for t, form in zip(tensors, forms, strict=True) if form.dtype in (np.float64, FP4))
        raise CheckpointError(f"{checkpoint.folder}: {cut(name)}: {error}.") from None


def _tell_mixed(checkpoint, by_leaf: dict[tuple, list[Tensor]], forms: dict[tuple, tuple[Stored, ...]]) -> None:
    """A note on the tensors that are stored unlike the most of their leaf."""
    odd, dtypes = [], set()
    for path, group in by_leaf.items():
        most = usual(forms[path])
        odd += [t.name for t, form in zip(group, forms[path], strict=True) if form != most]
        if len(set(forms[path])) > 1:
            held = _shared(checkpoint, group, forms[path])
            dtypes.add(f"{held.dtype} with {held.scale} scales" if held.scale else str(held.dtype))
    if odd:
        note(
            f"{checkpoint.folder}: {len(odd)} tensors are stored in another dtype than the most of their leaf "
            f"({', '.join(some(odd))}): these leaves are held, every value exactly, as {' or '.join(sorted(dtypes))}."
        )


def read_tensor(checkpoint: Checkpoint | Layers, name: str, scale: bool = False) -> np.ndarray:
    """A tensor's values, FP4 unpacked, or a tensor of scales, checked to be finite."""
    array = checkpoint.read(name)
    check_finite(checkpoint.entries[name], array, scale)
    return as_held(array)


def _load_leaf(checkpoint: Checkpoint | Layers, tensors: list[Tensor], leaf: Leaf, form: Stored):
    """One leaf: an array of ``form``'s dtype, or with scales a `Quantized`."""
    values, block = aligned(leaf.matrix, form.dtype), form.block(checkpoint.block)
    scales = None if form.scale is None else aligned(leaf.scale(block), form.scale)
    for tensor in tensors:
        array = read_tensor(checkpoint, tensor.name)
        own = read_tensor(checkpoint, tensor.scale, scale=True) if is_quantized(array.dtype) else None
        if scales is not None:
            scales[tensor.index] = 1 if own is None else own.T
        elif own is not None:
            array = dequantize_matrix(array, own, block_of(array.dtype, checkpoint.block), form.dtype)
        array = cast(checkpoint.entries[tensor.name], array, form.dtype)
        if tensor.transposed:
            _transpose_into(values[tensor.index], array)
        else:
            values[tensor.index] = array
    if scales is None:
        return jax.device_put(values.reshape(leaf.shape))
    return Quantized(jax.device_put(values), jax.device_put(scales), leaf.block(block), leaf.dims)


def _load_shards(checkpoint, tensors, leaf: Leaf, form: Stored, variable, ctx: Context):
    """`_load_leaf` into the leaf's shards."""
    block = form.block(checkpoint.block)
    if form.scale is not None:
        shapes = (jax.ShapeDtypeStruct(leaf.matrix, form.dtype), jax.ShapeDtypeStruct(leaf.scale(block), form.scale))
        variable = variable.replace(Quantized(*shapes, leaf.block(block), leaf.dims))
    where = shardings(variable, ctx).get_value()
    return load_leaf(checkpoint.entries, tensors, leaf, form, checkpoint.block, where)


def _transpose_into(out: np.ndarray, array: np.ndarray) -> None:
    """``out[...] = array.T`` in strips that stay in the cache: four times faster than at once."""
    raw = f"u{array.itemsize}"
    out, array = out.view(raw), array.view(raw)
    for first in range(0, array.shape[0], STRIP):
        out[:, first : first + STRIP] = array[first : first + STRIP].T


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose start JAX can take over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
