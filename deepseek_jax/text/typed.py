"""What somebody typed into a chat stays text: the name of a control token in a message is not that token.

A chat is rendered as one text, in which the tags of its format and the same names in a message look alike. So names
in messages are rendered as characters that nothing else has, and take their places again once the tags are found.
"""

import itertools
import re
from collections.abc import Iterable, Mapping

import tokenizers

# Characters for private use: no text that means something has them.
PRIVATE = range(0xE000, 0xF900)
# An assistant's thoughts may stand in its text with their tags: templates look for them.
THOUGHTS = frozenset({"<think>", "</think>"})


class Typed:
    """Names of control tokens in messages and other variables of a chat; ``names``: those of the tokenizer."""

    def __init__(self, names: Iterable[str]):
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._marks: dict[str, str] = {}

    def hidden(self, messages: list, variables: Mapping) -> tuple[list, dict]:
        """Both with marks in the place of names."""
        taken = {c for text in _texts([messages, variables]) for c in text if ord(c) in PRIVATE}
        self._free = (chr(i) for i in PRIVATE if chr(i) not in taken)
        kept = {i: THOUGHTS for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "assistant"}
        return [self._hide(m, kept.get(i, frozenset())) for i, m in enumerate(messages)], self._hide(variables)

    def __bool__(self) -> bool:
        """Whether a name was hidden."""
        return bool(self._marks)

    def restored(self, text: str) -> str:
        """The text with names in the place of marks."""
        return text.translate({ord(mark): name for name, mark in self._marks.items()})

    def _hide(self, value, kept: frozenset[str] = frozenset()):
        if isinstance(value, str) and self._names is not None:
            return self._names.sub(lambda found: found[0] if found[0] in kept else self._mark(found[0]), value)
        if isinstance(value, Mapping):
            return {name: item if name == "role" else self._hide(item, kept) for name, item in value.items()}
        return [self._hide(item, kept) for item in value] if isinstance(value, list | tuple) else value

    def _mark(self, name: str) -> str:
        if name not in self._marks:
            self._marks[name] = next(self._free)
        return self._marks[name]


def encode_around(text: str, typed: Typed, whole: tokenizers.Tokenizer, plain: tokenizers.Tokenizer) -> list[int]:
    """The ids of a rendered chat: its own tags by ``whole``, what lies between them by ``plain``, which has no tags."""
    control = whole.get_added_tokens_decoder()
    found = whole.encode(text, add_special_tokens=False)
    ids, begin = [], 0
    tags = [(i, *span) for i, span in zip(found.ids, found.offsets, strict=True) if i in control]
    for tag, start, end in itertools.chain(tags, [(None, len(text), len(text))]):
        ids += plain.encode(typed.restored(text[begin:start]), add_special_tokens=False).ids if begin < start else []
        ids += [] if tag is None else [tag]
        begin = end
    return ids


def _texts(value) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
