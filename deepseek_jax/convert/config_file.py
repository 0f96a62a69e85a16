"""A folder's config: its config.json, and what its other files say where that leaves something open."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from deepseek_jax.configs.hf import config_from_json, eos_ids, reads
from deepseek_jax.configs.published.fields import ALIASES
from deepseek_jax.configs.published.v4 import DSPARK
from deepseek_jax.configs.schema import ConfigError, ModelConfig
from deepseek_jax.convert.checkpoint import stored_names
from deepseek_jax.convert.folders import why_no_checkpoint
from deepseek_jax.convert.layers import RECORD, read_record
from deepseek_jax.convert.naming import find_prefix, layer_of
from deepseek_jax.convert.pickles import weight_files
from deepseek_jax.convert.safetensors import INDEX, CheckpointError, load_json
from deepseek_jax.convert.training import is_training
from deepseek_jax.notes import note

MTP_DEPTH = "num_nextn_predict_layers"


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
    if has_dspark(folder, names):
        if not any(name.startswith(DSPARK) for name in data):  # which has its own note
            note(f"{folder}: the drafts in these files are DSpark's, which is not built: read without drafts.")
        return {**data, named or MTP_DEPTH: 0}
    last = max((layer for layer in (layer_of(name, layers) for name in names) if layer is not None), default=-1)
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


def has_dspark(folder: Path, names: Iterable[str]) -> bool:
    """Whether the ``mtp.`` layers of a folder are the draft model of V4's later files, and no MTP."""
    fields = load_json(folder / "config.json")
    return any(name.startswith(DSPARK) for name in fields) or any(".markov_head." in name for name in names)


def tensor_names(folder: Path) -> list[str] | None:
    """The published names of a published or converted folder's tensors; None where it has none to look at."""
    if (folder / RECORD).exists():
        files = None if is_training(folder) else read_record(folder)["files"]
        return None if files is None else [name for names in files.values() for name in names]
    if not (folder / INDEX).exists() and not weight_files(folder):
        return None
    prefix = find_prefix(names := stored_names(folder))
    return [prefix.published(name) for name in names]
