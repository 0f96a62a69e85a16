"""Checkpoints in the published layout in other dtypes: a step of a training run, or a published folder itself."""

from pathlib import Path

from deepseek_jax.convert.check import check_copy, check_tensors
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.files import copy_files, new_folder
from deepseek_jax.convert.formats import block_of, is_quantized, stored
from deepseek_jax.convert.held import Held
from deepseek_jax.convert.layers import RECORD
from deepseek_jax.convert.load import read_tensor
from deepseek_jax.convert.names import Tensor, layout
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.save import Format, save_pretrained, write_published
from deepseek_jax.convert.training import is_training, load_training


def export(source: str | Path, destination: str | Path, dtype: str | None = None) -> None:
    """Writes a training checkpoint (``RUN/checkpoints/STEP``) or a published folder in the published layout, with its
    tokenizer files.

    ``dtype``: float32, bfloat16 or float16 for all but the router bias; "fp8": FP8 blocks for the linear maps; None: as
    they are held or stored. Of a published folder one tensor is in memory at a time; it keeps its files' split, and
    with "fp8" the blocks that it has.

    Raises CheckpointError for a bad source, a converted folder among them, ValueError for an unknown dtype,
    FileExistsError for a destination that is not empty. Whole or not at all.
    """
    source = Path(source)
    cfg = read_config(source)
    quantize, dtype = ("fp8", None) if dtype == "fp8" else (None, dtype)
    if is_training(source):
        with new_folder(destination) as folder:
            save_pretrained(load_training(source, cfg, None), folder, quantize, dtype=dtype)
            copy_files(source, folder)
        return
    if (source / RECORD).exists():
        raise CheckpointError(f"{source} is a converted folder: convert it back first, then to other dtypes.")
    how = Format.asked(quantize, dtype, source, cfg)
    checkpoint, (tensors, _) = how.like.checkpoint, layout(cfg)
    block = checkpoint.block
    check_tensors(checkpoint, cfg, tensors)

    def held(tensor: Tensor) -> Held:
        if tensor.copy:
            check_copy(checkpoint, tensor, tensors)
        values = read_tensor(checkpoint, tensor.name)
        if not is_quantized(values.dtype):
            return values
        return values, read_tensor(checkpoint, tensor.scale, scale=True), block_of(values.dtype, block)

    written = [(t, how.of(t, stored(checkpoint.entries, t))) for t in tensors if how.written(t)]
    with new_folder(destination) as folder:
        write_published(folder, cfg, written, held, block, how)
        copy_files(source, folder)
