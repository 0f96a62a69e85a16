"""Arrays of a converted folder: zarr files in an Orbax checkpoint, read and written a chunk at a time.

Orbax writes whole arrays only, and reads them whole. So it is given a tree of empty arrays, for which it writes
the checkpoint with its metadata, and each array's own files are then replaced through TensorStore, Orbax's own
storage library. Chunks are whole rows, not compressed: weights hardly shrink, and compressing takes longer than
writing.
"""

import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np

from deepseek_jax.convert.safetensors import CheckpointError, write_back
from deepseek_jax.notes import cut
from deepseek_jax.version import __version__

# Small enough for the C library to use the same memory again and again, large enough for the disk.
CHUNK_BYTES = 2**24
Domain = tuple[slice, ...]


def chunk_shape(shape: tuple[int, ...], stacked: int, itemsize: int) -> tuple[int, ...]:
    """The part of an array that is one file: up to ``CHUNK_BYTES``, in parts as equal as can be.

    The array is ``stacked`` axes of matrices; their rows are never cut.
    """
    nbytes = math.prod(shape[stacked + 1 :]) * itemsize
    for axis in range(stacked, -1, -1):
        if nbytes * shape[axis] > CHUNK_BYTES:
            count = -(-shape[axis] // max(1, CHUNK_BYTES // nbytes))
            return (*[1] * axis, -(-shape[axis] // count), *shape[axis + 1 :])
        nbytes *= shape[axis]
    return shape


def array_folder(checkpoint: Path, key: tuple[str, ...]) -> Path:
    return checkpoint.absolute() / "state" / ".".join(key)


class Array:
    """One array: ``shape``, ``dtype``, and its chunks."""

    def __init__(self, checkpoint: Path, key: tuple[str, ...], **options):
        """``options``: of TensorStore's `open`. Raises CheckpointError, OSError when the array cannot be opened."""
        import tensorstore

        self.path, self.key = checkpoint, key
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{array_folder(checkpoint, key)}/"},
            "metadata": {"compressor": None},
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        }
        with self.errors():
            self.store = tensorstore.open(spec, **options).result()
        self.shape, self.dtype = tuple(self.store.shape), np.dtype(self.store.dtype.numpy_dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def find(cls, checkpoint: Path, key: tuple[str, ...]) -> "Array | None":
        """The array, or None when the checkpoint does not have it."""
        return cls(checkpoint, key) if (array_folder(checkpoint, key) / ".zarray").exists() else None

    @classmethod
    def create(cls, checkpoint: Path, key: tuple[str, ...], shape: tuple[int, ...], dtype, stacked: int) -> "Array":
        """In place of what stands there."""
        import tensorstore

        chunk = tensorstore.ChunkLayout(chunk_shape=chunk_shape(shape, stacked, dtype.itemsize))
        return cls(checkpoint, key, create=True, delete_existing=True, dtype=dtype, shape=shape, chunk_layout=chunk)

    def chunks(self) -> Iterator[Domain]:
        sizes = self.store.chunk_layout.read_chunk.shape
        axes = [range(0, n, size) for n, size in zip(self.shape, sizes, strict=True)]
        for starts in product(*axes):
            yield tuple(slice(s, min(s + size, n)) for s, size, n in zip(starts, sizes, self.shape, strict=True))

    def read(self, domain: Domain) -> np.ndarray:
        """The values at ``domain``, in a new array. Raises CheckpointError when they are damaged or missing."""
        with self.errors():
            return self.store[domain].read(order="C").result()

    def write(self, domain: Domain, values: np.ndarray) -> None:
        """Writes whole chunks, and returns when they are on the disk."""
        with self.errors():
            self.store[domain].write(values, can_reference_source_data_indefinitely=True).result()
        self.write_back(domain)

    def write_back(self, domain: Domain) -> None:
        """Takes a chunk, written or read, out of the system's cache."""
        sizes = self.store.chunk_layout.read_chunk.shape
        chunk = ".".join(str(part.start // size) for part, size in zip(domain, sizes, strict=True))
        with (array_folder(self.path, self.key) / chunk).open("rb") as file:
            write_back(file.fileno())

    @contextmanager
    def errors(self) -> Iterator[None]:
        """TensorStore's errors as ours: OSError for the system's, CheckpointError for damage."""
        try:
            with disk_errors(self.path):
                yield
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {'/'.join(self.key)} cannot be read: {cut(error)}") from None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """TensorStore reports the system's refusal to write as a ValueError that quotes its code."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def write_skeleton(path: Path, keys: list[tuple[str, ...]]) -> None:
    """An Orbax checkpoint whose arrays, named by ``keys``, are still to be made. Raises OSError."""
    from orbax.checkpoint.experimental import v1 as ocp

    tree: dict = {}
    for key in keys:
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = np.zeros(1, np.uint8)
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(max(level, logging.ERROR))  # it warns that files of the form not asked for need no merging
    try:
        with context, disk_errors(path):
            ocp.save(path.absolute(), tree, custom_metadata={"deepseek_jax_version": __version__})
    finally:
        log.setLevel(level)
