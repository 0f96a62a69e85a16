"""Training checkpoints as folders: the stacked tree of a run's state in Orbax, and a record of what was written.

::

    deepseek_jax.json     format, versions, the run's counters, each leaf's shape and dtype, each file's sha256
    config.json, tokenizer files
    state/                Orbax: a flat dict of arrays under dotted names, `params.stacks.1.attn.q_a.value`

The record is written last and holds a hash of itself, so that a file that is missing, cut or altered by one bit
is found, and named, before anything is read from it. `deepseek_jax.runs.checkpoint` writes these folders.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.layers import RECORD
from deepseek_jax.convert.safetensors import CheckpointError, load_json
from deepseek_jax.core.params import RouterState, map_variables
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.notes import shown
from deepseek_jax.small_files import LARGE
from deepseek_jax.version import __version__

FORMAT = "training"
FORMAT_VERSION = 1
STATE = "state"
# The leaves of a whole model that no gradient reaches (`RouterState`).
ROUTER_STATE = ("router.bias.value", "router.table.value")
# Written by Orbax at or after the rename; nothing of a checkpoint is read from them.
UNHASHED = ("_CHECKPOINT_METADATA", "commit_success.txt")


def _is_leaf(spec) -> bool:
    return isinstance(spec, list) and len(spec) == 2 and _is_dtype(spec[0]) and _are(spec[1], list, int)


def _is_dtype(name) -> bool:
    try:
        return isinstance(name, str) and np.dtype(name) is not None
    except TypeError:
        return False


def _are(values, container: type, kind: type) -> bool:
    found = values.values() if isinstance(values, dict) else values
    return isinstance(values, container) and all(type(value) is kind for value in found)


# What a record must hold; whose hash fits may still have been written from what was damaged already.
_FIELDS = {
    "step": lambda value: type(value) is int and value >= 0,
    "metric": lambda value: value is None or type(value) in (int, float),
    "data_state": lambda value: isinstance(value, dict),
    "extra": lambda value: isinstance(value, dict),
    "leaves": lambda value: isinstance(value, dict) and all(map(_is_leaf, value.values())),
    "files": lambda value: _are(value, dict, str),
}


def leaf_names(tree) -> list[str]:
    """The dotted path of every leaf of a pytree, in its order: `params.stacks.1.attn.q_a.value`."""
    return [
        ".".join(str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", None)))) for p in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def write_record(folder: Path, values: dict) -> None:
    """Hashes all of a checkpoint's files and writes its record, which has ``values`` beside that."""
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "deepseek_jax_version": __version__,
        **values,
        "files": {
            path.relative_to(folder).as_posix(): _file_hash(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in UNHASHED
        },
    }
    with (folder / RECORD).open("w", encoding="utf-8") as file:
        json.dump({**record, "sha256": _hash(record)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def is_training(folder: Path) -> bool:
    """Whether a folder's record says that it is a training checkpoint; what is damaged is not looked at."""
    path = folder / RECORD
    return path.exists() and load_json(path, LARGE).get("format") == FORMAT


def read_record(folder: Path) -> dict:
    """A training checkpoint's record. Raises CheckpointError for a missing or damaged one, or another format."""
    path = folder / RECORD
    record = load_json(path, LARGE)
    if record.get("format") != FORMAT or record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {shown(record.get('format'))} version {shown(record.get('format_version'))} is not read "
            f"here, only {FORMAT!r} version {FORMAT_VERSION}."
        )
    if record.pop("sha256", None) != _hash(record):
        raise CheckpointError(f"{path} is damaged: its text does not have the hash that it names.")
    for name, fits in _FIELDS.items():
        if name not in record or not fits(record[name]):
            found = shown(record[name]) if name in record else "missing"
            raise CheckpointError(f"{path} is damaged: {name} is {found}.")
    return record


def check_files(folder: Path, record: dict) -> None:
    """Reads every file of a checkpoint. Raises CheckpointError that names the first missing or altered one."""
    for name, digest in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        if _file_hash(path) != digest:
            raise CheckpointError(f"{path} is damaged: its {path.stat().st_size} bytes are not those that were saved.")
    for path in sorted((folder / STATE).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name not in UNHASHED and name not in record["files"]:
            raise CheckpointError(f"{folder} is damaged: its record has no hash of {name}.")


def read_leaves(folder: Path, leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some of a checkpoint's arrays by name, in the shardings that ``leaves`` names.

    What names none comes onto the default device as a fresh array does, not bound to it: bound arrays would make
    another program of every jitted function that takes them.
    """
    import orbax.checkpoint as ocp

    how = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding) if leaf.sharding else ocp.RestoreArgs(np.ndarray)
        for name, leaf in leaves.items()
    }
    arguments = ocp.args.PyTreeRestore(dict(leaves), restore_args=how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore((folder / STATE).resolve(), args=arguments)
    return {name: value if leaves[name].sharding else jax.device_put(value) for name, value in found.items()}


def check_leaves(folder: Path, record: dict, names: Iterable[str], leaves: Iterable) -> None:
    """Raises CheckpointError unless the record has exactly these leaves, or names the first that differs."""
    held, wanted = record["leaves"], {n: _spec(leaf) for n, leaf in zip(names, leaves, strict=True)}
    for name in sorted({*held, *wanted}):
        if held.get(name) != wanted.get(name):
            saved, needed = (_text(specs.get(name)) for specs in (held, wanted))
            raise CheckpointError(f"{folder} is of another model or recipe: {name} is {saved} there, {needed} here.")


def leaf_specs(names: Iterable[str], leaves: Iterable) -> dict[str, list]:
    """Name -> [dtype, shape], for a record."""
    return {name: _spec(leaf) for name, leaf in zip(names, leaves, strict=True)}


def load_training(folder: Path, cfg: ModelConfig, dtype: np.dtype | None) -> Transformer:
    """The model of a training checkpoint: its weights, not their moving average; ``dtype`` as in `load_pretrained`.

    Raises CheckpointError for a damaged checkpoint and for one that does not hold every leaf of ``cfg``.
    """
    record = read_record(folder)
    check_files(folder, record)
    held, wanted = record["leaves"], {}
    model = abstract(cfg, np.float32 if dtype is None else dtype)
    if any(name.startswith("rest.") and not name.endswith(ROUTER_STATE) for name in held):
        raise CheckpointError(
            f"{folder} belongs to a run that trains adapters or a part of a model, and is no model by itself: end the "
            "run (train RUN --resume) and load what it exports, RUN/checkpoint."
        )

    def look(path, variable):
        name = _model_leaf(path, variable)
        shape = variable.get_value().shape
        if name not in held or tuple(held[name][1]) != shape:
            raise CheckpointError(f"{folder}: {name} is {_text(held.get(name))}, config.json implies shape {shape}.")
        wanted[name] = jax.ShapeDtypeStruct(shape, np.dtype(held[name][0]))
        return variable

    map_variables(look, model)
    values = read_leaves(folder, wanted)

    def fill(path, variable):
        value = values[_model_leaf(path, variable)]
        value = value if dtype is None else value.astype(variable.get_value().dtype)
        return type(variable)(value, **variable.get_metadata())

    return map_variables(fill, model)


def _model_leaf(path: tuple, variable) -> str:
    part = "rest" if isinstance(variable, RouterState) else "params"
    return ".".join(map(str, (part, *path, "value")))


def _spec(leaf) -> list:
    return [str(np.dtype(leaf.dtype)), list(leaf.shape)]


def _text(spec: list | None) -> str:
    return "not held" if spec is None else f"{spec[0]} {tuple(spec[1])}"


def _hash(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
