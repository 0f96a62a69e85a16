"""One choice of a completion: from the tokens that come to pieces of text, with log-probabilities beside them."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers

from deepseek_jax.generation.request import Delta
from deepseek_jax.serving.calls import Piece, Syntax
from deepseek_jax.serving.parse import THINK, THOUGHT, Parser
from deepseek_jax.text.stream import Stream
from deepseek_jax.text.tiktoken import byte_alphabet
from deepseek_jax.text.tokenizer import Tokenizer

# Pieces, each with the tokens that begin in it: where, and what is said of them.
Pieces = list[tuple[Piece, list[tuple[int, dict]]]]
LEAST = -9999.0  # stands for minus infinity, which JSON does not have


class Vocabulary:
    """What is said of a token, and which tokens are no part of a text."""

    def __init__(self, tokenizer: Tokenizer, syntax: Syntax | None = None):
        self.tokenizer = tokenizer
        kept = {tokenizer.id_of(mark) for mark in (THINK, THOUGHT, *(syntax.marks if syntax else ()))}
        self.unsaid = {i for i, token in tokenizer.control.items() if token.special} - kept
        level = isinstance(tokenizer.backend.decoder, tokenizers.decoders.ByteLevel)
        self._byte_of = {c: byte for byte, c in enumerate(byte_alphabet())} if level else None

    def raw(self, i: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character; a control token's are its name's."""
        token = self.tokenizer.control.get(i)
        if token is not None:
            return token.content.encode()
        if self._byte_of is None or not self.tokenizer.has(i):
            return self.tokenizer.decode([i]).encode()
        return bytes(self._byte_of[c] for c in self.tokenizer.backend.id_to_token(i))

    def text(self, i: int) -> str:
        """A token's text; of bytes that are no characters by themselves, as OpenAI writes them."""
        raw = self.raw(i)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def entry(self, i: int, logprob: float, top: Sequence[tuple[int, float]] | None = None) -> dict:
        """As chat completions list it; ``top``: its alternatives, None for one of these."""
        entry = {"token": self.text(i), "logprob": finite(logprob), "bytes": list(self.raw(i))}
        return entry if top is None else {**entry, "top_logprobs": [self.entry(*other) for other in top]}

    def places(self, text: str, ids: Sequence[int]) -> list[int]:
        """Where in a text each of its tokens begins, in characters; one that is no part of it, such as BOS, where the
        next one does."""
        stream, at, found = Stream(self.tokenizer, skip_special_tokens=False), 0, []
        for i in ids:
            found.append(min(at, len(text)))
            control = self.tokenizer.control.get(i)
            if control is None or text.startswith(control.content, at):
                at += len(stream.push([i]))
        return found


@dataclass(frozen=True)
class Echo:
    """A prompt that its answer repeats: its text, and its tokens."""

    text: str
    ids: Sequence[int]


def finite(logprob: float) -> float:
    return max(logprob, LEAST) if math.isfinite(logprob) else LEAST


class Answer:
    """Takes a choice's `Delta`s, gives pieces of it, each with the tokens that begin in it.

    Streamed or not, what comes out is the same. ``stop_ids``: those that may end it and are no part of its text.
    ``wanted``: whether tokens' log-probabilities are. ``prompt``: its tokens, where experts are wanted. ``echo``: the
    prompt, where it is to be repeated; every token is then listed, those of no text as well, as clients count them.

    Attributes:
        finish: why it ended: "stop", "length" or "error"; None while it goes on. A stop string ends it before the
            batcher does.
        error: what its grammar raised.
        tokens, reasoning_tokens: how many came, and those of its thoughts.
        last: the last delta.
        experts: of each token, once it has been fed, a list a layer; its last token never is.
        echoed: the prompt's tokens, where they are wanted: where each begins, and what is said of it.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        parser: Parser,
        stop_ids: Sequence[int],
        wanted: bool,
        prompt: int | None = None,
        echo: Echo | None = None,
    ):
        self.parser = parser
        self._vocabulary, self._stop_ids, self._wanted = vocabulary, frozenset(stop_ids), wanted
        self._stream = Stream(vocabulary.tokenizer, skip_special_tokens=False)
        self._length = 0
        # Where a token begins, and what is said of it.
        self._waiting: deque[tuple[int, dict | None]] = deque()
        self.finish: str | None = None
        self.error = ""
        self.tokens = self.reasoning_tokens = 0
        self.last: Delta | None = None
        self.experts: list[list[list[int]]] = []
        self._prompt, self._fed = prompt, 0
        self._echo = echo if wanted else None
        self.echoed: list[tuple[int, dict]] = []

    def take(self, delta: Delta) -> Pieces:
        """What is certain now; nothing after the end."""
        if self.finish is not None:
            return []
        if self.last is None and self._echo is not None:
            self.echoed = self._prompted(delta)
        self.last, pieces = delta, []
        if delta.routing is not None:
            self.experts += delta.routing[max(0, self._prompt - self._fed) :].tolist()
            self._fed += len(delta.routing)
        for k, i in enumerate(delta.tokens):
            self.tokens += 1
            ends = delta.finish == "stop" and k + 1 == len(delta.tokens) and i in self._stop_ids
            silent = ends or i in self._vocabulary.unsaid
            if not silent or self._echo is not None:
                self._waiting.append((self._length, self._said(delta, k) if self._wanted else None))
            if silent:
                continue
            pieces += self._push(self._stream.push([i]))
            if self.parser.stopped:
                self.finish = "stop"
                return self._beside(pieces)
        if delta.finish is not None:
            pieces += self._push(self._stream.finish()) + self.parser.finish()
            self.finish, self.error = "stop" if self.parser.stopped else delta.finish, delta.error
        found = self._beside(pieces)
        if self._echo is not None and delta.finish is not None and self._waiting and not self.parser.stopped:
            found.append((Piece("content", "", self._length), list(self._waiting)))
        return found

    def _push(self, text: str) -> list[Piece]:
        self._length += len(text)
        return self.parser.push(text)

    def _said(self, delta: Delta, k: int) -> dict:
        entry = self._vocabulary.entry(delta.tokens[k], delta.logprobs[k], delta.top[k] if delta.top else ())
        if self._prompt is not None:  # which of `experts` are this one's
            entry["index"] = self.tokens - 1
        return entry

    def _prompted(self, delta: Delta) -> list[tuple[int, dict]]:
        """Nothing predicts the first one."""
        echo, vocabulary, logprobs = self._echo, self._vocabulary, delta.prompt_logprobs
        first = {"token": vocabulary.text(echo.ids[0]), "logprob": None, "top_logprobs": None}
        top = delta.prompt_top or [()] * len(logprobs)
        entries = [first, *(vocabulary.entry(*said) for said in zip(echo.ids[1:], logprobs, top, strict=True))]
        return list(zip(vocabulary.places(echo.text, echo.ids), entries, strict=True))

    def _beside(self, pieces: list[Piece]) -> Pieces:
        found = []
        for piece in pieces:
            beside = []
            if piece.kind in ("content", "reasoning"):
                while self._waiting and self._waiting[0][0] < piece.at + len(piece.text):
                    at, entry = self._waiting.popleft()
                    # Tokens of tags and calls are no part of either text.
                    if at >= piece.at:
                        self.reasoning_tokens += piece.kind == "reasoning"
                        beside += [] if entry is None else [(at, entry)]
            found.append((piece, beside))
        return found
