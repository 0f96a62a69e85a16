"""`save_pretrained`: a model in the published layout.

Everything is written into a temporary folder beside the destination, which takes the destination's name at
the end: a failure leaves nothing.
"""

import json
import math
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.configs.hf import check_carried, config_to_json, eos_ids
from deepseek_jax.configs.json_fields import ALIASES, FOLLOWING, ROPE_FIELDS
from deepseek_jax.configs.schema import ConfigError, ModelConfig
from deepseek_jax.convert.load import block_size, has_bad, read_config, scale_shape
from deepseek_jax.convert.names import BLOCK, SCALE, Leaf, Tensor, layout, published_block
from deepseek_jax.convert.safetensors import INDEX, Checkpoint, CheckpointError, Entry, Writer, load_json
from deepseek_jax.core.params import Adapter, RouterBias, map_variables, variables
from deepseek_jax.core.quant import FP8, Quantized, dequantize_matrix, quantize_matrix
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.processes import is_first
from deepseek_jax.text.files import copy_tokenizer, tokenizer_folder
from deepseek_jax.version import __version__

if TYPE_CHECKING:
    from deepseek_jax.text.tokenizer import Tokenizer

SHARD_BYTES = 5_000_000_000
COPIED_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "processor_config.json",
    "generation_config.json",
    "*.tiktoken",
    "*.model",
    "*.py",
    "LICENSE*",
)
E8M0 = np.dtype(jnp.float8_e8m0fnu)
Spec = tuple[np.dtype, tuple[int, ...]]


def save_pretrained(
    model: Transformer,
    path: str | Path,
    quantize: str | None = None,
    like: str | Path | None = None,
    tokenizer: "str | Path | Tokenizer | None" = None,
) -> None:
    """Writes ``config.json`` and safetensors files, with an index when there are several.

    ``quantize="fp8"``: the linear maps of attention and networks as FP8 E4M3 with a scale for each 128 x 128
    block of the published matrix, all else bfloat16, the router bias float32. None: as the model holds it.
    ``like``: a published folder whose dtypes, scales, file split, tokenizer files and further config fields
    are taken; a block that its values still represent keeps its scale and bytes.
    ``tokenizer``: a folder, or a tokenizer loaded from one, whose tokenizer and templates are copied, byte for byte.

    Of a model in shards one published tensor after the other is gathered. Several processes all call this; the first
    one writes, and the others return when they have given their part.

    Raises, before anything is written, FileExistsError when ``path`` is there and not empty, ConfigError for a model
    that config.json cannot carry, CheckpointError when ``like`` does not hold the model's tensors, ValueError for an
    unknown ``quantize`` and a model with adapters; later ValueError for values that are not finite.
    """
    if quantize not in (None, "fp8"):
        raise ValueError(f'quantize={quantize!r}: choose "fp8" or None.')
    if any(isinstance(v, Adapter) for v in variables(model)):
        raise ValueError("the model has adapters: merge them, or write them apart (convert.adapter).")
    template = _Template(like, model.cfg) if like is not None else None
    _config_fields(model.cfg, template)
    words = None if tokenizer is None else tokenizer_folder(tokenizer)
    with new_folder(path) if is_first() else nullcontext() as folder:
        _write(model, folder, quantize, template)
        if words is not None and folder is not None:
            copy_tokenizer(words, folder)


@contextmanager
def new_folder(path: str | Path):
    """A temporary folder beside ``path`` that takes its name at the end, and vanishes after an error.

    Raises FileExistsError when ``path`` is a file or a folder that is not empty.
    """
    # Through a link, so that the temporary folder lies on the disk that the result will lie on.
    path = Path(path).resolve()
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".writing", dir=path.parent))
    try:
        folder.chmod(0o755)
        yield folder
        folder.replace(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_free(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; choose another destination or remove it.")


class _Template:
    """The folder that ``like`` names."""

    def __init__(self, folder: str | Path, cfg: ModelConfig):
        self.checkpoint = Checkpoint(folder)
        self.folder, self.entries = self.checkpoint.folder, self.checkpoint.entries
        self.config = load_json(self.folder / "config.json")
        self.block = block_size(self.config, cfg)
        self.powers_of_two = (self.config.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"
        tensors, _ = layout(cfg, self.block)
        for tensor in tensors:
            entry = self.entries.get(tensor.name)
            if entry is None:
                raise CheckpointError(f"like={self.folder} has no tensor {tensor.name}; it is another model's folder.")
            if entry.shape != tensor.shape:
                raise CheckpointError(
                    f"{entry.file}: {tensor.name} has shape {entry.shape}, the model's is {tensor.shape}."
                )
            if entry.dtype == FP8 and tensor.name + SCALE not in self.entries:
                raise CheckpointError(f"{entry.file}: {tensor.name} is FP8, but {tensor.name + SCALE} is missing.")


def _write(model: Transformer, folder: Path | None, quantize: str | None, like: _Template | None) -> None:
    """Without a folder: takes part in the gathering only."""
    values: dict[tuple, nnx.Variable] = {}
    map_variables(lambda path, v: values.setdefault(path, v), model)
    block = like.block if like else _model_block(values)
    tensors, leaves = layout(model.cfg, block)
    if folder is None:
        for tensor in tensors:
            _held(values[tensor.path].get_value(), leaves[tensor.path], tensor)
        return
    specs: dict[str, Spec] = {}
    for tensor in tensors:
        dtype, scale_dtype = _stored_as(tensor, values[tensor.path], quantize, like)
        specs[tensor.name] = (np.dtype(dtype), tensor.shape)
        if scale_dtype is not None:
            specs[tensor.name + SCALE] = (np.dtype(scale_dtype), scale_shape(tensor, block))
    files = split_files(specs, like.entries if like else None)
    if len(files) > 1 or (like and like.checkpoint.indexed):
        write_json(folder / INDEX, index_json(specs, files))
    with ExitStack() as stack:
        writer_of = {}
        for file, names in files.items():
            writer = stack.enter_context(Writer(folder / file, {name: specs[name] for name in names}))
            writer_of |= dict.fromkeys(names, writer)
        for tensor in tensors:
            held = _held(values[tensor.path].get_value(), leaves[tensor.path], tensor)
            array, scale = _published(tensor.name, held, specs, block, like)
            writer_of[tensor.name].write(tensor.name, array)
            if scale is not None:
                writer_of[tensor.name + SCALE].write(tensor.name + SCALE, scale)
    write_json(folder / "config.json", _config(model.cfg, specs, block, like))
    if like:
        copy_files(like.folder, folder)
        _keep_stops(folder / "generation_config.json", model.cfg)


def _model_block(values: dict) -> tuple[int, int]:
    """The block of the model's quantised leaves, as rows and columns of the published matrix."""
    held = {path: v.get_value() for path, v in values.items()}
    blocks = {published_block(path, q.block) for path, q in held.items() if isinstance(q, Quantized)}
    if len(blocks) > 1:
        raise ValueError(f"the model's quantised leaves have blocks of different sizes: {sorted(blocks)}.")
    return blocks.pop() if blocks else BLOCK


def _stored_as(tensor: Tensor, variable: nnx.Variable, quantize: str | None, like: _Template | None):
    """The dtypes a tensor and its scales (None: it has none) are written in."""
    value = variable.get_value()
    if like and (like.entries[tensor.name].dtype == FP8 or not (quantize and tensor.fp8)):
        dtype = like.entries[tensor.name].dtype
        return dtype, like.entries[tensor.name + SCALE].dtype if dtype == FP8 else None
    if isinstance(value, Quantized):
        return value.values.dtype, value.scale.dtype
    if quantize and tensor.fp8:
        return FP8, np.float32
    if quantize and not isinstance(variable, RouterBias):
        return jnp.bfloat16, None
    return value.dtype, None


def _held(value, leaf: Leaf, tensor: Tensor) -> np.ndarray | tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """A published tensor as the model holds it: an array, or FP8 values, scales and their block."""

    def part(array, shape):
        if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
            array = _gathered(array, shape, tensor.index)
        else:
            array = np.asarray(array).reshape(shape)[tensor.index]
        return array.T if tensor.transposed else array

    if isinstance(value, Quantized):
        scale = part(value.scale, value.scale.shape)
        return part(value.values, leaf.matrix), scale, published_block(tensor.path, value.block)
    return part(value, leaf.matrix)


def _gathered(array: jax.Array, shape: tuple[int, ...], index: tuple[int | slice, ...]) -> np.ndarray:
    """``array.reshape(shape)[index]`` of an array on a mesh; only that is ever whole on a device."""
    lead = next((i for i, part in enumerate(index) if not isinstance(part, int)), len(index))
    rest = tuple(part if isinstance(part, int) else None for part in index[lead:])
    piece = _piece(array.sharding.mesh, shape[lead:], rest)
    return np.asarray(piece(array, np.asarray(index[:lead], np.int32)))


@lru_cache
def _piece(mesh, shape: tuple[int, ...], rest: tuple[int | None, ...]):
    """Takes an array's part at the first axes' places, a program for all of these; ``rest``: None for a whole axis."""
    whole = NamedSharding(mesh, PartitionSpec())

    def take(array, places):
        for place in places:
            array = jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
        return array.reshape(shape)[tuple(slice(None) if part is None else part for part in rest)]

    return jax.jit(take, out_shardings=whole)


def _published(name: str, held, specs: dict[str, Spec], block: tuple[int, int], like: _Template | None):
    """A tensor's values and scales (None: it has none) in the dtypes of ``specs``."""
    dtype = specs[name][0]
    if isinstance(held, tuple):
        values, scale, held_block = held
        if dtype == FP8 and held_block == block and scale.dtype == specs[name + SCALE][0]:
            return values, scale
        held = dequantize_matrix(values, scale, held_block)
    if dtype != FP8:
        array = held.astype(dtype)
        if has_bad(array):
            raise ValueError(f"{name} holds values that are not finite as {dtype}; it is not saved.")
        return array, None
    stored = None
    if like and like.entries[name].dtype == FP8:
        stored = like.checkpoint.read(name), like.checkpoint.read(name + SCALE)
    scale_dtype = specs[name + SCALE][0]
    powers = scale_dtype == E8M0 or bool(like and like.powers_of_two)
    try:
        values, scale = quantize_matrix(held, block, stored, powers)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None
    return values, scale.astype(scale_dtype)


def split_files(specs: dict[str, Spec], like: dict[str, Entry] | None = None) -> dict[str, list[str]]:
    """File name -> names of its tensors: the split of ``like``, else files of up to 5 GB in published order.

    A scale that ``like`` does not have goes where its tensor is.
    """
    files: dict[str, list[str]] = {}
    if like is not None:
        for name in specs:
            entry = like.get(name) or like[name.removesuffix(SCALE)]
            files.setdefault(entry.file.name, []).append(name)
        return dict(sorted(files.items()))
    groups, size = [[]], 0
    for name, spec in specs.items():
        if groups[-1] and size + nbytes(spec) > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes(spec)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def index_json(specs: dict[str, Spec], files: dict[str, list[str]]) -> dict:
    total = sum(nbytes(spec) for spec in specs.values())
    weight_map = dict(sorted((name, file) for file, names in files.items() for name in names))
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def nbytes(spec: Spec) -> int:
    return math.prod(spec[1]) * spec[0].itemsize


def _config(cfg: ModelConfig, specs: dict[str, Spec], block: tuple[int, int], like: _Template | None) -> dict:
    """The config.json; of ``like``'s, fields that say nothing about our config are kept as they are."""
    quantization = None
    scales = {dtype for name, (dtype, _) in specs.items() if name.endswith(SCALE)}
    if scales:
        quantization = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": list(block),
            "activation_scheme": "dynamic",
        }
        if E8M0 in scales:
            quantization["scale_fmt"] = "ue8m0"
    data = _config_fields(cfg, like)
    if quantization is not None:
        data["quantization_config"] = quantization
    if like and "quantization_config" in like.config:
        data["quantization_config"] = like.config["quantization_config"]
    if like and same_model(like.folder, cfg):
        return data
    data["torch_dtype"] = specs["model.embed_tokens.weight"][0].name
    return data


def _config_fields(cfg: ModelConfig, like: _Template | None) -> dict:
    """What a config.json says of the model itself, and what it takes over from ``like``'s.

    Raises ConfigError where it would be read as another model.
    """
    data = config_to_json(cfg)
    if like is None:
        kept = {}
    elif same_model(like.folder, cfg):
        kept, data = like.config, {}
    else:
        known = {*ALIASES.values(), *ROPE_FIELDS, *FOLLOWING}
        kept = {key: value for key, value in like.config.items() if key not in known}
        check_carried(cfg, kept | data)
    return kept | data | {"deepseek_jax_version": __version__}


def same_model(folder: Path, cfg: ModelConfig) -> bool:
    """Whether a folder's config describes ``cfg``, its name apart."""
    try:
        return replace(read_config(folder)[0], name=cfg.name) == cfg
    except ConfigError:
        return False


def _keep_stops(path: Path, cfg: ModelConfig) -> None:
    """A copied generation config would bring back the stop tokens that a changed model no longer has."""
    if path.is_file():
        data = load_json(path)
        if "eos_token_id" in data and eos_ids(data["eos_token_id"], path.name) != cfg.eos_ids:
            write_json(path, data | {"eos_token_id": list(cfg.eos_ids)})


def copy_files(source: Path, destination: Path) -> None:
    """Copies the tokenizer, its templates, the generation config and the licence."""
    for pattern in COPIED_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = destination / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def write_json(path: Path, data: dict) -> None:
    with path.open("w") as file:
        json.dump(data, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
