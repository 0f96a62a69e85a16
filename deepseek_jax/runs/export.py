"""What a run exports: the published layout, in the dtypes of the checkpoint that it began from, or in one asked for."""

from pathlib import Path

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.files import copy_files
from deepseek_jax.convert.formats import is_quantized
from deepseek_jax.convert.load import open_checkpoint
from deepseek_jax.convert.names import layout
from deepseek_jax.convert.save import save_pretrained
from deepseek_jax.convert.training import is_training
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.processes import is_first
from deepseek_jax.runs.options import Options


def export_model(model: Transformer, folder: Path, options: Options, source: Path | None, computed: str) -> None:
    """Writes ``model`` into ``folder`` in the dtype that ``options`` name.

    "source": the dtypes of ``source``, tensor by tensor, its file split and its unchanged blocks. With a run's
    checkpoint, which has no files of that layout, and for a model with other tensors: as the model is held, in FP8
    blocks where ``source`` has any. Without a source ``computed``, the dtype that the run computes in. A source's
    tokenizer and licence come along.
    """
    like = source if source is not None and _gives_all(source, model.cfg) else None
    how = {"quantize": "fp8"} if options.export_dtype == "fp8" else {"dtype": options.export_dtype}
    if options.export_dtype == "source":
        how = {"dtype": computed} if source is None else {}
        if source is not None and like is None and _is_quantized(source):
            how = {"quantize": "fp8"}
    save_pretrained(model, folder, like=like, **how)
    if source is not None and like is None and is_first():
        copy_files(source, folder)


def _gives_all(source: Path, cfg: ModelConfig) -> bool:
    """Whether a folder has every tensor of a model of ``cfg``, which may be another config than its own."""
    if is_training(source):
        return False
    own = read_config(source)
    ours, theirs = ({(t.name, t.shape) for t in layout(c)[0]} for c in (cfg, own))
    return ours <= theirs


def _is_quantized(source: Path) -> bool:
    if is_training(source):
        return False
    return any(is_quantized(entry.dtype) for entry in open_checkpoint(source, read_config(source)).entries.values())
