"""Training a part of a model: patterns of parameter paths, single layers of a stack included."""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from flax import nnx

from deepseek_jax.core.params import RouterBias, map_variables, stacked_layers
from deepseek_jax.core.partition import Trained
from deepseek_jax.core.quant import Quantized
from deepseek_jax.model.transformer import Transformer

Chosen = dict[str, bool | tuple[int, ...]]
RANGE = re.compile(r"layers\.(\d+)-(\d+)(\..*)")


def select(model: Transformer, patterns: Sequence[str]) -> Trained:
    """The predicate for `partition` that trains what any of ``patterns`` matches, and nothing else.

    A pattern is a shell glob (``*`` also across dots) over dotted paths: ``head``, ``stacks.*.ffn.router.*``,
    ``mtp.*``. Layers of the main model, from 0 and across stacks, are named by ``layers``: ``layers.60.*``, a range
    with both ends ``layers.58-60.*``, ``layers.*.attn.o``. Layers that are not chosen stay bit-equal.

    A router bias is no parameter. One that a pattern matches is moved by the load balance at the recipe's bias speed,
    as in training of the whole model; any other stays.

    Raises ValueError for a pattern that matches nothing, with the names that come close, for one that matches a
    quantised leaf, and where router biases alone are chosen.
    """
    known, frozen = paths(model, biases=True), quantised(model)
    for pattern in patterns:
        hit = [path for path in matches(model, [pattern], known) if path in frozen]
        if hit:
            raise ValueError(
                f"the pattern {pattern!r} matches {len(hit)} quantised leaves, which take no gradients, such as "
                f"{hit[0]}: load the model with a dtype, adapt them with LoRA, or name others."
            )
    chosen = matches(model, patterns, known)
    if not chosen.keys() & paths(model).keys():
        raise ValueError(
            f"the patterns {', '.join(map(repr, patterns))} match router biases alone, which the load balance moves "
            "and gradients do not reach: name a parameter beside them."
        )

    def trained(path: str) -> bool | tuple[int, ...]:
        return chosen.get(path, False)

    return trained


def paths(model: Transformer, biases: bool = False) -> dict[str, int]:
    """Every parameter's dotted path, and every router bias's if asked for, and how many layers it stacks: 0 outside the
    stacks."""
    found, kinds = {}, (nnx.Param, RouterBias) if biases else nnx.Param

    def note(path, variable):
        if isinstance(variable, kinds):
            found[".".join(map(str, path))] = stacked_layers(variable)

    map_variables(note, model)
    return found


def quantised(model: Transformer) -> set[str]:
    """The dotted paths of quantised leaves."""
    found = set()

    def note(path, variable):
        if isinstance(variable.get_value(), Quantized):
            found.add(".".join(map(str, path)))

    map_variables(note, model)
    return found


def matches(model: Transformer, patterns: Sequence[str], among: dict[str, int]) -> Chosen:
    """The paths of ``among`` that a pattern matches: True, or the layers of the stack that it names.

    Raises ValueError for a pattern without a match.
    """
    numbers = [stack.numbers for stack in model.cfg.stacks]
    chosen: dict[str, set[int] | bool] = {}
    for pattern in patterns:
        found = False
        for path in among:
            hit = _layers(pattern, path, numbers) if pattern.startswith("layers.") else fnmatchcase(path, pattern)
            if hit:
                found = True
                before = chosen.get(path, set())
                chosen[path] = True if hit is True or before is True else before | hit
        if not found:
            hint = _hint(pattern, among, model.cfg.n_layers)
            raise ValueError(f"the pattern {pattern!r} matches no parameter here; {hint}.")
    return {
        path: True if hit is True or len(hit) == among[path] else tuple(sorted(hit)) for path, hit in chosen.items()
    }


def _layers(pattern: str, path: str, numbers: list[range]) -> set[int]:
    """The layers of a stacked path that a pattern over ``layers`` names, counted within the stack."""
    if not path.startswith("stacks."):
        return set()
    _, stack, rest = path.split(".", 2)
    there = list(enumerate(numbers[int(stack)]))
    if span := RANGE.fullmatch(pattern):
        low, high = int(span[1]), int(span[2])
        return {i for i, n in there if low <= n <= high} if fnmatchcase(rest, span[3][1:]) else set()
    return {i for i, n in there if fnmatchcase(f"layers.{n}.{rest}", pattern)}


def _hint(pattern: str, among: dict[str, int], layers: int) -> str:
    names = list(among)
    if pattern.startswith("layers."):
        names = [re.sub(r"stacks\.\d+", "layers.*", path) for path, size in among.items() if size]
    near = difflib.get_close_matches(pattern, dict.fromkeys(names), n=3, cutoff=0.0)
    return f"layers are 0 to {layers - 1}, and near names are {', '.join(near)}"
