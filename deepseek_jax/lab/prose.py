"""Which of a text in Python is prose: comments, and strings that stand alone, as docstrings do. Loads no JAX."""

import io
import tokenize
from dataclasses import replace

import numpy as np

from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.text.tokenizer import Tokenizer

KINDS = ("code", "prose")
# Tokens that change nothing about what a logical line holds, and those behind which one begins.
BLANK = {tokenize.NL, tokenize.COMMENT}
BEFORE = {None, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def by_kind(held_out: HeldOut, tokenizer: Tokenizer) -> HeldOut:
    """The same text with `KINDS` for domains. A token is of the kind of its first byte; one that has none is code.

    Raises ValueError where the tokenizer is not byte-level.
    """
    size_n = tokenizer.token_bytes()[held_out.stream_n]
    prose_n = np.zeros(len(size_n), np.int64)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], size_n > 0, [0]])))
    for start, stop in edges.reshape(-1, 2):
        text = tokenizer.backend.decode(held_out.stream_n[start:stop].tolist())
        first_n = np.cumsum(size_n[start:stop]) - size_n[start:stop]
        prose_n[start:stop] = prose_bytes(text)[first_n]
    return replace(held_out, domains=KINDS, domain_n=prose_n)


def prose_bytes(text: str) -> np.ndarray:
    """bool, a UTF-8 byte each: whether it is a comment's, or of a string that is a statement. What follows a fault that
    stops Python's own tokeniser is code."""
    lines = text.split("\n")
    begins = np.cumsum([0, *(len(line) + 1 for line in lines)])
    prose = np.zeros(len(text), bool)
    before, alone = None, None
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            here = slice(*(begins[row - 1] + column for row, column in (token.start, token.end)))
            if token.type == tokenize.COMMENT:
                prose[here] = True
            if token.type in BLANK:
                continue
            if token.type == tokenize.NEWLINE and alone is not None:
                prose[alone] = True
            alone = here if token.type == tokenize.STRING and before in BEFORE else None
            before = token.type
    except (tokenize.TokenError, SyntaxError):
        pass
    return np.repeat(prose, [len(character.encode()) for character in text])
