"""An answer's text, as it comes, parted into thoughts, content and calls of tools, and ended by stop strings.

What comes out is the same wherever the text is cut: the parts of a piece, joined, are those of the whole.
"""

from collections.abc import Sequence
from typing import Literal

from deepseek_jax.serving.calls import Piece, Step, Syntax, first_mark

THINK, THOUGHT = "<think>", "</think>"
# How a prompt leaves an answer's thoughts: begun, over, or for the answer to begin.
Thinking = Literal["begun", "over", "open"]


def thinking_of(prompt: str) -> Thinking:
    """By the text of the prompt: some formats begin the thoughts in it, or end them there to have none."""
    end = prompt.rstrip()
    return "begun" if end.endswith(THINK) else "over" if end.endswith(THOUGHT) else "open"


class Parser:
    """Takes an answer's text, gives `Piece`s.

    ``thinking``: how the prompt ends; of an answer that may begin its thoughts itself only the first word counts.
    ``syntax``: how calls of tools are written; None where none may come, and all is content. ``stops``: texts that end
    the answer and are no part of it, in the content only: neither thoughts nor calls are ended by them.

    Attributes:
        stopped: whether a stop string came. Nothing comes out any more then.
        calls: how many calls began.
    """

    def __init__(self, thinking: Thinking = "over", syntax: Syntax | None = None, stops: Sequence[str] = ()):
        self._state = {"begun": self._thoughts, "over": self._content, "open": self._begin}[thinking]
        self._syntax, self._stops = syntax, tuple(stops)
        self._reader = None
        self._rest, self._at = "", 0
        self.stopped, self.calls = False, 0

    def push(self, text: str) -> list[Piece]:
        """Takes in more of the text; returns what is certain now."""
        self._rest += text
        return self._run(final=False)

    def finish(self) -> list[Piece]:
        """What was held back: the text has ended."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Piece]:
        pieces = []
        while not self.stopped and (step := self._state(final)) is not None:
            pieces += step.pieces
            self._rest, self._at = self._rest[step.read :], self._at + step.read
        if self.stopped:
            self._rest = ""
        return _joined(pieces)

    def _begin(self, final: bool) -> Step | None:
        start = self._rest.lstrip()
        if start.startswith(THINK):
            self._state = self._thoughts
            return Step(len(self._rest) - len(start) + len(THINK))
        if THINK.startswith(start) and not final:
            return None
        self._state = self._content
        return Step(0)

    def _thoughts(self, final: bool) -> Step | None:
        at, mark = first_mark(self._rest, (THOUGHT,), final)
        pieces = self._piece("reasoning", at)
        if mark is None:
            return Step(at, pieces) if at else None
        self._state = self._content
        return Step(at + len(mark), pieces)

    def _content(self, final: bool) -> Step | None:
        begin = (self._syntax.begin,) if self._syntax else ()
        at, mark = first_mark(self._rest, (*self._stops, *begin), final)
        if mark in self._stops:
            self.stopped = True
            return Step(len(self._rest), self._piece("content", at))
        # White space before calls belongs to them.
        end = len(self._rest[:at].rstrip()) if mark or (begin and not final) else at
        pieces = self._piece("content", end)
        if mark is None:
            return Step(end, pieces) if end else None
        self._reader, self._state = self._syntax.reader(self.calls), self._block
        return Step(at + len(mark), pieces)

    def _block(self, final: bool) -> Step | None:
        step = self._reader.step(self._rest, final)
        if step is None:
            return None
        pieces = tuple(Piece(p.kind, p.text, self._at + p.at, p.call) for p in step.pieces)
        self.calls = max([self.calls, *(p.call + 1 for p in pieces if p.kind == "call")])
        if step.ended:
            self._state = self._after
        return Step(step.read, pieces)

    def _after(self, final: bool) -> Step | None:
        """Behind a block of calls, where white space says nothing."""
        text = self._rest.lstrip()
        if text:
            self._state = self._content
        return Step(len(self._rest) - len(text)) if text or self._rest else None

    def _piece(self, kind, end: int) -> tuple[Piece, ...]:
        return (Piece(kind, self._rest[:end], self._at),) if end else ()


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    joined: list[Piece] = []
    for piece in pieces:
        before = joined[-1] if joined else None
        follows = before is not None and (before.kind, before.call) == (piece.kind, piece.call) and piece.kind != "call"
        if follows and (piece.kind == "arguments" or before.at + len(before.text) == piece.at):
            joined[-1] = Piece(before.kind, before.text + piece.text, before.at, before.call)
        else:
            joined.append(piece)
    return joined
