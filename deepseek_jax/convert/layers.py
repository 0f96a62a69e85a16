"""The converted layout: an Orbax checkpoint for each layer, holding the published matrices as they are stored.

::

    config.json, tokenizer files        byte for byte those of the source
    deepseek_jax.json                   format, versions, the source's files and the tensors in each
    model/                              Orbax: embed, norm, head
    layers/0/ ... layers/61/            Orbax: attn_norm/weight, attn/q_a, ..., ffn/down; the last are MTP layers

Keys are the names of our leaves. A matrix has its published orientation [out, in], dtype and bytes; gate and up
are stacked, and so are experts, in groups named by their first expert: ffn/gate_up/16 is [experts, 2, out, in].
Below a key stand ``values`` and, for FP8, ``scale``. The folder does not depend on how a model groups its
layers; `Layers` reads it tensor by tensor under the published names.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.names import SCALE, Tensor, layout
from deepseek_jax.convert.safetensors import CheckpointError, load_json

RECORD = "deepseek_jax.json"
FORMAT = "layers"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Place:
    """Where a published tensor stands: Orbax folder, key in its tree, index in that array."""

    unit: str
    key: tuple[str, ...]
    index: tuple[int, ...]


def places(cfg: ModelConfig, block: tuple[int, int], group: int) -> dict[str, Place]:
    """Published name -> place, for every tensor that is not a copy, in published order.

    ``group``: experts are put together up to this many numbers.
    """
    tensors, leaves = layout(cfg, block)
    found = {}
    for tensor in tensors:
        if tensor.copy:
            continue
        unit, key = _unit(tensor, cfg)
        index = tuple(i for i in tensor.index[leaves[tensor.path].stacked :] if isinstance(i, int))
        if tensor.expert:
            matrix = leaves[tensor.path].matrix[leaves[tensor.path].stacked + 1 :]
            size = max(1, group // math.prod(matrix))
            first = index[0] // size * size
            key, index = (*key, str(first)), (index[0] - first, *index[1:])
        found[tensor.name] = Place(unit, key, index)
    return found


def _unit(tensor: Tensor, cfg: ModelConfig) -> tuple[str, tuple[str, ...]]:
    if tensor.path[0] == "stacks":
        first = cfg.n_dense_layers if tensor.path[1] else 0
        return f"layers/{first + tensor.index[0]}", tensor.path[2:]
    if tensor.path[0] == "mtp":
        rest = tensor.path[2:]
        return f"layers/{cfg.n_layers + tensor.path[1]}", rest[1:] if rest[0] == "block" else rest
    return "model", tensor.path


@dataclass(frozen=True)
class LayerEntry:
    """One published tensor of a converted folder; as `safetensors.Entry`, but read through `Layers`."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    key: tuple[str, ...]
    index: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Layers:
    """A converted folder, read by published names; the interface of `safetensors.Checkpoint`.

    Keeps the values and the scales read last: the experts of a group follow each other. Copies of the embedding
    and head have entries, and read the original. Raises CheckpointError for a folder of another format or
    version, and for one that lacks a layer.
    """

    def __init__(self, folder: str | Path, cfg: ModelConfig, block: tuple[int, int]):
        self.folder = Path(folder)
        self.record = read_record(self.folder)
        self.entries: dict[str, LayerEntry] = {}
        self._metadata: dict[str, Any] = {}
        self._held: dict[str, tuple[Any, np.ndarray | None]] = {}
        for name, place in places(cfg, block, self.record["group_size"]).items():
            arrays = _find(self._unit_metadata(place.unit), place.key)
            for suffix, kind in (("", "values"), (SCALE, "scale")):
                if arrays is not None and kind in arrays:
                    array, full = arrays[kind], name + suffix
                    shape = tuple(array.shape)[len(place.index) :]
                    self.entries[full] = LayerEntry(
                        self.folder / place.unit, full, np.dtype(array.dtype), shape, (*place.key, kind), place.index
                    )
        for copy, original in copies(cfg, block).items():
            if original in self.entries:
                self.entries[copy] = self.entries[original]

    def _unit_metadata(self, unit: str):
        if unit not in self._metadata:
            from orbax.checkpoint.experimental import v1 as ocp

            path = self.folder / unit
            if not path.is_dir():
                raise CheckpointError(f"{path} is missing: the folder is not whole.")
            try:
                self._metadata[unit] = ocp.metadata(path).metadata
            except (ValueError, OSError, KeyError) as e:
                raise CheckpointError(f"{path} cannot be read by Orbax: {e}") from None
        return self._metadata[unit]

    def read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        place, kind = (entry.file, entry.key), entry.key[-1]
        if self._held.get(kind, (None,))[0] != place:
            self._held.pop(kind, None)
            self._held[kind] = (place, self._load(entry))
        return self._held[kind][1][entry.index]

    def _load(self, entry: LayerEntry) -> np.ndarray:
        """One array of a layer: Orbax is asked for nothing else."""
        from orbax.checkpoint.experimental import v1 as ocp

        tree = self._metadata[str(entry.file.relative_to(self.folder))]

        def only(node, path=()):
            if isinstance(node, dict):
                return {key: only(child, (*path, key)) for key, child in node.items()}
            return node if path == entry.key else ocp.PLACEHOLDER

        try:
            return np.asarray(_find(ocp.load(entry.file, only(tree)), entry.key))
        except (ValueError, OSError) as e:
            raise CheckpointError(f"{entry.file}: {'/'.join(entry.key)} cannot be read: {e}") from None

    def __iter__(self):
        return iter(self.entries)


def copies(cfg: ModelConfig, block: tuple[int, int]) -> dict[str, str]:
    """The MTP layers' copies of embedding and head -> the tensors they repeat."""
    tensors, _ = layout(cfg, block)
    originals = {t.path: t.name for t in tensors if not t.copy and len(t.path) == 1}
    return {t.name: originals[t.path] for t in tensors if t.copy}


def read_record(folder: Path) -> dict:
    """The folder's deepseek_jax.json.

    Raises CheckpointError for another format or version, and for contents of another form: ``files`` maps plain
    names of safetensors files to lists of tensors, and no tensor stands in it twice.
    """
    record = load_json(folder / RECORD)
    if record.get("format") != FORMAT or record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / RECORD}: format {record.get('format')!r} version {record.get('format_version')!r} is not "
            f"read here, only {FORMAT!r} version {FORMAT_VERSION}."
        )
    group, indexed, files = (record.get(key) for key in ("group_size", "indexed", "files"))
    if type(group) is not int or group < 1 or not isinstance(indexed, bool) or not isinstance(files, dict):
        raise CheckpointError(
            f"{folder / RECORD} must hold group_size (a positive integer), indexed (true or false) and files (an "
            f"object), not {group!r}, {indexed!r} and {type(files).__name__}."
        )
    held = set()
    for file, names in files.items():
        # The name is one that will be written: it must not lead out of the destination.
        if not file.endswith(".safetensors") or file != Path(file).name:
            raise CheckpointError(f"{folder / RECORD}: {file!r} is not the plain name of a safetensors file.")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{folder / RECORD}: {file} must have a list of tensors' names, not {names!r}.")
        if len(set(names)) != len(names) or held & set(names):
            raise CheckpointError(f"{folder / RECORD}: {file} has a tensor that stood there before.")
        held |= set(names)
    return record


def _find(tree, key: tuple[str, ...]):
    for part in key:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
