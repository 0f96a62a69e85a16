"""Text as its tokens come: whole characters only, at a cost that does not grow with the text."""

from collections.abc import Iterable

from deepseek_jax.text.tokenizer import REPLACEMENT, Tokenizer

# Tokens that are decoded again at a push, at most, and how many of them stay when there are more. A character has four
# bytes, and so four tokens that stand for something.
WINDOW, KEPT = 32, 8


class Stream:
    """Decodes ids as they come, giving out whole characters only.

    A character may be spread over several tokens; what is not complete yet waits for the next push. All
    that comes out, joined, equals ``Tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # the last ones
        self._given = 0  # characters of their text that are out

    def push(self, ids: Iterable[int]) -> str:
        """Takes in the next ids; returns the text that is certain now, perhaps none."""
        self._ids.extend(ids)
        # A token's text may depend on those before it. A character cut short is one replacement character at the end,
        # and the only one that may still change.
        text = self._text(self._ids)
        new = self._take(text.removesuffix(REPLACEMENT))
        if len(self._ids) > WINDOW:
            self._forget(text)
        return new

    def finish(self) -> str:
        """The rest: bytes that never became a character come out as U+FFFD."""
        return self._take(self._text(self._ids))

    def _forget(self, text: str) -> None:
        """Leaves out what is before the last tokens, where their text does not depend on it; else at a later push."""
        before, last = self._text(self._ids[:-KEPT]), self._text(self._ids[-KEPT:])
        # A character that both sides share would be replacement characters on both; without text, the last ones leave
        # open whether the one before them goes on.
        if last and before + last == text and len(before) <= self._given:
            self._ids, self._given = self._ids[-KEPT:], self._given - len(before)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)

    def _take(self, text: str) -> str:
        new = text[self._given :]
        self._given = len(text)
        return new
