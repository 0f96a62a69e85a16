"""A published checkpoint that is trained further: all of it, a part of it, or adapters beside it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.adapter import load_adapter, merge, save_adapter
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.core.context import Context
from deepseek_jax.core.lowrank import dense
from deepseek_jax.core.params import map_variables
from deepseek_jax.core.partition import Trained
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.runs.export import export_model
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.text.files import copy_tokenizer
from deepseek_jax.train.lora import adapt, check_targets
from deepseek_jax.train.patterns import select
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.tuning import LoRA


@dataclass(frozen=True)
class Tuned:
    """``source``: a published folder, a converted one or a run's checkpoint. ``cfg``: what it becomes; of a config that
    is not its own the weights that fit are kept. ``patterns``: what is trained (`train.patterns.select`), all by
    default; everything else stays as it is stored, bit for bit. ``lora``: adapters are trained instead, on a model that
    stays as it is stored; None for none.

    Raises ValueError for what does not fit each other, the checkpoint, or the mesh.
    """

    source: Path
    cfg: ModelConfig
    recipe: Recipe
    options: Options
    ctx: Context
    patterns: tuple[str, ...] = ()
    lora: LoRA | None = None

    def __post_init__(self):
        if self.ctx.mesh is not None and (self.patterns or self.lora is not None):
            raise ValueError(
                "a part of a model and adapters are trained on one device: leave the mesh out, or train all of the "
                "model."
            )
        if self.patterns and self.lora is not None:
            raise ValueError(
                "patterns of trained parameters and LoRA exclude each other: its targets say what gets adapters."
            )
        for pattern in self.patterns:
            if pattern.endswith("router.bias") and not self.recipe.bias_speed:
                raise ValueError(
                    f"{pattern!r} asks for router biases to move, but the recipe's bias_speed is 0: give one."
                )
        if self.patterns:
            select(abstract(self.cfg), self.patterns)
        if self.lora is not None:
            check_targets(abstract(self.cfg), self.lora)
            if not self.lora.merge and self.cfg != read_config(self.source):
                raise ValueError(
                    "adapters alone fit the checkpoint as it is stored, not another config: merge them, or leave the "
                    "config."
                )

    @property
    def trained(self) -> Trained | None:
        return select(abstract(self.cfg), self.patterns) if self.patterns else None

    def make(self) -> Transformer:
        """The model before the first step; what is computed in float32 beside it is no part of ``ctx``."""
        key = jax.random.key(self.recipe.seed)
        if self.lora is not None:
            return adapt(self._stored(key), self.lora, self.recipe.seed)
        if self.patterns:
            return thawed(self._stored(key), self.trained)
        ctx = replace(self.ctx, dtype=jnp.dtype(self.recipe.dtype))
        return load_pretrained(self.source, dtype=jnp.float32, ctx=ctx, cfg=self.cfg, key=key)

    def _stored(self, key) -> Transformer:
        return load_pretrained(self.source, dtype=None, cfg=self.cfg, key=key)

    def write(self, model: Transformer, folder: Path) -> None:
        """Exports the model, or the adapters where they are not merged."""
        if self.lora is not None and not self.lora.merge:
            save_adapter(model, folder, base=self.source)
        else:
            whole = merge(model) if self.lora is not None else model
            export_model(whole, folder, self.options, self.source, self.recipe.dtype)

    @property
    def load(self) -> Callable[[Path], Transformer] | None:
        """How an export is read again; None for as any published folder."""
        if self.lora is None or self.lora.merge:
            return None
        return lambda folder: load_adapter(load_pretrained(self.source, dtype=None), folder)


def thawed(model: Transformer, trained: Trained) -> Transformer:
    """``model`` with every leaf that ``trained`` chooses, in whole or in part, as float32, quantised ones included."""

    def thaw(path, variable):
        if not trained(".".join(map(str, path))):
            return variable
        return variable.replace(dense(variable, jnp.float32))

    return map_variables(thaw, model)


def keep_tokenizer(source: Path, run: RunFolder) -> None:
    """Copies the checkpoint's tokenizer into the run's folder."""
    run.tokenizer.mkdir(exist_ok=True)
    copy_tokenizer(source, run.tokenizer)


def fingerprint(source: Path) -> str:
    """Tells two states of a checkpoint's folder apart by names, sizes and times: hashing terabytes would take hours."""
    files = sorted(p for p in source.rglob("*") if p.is_file())
    listed = [(str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def adapters(lora: LoRA | None) -> LoRA | None:
    """None for rank 0, which is none."""
    return lora if lora is not None and lora.rank else None
