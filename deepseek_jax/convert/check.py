"""Compares what a checkpoint holds with what its config implies, before anything of it is used.

What the reference loads with the same meaning passes, and a note says what was taken for granted or left out. What is
missing, contradicts itself or would change a number is refused by name.
"""

import jax
import numpy as np

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.formats import INTEGERS, READ, SCALES, block_of, packed_shape, scale_shape
from deepseek_jax.convert.layers import Layers
from deepseek_jax.convert.names import IGNORED, Tensor
from deepseek_jax.convert.naming import layer_of
from deepseek_jax.convert.safetensors import CheckpointError, load_json
from deepseek_jax.convert.tables import names_of
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.quant import FP8, PACKED
from deepseek_jax.notes import cut, note

# So many problems of one kind are named; the rest are counted.
NAMED = 5
COMPARED_ROWS = 4096
# The tensor that tells a layer of multi-token prediction.
MTP_MARK = "enorm.weight"


def check_tensors(checkpoint: Checkpoint | Layers, cfg: ModelConfig, tensors) -> None:
    """Compares the names, shapes and dtypes of a checkpoint with those that its config implies.

    Raises one CheckpointError that names what is missing, unexpected and wrong.
    """
    entries, block, problems = checkpoint.entries, checkpoint.block, []
    expected, missing, shared, scaled = set(), [], [], []
    for tensor in tensors:
        expected.add(tensor.name)
        entry = entries.get(tensor.name)
        if entry is None:
            (shared if tensor.copy else missing).append(tensor)
            continue
        packed = tensor.fp8 and entry.dtype == PACKED and tensor.shape[-1] % 2 == 0
        shape = packed_shape(tensor.shape) if packed else tensor.shape
        if entry.shape != shape:
            problems.append(f"{entry.file}: {tensor.name} has shape {entry.shape}, the config implies {shape}")
            continue
        scale = entries.get(tensor.scale)
        if packed or (entry.dtype == FP8 and tensor.fp8):
            expected.add(tensor.scale)
            own = block_of(entry.dtype, block)
            shape = scale_shape(tensor, own)
            if scale is None:
                missing.append(tensor.scale)
            elif scale.shape != shape:
                problems.append(f"{scale.file}: {scale.name} has shape {scale.shape}, blocks of {own} imply {shape}")
            elif scale.dtype not in SCALES:
                problems.append(
                    f"{scale.file}: {scale.name} has dtype {scale.dtype}, which no scale has here: "
                    f"{', '.join(map(str, SCALES))} are read"
                )
        elif tensor.fixed is not None and tensor.fixed.kind == "i":
            problems += _table_problems(checkpoint, tensor, cfg)
        elif entry.dtype not in READ:
            problems.append(f"{entry.file}: {tensor.name} has dtype {entry.dtype}, which is not read here")
        elif scale is not None and tensor.fp8:
            expected.add(scale.name)
            scaled.append(tensor)
    missing = [t if isinstance(t, str) else t.name for t in missing]
    left = _left_out(checkpoint, cfg, expected)
    unexpected = [n for n in entries if n not in expected and n not in left]
    problems = _first(problems)
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {', '.join(some(missing))}")
    if unexpected:
        files = [f"{name} in {entries[name].file.name}" for name in unexpected]
        problems.append(f"{len(unexpected)} tensors are unexpected: {', '.join(some(files))}")
    if scaled and _is_quantised(checkpoint):
        dtype = entries[scaled[0].name].dtype
        problems.append(
            f"{len(scaled)} scales stand beside weights that are not FP8, {scaled[0].scale} beside {dtype}, and "
            "config.json has a quantization_config, by which they would be multiplied: remove the scales, or "
            "quantization_config, if the weights are dequantised already"
        )
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: " + "; ".join(problems) + ".")
    _tell(checkpoint, cfg, [t for t in shared if t.written], left, [t.scale for t in scaled])


def _table_problems(checkpoint: Checkpoint | Layers, tensor: Tensor, cfg: ModelConfig) -> list[str]:
    """What is wrong with a hash router's table: each of its values is an expert."""
    entry = checkpoint.entries[tensor.name]
    if entry.dtype not in INTEGERS:
        return [f"{entry.file}: {tensor.name} has dtype {entry.dtype}, not one of {', '.join(map(str, INTEGERS))}"]
    table = checkpoint.read(tensor.name)
    bad = (table < 0) | (table >= cfg.moe.n_experts)
    if not bad.any():
        return []
    token, place = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
    return [
        f"{entry.file}: {tensor.name} is {table[token, place]} at [{token}, {place}], which is none of the "
        f"{cfg.moe.n_experts} experts"
    ]


def _left_out(checkpoint: Checkpoint | Layers, cfg: ModelConfig, expected: set[str]) -> set[str]:
    """What is no weight (buffers of older tools, empty tensors, states of modules), and whole MTP layers that the
    config does not have."""
    others = [name for name in checkpoint.entries if name not in expected]
    layers = extra_layers(checkpoint, cfg)
    return {
        name
        for name in others
        if name.endswith(IGNORED) or 0 in checkpoint.entries[name].shape or layer_of(name, cfg.n_layers) in layers
    }


def extra_layers(checkpoint: Checkpoint | Layers, cfg: ModelConfig) -> list[int]:
    """The numbers of MTP layers in the files beyond those that the config has."""
    last = cfg.n_layers + cfg.mtp_depth
    marked = (name for name in checkpoint.entries if name.endswith(f".{MTP_MARK}") or name.startswith("mtp."))
    found = {layer_of(name, cfg.n_layers) for name in marked} - {None}
    return sorted(layer for layer in found if layer >= last)


def stored_as(cfg: ModelConfig, layers: list[int]) -> str:
    """The names of MTP layers in files: model.layers.61, 62."""
    first, *others = (names_of(cfg).of_mtp(layer - cfg.n_layers, cfg.n_layers).rstrip(".") for layer in layers)
    return ", ".join([first, *(other.rsplit(".", 1)[1] for other in others)])


def _is_quantised(checkpoint: Checkpoint | Layers) -> bool:
    return load_json(checkpoint.folder / "config.json").get("quantization_config") is not None


def _tell(checkpoint, cfg: ModelConfig, shared: list[Tensor], left: set[str], scaled: list[str]) -> None:
    if shared:
        names = ", ".join(some([t.name for t in shared]))
        note(f"{checkpoint.folder}: {names} are not stored: the main model's embedding and head are taken for them.")
    layers = [
        layer for layer in extra_layers(checkpoint, cfg) if any(layer_of(name, cfg.n_layers) == layer for name in left)
    ]
    if layers:
        note(
            f"{checkpoint.folder}: config.json has {cfg.mtp_depth} MTP layers: those stored as "
            f"{stored_as(cfg, layers)} are left out."
        )
    rest = sorted(name for name in left if layer_of(name, cfg.n_layers) not in layers)
    if rest:
        note(f"{checkpoint.folder}: {len(rest)} tensors that are no weights are left out: {', '.join(some(rest))}.")
    if scaled:
        note(
            f"{checkpoint.folder}: {len(scaled)} scales beside weights that are not FP8 are left out: "
            f"{', '.join(some(scaled))}."
        )


def some(items: list[str]) -> list[str]:
    """The first few names, cut where they are long, and how many more there are."""
    return _first([*map(cut, items[:NAMED]), *items[NAMED:]])


def _first(items: list[str]) -> list[str]:
    return items if len(items) <= NAMED else [*items[:NAMED], f"and {len(items) - NAMED} more"]


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
