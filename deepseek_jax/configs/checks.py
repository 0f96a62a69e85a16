"""Checks of dataclass fields: a value of another type than its annotation is refused in a sentence.

Used by every frozen dataclass that users fill in: `ModelConfig` and its parts, `Context`, `Recipe`.
"""

import math
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from deepseek_jax.configs.numbers import complaint
from deepseek_jax.notes import shown

WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "text", NoneType: "None"}


class ConfigError(ValueError):
    """A model config that contradicts itself, or that describes something not built here."""


class _Misfit(Exception):
    """A value that is none of its annotation."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def require_number(owner, *names: str, low: float = 0.0) -> None:
    """Raises ConfigError for a field below ``low``, or that float32 cannot hold."""
    for name in names:
        if problem := complaint(getattr(owner, name), low):
            raise ConfigError(f"{type(owner).__name__} {name} {problem}.")


def check_types(owner, error: type[ValueError] = ConfigError, finite: bool = False) -> None:
    """Holds a dataclass's fields to their annotations, in its ``__post_init__``.

    Integers of NumPy become Python's, and a number where a float is meant becomes a float, so that equal values are
    equal in files too. A bool is no integer, a float is none either, and NaN is no number; with ``finite`` infinity
    is none. Raises ``error`` that names the field and its value.
    """
    for name, hint in _hints(type(owner)).items():
        value = getattr(owner, name)
        try:
            fitted = _fit(value, hint, finite)
        except _Misfit:
            kind = f"{type(owner).__name__}: {name} must be {_words(hint)}"
            raise error(f"{kind}, not {shown(value)}.") from None
        if fitted is not value:
            object.__setattr__(owner, name, fitted)


@cache
def _hints(kind: type) -> dict[str, Any]:
    own = kind.__dataclass_fields__
    return {name: hint for name, hint in get_type_hints(kind).items() if name in own}


def _fit(value, hint, finite: bool):
    """The value as the annotation's type."""
    if get_origin(hint) in (Union, UnionType):
        for one in get_args(hint):
            try:
                return _fit(value, one, finite)
            except _Misfit:
                continue
        raise _Misfit
    if hint is Any:
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            raise _Misfit
        kinds = get_args(hint)
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        if len(kinds) != len(value):
            raise _Misfit
        fitted = tuple(_fit(v, k, finite) for v, k in zip(value, kinds, strict=True))
        return value if all(a is b for a, b in zip(fitted, value, strict=True)) else fitted
    if hint in (int, float):
        return _number(value, hint, finite)
    if not isinstance(value, hint):
        raise _Misfit
    return value


def _number(value, kind: type, finite: bool):
    # In Python a bool is an integer.
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        raise _Misfit
    if type(value) is kind and (kind is int or math.isfinite(value)):
        return value
    try:
        number = kind(value)
    except OverflowError:
        raise _Misfit from None
    if kind is float and (math.isnan(number) or (finite and math.isinf(number))):
        raise _Misfit
    return number


def _words(hint) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_words, get_args(hint)))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if kinds[1:] == (...,):
            return f"a tuple, each element {_words(kinds[0])}"
        return f"a tuple of {' and '.join(map(_words, kinds))}"
    return WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"
