"""What a command's help says: its docstrings, as running text."""

import inspect
import typing
from dataclasses import fields, is_dataclass
from types import MappingProxyType


def flow(command: type) -> None:
    """Gives each field of a command's dataclass, and of the dataclasses in it, its docstring as the help tyro shows.

    tyro reads docstrings itself, but with their indentation, which it takes for lines that the text wants to keep.
    """
    import docstring_parser

    waiting, known = [command], set()
    while waiting:
        cls = waiting.pop()
        if cls in known:
            continue
        known.add(cls)
        found = {doc.arg_name: doc.description for c in cls.__mro__[-2::-1] for doc in _params(docstring_parser, c)}
        for field in fields(cls):
            text = found.get(field.name)
            if text and "help" not in field.metadata:
                field.metadata = MappingProxyType({**field.metadata, "help": " ".join(text.split())})
        for kind in typing.get_type_hints(cls).values():
            waiting += [k for k in (kind, *typing.get_args(kind)) if isinstance(k, type) and is_dataclass(k)]


def description(command: type) -> str:
    """A command's docstring, each paragraph a line: a terminal's width is not that of the source."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.getdoc(command).split("\n\n"))


def _params(docstring_parser, cls: type) -> list:
    return docstring_parser.parse_from_object(cls).params
