"""Published tensors and our leaves, by the names of `convert.tables`: one description, read both ways.

A published Linear weight is [out, in], our matrix is [in, out]. Several published tensors share one leaf: the
layers of a stack, the experts, gate and up. `Tensor.index` says where in the leaf's *matrix form* a tensor
stands: the leaf with fused heads, for instance q_b [L, Q, N * X], experts' gate_up [L, E, D, 2, F].
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache, singledispatch
from pathlib import Path as FilePath

import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.schema import GQA, MLA, Compressed, ModelConfig
from deepseek_jax.convert.naming import layer_of
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.tables import Names, names_of
from deepseek_jax.core.params import Matrix, is_looked_up, map_variables, matrix_of
from deepseek_jax.model.transformer import abstract

# What `layout` makes in a second, whatever the files hold.
MOST_LAID_OUT = 100_000
# Buffers that older tools saved, which follow from the config, and states of modules that are no weights.
IGNORED = ("rotary_emb.inv_freq", "._extra_state")

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Tensor:
    """A published tensor: its name and shape, and the place in the model that holds it.

    ``scale``: the name of its scales, where it is stored quantised.
    ``path``: the leaf. ``index``: the part of the leaf's matrix form, stacked axes first. ``transposed``:
    whether the part is the published tensor's transpose. ``fp8``: whether releases quantise it. ``copy``:
    whether it is a duplicate of a tensor that stands elsewhere, which exporters may leave out: of the MTP layer, or a
    tied head. ``written``: whether it is written where no other folder says so; a tied head is not. ``fixed``: the
    dtype that its leaf has whatever the model's is, float32 or int32; None: the model's.
    """

    name: str
    scale: str
    shape: tuple[int, ...]
    path: Path
    index: tuple[int | slice, ...]
    transposed: bool
    fp8: bool
    copy: bool = False
    written: bool = True
    fixed: np.dtype | None = None


@dataclass(frozen=True)
class Leaf:
    """A leaf's shapes: ``shape`` as the model has it, ``matrix`` with fused heads.

    Of both the first ``stacked`` axes are layers. ``form``: what the leaf says of its other axes. ``transposed``:
    whether the published tensors are the transposes of its parts. A ``block`` is an FP8 block's rows and columns in the
    published [out, in] matrix.
    """

    shape: tuple[int, ...]
    matrix: tuple[int, ...]
    stacked: int
    form: Matrix
    transposed: bool

    def block(self, block: tuple[int, int]) -> tuple[int, ...]:
        """The block's extent along the axes of ``matrix`` after the stacked ones."""
        rows, columns = block
        return (*(1 for _ in self.form.front), columns, *(1 for _ in self.form.between), rows)

    def published_block(self, block: tuple[int, ...]) -> tuple[int, int]:
        """The rows and columns of which `block` makes this."""
        return block[-1], block[-2 - len(self.form.between)]

    def scale(self, block: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the block scales."""
        lead, rest = self.matrix[: self.stacked], self.matrix[self.stacked :]
        return (*lead, *(-(-n // b) for n, b in zip(rest, self.block(block), strict=True)))

    @property
    def dims(self) -> tuple[int, ...]:
        return self.shape[self.stacked :]


@cache
def layout(cfg: ModelConfig) -> tuple[tuple[Tensor, ...], dict[Path, Leaf]]:
    """Every published tensor of a model in published order, and the shapes of its leaves."""
    names, variables = names_of(cfg), {}
    # What is not of this dtype is of its own in every model.
    map_variables(lambda path, v: variables.setdefault(path, v), abstract(cfg, jnp.bfloat16))
    tensors, leaves = [], {}

    def add(prefix: Path, rows, published: str, lead: tuple[int, ...] = ()) -> None:
        for ours, theirs, fp8 in rows:
            path = (*prefix, *ours.split("."))
            if path not in variables:
                continue
            leaf = leaves.setdefault(path, leaf_of(variables[path], path, len(lead)))
            dtype = variables[path].get_value().dtype
            fixed = None if dtype == jnp.bfloat16 else np.dtype(dtype)
            found = _tensors(leaf, path, published + theirs, lead, fp8, names)
            tensors.extend(replace(tensor, fixed=fixed) for tensor in found)

    add((), names.embedding, "")
    where = {n: (s, i) for s, stack in enumerate(cfg.stacks) for i, n in enumerate(stack.numbers)}
    for number, layer in enumerate(cfg.layers):
        stack, i = where[number]
        add(("stacks", stack), names.layer(layer), names.prefix.format(layer=number), (i,))
    add((), names.root, "")
    main = {tensor.path: tensor for tensor in tensors if len(tensor.path) == 1}

    def add_copy(name: str, source: Tensor, written: bool = True) -> None:
        tensors.append(replace(source, name=name, scale=names.scale(name), fp8=False, copy=True, written=written))

    if cfg.tie_embeddings:
        head = next(theirs for ours, theirs, _ in names.root if ours == "head")
        add_copy(head, main[("embed",)], written=False)
    for depth in range(cfg.mtp_depth):
        published = names.of_mtp(depth, cfg.n_layers)
        add(("mtp", depth), names.mtp, published)
        add(("mtp", depth, "block"), names.layer(cfg.mtp_layer), published)
        for theirs, ours in names.copies:
            add_copy(published + theirs, main.get((ours,), main[("embed",)]))
    missing = set(variables) - set(leaves)
    if missing:
        raise AssertionError(f"leaves without a published name: {sorted(map(str, missing))}")
    return tuple(tensors), leaves


def widest(cfg: ModelConfig) -> int:
    """The largest extent of a matrix that releases quantise."""
    experts = 0 if cfg.moe is None else max(cfg.moe.expert_dim, cfg.moe.shared_width)
    return max(cfg.dim, cfg.ffn_dim, _widest(cfg.attention), experts)


@singledispatch
def _widest(a) -> int:
    """The largest extent of a form of attention's matrices, the model's width apart."""
    raise TypeError(f"the matrices of {type(a).__name__} are not known.")


@_widest.register
def _(a: GQA) -> int:
    return a.n_heads * a.head_dim


@_widest.register
def _(a: MLA) -> int:
    heads = a.n_heads * max(a.nope_dim + max(a.rope_dim, a.v_dim), a.v_dim)
    return max(heads, a.kv_rank + a.rope_dim, a.q_rank or 0)


@_widest.register
def _(a: Compressed) -> int:
    return max(a.n_heads * a.head_dim, a.q_rank, a.o_groups * a.o_rank, a.indexer.index_heads * a.indexer.index_dim)


def check_size(cfg: ModelConfig, names: Collection[str], folder: FilePath) -> None:
    """Raises CheckpointError where a config implies so many more tensors than there are that it cannot be theirs.

    Laying them out one by one, to name what is missing, would take the memory that the numbers in config.json claim.
    """
    layers = len({layer_of(name, cfg.n_layers) for name in names} - {None})
    moe = 0 if cfg.moe is None else cfg.n_moe_layers + (cfg.mtp_depth if cfg.mtp_layer.is_moe else 0)
    per_moe = 0 if cfg.moe is None else 3 * cfg.moe.n_experts
    tensors = (cfg.n_layers + cfg.mtp_depth) * (len(names_of(cfg).rows[type(cfg.attention)]) + 2) + moe * per_moe
    if tensors > MOST_LAID_OUT + 4 * len(names) or cfg.n_layers > 2 * layers + 100:
        experts = "" if cfg.moe is None else f" and n_routed_experts {cfg.moe.n_experts}"
        raise CheckpointError(
            f"{folder}: config.json says num_hidden_layers {cfg.n_layers}, num_nextn_predict_layers {cfg.mtp_depth}"
            f"{experts}, which is some {tensors} tensors; the files hold {len(names)} in {layers} layers."
        )


def leaf_of(variable, path: Path, stacked: int) -> Leaf:
    """The shapes of a variable of which the first ``stacked`` axes are layers."""
    shape, form = variable.get_value().shape, matrix_of(variable, ".".join(map(str, path)))
    front, between = ([shape[a] for a in axes] for axes in (form.front, form.between))
    inputs = [math.prod(shape[a] for a in form.inputs)] if form.inputs else []
    matrix = (*shape[:stacked], *front, *inputs, *between, math.prod(shape[a] for a in form.outputs))
    # The embedding is used as it is published.
    return Leaf(shape, matrix, stacked, form, bool(inputs) and not is_looked_up(variable))


def _tensors(leaf: Leaf, path: Path, name: str, lead: tuple[int, ...], fp8: bool, names: Names):
    matrix = leaf.matrix[leaf.stacked :]
    experts = range(matrix[0]) if "{expert}" in name else (None,)
    halves = tuple(enumerate(names.halves)) if "{half}" in name else ((None, None),)
    for expert in experts:
        for number, half in halves:
            index = (*lead, *(() if expert is None else (expert,)), slice(None))
            index += () if number is None else (number,)
            if len(matrix) >= 2:
                index += (slice(None),)
                shape = (matrix[-1], matrix[1] if expert is not None else matrix[0])
                shape = shape if leaf.transposed else shape[::-1]
            else:
                shape = matrix
            published = name.format(expert=expert, half=half)
            yield Tensor(published, names.scale(published), shape, path, index, leaf.transposed, fp8)
