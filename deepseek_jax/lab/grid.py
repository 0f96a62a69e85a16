"""A grid over fields of a setup: every combination of the values that ``FIELD=a,b,c`` name. Loads no JAX."""

import ast
import itertools
from collections.abc import Sequence
from typing import Any

from deepseek_jax.lab.study import Setup, changed


def grid(base: Setup, spelled: Sequence[str]) -> dict[str, Setup]:
    """Label -> setup of each point, the last field's values changing first.

    ``spelled``: each FIELD=VALUE,VALUE..., where FIELD is a path such as ``recipe.rate.peak`` or ``model.moe.top_k``.

    Raises ValueError for what is no field, no value, a field given twice, or a setup that cannot be.
    """
    axes: dict[str, list] = {}
    for text in spelled:
        path, sign, values = text.partition("=")
        if not sign or not values:
            raise ValueError(f"{text!r} names no values: write FIELD=a,b,c, such as recipe.rate.peak=1e-3,2e-3.")
        if path in axes:
            raise ValueError(f"{path} is given twice: name all its values at once.")
        axes[path] = _values(values)
        if len({repr(value) for value in axes[path]}) < len(axes[path]):
            raise ValueError(f"{text}: a value is given twice.")
    points = {}
    for chosen in itertools.product(*axes.values()):
        changes = {path: _fitting(base, path, value) for path, value in zip(axes, chosen, strict=True)}
        points[", ".join(f"{path}={value}" for path, value in changes.items())] = changed(base, changes)
    return points


def _values(text: str) -> list:
    try:
        return list(ast.literal_eval(f"[{text}]"))
    except (ValueError, SyntaxError):
        return [_value(piece) for piece in text.split(",")]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fitting(base: Setup, path: str, value: Any) -> Any:
    """A whole number for a field that holds a fraction is one, so that 1 and 1.0 are the same run."""
    owner: Any = base
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return float(value) if isinstance(owner, float) and type(value) is int else value
