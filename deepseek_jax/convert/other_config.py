"""The same weights under another config: what fits is kept, the rest is named, left out or drawn anew.

Parameters meet by name: those of a layer by its number in the model, of an MTP module by its depth, of an expert by its
index. How layers are stacked, which follows from the config, plays no part.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import numpy as np

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.formats import STORED
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import map_variables
from deepseek_jax.core.quant import Quantized
from deepseek_jax.model.transformer import Transformer, abstract, init_leaves
from deepseek_jax.notes import note
from deepseek_jax.parallel.placement import place

# Along these axes stand separate things: a model with fewer of them has the first ones.
LISTS = ("expert", "scores", "vocab")
# The sizes that a matrix of attention is cut by: with others, values of the same shape would mean something else.
CUT_BY = {
    "q": ("n_heads", "nope_dim", "rope_dim", "head_dim"),
    "k": ("n_kv_heads", "head_dim"),
    "v": ("n_kv_heads", "head_dim"),
    **dict.fromkeys(("q_bias", "k_bias", "v_bias"), ("n_heads", "n_kv_heads", "head_dim")),
    "q_b": ("n_heads", "nope_dim", "rope_dim"),
    "kv_a": ("kv_rank", "rope_dim"),
    "kv_b": ("n_heads", "nope_dim", "v_dim"),
    "o": ("n_heads", "v_dim", "head_dim"),
}
# So many names are told; the rest are counted.
TOLD = 12

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Part:
    """A parameter of one layer: its leaf, its place in a stacked one (None: the leaf is the parameter), its shape."""

    path: Path
    index: int | None
    shape: tuple[int, ...]
    axes: tuple


def with_config(
    model: Transformer, cfg: ModelConfig, key: jax.Array | None = None, ctx: Context | None = None
) -> Transformer:
    """``model``'s weights as a model of ``cfg``. Leaves that stay as they are, quantised ones too, are shared.

    Kept is what both have, by name, with one shape; of experts and of the vocabulary the first ones that both have.
    What ``model`` alone has is left out; what ``cfg`` alone has, or has with another shape, is drawn from ``key`` as
    `init` draws it. A `CheckpointWarning` each names them. ``model`` lies on devices of this process, ``ctx`` says
    where the new one lies; leaves that change are made in the host's memory.

    Raises ValueError where the width of the residual stream differs, so that no weight fits; where something is new and
    there is no ``key``; for a quantised leaf that would change.
    """
    was = model.cfg
    if cfg.dim != was.dim:
        raise ValueError(
            f"dim is {was.dim} in {was.name} and {cfg.dim} in the other config, so that no weight fits: begin with "
            "fresh weights instead."
        )
    held, wanted = _parts(model), _parts(abstract(cfg))
    kept = {name: _overlap(name, held.get(name), part, was, cfg) for name, part in wanted.items()}
    left = [_named(name, part.shape, kept.get(name)) for name, part in held.items() if kept.get(name) != part.shape]
    new = [_named(name, part.shape, kept[name]) for name, part in wanted.items() if kept[name] != part.shape]
    if new and key is None:
        raise ValueError(
            f"the other config has what {was.name} lacks: {_told(new, wanted)}. Give a key to draw it from."
        )
    if left:
        note(f"{was.name} under another config: left out {_told(left, held)}.")
    if new:
        note(f"{was.name} under another config: drawn anew {_told(new, wanted)}.")
    incomplete = {part.path for name, part in wanted.items() if kept[name] != part.shape}
    fresh = init_leaves(cfg, key, tuple(sorted(incomplete, key=str))) if incomplete else {}
    values: dict[Path, object] = {}
    map_variables(lambda path, v: values.setdefault(path, v.get_value()), model)
    metadata_of: dict[Path, dict] = {}
    map_variables(lambda path, v: metadata_of.setdefault(path, v.get_metadata()), model)
    forms = {path: metadata[STORED] for path, metadata in metadata_of.items() if STORED in metadata}
    by_leaf: dict[Path, list[tuple[str, Part]]] = {}
    for name, part in wanted.items():
        by_leaf.setdefault(part.path, []).append((name, part))

    def fill(path, variable):
        parts = [(held[name], part, kept[name]) for name, part in by_leaf[path] if kept[name] is not None]
        shape = variable.get_value().shape
        if parts and _same(parts, len(by_leaf[path]), values, shape):
            source = parts[0][0].path
            return variable.replace(values[source], **({STORED: forms[source]} if source in forms else {}))
        for source, _, _ in parts:
            if isinstance(values[source.path], Quantized):
                name = ".".join(map(str, source.path))
                raise ValueError(f"{name} is quantised and would change in part: load the model with a dtype.")
        dtype = values[parts[0][0].path].dtype if parts else variable.get_value().dtype
        value = np.array(fresh[path], dtype) if path in fresh else np.empty(shape, dtype)
        for source, part, size in parts:
            found, cut = np.asarray(values[source.path]), tuple(slice(n) for n in size)
            found = found if source.index is None else found[source.index]
            value[cut if part.index is None else (part.index, *cut)] = found[cut].astype(dtype)
        return variable.replace(jax.device_put(value))

    return place(map_variables(fill, abstract(cfg, _dtype(values))), ctx or DEFAULT)


def _parts(model: Transformer) -> dict[str, Part]:
    """The parameters of a model under names that count layers from the model's first one."""
    found, stacks = {}, model.cfg.stacks

    def note_parts(path, variable):
        shape, axes = variable.get_value().shape, variable.get_metadata()["axes"]
        if path[0] != "stacks":
            found[".".join(map(str, path))] = Part(path, None, shape, axes)
            return
        for i, number in enumerate(stacks[path[1]].numbers):
            found[".".join(map(str, ("layers", number, *path[2:])))] = Part(path, i, shape[1:], axes)

    map_variables(note_parts, model)
    return found


def _overlap(name: str, held: Part | None, wanted: Part, was: ModelConfig, cfg: ModelConfig) -> tuple | None:
    """The shape of what is kept of a parameter, None for nothing."""
    if held is None or held.axes != wanted.axes:
        return None
    last = name.rsplit(".", 1)[-1]
    if any(_size(was, size) != _size(cfg, size) for size in CUT_BY.get(last, ())):
        return None
    for axis, a, b in zip(wanted.axes, held.shape, wanted.shape, strict=True):
        if a != b and axis not in LISTS:
            return None
    return tuple(map(min, held.shape, wanted.shape))


def _size(cfg: ModelConfig, name: str) -> int | None:
    """A size of attention, None of a form that has no such size."""
    return getattr(cfg.attention, name, None)


def _same(parts, count: int, values: dict, shape: tuple[int, ...]) -> bool:
    """Whether all of a leaf is all of one leaf of the model."""
    sources = {source.path for source, _, _ in parts}
    whole = len(parts) == count and all(size == source.shape == part.shape for source, part, size in parts)
    return whole and len(sources) == 1 and values[parts[0][0].path].shape == shape


def _dtype(values: dict):
    return next(v.dtype for v in values.values() if not isinstance(v, Quantized))


def _named(name: str, shape: tuple[int, ...], kept: tuple[int, ...] | None) -> str:
    """A parameter, and if some of it is kept which indices along which axis are not."""
    if kept is None:
        return name
    axis = next(i for i, (n, k) in enumerate(zip(shape, kept, strict=True)) if n != k)
    return f"{name}[{':, ' * axis}{kept[axis]}:{shape[axis]}]"


def _told(names: list[str], every: Iterable[str]) -> str:
    """The names, a layer or module all of whose parameters are among them as one, equal parts of layers as one."""
    sizes = Counter(map(_module, every))
    missing = Counter(_module(name) for name in names if not name.endswith("]"))
    whole = {module for module, size in missing.items() if module and size == sizes[module]}
    groups: dict[str, list[int]] = {}
    for name in dict.fromkeys(_module(name) if _module(name) in whole else name for name in names):
        number = re.match(r"layers\.(\d+)", name)
        rest = name if number is None else f"layers.{{}}{name[number.end() :]}"
        groups.setdefault(rest, []).append(-1 if number is None else int(number[1]))
    told = [rest.format(_ranges(sorted(layers))) for rest, layers in groups.items()]
    more = [] if len(told) <= TOLD else [f"and {len(told) - TOLD} more"]
    return ", ".join([*told[:TOLD], *more])


def _module(name: str) -> str | None:
    """``layers.3`` or ``mtp.0`` of what lies in one."""
    found = re.match(r"(layers|mtp)\.\d+", name)
    return None if found is None else found[0]


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as 0-2,5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
