"""Published folder <-> converted folder, in bytes as they are stored, a few chunks of an array in memory.

Work goes into ``.NAME.converting-...`` beside the destination, which is renamed at the end. A layer (or, on the
way back, a safetensors file) is there whole or not at all, so that a conversion that was interrupted goes on where
it stopped; what it had begun is made again.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np

from deepseek_jax.configs.schema import ConfigError
from deepseek_jax.convert.arrays import Array, Domain, write_skeleton
from deepseek_jax.convert.check import check_copy, check_tensors, extra_layers, some, stored_as
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.config_file import has_dspark, read_config
from deepseek_jax.convert.files import check_free, copy_files, index_json, write_json
from deepseek_jax.convert.formats import check_finite, stored, usual
from deepseek_jax.convert.layers import APART_VERSION, FORMAT, FORMAT_VERSION, RECORD, Layers, places
from deepseek_jax.convert.load import open_published
from deepseek_jax.convert.names import IGNORED, Tensor, layout
from deepseek_jax.convert.pickles import safetensors_name
from deepseek_jax.convert.safetensors import INDEX, CheckpointError, Writer
from deepseek_jax.notes import note
from deepseek_jax.version import __version__

# So many chunks are in memory, being read, checked or written. Waiting for the disk, threads outnumber cores.
WORKERS = 4
Progress = Callable[[int], None]
Members = dict[tuple[int, ...], str]  # an array's tensors: index -> name


def convert(source: str | Path, destination: str | Path, progress: Progress = lambda n: None) -> str:
    """Converts a published folder, or a converted one back; returns the format written, "layers" or "published".

    ``progress``: called with the number of bytes just done. Interrupted, it goes on when called again with the
    same source and destination. Every tensor is checked as `load_pretrained` checks it.

    Raises CheckpointError and ConfigError for a bad source, FileExistsError for a destination that is not
    empty, OSError when the disk is too small, fills up or cannot be written; what is finished then stays.
    """
    source, destination = Path(source), Path(destination).resolve()
    check_free(destination)
    cfg = read_config(source)
    if (source / RECORD).exists():
        layers = Layers(source, cfg)
        check_tensors(layers, cfg, layout(cfg)[0])
        with _staging(layers, destination) as folder:
            _to_published(layers, folder, progress)
        return "published"
    checkpoint = open_published(source, cfg)
    check_tensors(checkpoint, cfg, layout(cfg)[0])
    if layers := extra_layers(checkpoint, cfg):
        more = f"the files more, as {stored_as(cfg, layers)}, which the conversion would lose"
        if has_dspark(source, checkpoint.entries):
            raise CheckpointError(f"{source}: {stored_as(cfg, layers)} are DSpark's draft model, which is not built.")
        raise CheckpointError(
            f"{source}: config.json has {cfg.mtp_depth} MTP layers, {more}: set num_nextn_predict_layers to "
            f"{cfg.mtp_depth + len(layers)}."
        )
    with _staging(checkpoint, destination) as folder:
        _to_layers(checkpoint, folder, cfg, progress)
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
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError:
        raise FileExistsError(f"another process is converting to {destination}; wait for it, or end it.") from None
    except (CheckpointError, ConfigError):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
        raise OSError(
            error.errno, f"{text}; what is finished is kept in {folder}, where the same command goes on."
        ) from error
    else:
        folder.replace(destination)
    finally:
        os.close(lock)


def _fingerprint(source: Checkpoint | Layers) -> str:
    """Changes with any file of the source (names, shapes, sizes, times) and with the form that is written."""
    digest = hashlib.sha256(repr((FORMAT_VERSION, __version__)).encode())
    for name, entry in sorted(source.entries.items()):
        digest.update(repr((name, str(entry.dtype), entry.shape)).encode())
    for file in sorted({*source.folder.glob("*.safetensors"), *source.folder.glob("*.json")}):
        status = file.stat()
        digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0


def _apart(checkpoint: Checkpoint, cfg) -> list[str]:
    """The tensors that are stored unlike the most of those that share an array; a note names them."""
    groups: dict[tuple, list[Tensor]] = {}
    for place in places(cfg).values():
        groups.setdefault((place.unit, place.key), []).append(place.tensor)
    found = []
    for tensors in groups.values():
        forms = [stored(checkpoint.entries, tensor) for tensor in tensors]
        most = usual(forms)
        found += [tensor.name for tensor, form in zip(tensors, forms, strict=True) if form != most]
    if found:
        note(
            f"{checkpoint.folder}: {len(found)} experts' tensors are stored in another dtype than the layer's others "
            f"({', '.join(some(found))}): each has an array of its own."
        )
    return found


def _to_layers(checkpoint: Checkpoint, folder: Path, cfg, progress: Progress) -> None:
    tensors, _ = layout(cfg)
    apart = _apart(checkpoint, cfg)
    units: dict[str, dict[tuple[str, ...], Members]] = {}
    sizes: dict[tuple, tuple[int, ...]] = {}
    for place in places(cfg).values():
        size = sizes.get((place.unit, place.key), place.index)
        sizes[place.unit, place.key] = tuple(max(n, i + 1) for n, i in zip(size, place.index, strict=True))
    for place in places(cfg, frozenset(apart)).values():
        for name, kind in ((place.tensor.name, "values"), (place.tensor.scale, "scale")):
            if kind == "values" or stored(checkpoint.entries, place.tensor).scale is not None:
                members = units.setdefault(place.unit, {}).setdefault((*place.key, kind), {})
                members[place.index] = name
    for unit, arrays in units.items():
        if not (folder / unit).exists():
            _write_unit(checkpoint, folder / unit, arrays, {k: sizes.get((unit, k[:-1]), ()) for k in arrays}, progress)
        else:
            progress(sum(checkpoint.entries[name].nbytes for names in arrays.values() for name in names.values()))
    for tensor in tensors:
        if tensor.copy and tensor.name in checkpoint.entries:
            check_copy(checkpoint, tensor, tensors)
            progress(checkpoint.entries[tensor.name].nbytes)
    kept = {name for arrays in units.values() for members in arrays.values() for name in members.values()}
    kept |= {tensor.name for tensor in tensors}
    files: dict[str, list[str]] = {}
    pickled = any(entry.file.suffix == ".bin" for entry in checkpoint.entries.values())
    for name, entry in checkpoint.entries.items():
        if name in kept:
            files.setdefault(safetensors_name(entry.file.name), []).append(name)
    shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")
    copy_files(checkpoint.folder, folder)
    record = {
        "format": FORMAT,
        "format_version": APART_VERSION if apart else FORMAT_VERSION,
        "deepseek_jax_version": __version__,
        # Pickled files have an index of their own kind, or need none.
        "indexed": checkpoint.indexed or (pickled and len(files) > 1),
        "files": files,
        **({"apart": apart} if apart else {}),
    }
    write_json(folder / RECORD, record)


def _write_unit(
    checkpoint: Checkpoint,
    path: Path,
    arrays: dict[tuple[str, ...], Members],
    sizes: dict[tuple[str, ...], tuple[int, ...]],
    progress: Progress,
) -> None:
    """One Orbax checkpoint, chunk by chunk; nothing stands at ``path`` before the last is written.

    ``sizes``: the stacked axes of each array, which has zeros where it has no member.
    """
    temporary = path.with_name(f".{path.name}.writing")
    for rest in path.parent.glob(f"{temporary.name}*"):  # of an earlier run that was interrupted
        shutil.rmtree(rest)
    path.parent.mkdir(exist_ok=True)
    write_skeleton(temporary, list(arrays))

    def move(array: Array, domain: Domain, members: Members) -> int:
        values, nbytes = np.zeros([part.stop - part.start for part in domain], array.dtype), 0
        for index, where in _stack(domain, members):
            entry, rows = checkpoint.entries[members[index]], values[where]
            entry.read_into(rows, domain[len(index)].start)
            _check(checkpoint, array, entry.name, rows)
            nbytes += rows.nbytes
        array.write(domain, values)
        return nbytes

    moves = []
    for key, members in arrays.items():
        entry, size = checkpoint.entries[members[min(members)]], sizes[key]
        array = Array.create(temporary, key, (*size, *entry.shape), entry.dtype, len(size))
        moves += [(array, domain, members) for domain in array.chunks()]
    _each(move, moves, progress)
    temporary.replace(path)


def _stack(domain: Domain, members: Collection[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The matrices that a chunk holds rows of: the index of each in the array, and in the chunk."""
    stack = domain[: len(next(iter(members)))]
    for index in product(*(range(part.start, part.stop) for part in stack)):
        if index in members:
            yield index, tuple(i - part.start for i, part in zip(index, stack, strict=True))


def _check(source: Checkpoint | Layers, array: Array, name: str, rows: np.ndarray) -> None:
    """As `check_finite`, of rows that stand in ``array``; for the message the whole tensor is looked at."""
    scale = array.key[-1] == "scale"
    try:
        check_finite(source.entries[name], rows, scale)
    except CheckpointError:
        check_finite(source.entries[name], source.read(name), scale)
        raise


def _each(move: Callable[..., int], moves: list[tuple], progress: Progress) -> None:
    """Calls ``move`` with each tuple, in threads; it returns a number of bytes. After an error all have ended."""
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(move, *arguments) for arguments in moves]
        try:
            for future in futures:
                progress(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _to_published(layers: Layers, folder: Path, progress: Progress) -> None:
    files, specs = layers.record["files"], {}
    for name in (name for names in files.values() for name in names):
        if name in layers.entries:
            specs[name] = (layers.entries[name].dtype, layers.entries[name].shape)
    lost = [name for names in files.values() for name in names if name not in specs and not name.endswith(IGNORED)]
    extra = set(layers.entries) - set(specs)
    if lost or extra:
        raise CheckpointError(f"{layers.folder}: {RECORD} and the layers disagree on {(lost or sorted(extra))[0]}.")
    written = {file: [name for name in names if name in specs] for file, names in files.items()}
    for file, names in written.items():
        if (folder / file).exists():
            progress(sum(layers.entries[name].nbytes for name in names))
            continue
        with Writer(folder / file, {name: specs[name] for name in names}) as writer:
            _write_file(layers, writer, names, progress)
    if layers.record["indexed"]:
        write_json(folder / INDEX, index_json(specs, written))
    shutil.copyfile(layers.folder / "config.json", folder / "config.json")
    copy_files(layers.folder, folder)


def _write_file(layers: Layers, writer: Writer, names: list[str], progress: Progress) -> None:
    """Fills one file, chunk by chunk of the arrays that hold its tensors."""
    arrays: dict[Array, dict[tuple[int, ...], list[str]]] = {}
    for name in names:
        entry = layers.entries[name]
        arrays.setdefault(entry.array, {}).setdefault(entry.index, []).append(name)

    def move(array: Array, domain: Domain, members: dict[tuple[int, ...], list[str]]) -> int:
        values, nbytes = array.read(domain), 0
        array.write_back(domain)
        for index, where in _stack(domain, members):
            for name in members[index]:  # the embedding or the head, and its copies
                _check(layers, array, name, values[where])
                writer.write_rows(name, values[where], domain[len(index)].start)
                nbytes += values[where].nbytes
        return nbytes

    moves = [
        (array, domain, members)
        for array, members in arrays.items()
        for domain in array.chunks()
        if any(_stack(domain, members))
    ]
    _each(move, moves, progress)
