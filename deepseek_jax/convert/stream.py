"""Published folder <-> converted folder, in bytes as they are stored, with a group of matrices in memory.

Work goes into ``.NAME.converting-...`` beside the destination, which is renamed at the end. A layer (or, on the
way back, a safetensors file) is there whole or not at all, so that a conversion that was interrupted goes on where
it stopped; what it had begun is made again.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from deepseek_jax.configs.schema import ConfigError
from deepseek_jax.convert.layers import FORMAT, FORMAT_VERSION, RECORD, Layers, Place, places
from deepseek_jax.convert.load import check_copy, check_finite, check_tensors, read_config, read_tensor
from deepseek_jax.convert.names import IGNORED, SCALE, layout
from deepseek_jax.convert.safetensors import INDEX, Checkpoint, CheckpointError, Writer
from deepseek_jax.convert.save import check_free, copy_files, index_json, write_json
from deepseek_jax.version import __version__

# Experts are written in groups of up to this many numbers: what is in memory at once.
GROUP_SIZE = 2**28
# Small arrays are handed to Orbax together, up to this many bytes.
BATCH_BYTES = 2**28
Progress = Callable[[int], None]


def convert(source: str | Path, destination: str | Path, progress: Progress = lambda n: None) -> str:
    """Converts a published folder, or a converted one back; returns the format written, "layers" or "published".

    ``progress``: called with the number of bytes just done. Interrupted, it goes on when called again with the
    same source and destination. Every tensor is checked as `load_pretrained` checks it.

    Raises CheckpointError and ConfigError for a bad source, FileExistsError for a destination that is not
    empty, OSError when the disk is too small, fills up or cannot be written; what is finished then stays.
    """
    source, destination = Path(source), Path(destination).resolve()
    check_free(destination)
    cfg, block = read_config(source)
    if (source / RECORD).exists():
        layers = Layers(source, cfg, block)
        check_tensors(layers, cfg, layout(cfg, block)[0], block)
        with _staging(layers, destination) as folder:
            _to_published(layers, folder, progress)
        return "published"
    checkpoint = Checkpoint(source)
    check_tensors(checkpoint, cfg, layout(cfg, block)[0], block)
    _check_uniform(checkpoint, places(cfg, block, GROUP_SIZE))
    with _staging(checkpoint, destination) as folder:
        _to_layers(checkpoint, folder, cfg, block, progress)
    return FORMAT


@contextmanager
def _staging(source: Checkpoint | Layers, destination: Path) -> Iterator[Path]:
    """The working folder, named after the source; it becomes the destination, or is kept to go on with later."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.converting-"
    folder = destination.with_name(prefix + _fingerprint(source))
    for other in destination.parent.iterdir():
        if other.name.startswith(prefix) and other != folder:
            raise FileExistsError(f"{other} holds another conversion to {destination}; remove it to start anew.")
    needed = sum(entry.nbytes for entry in source.entries.values()) - _size(folder)
    free = shutil.disk_usage(destination.parent).free
    if needed > free:
        raise OSError(f"{destination} needs {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free.")
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    except (CheckpointError, ConfigError):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
        raise OSError(
            error.errno, f"{text}; what is finished is kept in {folder}, where the same command goes on."
        ) from error
    folder.replace(destination)


def _fingerprint(source: Checkpoint | Layers) -> str:
    """Changes with any file of the source (names, shapes, sizes, times) and with the form that is written."""
    digest = hashlib.sha256(repr((FORMAT_VERSION, GROUP_SIZE, __version__)).encode())
    for name, entry in sorted(source.entries.items()):
        digest.update(repr((name, str(entry.dtype), entry.shape)).encode())
    for file in sorted({*source.folder.glob("*.safetensors"), *source.folder.glob("*.json")}):
        status = file.stat()
        digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0


def _check_uniform(checkpoint: Checkpoint, found: dict[str, Place]) -> None:
    """Tensors that share an array share a dtype."""
    first: dict[tuple, str] = {}
    for name, place in found.items():
        other = first.setdefault((place.unit, place.key), name)
        for suffix in ("", SCALE):
            a, b = (checkpoint.entries.get(n + suffix) for n in (name, other))
            if (a and a.dtype) != (b and b.dtype):
                raise CheckpointError(
                    f"{checkpoint.folder}: {other + suffix} is stored as {b and b.dtype} and {name + suffix} as "
                    f"{a and a.dtype}; experts of a layer that differ in dtype cannot be converted."
                )


def _to_layers(checkpoint: Checkpoint, folder: Path, cfg, block, progress: Progress) -> None:
    tensors, _ = layout(cfg, block)
    units: dict[str, dict[tuple[str, ...], list[tuple[str, Place]]]] = {}
    for name, place in places(cfg, block, GROUP_SIZE).items():
        units.setdefault(place.unit, {}).setdefault(place.key, []).append((name, place))
    for unit, arrays in units.items():
        if not (folder / unit).exists():
            _write_unit(checkpoint, folder / unit, arrays, progress)
        else:
            names = [n for members in arrays.values() for n, _ in members]
            progress(sum(e.nbytes for n in names for e in _stored(checkpoint, n)))
    for tensor in tensors:
        if tensor.copy:
            check_copy(checkpoint, tensor, tensors)
            progress(checkpoint.entries[tensor.name].nbytes)
    files: dict[str, list[str]] = {}
    for name, entry in checkpoint.entries.items():
        files.setdefault(entry.file.name, []).append(name)
    shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")
    copy_files(checkpoint.folder, folder)
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "deepseek_jax_version": __version__,
        "group_size": GROUP_SIZE,
        "indexed": checkpoint.indexed,
        "files": files,
    }
    write_json(folder / RECORD, record)


class _Uncopied(np.ndarray):
    """Orbax copies NumPy arrays, since a caller may change them while it writes; here nobody does."""

    def __deepcopy__(self, memo) -> np.ndarray:
        return self


def _stored(checkpoint: Checkpoint, name: str):
    return [checkpoint.entries[n] for n in (name, name + SCALE) if n in checkpoint.entries]


def _write_unit(checkpoint: Checkpoint, path: Path, arrays: dict, progress: Progress) -> None:
    """One Orbax checkpoint, array by array; nothing stands at ``path`` before the last is written."""
    from orbax.checkpoint.experimental import v1 as ocp

    for rest in path.parent.glob(f"{path.name}.*"):  # of an earlier run that was interrupted
        shutil.rmtree(rest)
    path.parent.mkdir(exist_ok=True)
    metadata = {"deepseek_jax_version": __version__}
    context = ocp.Context()
    # Weights hardly compress, and compressing takes longer than writing.
    context.array.saving.use_compression = False
    with context, _disk_errors(path):
        batch, size = {}, 0
        for key, members in arrays.items():
            for kind, suffix in (("values", ""), ("scale", SCALE)):
                if members[0][0] + suffix not in checkpoint.entries:
                    continue
                nbytes = sum(checkpoint.entries[name + suffix].nbytes for name, _ in members)
                if size and size + nbytes > BATCH_BYTES:
                    ocp.partial.save(path, batch, custom_metadata=metadata)
                    progress(size)
                    batch, size = {}, 0
                _put(batch, (*key, kind), _gather(checkpoint, members, suffix).view(_Uncopied))
                size += nbytes
        ocp.partial.save(path, batch, custom_metadata=metadata)
        progress(size)
        ocp.partial.finalize(path)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Orbax's store reports the system's refusal to write as a ValueError that quotes its code."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _gather(checkpoint: Checkpoint, members: list[tuple[str, Place]], suffix: str) -> np.ndarray:
    """The tensors of one array, read into their places."""
    entry, axes = checkpoint.entries[members[0][0] + suffix], range(len(members[0][1].index))
    stacked = tuple(1 + max(place.index[axis] for _, place in members) for axis in axes)
    array = np.empty((*stacked, *entry.shape), entry.dtype)
    for name, place in members:
        entry, part = checkpoint.entries[name + suffix], array[place.index]
        entry.read_into(part)
        check_finite(entry, part)
    return array


def _put(tree: dict, key: tuple[str, ...], array: np.ndarray) -> None:
    for part in key[:-1]:
        tree = tree.setdefault(part, {})
    tree[key[-1]] = array


def _to_published(layers: Layers, folder: Path, progress: Progress) -> None:
    files, specs = layers.record["files"], {}
    for name in (name for names in files.values() for name in names):
        if name in layers.entries:
            specs[name] = (layers.entries[name].dtype, layers.entries[name].shape)
    lost = [name for names in files.values() for name in names if name not in specs and not name.endswith(IGNORED)]
    extra = set(layers.entries) - set(specs)
    if lost or extra:
        raise CheckpointError(f"{layers.folder}: {RECORD} and the layers disagree on {(lost or sorted(extra))[0]}.")
    order = {name: i for i, name in enumerate(layers.entries)}
    written = {file: [name for name in names if name in specs] for file, names in files.items()}
    for file, names in written.items():
        if (folder / file).exists():
            progress(sum(layers.entries[name].nbytes for name in names))
            continue
        # Values of a group of experts, then its scales: each array of the source is read once a file.
        names = sorted(names, key=lambda n: (layers.entries[n].file, layers.entries[n].key, order[n]))
        with Writer(folder / file, {name: specs[name] for name in names}) as writer:
            for name in names:
                writer.write(name, read_tensor(layers, name))
                progress(layers.entries[name].nbytes)
    if layers.record["indexed"]:
        write_json(folder / INDEX, index_json(specs, written))
    shutil.copyfile(layers.folder / "config.json", folder / "config.json")
    copy_files(layers.folder, folder)
