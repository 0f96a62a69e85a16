"""`load_pretrained`: a published checkpoint as a model.

Tensors are read one at a time into the leaves' final, stacked arrays: memory is the model and one tensor.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.hf import config_from_json, eos_ids, reads
from deepseek_jax.configs.published.fields import ALIASES
from deepseek_jax.configs.schema import ConfigError, ModelConfig
from deepseek_jax.convert.check import check_copy, check_tensors, some
from deepseek_jax.convert.checkpoint import Checkpoint, stored_names
from deepseek_jax.convert.folders import why_no_checkpoint
from deepseek_jax.convert.formats import FLOATS, STORED, Stored, block_size, cast, check_finite, shared, stored, usual
from deepseek_jax.convert.layers import RECORD, Layers, read_record
from deepseek_jax.convert.names import Leaf, Tensor, check_size, layout
from deepseek_jax.convert.naming import Prefix, find_prefix, fused_names, layer_of, published_entries
from deepseek_jax.convert.other_config import with_config
from deepseek_jax.convert.pickles import weight_files
from deepseek_jax.convert.safetensors import INDEX, CheckpointError, load_json
from deepseek_jax.convert.shards import load_leaf
from deepseek_jax.convert.training import is_training, load_training
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import RouterBias, map_variables
from deepseek_jax.core.quant import FP8, Quantized, dequantize_matrix
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.notes import cut, note, shown
from deepseek_jax.parallel.placement import place
from deepseek_jax.parallel.shardings import shardings

ALIGNMENT = 64
STRIP = 64
MTP_DEPTH = "num_nextn_predict_layers"


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
        layer = layer_of(name)
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
    if prefix != Prefix():
        note(f"{folder}: the names begin with {shown(prefix.trunk)}: read as if with 'model.'.")
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
    forms = {path: tuple(stored(checkpoint.entries, t) for t in group) for path, group in by_leaf.items()}
    if dtype is None:
        _tell_mixed(checkpoint, by_leaf, forms)

    def fill(path, variable):
        if isinstance(variable, RouterBias):
            form = Stored(np.dtype(np.float32))
        else:
            form = Stored(dtype) if dtype is not None else _shared(checkpoint, by_leaf[path], forms[path])
        arguments = (checkpoint, by_leaf[path], leaves[path], form)
        value = _load_leaf(*arguments) if ctx.mesh is None else _load_shards(*arguments, variable, ctx)
        kept = {} if dtype is not None or set(forms[path]) == {form} else {STORED: forms[path]}
        return type(variable)(value, **variable.get_metadata(), **kept)

    return map_variables(fill, abstract(cfg))


def _shared(checkpoint: Checkpoint | Layers, tensors: list[Tensor], forms: tuple[Stored, ...]) -> Stored:
    try:
        return shared(forms)
    except CheckpointError as error:
        name = next(t.name for t, form in zip(tensors, forms, strict=True) if form.dtype not in (*FLOATS, FP8))
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


def read_config(folder: Path) -> ModelConfig:
    """A folder's config.

    The tokens that end a text are those of generation_config.json, where it names any. The number of MTP layers is
    that of the files where config.json does not say it, or announces layers of which no tensor is there; a note says
    so then.
    """
    if (why := why_no_checkpoint(folder)) is not None:
        raise CheckpointError(why)
    data = _with_mtp_depth(folder, load_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    stops = load_json(generation) if generation.exists() else {}
    try:
        cfg = config_from_json(data, name=folder.resolve().name)
        if "eos_token_id" in stops:
            cfg = replace(cfg, eos_ids=eos_ids(stops["eos_token_id"], generation.name))
        return cfg
    except ConfigError as e:
        raise ConfigError(f"{folder}: {e}") from None


def _with_mtp_depth(folder: Path, data: dict) -> dict:
    """A config.json with the number of MTP layers that the folder's files have, where it has none, or a larger one."""
    named = next((name for name in (MTP_DEPTH, ALIASES[MTP_DEPTH]) if data.get(name) is not None), None)
    layers, announced = data.get("num_hidden_layers"), data.get(named, 0)
    counts = all(type(n) is int and n >= 0 for n in (layers, announced))
    if not counts or not reads(data, MTP_DEPTH) or (named is not None and not announced):
        return data
    names = tensor_names(folder)
    if names is None:
        return data
    last = max((layer for layer in map(layer_of, names) if layer is not None), default=-1)
    depth = max(0, last + 1 - layers)
    if named is not None and last < layers - 1:
        return data  # fewer layers than the model's own: the config is another's
    if named is None:
        what = f"{depth} MTP layers are there" if depth else "no tensor of an MTP layer is there"
        note(f"{folder}: config.json lacks {MTP_DEPTH}: taken to be {depth}, since {what}.")
    elif depth < announced:
        note(
            f"{folder}: config.json announces {announced} MTP layers ({named}), of which the files hold "
            f"{depth or 'none'}: read with {depth}."
        )
    else:
        return data
    return {**data, named or MTP_DEPTH: depth, **({ALIASES[MTP_DEPTH]: depth} if ALIASES[MTP_DEPTH] in data else {})}


def tensor_names(folder: Path) -> list[str] | None:
    """The published names of a published or converted folder's tensors; None where it has none to look at."""
    if (folder / RECORD).exists():
        files = None if is_training(folder) else read_record(folder)["files"]
        return None if files is None else [name for names in files.values() for name in names]
    if not (folder / INDEX).exists() and not weight_files(folder):
        return None
    prefix = find_prefix(names := stored_names(folder))
    return [prefix.published(name) for name in names]


def read_tensor(checkpoint: Checkpoint | Layers, name: str, scale: bool = False) -> np.ndarray:
    """A tensor's stored values, or a tensor of scales, checked to be finite."""
    array = checkpoint.read(name)
    check_finite(checkpoint.entries[name], array, scale)
    return array


def _load_leaf(checkpoint: Checkpoint | Layers, tensors: list[Tensor], leaf: Leaf, form: Stored):
    """One leaf: an array of ``form``'s dtype, or with scales a `Quantized`."""
    values, block = aligned(leaf.matrix, form.dtype), checkpoint.block
    scales = None if form.scale is None else aligned(leaf.scale(block), form.scale)
    for tensor in tensors:
        array = read_tensor(checkpoint, tensor.name)
        if scales is not None:
            fp8 = array.dtype == FP8
            scales[tensor.index] = read_tensor(checkpoint, tensor.scale, scale=True).T if fp8 else 1
        elif array.dtype == FP8:
            array = dequantize_matrix(array, read_tensor(checkpoint, tensor.scale, scale=True), block, form.dtype)
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
    block = checkpoint.block
    if form.scale is not None:
        shapes = (jax.ShapeDtypeStruct(leaf.matrix, form.dtype), jax.ShapeDtypeStruct(leaf.scale(block), form.scale))
        variable = variable.replace(Quantized(*shapes, leaf.block(block), leaf.dims))
    where = shardings(variable, ctx).get_value()
    return load_leaf(checkpoint.entries, tensors, leaf, form, block, where)


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
