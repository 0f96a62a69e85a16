"""`save_pretrained`: a model in the published layout.

Everything is written into a temporary folder beside the destination, which takes the destination's name at
the end: a failure leaves nothing.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.configs.hf import check_carried, config_to_json, eos_ids
from deepseek_jax.configs.published.fields import ALIASES, FOLLOWING, ROPE_FIELDS
from deepseek_jax.configs.schema import ConfigError, ModelConfig
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.files import copy_files, index_json, new_folder, split_files, write_json
from deepseek_jax.convert.formats import (
    FLOATS,
    Stored,
    as_held,
    as_stored,
    has_bad,
    is_quantized,
    packed_shape,
    scale_shape,
    stored,
)
from deepseek_jax.convert.held import Held, forms_of, held_as, model_block, tensor_of
from deepseek_jax.convert.layers import Layers
from deepseek_jax.convert.load import open_checkpoint
from deepseek_jax.convert.names import Tensor, layout
from deepseek_jax.convert.pickles import safetensors_name
from deepseek_jax.convert.safetensors import INDEX, CheckpointError, Writer, load_json
from deepseek_jax.core.params import Adapter, map_variables, variables
from deepseek_jax.core.quant import FP4, FP8, PACKED, dequantize_matrix, quantize_matrix
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.processes import is_first
from deepseek_jax.text.files import copy_tokenizer, tokenizer_folder
from deepseek_jax.version import __version__

if TYPE_CHECKING:
    from deepseek_jax.text.tokenizer import Tokenizer

E8M0 = np.dtype(jnp.float8_e8m0fnu)


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
    block of the published matrix, all else bfloat16, what no model has in another dtype as it is (the router bias in
    float32, a hash router's table in int64). ``dtype``: float32, bfloat16 or float16 for every tensor but these; FP8
    and FP4 are dequantised. Neither: as the model holds it, or, of a model that was loaded with dtype=None, each tensor
    as it was stored.
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
    config_to_json(model.cfg)  # what no config.json can carry has no published names either
    how = Format.asked(quantize, dtype, like, model.cfg)
    _config_fields(model.cfg, how)
    words = None if tokenizer is None else tokenizer_folder(tokenizer)
    with new_folder(path) if is_first() else nullcontext() as folder:
        _write(model, folder, how)
        if words is not None and folder is not None:
            copy_tokenizer(words, folder)


class Template:
    """The folder that ``like`` names."""

    def __init__(self, folder: str | Path, cfg: ModelConfig):
        self.folder = Path(folder)
        self.config = load_json(self.folder / "config.json")
        self.checkpoint = open_checkpoint(self.folder, cfg)
        self.entries = self.checkpoint.entries
        if isinstance(self.checkpoint, Layers):
            record = self.checkpoint.record
            self.indexed = record["indexed"]
            self.file_of = {name: file for file, names in record["files"].items() for name in names}
        else:
            self.indexed = self.checkpoint.indexed
            self.file_of = {name: safetensors_name(e.file.name) for name, e in self.entries.items()}
        self.powers_of_two = (self.config.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"
        tensors, _ = layout(cfg)
        for tensor in tensors:
            entry = self.entries.get(tensor.name)
            if entry is None:
                if tensor.copy:
                    continue
                raise CheckpointError(f"like={self.folder} has no tensor {tensor.name}; it is another model's folder.")
            shape = packed_shape(tensor.shape) if entry.dtype == PACKED else tensor.shape
            if entry.shape != shape:
                raise CheckpointError(f"{entry.file}: {tensor.name} has shape {entry.shape}, the model's is {shape}.")
            if is_quantized(entry.dtype) and tensor.scale not in self.entries:
                raise CheckpointError(f"{entry.file}: {tensor.name} is {entry.dtype}, but {tensor.scale} is missing.")
            # Scales that are not there yet go where their tensor is.
            self.file_of.setdefault(tensor.scale, self.file_of[tensor.name])


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
        if tensor.fixed is not None:
            return stored(self.like.entries, tensor) if self.like else held
        if self.dtype is not None:
            return Stored(self.dtype)
        if self.like:
            own = stored(self.like.entries, tensor)
            if own.scale is not None or not (self.quantize and tensor.fp8):
                return own
        if held.scale is None and self.quantize:
            return Stored(np.dtype(FP8), np.dtype(np.float32)) if tensor.fp8 else Stored(np.dtype(jnp.bfloat16))
        return held


def _write(model: Transformer, folder: Path | None, how: Format) -> None:
    """Without a folder: takes part in the gathering only."""
    values: dict[tuple, nnx.Variable] = {}
    map_variables(lambda path, v: values.setdefault(path, v), model)
    tensors, leaves = layout(model.cfg)
    block = how.like.checkpoint.block if how.like else model_block(values, leaves)
    forms = forms_of(values, tensors)
    tensors = [tensor for tensor in tensors if how.written(tensor)]

    def held(tensor: Tensor):
        return tensor_of(values[tensor.path].get_value(), leaves[tensor.path], tensor, forms.get(tensor.name))

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
        specs[tensor.name] = form.spec(tensor.shape)
        if form.scale is not None:
            specs[tensor.scale] = (form.scale, scale_shape(tensor, form.block(block)))
    files = split_files(specs, like.file_of if like else None)
    if len(files) > 1 or (like and like.indexed):
        write_json(folder / INDEX, index_json(specs, files))
    with ExitStack() as stack:
        writer_of = {}
        for file, names in files.items():
            writer = stack.enter_context(Writer(folder / file, {name: specs[name] for name in names}))
            writer_of |= dict.fromkeys(names, writer)
        for tensor, form in written:
            array, scale = _published(tensor, held(tensor), form, block, like)
            writer_of[tensor.name].write(tensor.name, as_stored(array))
            if scale is not None:
                writer_of[tensor.scale].write(tensor.scale, scale)
    write_json(folder / "config.json", _config(cfg, written, block, how))


def _published(tensor: Tensor, held: Held, form: Stored, block: tuple[int, int], like: Template | None):
    """A tensor's values and scales (None: it has none) in the dtypes of ``form``."""
    block = form.block(block)
    if isinstance(held, tuple):
        values, scale, held_block = held
        if Stored(values.dtype, scale.dtype) == form and held_block == block:
            return values, scale
        held = dequantize_matrix(values, scale, held_block)
    if form.scale is None:
        array = held.astype(form.dtype)
        if has_bad(array):
            raise ValueError(f"{tensor.name} holds values that are not finite as {form.dtype}; it is not saved.")
        return array, None
    kept = None
    if like and stored(like.entries, tensor).dtype == form.dtype:
        kept = as_held(like.checkpoint.read(tensor.name)), like.checkpoint.read(tensor.scale)
    powers = form.scale == E8M0 or bool(like and like.powers_of_two)
    try:
        return quantize_matrix(held, block, kept, powers, form.scale, form.dtype)
    except ValueError as e:
        raise ValueError(f"{tensor.name}: {e}") from None


def _config(cfg: ModelConfig, written: list[tuple[Tensor, Stored]], block: tuple[int, int], how: Format) -> dict:
    """The config.json; of ``like``'s, fields that say nothing about our config are kept as they are."""
    data, like = _config_fields(cfg, how), how.like
    scales = {form.scale for _, form in written if form.scale is not None}
    if like and how.dtype is None and "quantization_config" in like.config:
        data["quantization_config"] = like.config["quantization_config"]
    elif scales:
        data["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": list(block),
            "activation_scheme": "dynamic",
        } | ({"scale_fmt": "ue8m0"} if E8M0 in scales else {})
        if any(form.dtype == FP4 for _, form in written):
            data["expert_dtype"] = "fp4"
    if like and how.dtype is None and same_model(like.folder, cfg):
        return data
    data["torch_dtype"] = next(form.dtype.name for tensor, form in written if tensor.path == ("embed",))
    return data


def _config_fields(cfg: ModelConfig, how: Format) -> dict:
    """What a config.json says of the model itself, and what it takes over from ``like``'s.

    Raises ConfigError where it would be read as another model.
    """
    data, like = config_to_json(cfg), how.like
    replaced = set() if how.dtype is None else {"quantization_config", "expert_dtype", "torch_dtype", "dtype"}
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
        return replace(read_config(folder), name=cfg.name) == cfg
    except ConfigError:
        return False


def _keep_stops(path: Path, cfg: ModelConfig) -> None:
    """A copied generation config would bring back the stop tokens that a changed model no longer has."""
    if path.is_file():
        data = load_json(path)
        if "eos_token_id" in data and eos_ids(data["eos_token_id"], path.name) != cfg.eos_ids:
            write_json(path, data | {"eos_token_id": list(cfg.eos_ids)})
