"""`load_pretrained` and `save_pretrained` of a Janus, in DeepSeek's layout and in transformers'.

Files are read and written by `deepseek_jax.convert`: one tensor at a time, a folder whole or not at all.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.hf import eos_ids
from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.configs.published.janus import is_janus, janus_from_json, janus_to_json, named
from deepseek_jax.convert.check import some
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.files import copy_files, index_json, new_folder, split_files, write_json
from deepseek_jax.convert.folders import why_no_checkpoint
from deepseek_jax.convert.formats import FLOATS, READ, has_bad, shared
from deepseek_jax.convert.held import forms_of, held_as, tensor_of
from deepseek_jax.convert.load import filled
from deepseek_jax.convert.names import IGNORED
from deepseek_jax.convert.pickles import safetensors_name
from deepseek_jax.convert.safetensors import INDEX, CheckpointError, Entry, Writer, load_json
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import map_variables
from deepseek_jax.multimodal.janus import Janus, abstract
from deepseek_jax.multimodal.names import UNUSED, Kept, layout
from deepseek_jax.text.files import copy_tokenizer, tokenizer_folder
from deepseek_jax.version import __version__

# Of a processor for pictures, beside what every folder has.
PROCESSOR = ("preprocessor_config.json",)


def holds_janus(folder: Path) -> bool:
    """Whether a folder's config.json is a Janus's; False where there is none."""
    file = folder / "config.json"
    return file.is_file() and is_janus(load_json(file))


def read_config(folder: Path) -> JanusConfig:
    """A folder's config; the tokens that end a text are those of generation_config.json, where it names any.

    Raises CheckpointError for what is no folder of a checkpoint, ConfigError for a config that is no Janus's.
    """
    if (why := why_no_checkpoint(folder)) is not None:
        raise CheckpointError(why)
    file = folder / "generation_config.json"
    stops = load_json(file) if file.exists() else {}
    try:
        cfg = janus_from_json(load_json(folder / "config.json"), name=folder.resolve().name)
        if "eos_token_id" in stops:
            ids = eos_ids(stops["eos_token_id"], file.name)
            cfg = replace(cfg, language=replace(cfg.language, eos_ids=ids))
        return cfg
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None


def load_pretrained(path: str | Path, dtype=jnp.bfloat16, ctx: Context | None = None) -> Janus:
    """A Janus from a folder of DeepSeek's files or of transformers', safetensors or, where PyTorch is installed,
    ``pytorch_model*.bin``. ``dtype``: of all parameters; None keeps every tensor as it is stored. ``ctx``: with a mesh
    the model is read into its shards.

    Raises CheckpointError for tensors that are missing, unexpected, of a wrong shape or dtype, truncated or not finite;
    ConfigError for a config that is not built; LayoutError where the context's layout does not divide the model.
    """
    folder = Path(path)
    cfg = read_config(folder)
    if dtype is not None and (dtype := np.dtype(dtype)) not in FLOATS:
        raise ValueError(f"dtype {dtype} is not supported: choose float32, bfloat16 or float16, or None.")
    kept, leaves = layout(cfg)
    checkpoint = Checkpoint(folder)
    checkpoint.entries = _parts(checkpoint, kept)
    by_leaf: dict[tuple, list] = {}
    for tensor in (tensor for one in kept for tensor in one.parts):
        by_leaf.setdefault(tensor.path, []).append(tensor)
    like = abstract(cfg, np.float32 if dtype is None else dtype)
    return filled(like, checkpoint, by_leaf, leaves, dtype, ctx or DEFAULT)


def _parts(checkpoint: Checkpoint, kept: tuple[Kept, ...]) -> dict[str, Entry]:
    """The entries of our tensors, each a run of bytes of what a file has. Raises one CheckpointError that names what is
    missing, unexpected and wrong."""
    entries, found, problems = checkpoint.entries, {}, []
    expected = {one.name for one in kept}
    missing = [one.name for one in kept if one.name not in entries]
    unexpected = [n for n in entries if n not in expected and not is_unused(n)]
    for one in kept:
        if (entry := entries.get(one.name)) is None:
            continue
        if entry.shape != one.shape:
            problems.append(f"{entry.file}: {one.name} has shape {entry.shape}, the config implies {one.shape}")
        elif entry.dtype not in READ:
            problems.append(f"{entry.file}: {one.name} has dtype {entry.dtype}, which is not read here")
        else:
            start = entry.start
            for part in one.parts:
                size = int(np.prod(part.shape)) * entry.dtype.itemsize
                found[part.name] = replace(entry, shape=part.shape, start=start, stop=start + size)
                start += size
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {', '.join(some(missing))}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are unexpected: {', '.join(some(unexpected))}")
    if problems:
        raise CheckpointError(f"{checkpoint.folder}: " + "; ".join(some(problems)) + ".")
    return found


def is_unused(name: str) -> bool:
    """Whether a released file's tensor belongs to nothing that the model computes."""
    return name.startswith(UNUSED) or name.endswith(IGNORED)


def save_pretrained(
    model: Janus,
    path: str | Path,
    like: str | Path | None = None,
    dtype=None,
    tokenizer=None,
    model_type: str | None = None,
) -> None:
    """Writes ``config.json`` and safetensors files. ``model_type``: "multi_modality" for DeepSeek's layout, "janus" for
    transformers'; None: that of the folder ``like``, else of ``model.cfg``.

    ``like``: a folder whose dtypes, file split, tokenizer and processor files are taken, and its tensors that no part
    of the model reads, byte for byte. ``dtype``: float32, bfloat16 or float16 for every tensor; None: ``like``'s, else
    as the model holds it. ``tokenizer``: a folder, or a tokenizer loaded from one, whose files are copied.

    Raises, before anything is written, FileExistsError when ``path`` is there and not empty, ConfigError for a model
    that the layout cannot carry, CheckpointError when ``like`` does not hold the model's tensors, ValueError for an
    unknown dtype; later ValueError for values that are not finite.
    """
    if dtype is not None and (dtype := np.dtype(dtype)) not in FLOATS:
        raise ValueError(f"dtype {dtype}: choose float32, bfloat16 or float16.")
    folder_like = None if like is None else Path(like)
    source = None if folder_like is None else Checkpoint(folder_like)
    if source is not None:
        model_type = model_type or read_config(folder_like).model_type
    cfg = replace(model.cfg, model_type=model_type or model.cfg.model_type)
    config = _config(cfg, folder_like)
    kept, leaves = layout(cfg)
    entries = {} if source is None else source.entries
    if source is not None:
        _parts(source, kept)
    words = None if tokenizer is None else tokenizer_folder(tokenizer)
    values: dict[tuple, object] = {}
    map_variables(lambda path, v: values.setdefault(path, v), model)
    forms = forms_of(values, [tensor for one in kept for tensor in one.parts])

    def dtype_of(one: Kept) -> np.dtype:
        if dtype is not None:
            return dtype
        if one.name in entries:
            return entries[one.name].dtype
        return shared(forms.get(part.name) or held_as(values[part.path].get_value()) for part in one.parts).dtype

    def held(one: Kept) -> np.ndarray:
        found = [tensor_of(values[part.path].get_value(), leaves[part.path], part, None) for part in one.parts]
        return np.concatenate(found).reshape(one.shape)

    specs = {one.name: (dtype_of(one), one.shape) for one in kept}
    extra = {name: entry for name, entry in entries.items() if name not in specs}
    specs |= {name: (entry.dtype, entry.shape) for name, entry in extra.items()}
    places = {name: safetensors_name(entry.file.name) for name, entry in entries.items()} or None
    files = split_files(specs, places)
    with new_folder(path) as folder, ExitStack() as stack:
        if len(files) > 1 or (source is not None and source.indexed):
            write_json(folder / INDEX, index_json(specs, files))
        writer_of = {}
        for file, names in files.items():
            writer = stack.enter_context(Writer(folder / file, {name: specs[name] for name in names}))
            writer_of |= dict.fromkeys(names, writer)
        for one in kept:
            array = held(one).astype(specs[one.name][0])
            if has_bad(array):
                raise ValueError(f"{one.name} holds values that are not finite as {array.dtype}; it is not saved.")
            writer_of[one.name].write(one.name, array)
        for name, entry in extra.items():
            writer_of[name].write(name, entry.read())
        config["torch_dtype"] = str(specs[kept[-1].name][0])
        write_json(folder / "config.json", config)
        if folder_like is not None:
            copy_files(folder_like, folder)
            for name in PROCESSOR:
                if (folder_like / name).is_file():
                    (folder / name).write_bytes((folder_like / name).read_bytes())
        if words is not None:
            copy_tokenizer(words, folder)


def _config(cfg: JanusConfig, like: Path | None) -> dict:
    """The config.json, with ``like``'s further fields; its own where it describes the same model."""
    data = janus_to_json(cfg)
    if like is None:
        return data | {"deepseek_jax_version": __version__}
    own = load_json(like / "config.json")
    if named(read_config(like), "") == named(cfg, ""):
        data = {}
    return own | data | {"deepseek_jax_version": __version__}
