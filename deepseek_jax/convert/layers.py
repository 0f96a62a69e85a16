"""The converted layout: an Orbax checkpoint for each layer, holding the published matrices as they are stored.

::

    config.json, tokenizer files        byte for byte those of the source
    deepseek_jax.json                   format, versions, the source's files and the tensors in each
    model/                              Orbax: embed, norm, head
    layers/0/ ... layers/61/            Orbax: attn_norm/weight, attn/q_a, ..., ffn/down; the last are MTP layers

Keys are the names of our leaves. A matrix has its published orientation [out, in], dtype and bytes; gate and up
are stacked, and so are experts: ffn/gate_up is [experts, 2, out, in]. Below a key stand ``values`` and, for FP8,
``scale``. A tensor that is stored unlike the most of its stack stands apart, below ffn/gate_up/4_1, and its place in
the stack is filled with zeros; the record lists these, and has format version 3 then. The folder does not depend on
how a model groups its layers; `Layers` reads it tensor by tensor under the published names.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek_jax.configs.layers import Stack
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.arrays import CHUNK_BYTES, Array
from deepseek_jax.convert.formats import block_size
from deepseek_jax.convert.names import Tensor, check_size, layout
from deepseek_jax.convert.safetensors import CheckpointError, load_json
from deepseek_jax.notes import shown
from deepseek_jax.small_files import LARGE

RECORD = "deepseek_jax.json"
FORMAT = "layers"
FORMAT_VERSION = 2
APART_VERSION = 3  # with tensors that stand apart: an older reader would take the zeros in their places


@dataclass(frozen=True)
class Place:
    """Where a published tensor stands: Orbax folder, key in its tree, index in that array."""

    unit: str
    key: tuple[str, ...]
    index: tuple[int, ...]
    tensor: Tensor


def places(cfg: ModelConfig, apart: Collection[str] = ()) -> dict[str, Place]:
    """Published name -> place, for every tensor that is not a copy, in published order; ``apart``: those of a stack
    that stand by themselves."""
    tensors, leaves = layout(cfg)
    found, stacks = {}, cfg.stacks
    for tensor in tensors:
        if tensor.copy:
            continue
        unit, key = _unit(tensor, stacks, cfg.n_layers)
        index = tuple(i for i in tensor.index[leaves[tensor.path].stacked :] if isinstance(i, int))
        if tensor.name in apart:
            key, index = (*key, "_".join(map(str, index))), ()
        found[tensor.name] = Place(unit, key, index, tensor)
    return found


def _unit(tensor: Tensor, stacks: tuple[Stack, ...], n_layers: int) -> tuple[str, tuple[str, ...]]:
    if tensor.path[0] == "stacks":
        return f"layers/{stacks[tensor.path[1]].numbers[tensor.index[0]]}", tensor.path[2:]
    if tensor.path[0] == "mtp":
        rest = tensor.path[2:]
        return f"layers/{n_layers + tensor.path[1]}", rest[1:] if rest[0] == "block" else rest
    return "model", tensor.path


@dataclass(frozen=True)
class LayerEntry:
    """One published tensor of a converted folder, at ``index`` of an array; as `safetensors.Entry`."""

    array: Array
    name: str
    shape: tuple[int, ...]
    index: tuple[int, ...]

    @property
    def file(self) -> Path:
        return self.array.path

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Layers:
    """A converted folder, read by published names; the interface of `safetensors.Checkpoint`.

    Keeps the small array read last, such as all experts' scales. Copies of the embedding and head have entries,
    and read the original. Raises CheckpointError for a folder of another format or version, and for one that
    lacks a layer.
    """

    def __init__(self, folder: str | Path, cfg: ModelConfig):
        self.folder = Path(folder)
        self.block = block_size(self.folder, cfg)
        self.record = read_record(self.folder)
        self.entries: dict[str, LayerEntry] = {}
        check_size(cfg, {name for names in self.record["files"].values() for name in names}, self.folder)
        self.arrays: dict[tuple[str, tuple[str, ...]], Array | None] = {}
        self._held: tuple[Array | None, np.ndarray | None] = (None, None)
        apart = self.record.get("apart", [])
        for name, place in places(cfg, frozenset(apart)).items():
            for full, kind in ((name, "values"), (place.tensor.scale, "scale")):
                array = self._array(place.unit, (*place.key, kind))
                if array is not None:
                    shape = array.shape[len(place.index) :]
                    self.entries[full] = LayerEntry(array, full, shape, place.index)
        recorded = {name for names in self.record["files"].values() for name in names}
        for copy, original in copies(cfg).items():
            if original in self.entries and copy in recorded:
                self.entries[copy] = self.entries[original]

    def _array(self, unit: str, key: tuple[str, ...]) -> Array | None:
        if (unit, key) not in self.arrays:
            path = self.folder / unit
            if not path.is_dir():
                raise CheckpointError(f"{path} is missing: the folder is not whole.")
            self.arrays[unit, key] = Array.find(path, key)
        return self.arrays[unit, key]

    def read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        array = entry.array
        if array.nbytes > CHUNK_BYTES:
            return array.read(tuple(slice(i, i + 1) for i in entry.index)).reshape(entry.shape)
        if self._held[0] is not array:
            self._held = (array, array.read(()))
        return self._held[1][entry.index]

    def __iter__(self):
        return iter(self.entries)


def copies(cfg: ModelConfig) -> dict[str, str]:
    """The copies of embedding and head -> the tensors they repeat."""
    tensors, _ = layout(cfg)
    originals = {t.path: t.name for t in tensors if not t.copy and len(t.path) == 1}
    return {t.name: originals[t.path] for t in tensors if t.copy}


def read_record(folder: Path) -> dict:
    """The folder's deepseek_jax.json.

    Raises CheckpointError for another format or version, and for contents of another form: ``files`` maps plain
    names of safetensors files to lists of tensors, no tensor stands in it twice, and ``apart`` lists some of them.
    """
    record = load_json(folder / RECORD, LARGE)
    if record.get("format") != FORMAT or record.get("format_version") not in (FORMAT_VERSION, APART_VERSION):
        raise CheckpointError(
            f"{folder / RECORD}: format {shown(record.get('format'))} version {shown(record.get('format_version'))} is "
            f"not read here, only {FORMAT!r} versions {FORMAT_VERSION} and {APART_VERSION}."
        )
    indexed, files = record.get("indexed"), record.get("files")
    if not isinstance(indexed, bool) or not isinstance(files, dict):
        raise CheckpointError(
            f"{folder / RECORD} must hold indexed (true or false) and files (an object), not {shown(indexed)} and "
            f"{type(files).__name__}."
        )
    held = set()
    for file, names in files.items():
        # The name is one that will be written: it must not lead out of the destination.
        if not file.endswith(".safetensors") or file != Path(file).name:
            raise CheckpointError(f"{folder / RECORD}: {shown(file)} is not the plain name of a safetensors file.")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{folder / RECORD}: {file} must have a list of tensors' names, not {shown(names)}.")
        if len(set(names)) != len(names) or held & set(names):
            raise CheckpointError(f"{folder / RECORD}: {file} has a tensor that stood there before.")
        held |= set(names)
    apart = record.get("apart", [])
    if not isinstance(apart, list) or not all(isinstance(name, str) and name in held for name in apart):
        raise CheckpointError(f"{folder / RECORD}: apart must list tensors of its files, not {shown(apart)}.")
    return record
