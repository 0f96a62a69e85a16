"""`save_pretrained`: a model in the published layout.

Everything is written into a temporary folder beside the destination, which takes the destination's name at
the end: a failure leaves nothing.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
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
from deepseek_jax.convert.formats import FLOATS, STORED, Stored, block_size, has_bad, scale_shape, shared, stored
from deepseek_jax.convert.layers import Layers
from deepseek_jax.convert.load import open_checkpoint, read_config
from deepseek_jax.convert.names import BLOCK, SCALE, Leaf, Tensor, layout, published_block
from deepseek_jax.convert.safetensors import INDEX, CheckpointError, Writer, load_json
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
# An array, or FP8 values, scales and their block.
Held = np.ndarray | tuple[np.ndarray, np.ndarray, tuple[int, int]]


def save_pretrained(
    model: Transformer,
    path: str | Path,
    quantize: str | None = None,
    like: str | Path | None = None,
    tokenizer: "str | Path | Tokenizer | None" = None,
    dtype=None,
) -> None:
    """Writes ``config.json`` and safetensors files, with an index when there are several.

    ``quantize="fp8"``: the linear maps of attention and networks as FP8 E4M3 with a scale for each 128 x 128
    block of the published matrix, all else bfloat16, the router bias float32. ``dtype``: float32, bfloat16 or float16
    for every tensor but the router bias, which is float32; FP8 is dequantised. Neither: as the model holds it, or, of a
    model that was loaded with dtype=None, each tensor as it was stored.
    ``like``: a published or converted folder whose dtypes, scales, file split, tokenizer files and further config
    fields are taken; a block that its values still represent keeps its scale and bytes. ``quantize`` and ``dtype`` come
    before its dtypes. What it stores under other names (`convert.naming`) is written under the published ones.
    ``tokenizer``: a folder, or a tokenizer loaded from one, whose tokenizer and templates are copied, byte for byte.

    Of a model in shards one published tensor after the other is gathered. Several processes all call this; the first
    one writes, and the others return when they have given their part.

    Raises, before anything is written, FileExistsError when ``path`` is there and not empty, ConfigError for a model
    that config.json cannot carry, CheckpointError when ``like`` does not hold the model's tensors, ValueError for an
    unknown ``quantize`` or ``dtype`` and a model with adapters; later ValueError for values that are not finite.
    """
    if any(isinstance(v, Adapter) for v in variables(model)):
        raise ValueError("the model has adapters: merge them, or write them apart (convert.adapter).")
    how = Format.asked(quantize, dtype, like, model.cfg)
    _config_fields(model.cfg, how)
    words = None if tokenizer is None else tokenizer_folder(tokenizer)
    with new_folder(path) if is_first() else nullcontext() as folder:
        _write(model, folder, how)
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


class Template:
    """The folder that ``like`` names."""

    def __init__(self, folder: str | Path, cfg: ModelConfig):
        self.folder = Path(folder)
        self.config = load_json(self.folder / "config.json")
        self.block = block_size(self.config, cfg)
        self.checkpoint = open_checkpoint(self.folder, cfg, self.block)
        self.entries = self.checkpoint.entries
        if isinstance(self.checkpoint, Layers):
            record = self.checkpoint.record
            self.indexed = record["indexed"]
            self.file_of = {name: file for file, names in record["files"].items() for name in names}
        else:
            self.indexed = self.checkpoint.indexed
            self.file_of = {name: entry.file.name for name, entry in self.entries.items()}
        self.powers_of_two = (self.config.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"
        tensors, _ = layout(cfg, self.block)
        for tensor in tensors:
            entry = self.entries.get(tensor.name)
            if entry is None:
                if tensor.copy:
                    continue
                raise CheckpointError(f"like={self.folder} has no tensor {tensor.name}; it is another model's folder.")
            if entry.shape != tensor.shape:
                raise CheckpointError(
                    f"{entry.file}: {tensor.name} has shape {entry.shape}, the model's is {tensor.shape}."
                )
            if entry.dtype == FP8 and tensor.name + SCALE not in self.entries:
                raise CheckpointError(f"{entry.file}: {tensor.name} is FP8, but {tensor.name + SCALE} is missing.")


@dataclass(frozen=True)
class Format:
    """What is asked for: the arguments of `save_pretrained`."""

    quantize: str | None
    dtype: np.dtype | None
    like: Template | None

    @classmethod
    def asked(cls, quantize: str | None, dtype, like: str | Path | None, cfg: ModelConfig) -> "Format":
        """Raises ValueError for an unknown ``quantize`` or ``dtype`` and for both, CheckpointError for ``like``."""
        if quantize not in (None, "fp8"):
            raise ValueError(f'quantize={quantize!r}: choose "fp8" or None.')
        dtype = None if dtype is None else np.dtype(dtype)
        if dtype is not None and (quantize is not None or dtype not in FLOATS):
            raise ValueError(
                f"dtype {dtype} with quantize={quantize!r}: choose float32, bfloat16 or float16, and no quantize then."
            )
        return cls(quantize, dtype, None if like is None else Template(like, cfg))

    def written(self, tensor: Tensor) -> bool:
        """Copies are written where ``like`` has them."""
        if not tensor.copy:
            return True
        return tensor.name in self.like.entries if self.like else tensor.written

    def of(self, tensor: Tensor, held: Stored) -> Stored:
        """How a tensor is written that is ``held`` so."""
        bias = tensor.path[-2:] == ("router", "bias")
        if self.dtype is not None and not bias:
            return Stored(self.dtype)
        if self.like:
            own = stored(self.like.entries, tensor.name)
            if own.scale is not None or not (self.quantize and tensor.fp8):
                return own
        if held.scale is None and self.quantize and not bias:
            return Stored(np.dtype(FP8), np.dtype(np.float32)) if tensor.fp8 else Stored(np.dtype(jnp.bfloat16))
        return held


def _write(model: Transformer, folder: Path | None, how: Format) -> None:
    """Without a folder: takes part in the gathering only."""
    values: dict[tuple, nnx.Variable] = {}
    map_variables(lambda path, v: values.setdefault(path, v), model)
    block = how.like.block if how.like else _model_block(values)
    tensors, leaves = layout(model.cfg, block)
    forms = _forms(values, tensors)
    tensors = [tensor for tensor in tensors if how.written(tensor)]

    def held(tensor: Tensor):
        return _held(values[tensor.path].get_value(), leaves[tensor.path], tensor, forms.get(tensor.name))

    if folder is None:
        for tensor in tensors:
            held(tensor)
        return
    written = [(t, how.of(t, forms.get(t.name) or held_as(values[t.path].get_value()))) for t in tensors]
    write_published(folder, model.cfg, written, held, block, how)
    if how.like:
        copy_files(how.like.folder, folder)
        _keep_stops(folder / "generation_config.json", model.cfg)


def write_published(
    folder: Path,
    cfg: ModelConfig,
    written: list[tuple[Tensor, Stored]],
    held: Callable[[Tensor], Held],
    block: tuple[int, int],
    how: Format,
) -> None:
    """Writes config.json and safetensors files. ``written``: the tensors, in published order, and how each is stored;
    ``held``: gives a tensor's values, one tensor at a time."""
    like, specs = how.like, {}
    for tensor, form in written:
        specs[tensor.name] = (form.dtype, tensor.shape)
        if form.scale is not None:
            specs[tensor.name + SCALE] = (form.scale, scale_shape(tensor, block))
    files = split_files(specs, like.file_of if like else None)
    if len(files) > 1 or (like and like.indexed):
        write_json(folder / INDEX, index_json(specs, files))
    with ExitStack() as stack:
        writer_of = {}
        for file, names in files.items():
            writer = stack.enter_context(Writer(folder / file, {name: specs[name] for name in names}))
            writer_of |= dict.fromkeys(names, writer)
        for tensor, _ in written:
            array, scale = _published(tensor.name, held(tensor), specs, block, like)
            writer_of[tensor.name].write(tensor.name, array)
            if scale is not None:
                writer_of[tensor.name + SCALE].write(tensor.name + SCALE, scale)
    write_json(folder / "config.json", _config(cfg, specs, block, how))


def held_as(value) -> Stored:
    """The dtypes of a leaf's value."""
    if isinstance(value, Quantized):
        return Stored(np.dtype(value.values.dtype), np.dtype(value.scale.dtype))
    return Stored(np.dtype(value.dtype))


def _model_block(values: dict) -> tuple[int, int]:
    """The block of the model's quantised leaves, as rows and columns of the published matrix."""
    held = {path: v.get_value() for path, v in values.items()}
    blocks = {published_block(path, q.block) for path, q in held.items() if isinstance(q, Quantized)}
    if len(blocks) > 1:
        raise ValueError(f"the model's quantised leaves have blocks of different sizes: {sorted(blocks)}.")
    return blocks.pop() if blocks else BLOCK


def _forms(values: dict[tuple, nnx.Variable], tensors) -> dict[str, Stored]:
    """How the tensors of leaves of several forms were stored, as long as these leaves are held as they were loaded."""
    found: dict[str, Stored] = {}
    for path, variable in values.items():
        forms, value = variable.get_metadata().get(STORED), variable.get_value()
        if forms is None:
            continue
        if held_as(value) == shared(forms) or isinstance(variable, RouterBias):
            own = [tensor.name for tensor in tensors if tensor.path == path and not tensor.copy]
            found |= zip(own, forms, strict=True)
    return found


def _held(value, leaf: Leaf, tensor: Tensor, form: Stored | None) -> Held:
    """A published tensor as the model holds it."""

    def part(array, shape):
        if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
            array = _gathered(array, shape, tensor.index)
        else:
            array = np.asarray(array).reshape(shape)[tensor.index]
        return array.T if tensor.transposed else array

    if not isinstance(value, Quantized):
        return part(value, leaf.matrix)
    values = part(value.values, leaf.matrix)
    if form is not None and form.scale is None:
        return values.astype(form.dtype)  # its scales are 1
    scale = part(value.scale, value.scale.shape)
    if form is not None:
        values, scale = values.astype(FP8), scale.astype(form.scale)
    return values, scale, published_block(tensor.path, value.block)


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


def _published(name: str, held, specs: dict[str, Spec], block: tuple[int, int], like: Template | None):
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
    kept = None
    if like and like.entries[name].dtype == FP8:
        kept = like.checkpoint.read(name), like.checkpoint.read(name + SCALE)
    scale_dtype = specs[name + SCALE][0]
    powers = scale_dtype == E8M0 or bool(like and like.powers_of_two)
    try:
        return quantize_matrix(held, block, kept, powers, scale_dtype)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


def split_files(specs: dict[str, Spec], like: dict[str, str] | None = None) -> dict[str, list[str]]:
    """File name -> names of its tensors: the split of ``like`` (name -> file), else files of up to 5 GB in published
    order.

    A scale that ``like`` does not have goes where its tensor is.
    """
    files: dict[str, list[str]] = {}
    if like is not None:
        for name in specs:
            files.setdefault(like.get(name) or like[name.removesuffix(SCALE)], []).append(name)
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


def _config(cfg: ModelConfig, specs: dict[str, Spec], block: tuple[int, int], how: Format) -> dict:
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
    data, like = _config_fields(cfg, how), how.like
    if quantization is not None:
        data["quantization_config"] = quantization
    if like and how.dtype is None and "quantization_config" in like.config:
        data["quantization_config"] = like.config["quantization_config"]
    if like and how.dtype is None and same_model(like.folder, cfg):
        return data
    data["torch_dtype"] = specs["model.embed_tokens.weight"][0].name
    return data


def _config_fields(cfg: ModelConfig, how: Format) -> dict:
    """What a config.json says of the model itself, and what it takes over from ``like``'s.

    Raises ConfigError where it would be read as another model.
    """
    data, like = config_to_json(cfg), how.like
    replaced = set() if how.dtype is None else {"quantization_config", "torch_dtype", "dtype"}
    if like is None:
        kept = {}
    elif same_model(like.folder, cfg):
        kept, data = like.config, {}
    else:
        known = {*ALIASES.values(), *ROPE_FIELDS, *FOLLOWING}
        kept = {key: value for key, value in like.config.items() if key not in known}
        check_carried(cfg, kept | data)
    kept = {key: value for key, value in kept.items() if key not in replaced}
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
