"""The safetensors format: a reader and a streaming writer that know FP8, and folders of such files.

A file is 8 bytes of little-endian header length, a JSON header (name -> dtype, shape, offsets into the rest),
then the tensors' bytes without gaps. Tensors are read and written one at a time through plain file reads: a
mapped file that is cut short kills the process, and its pages count as the process's memory.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import ml_dtypes
import numpy as np

from deepseek_jax.notes import cut, shown
from deepseek_jax.small_files import SMALL, read_json
from deepseek_jax.version import __version__

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
LONGEST_NAME = 255  # of a file, on the systems in use
FLUSHED = 2**28  # bytes that a file's writer leaves to the system's cache
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or contradicts itself; the message names what and where."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype, shape and its bytes [start, stop) in the file."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """The tensor's values, or its rows [first, last), in a new array.

        Raises CheckpointError if the file has become shorter than its header said.
        """
        shape, skipped = self.shape, 0
        if first or last is not None:
            shape = (len(range(self.shape[0])[first:last]), *self.shape[1:])
            skipped = first * (self.nbytes // max(self.shape[0], 1))
        out = np.empty(shape, self.dtype)
        self._fill(out, self.start + skipped)
        return out

    def read_into(self, out: np.ndarray, first: int = 0) -> None:
        """Reads the values, or the rows from ``first`` on, into a contiguous array of the tensor's dtype."""
        fits = out.shape[1:] == self.shape[1:] and first + len(out) <= self.shape[0]
        if (out.dtype, fits, out.flags.c_contiguous) != (self.dtype, True, True):
            raise ValueError(f"{self.name} is {self.dtype} {self.shape}; it does not fit {out.dtype} {out.shape}.")
        self._fill(out, self.start + first * (self.nbytes // self.shape[0]))

    def _fill(self, out: np.ndarray, start: int) -> None:
        with self.file.open("rb", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.file}: truncated within {self.name}, at byte {start + done}.")
                done += count


def load_json(path: Path, most: int = SMALL) -> dict:
    """A JSON object from a file. Raises CheckpointError when it is missing, no regular file, above ``most`` bytes,
    not JSON or no object."""
    try:
        return read_json(path, most)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except ValueError as e:
        raise CheckpointError(str(e)) from None


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and the metadata of a file.

    Raises CheckpointError for a damaged header: length, JSON, dtypes, shapes, and offsets that leave gaps,
    overlap, or do not end where the file ends.
    """
    if not path.is_file():  # opening a pipe would wait for a writer
        raise CheckpointError(f"{path} is not a regular file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{path}: the file has {size} bytes, too few for its header of {length}.")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: the header is not valid JSON: {cut(e)}.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object, not {type(header).__name__}.")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings, not {shown(metadata)}.")
    entries = {name: _entry(path, name, info, 8 + length) for name, info in header.items()}
    end, ordered = 8 + length, sorted(entries.values(), key=lambda e: (e.start, e.stop))
    for entry in ordered:
        if entry.start != end:
            raise CheckpointError(
                f"{path}: {cut(entry.name)} starts at byte {entry.start}, the one before ends at {end}."
            )
        end = entry.stop
    if end != size:
        where = next((f", so that {cut(entry.name)} is truncated" for entry in ordered if entry.stop > size), "")
        raise CheckpointError(f"{path}: the header describes {end} bytes, the file has {size}{where}.")
    return entries, metadata


def _unique(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(n for n in names if names.count(n) > 1))} occurs twice")
    return result


def _entry(path: Path, name: str, info, base: int) -> Entry:
    def refuse(what: str):
        return CheckpointError(f"{path}: {cut(name)} has {what}.")

    def naturals(value, count=None) -> bool:
        ok = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
        return ok and (count is None or len(value) == count)

    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= set(info):
        raise refuse(f"a header without dtype, shape and data_offsets: {shown(info)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"the unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not naturals(shape):
        raise refuse(f"a bad shape: {shown(shape)}")
    if not naturals(offsets, 2) or offsets[0] > offsets[1]:
        raise refuse(f"bad offsets: {shown(offsets)}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise refuse(f"{offsets[1] - offsets[0]} bytes, but {dtype} {shown(shape)} takes {size}")
    return Entry(path, name, DTYPES[dtype], tuple(shape), base + offsets[0], base + offsets[1])


def write_back(descriptor: int) -> None:
    """Puts a file's bytes on the disk and out of the system's cache.

    Left in the cache, the bytes of a large checkpoint take all free memory, and finding more costs more time than
    writing.
    """
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class Writer:
    """Writes one file: the header first, then each tensor at its place, in any order, from any thread.

    Used as a context manager. The file has a temporary name beside ``path`` until all tensors are in it and
    on the disk; after an error nothing is left. ``specs``: name -> (dtype, shape).
    """

    def __init__(
        self,
        path: Path,
        specs: dict[str, tuple[np.dtype, tuple[int, ...]]],
        metadata: dict[str, str] | None = None,
    ):
        self.path, self.temporary = path, path.with_name(f".{path.name}.writing")
        header = {"__metadata__": {"format": "pt", "deepseek_jax_version": __version__, **(metadata or {})}}
        position = 0
        # Wide dtypes first keeps every tensor aligned, which PyTorch's reader needs.
        self.places, self.missing, self.unflushed, self.lock = {}, {}, 0, Lock()
        for name in sorted(specs, key=lambda n: (-np.dtype(specs[n][0]).itemsize, n)):
            dtype, shape = np.dtype(specs[name][0]), tuple(specs[name][1])
            stop = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
            self.places[name] = (dtype, shape, position)
            self.missing[name] = stop - position
            position = stop
        raw = json.dumps(header, separators=(",", ":")).encode()
        self.header = raw + b" " * (-len(raw) % 8)
        self.size = 8 + len(self.header) + position

    def __enter__(self) -> "Writer":
        self.file = self.temporary.open("wb", buffering=0)
        try:
            self._write(len(self.header).to_bytes(8, "little") + self.header, 0)
            self.file.truncate(self.size)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor; its dtype and shape are those announced, and it is written once."""
        dtype, shape, _ = self.places[name]
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} was announced as {dtype} {shape}, but is {array.dtype} {array.shape}.")
        self.write_rows(name, array, 0)

    def write_rows(self, name: str, rows: np.ndarray, first: int) -> None:
        """Writes a tensor's rows from ``first`` on, in its dtype."""
        _, shape, position = self.places[name]
        start = 8 + len(self.header) + position + first * (rows.nbytes // max(len(rows), 1) if shape else 0)
        self._write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8), start)
        with self.lock:
            self.missing[name] -= rows.nbytes
            self.unflushed += rows.nbytes
            flush = self.unflushed > FLUSHED
            if flush:
                self.unflushed = 0
        if flush:
            write_back(self.file.fileno())

    def _write(self, data, position: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self.file.fileno(), view, position)
            view, position = view[count:], position + count

    def _discard(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                missing = [name for name, nbytes in self.missing.items() if nbytes]
                if missing:
                    raise ValueError(f"{self.path}: {len(missing)} tensors were never written: {min(missing)}.")
                write_back(self.file.fileno())
                self.temporary.replace(self.path)
        finally:
            self._discard()
