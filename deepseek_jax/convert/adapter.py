"""Adapters of a model, and their folders in PEFT's format: one pair of thin matrices for each published matrix.

An adapted leaf is a `core.lowrank.LowRank` in the place of its weight: every linear map of the model knows it, so the
model's code does not. `deepseek_jax.train.lora` makes fresh ones to train.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.files import new_folder, write_json
from deepseek_jax.convert.names import Tensor, layout
from deepseek_jax.convert.safetensors import CheckpointError, Writer, load_json
from deepseek_jax.core.lowrank import LowRank, dense, held
from deepseek_jax.core.params import Adapter, declared, is_looked_up, is_variable, map_variables, matrix_of
from deepseek_jax.core.quant import Quantized
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.notes import shown
from deepseek_jax.version import __version__

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def adaptable(variable, name: str) -> bool:
    """Whether a leaf may have an adapter: linear maps, but neither the embedding, whose rows are looked up, nor a
    router, which the reference does not have as a linear module."""
    is_map = bool(matrix_of(variable, name).inputs) and not is_looked_up(variable)
    return is_map and variable.get_metadata()["axes"][-1] != "scores"


def _axes(variable) -> tuple[int, int, int]:
    """How many inputs, separate published matrices after them, and outputs a leaf has."""
    matrix = matrix_of(variable)
    return len(matrix.inputs), len(matrix.between), len(matrix.outputs)


def shapes(variable, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The shapes of a and b, and how many axes stand before the leaf's inputs."""
    shape, (inputs, split, outputs) = variable.get_value().shape, _axes(variable)
    lead = len(shape) - inputs - split - outputs
    middle = shape[lead + inputs : lead + inputs + split]
    return (*shape[: lead + inputs], *middle, rank), (*shape[:lead], *middle, rank, *shape[-outputs:]), lead


def low_rank(variable, a, b, alpha: float, dtype) -> LowRank:
    """``variable`` with an adapter: arrays a and b of the shapes of `shapes`."""
    inputs, split, outputs = _axes(variable)
    axes = variable.get_metadata()["axes"]
    lead = len(axes) - inputs - split - outputs
    front, middle = tuple(range(lead)), axes[lead + inputs : lead + inputs + split]
    after = tuple(range(lead + inputs, lead + inputs + split))
    of_a = declared((*axes[: lead + inputs], *middle, None), inputs, (*front, *after))
    of_b = declared((*axes[:lead], *middle, None, *axes[-outputs:]), 1, tuple(range(lead + split)))
    a, b = Adapter(jnp.asarray(a, dtype), **of_a), Adapter(jnp.asarray(b, dtype), **of_b)
    return LowRank(variable, a, b, alpha, inputs, split, outputs)


def _is_node(x) -> bool:
    return isinstance(x, LowRank) or is_variable(x)


def adapted(model: Transformer) -> dict[tuple, LowRank]:
    """The adapted leaves by path."""
    return {path: x for path, x in _nodes(model).items() if isinstance(x, LowRank)}


def _nodes(model: Transformer) -> dict[tuple, Any]:
    """The leaves by path: a variable, or a `LowRank` with its three."""
    return {
        tuple(getattr(p, "name", getattr(p, "key", getattr(p, "idx", None))) for p in path): x
        for path, x in jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_node)
    }


def adapted_paths(model: Transformer) -> list[str]:
    return [".".join(map(str, path)) for path in adapted(model)]


def merge(model: Transformer, dtype=None) -> Transformer:
    """``model`` with every adapter multiplied out and added to its weight, in float32; for `save_pretrained`.

    ``dtype``: of the merged leaves; None for that of the weight, float32 where it was quantised. All else, quantised
    leaves without an adapter included, stays as it is. The sum is rounded to ``dtype`` once.
    """

    def join(w):
        if not isinstance(w, LowRank):
            return w
        base = held(w.base)
        own = jnp.float32 if isinstance(base, Quantized) else base.dtype
        return w.base.replace(_multiplied_out(w, np.dtype(dtype or own)))

    return jax.tree.map(join, model, is_leaf=_is_node)


_multiplied_out = jax.jit(dense, static_argnums=1)


@dataclass(frozen=True)
class Pair:
    """A published matrix's adapter: where it stands in its leaf's matrix form."""

    module: str
    lead: tuple[int, ...]
    half: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Pair":
        first = next(i for i, part in enumerate(tensor.index) if isinstance(part, slice))
        return cls(tensor.name.removesuffix(".weight"), tensor.index[:first], tensor.index[first + 1 : -1])

    @property
    def names(self) -> tuple[str, str]:
        return f"{PREFIX}{self.module}.lora_A.weight", f"{PREFIX}{self.module}.lora_B.weight"

    def of_a(self, a: np.ndarray) -> np.ndarray:
        """[inputs, r] of a in matrix form, [*lead, inputs, *split, r]: a view."""
        return a[(*self.lead, slice(None), *self.half)]

    def of_b(self, b: np.ndarray) -> np.ndarray:
        """[r, outputs] of b in matrix form, [*lead, *split, r, outputs]: a view."""
        return b[(*self.lead, *self.half)]


def _matrices(variable, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The adapter a, b of a leaf with fused heads: its matrix form."""
    inputs, split, outputs = _axes(variable)
    lead = a.ndim - inputs - split - 1
    return (
        a.reshape(*a.shape[:lead], -1, *a.shape[lead + inputs :]),
        b.reshape(*b.shape[: b.ndim - outputs], -1),
    )


def _pairs(cfg, variables: dict[tuple, Any]) -> Iterator[tuple[tuple, Pair]]:
    """Every published matrix that may have an adapter; ``variables``: the model's weights by path."""
    for tensor in layout(cfg)[0]:
        if not tensor.copy and adaptable(variables[tensor.path], tensor.name):
            yield tensor.path, Pair.of(tensor)


def save_adapter(model: Transformer, path: str | Path, base: str | Path | None = None) -> None:
    """Writes the adapters apart, in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

    One pair ``lora_A`` [r, in], ``lora_B`` [out, r] for each published matrix, in the adapters' dtype; pairs that
    are all zero are left out. ``base``: what the config names as the base model. `load_adapter` reads all of it back
    exactly. PEFT (0.21.2, with transformers 5) applies the adapters of attention and of the head; there it takes
    gate_proj, up_proj and down_proj for its fused experts, whatever else has these names, and it has no MTP modules:
    a model with adapters on networks goes there merged. Whole or not at all.

    Raises ValueError for a model without adapters and for values that are not finite, FileExistsError when ``path``
    is there and not empty.
    """
    leaves = adapted(model)
    if not leaves:
        raise ValueError("the model has no adapters to save.")
    ranks = {(w.rank, w.alpha) for w in leaves.values()}
    if len(ranks) > 1:
        raise ValueError(f"the adapters have different ranks or alphas, which one file cannot say: {sorted(ranks)}.")
    ((rank, alpha),) = ranks
    tensors, written, left = {}, [], []
    forms = {p: _matrices(w.base, *(np.asarray(x.get_value()) for x in (w.a, w.b))) for p, w in leaves.items()}
    weights = {path: x.base if isinstance(x, LowRank) else x for path, x in _nodes(model).items()}
    for leaf, pair in _pairs(model.cfg, weights):
        if leaf not in forms:
            left.append(pair.module)
            continue
        a, b = pair.of_a(forms[leaf][0]).T, pair.of_b(forms[leaf][1]).T
        if not a.any() and not b.any():
            left.append(pair.module)
            continue
        for name, array in zip(pair.names, (a, b), strict=True):
            if not np.isfinite(array.astype(np.float32)).all():
                raise ValueError(f"{name} holds values that are not finite; it is not saved.")
            tensors[name] = array
        written.append(pair.module)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _target_modules(written, left),
        "deepseek_jax_version": __version__,
    }
    with new_folder(path) as folder:
        with Writer(folder / WEIGHTS, {name: (a.dtype, a.shape) for name, a in tensors.items()}) as writer:
            for name, array in tensors.items():
                writer.write(name, array)
        write_json(folder / CONFIG, config)


def _target_modules(written: list[str], left: list[str]) -> list[str]:
    """PEFT matches a module by the end of its name: the last part alone where all such modules are written."""
    short = {module.rsplit(".", 1)[-1] for module in written}
    others = {module.rsplit(".", 1)[-1] for module in left}
    return sorted(short - others) + [m for m in written if m.rsplit(".", 1)[-1] in others]


def load_adapter(model: Transformer, path: str | Path) -> Transformer:
    """``model`` with the adapters of a folder in PEFT's format, as `save_adapter` or PEFT wrote it.

    Matrices without a pair get none, or A = B = 0 beside others of their leaf.

    Raises CheckpointError for a file that is damaged, for tensors that do not fit the model, for a matrix with only
    one of its two tensors, and for kinds of adapters other than plain LoRA; ValueError for a model with adapters.
    """
    folder = Path(path)
    if adapted(model):
        raise ValueError("the model has adapters already: merge them first, or load a model without.")
    rank, alpha = _read_config(folder / CONFIG)
    checkpoint = Checkpoint(folder)
    entries = dict(checkpoint.entries)
    variables, leaves = _nodes(model), {}
    for leaf, pair in _pairs(model.cfg, variables):
        found = [entries.pop(name, None) for name in pair.names]
        if found == [None, None]:
            continue
        if None in found:
            raise CheckpointError(f"{folder / WEIGHTS}: {pair.module} has one of lora_A and lora_B without the other.")
        if leaf not in leaves:
            sizes = shapes(variables[leaf], rank)[:2]
            leaves[leaf] = [np.zeros(size, entry.dtype) for size, entry in zip(sizes, found, strict=True)]
        a, b = _matrices(variables[leaf], *leaves[leaf])
        for entry, part in zip(found, (pair.of_a(a), pair.of_b(b)), strict=True):
            if entry.shape != part.shape[::-1] or entry.dtype != part.dtype:
                raise CheckpointError(
                    f"{entry.file}: {entry.name} is {entry.dtype} {entry.shape}; the model and rank {rank} imply "
                    f"{part.dtype} {part.shape[::-1]}."
                )
            part[...] = entry.read().T
    # PEFT writes a copy of the head's frozen weight beside the head's adapter.
    names = sorted(name for name in entries if not name.endswith(".base_layer.weight"))
    if names:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {len(names)} tensors belong to no matrix of {model.cfg.name}, the first {names[0]}."
        )

    def wrap(leaf, variable):
        if leaf not in leaves:
            return variable
        a, b = leaves[leaf]
        return low_rank(variable, a, b, alpha, a.dtype)

    return map_variables(wrap, model)


def _read_config(path: Path) -> tuple[int, float]:
    """Rank and alpha. Raises CheckpointError for what is no plain LoRA."""
    config = load_json(path)
    plain = {
        "peft_type": ("LORA",),
        "use_dora": (False, None),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "fan_in_fan_out": (False, None),
        "bias": ("none", None),
        "modules_to_save": (None, []),
    }
    for field, allowed in plain.items():
        if config.get(field) not in allowed:
            raise CheckpointError(f"{path}: {field} {shown(config.get(field))} is not read here, only {allowed[0]!r}.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise CheckpointError(
            f"{path}: r must be a positive integer and lora_alpha positive, not {shown(rank)} and {shown(alpha)}."
        )
    # rsLoRA divides alpha by the rank's root.
    return rank, alpha * rank**0.5 if config.get("use_rslora") else alpha
