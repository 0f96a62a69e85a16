"""Calls of tools as the releases write them, read while they come. One grammar a chat format:

- V3, R1: ``<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME``, a fenced block of JSON, ``<｜tool▁call▁end｜>``, and
  so on, between ``<｜tool▁calls▁begin｜>`` and ``<｜tool▁calls▁end｜>``
- V3.1: ``<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`` between the same
- V3.2, V4: DSML, as `text.encoders.dsml` writes it, in ``function_calls`` or ``tool_calls``

A reader is fed by `parse.Parser`, which holds the text. What it gives out does not depend on where the text was cut: at
a place where a mark may begin it waits, and of several marks it takes the one that begins first.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["reasoning", "content", "call", "arguments"]


@dataclass(frozen=True)
class Piece:
    """A part of an answer. ``text``: of thoughts, content or a call's arguments; a call's name. ``at``: where thoughts
    and content stand in the whole text, in characters (in a `Step`: from where the step began). ``call``: which of the
    calls, from 0."""

    kind: Kind
    text: str
    at: int = 0
    call: int = 0


@dataclass(frozen=True)
class Step:
    """How far a reader came: characters it is done with, what they said, and whether the block of calls has ended."""

    read: int
    pieces: tuple[Piece, ...] = ()
    ended: bool = False


class Reader(Protocol):
    """Reads one block of calls, behind its first mark; ``calls``: how many there were up to here. ``MARKS``: control
    tokens that calls are made of, beside the first mark."""

    MARKS: tuple[str, ...]
    calls: int

    def __init__(self, calls: int): ...

    def step(self, text: str, final: bool) -> Step | None:
        """A step on the text that is left; None: there must be more of it first. ``final``: no more comes."""


@dataclass(frozen=True)
class Syntax:
    """How a chat format writes calls: the mark that a block of them begins with, and who reads it."""

    begin: str
    reader: type[Reader]

    @property
    def marks(self) -> tuple[str, ...]:
        """Control tokens that carry meaning here, and so are kept in the text."""
        return (self.begin, *self.reader.MARKS)


def first_mark(text: str, marks: Sequence[str], final: bool = False) -> tuple[int, str | None]:
    """Where the first mark begins, and which; or where one may begin, the end of the text included, and None.

    Of marks that begin at one place it is the shortest. A place where a longer one may begin hides marks behind it.
    """
    found = min(((at, len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0), default=None)
    end = len(text)
    if not final:
        longest = max(map(len, marks), default=1)
        starts = (i for i in range(max(0, end - longest + 1), end) if any(m.startswith(text[i:]) for m in marks))
        end = next(starts, end)
    return (found[0], found[2]) if found is not None and found[0] <= end else (end, None)


CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class Bare:
    """V3.1's: a name and JSON."""

    MARKS = (CALLS_END, CALL_BEGIN, SEPARATOR, CALL_END)
    HEAD = SEPARATOR  # what parts a call's head from its arguments
    # What may stand between the arguments' end and the mark behind it, and any beginning of it.
    CLOSING = re.compile(r"\Z")

    def __init__(self, calls: int):
        self._state, self.calls = self._between, calls

    def step(self, text: str, final: bool) -> Step | None:
        return self._state(text, final)

    def _between(self, text: str, final: bool) -> Step | None:
        at, mark = first_mark(text, (CALL_BEGIN, CALLS_END), final)
        if mark is None:
            return Step(at) if at else None
        if mark == CALL_BEGIN:
            self._state = self._head
        return Step(at + len(mark), ended=mark == CALLS_END)

    def _head(self, text: str, final: bool) -> Step | None:
        at, mark = first_mark(text, (self.HEAD, CALL_END, CALLS_END), final)
        if mark is None and not final:
            return None
        self._state = self._between
        if mark != self.HEAD:  # no call: it is said as it stands
            end = at + len(mark or "")
            return Step(end, (Piece("content", CALL_BEGIN + text[:end], -len(CALL_BEGIN)),), ended=mark == CALLS_END)
        self._state = self._arguments
        return Step(at + len(mark), (Piece("call", self._name(text[:at]), call=self.calls),))

    def _arguments(self, text: str, final: bool) -> Step | None:
        # A mark that the text's end cuts is no part of them.
        at, mark = first_mark(text, (CALL_END, CALLS_END))
        end = self.CLOSING.search(text, 0, at).start()
        pieces = (Piece("arguments", text[:end], call=self.calls),) if end else ()
        if mark is None:
            read = len(text) if final else end
            return Step(read, pieces) if read else None
        self._state, self.calls = self._between, self.calls + 1
        return Step(at + len(mark), pieces, ended=mark == CALLS_END)

    def _name(self, head: str) -> str:
        return head.strip()


class Fenced(Bare):
    """V3's and R1's: the word function, a name, and JSON between fences."""

    HEAD = "```json\n"
    CLOSING = re.compile(r"\s*`{0,3}\s*\Z")

    def _name(self, head: str) -> str:
        return head.rpartition(SEPARATOR)[2].strip()


class Dsml:
    """V3.2's; V4's is called otherwise."""

    MARKS = ("｜DSML｜",)
    BLOCK = "function_calls"
    NAME, TEXT = re.compile(r'\bname="(.*)', re.DOTALL), re.compile(r'^(.*)" string="(true|false)$', re.DOTALL)
    INVOKE, INVOKED = "<｜DSML｜invoke", "</｜DSML｜invoke>"
    PARAMETER, PARAMETER_END = "<｜DSML｜parameter", "</｜DSML｜parameter>"
    HEAD_END = '">'

    def __init__(self, calls: int):
        self._state, self.calls = self._between, calls
        self._parameters, self._is_text = 0, True

    def step(self, text: str, final: bool) -> Step | None:
        return self._state(text, final)

    def _between(self, text: str, final: bool) -> Step | None:
        end = f"</｜DSML｜{self.BLOCK}>"
        at, mark = first_mark(text, (self.INVOKE, end), final)
        if mark is None:
            return Step(at) if at else None
        if mark == self.INVOKE:
            self._state, self._parameters = self._invoke, 0
        return Step(at + len(mark), ended=mark == end)

    def _invoke(self, text: str, final: bool) -> Step | None:
        at, mark = first_mark(text, (self.HEAD_END,), final)
        if mark is None:
            return self._cut(self.INVOKE, text) if final else None
        self._state = self._inside
        found = self.NAME.search(text[:at])
        name = found[1] if found else text[:at].strip()
        return Step(at + len(mark), (Piece("call", name, call=self.calls), self._piece("{")))

    def _inside(self, text: str, final: bool) -> Step | None:
        at, mark = first_mark(text, (self.PARAMETER, self.INVOKED), final)
        if mark is None:
            return Step(at) if at else None
        if mark == self.PARAMETER:
            self._state = self._parameter
            return Step(at + len(mark))
        piece = self._piece("}")
        self._state, self.calls = self._between, self.calls + 1
        return Step(at + len(mark), (piece,))

    def _parameter(self, text: str, final: bool) -> Step | None:
        at, mark = first_mark(text, (self.HEAD_END,), final)
        if mark is None:
            return Step(len(text)) if final and text else None
        found = self.NAME.search(text[:at])
        name = found[1] if found else text[:at].strip()
        typed = self.TEXT.match(name)
        self._is_text = typed is None or typed[2] == "true"
        comma, self._parameters = ", " if self._parameters else "", self._parameters + 1
        self._state = self._value
        quote = '"' if self._is_text else ""
        named = json.dumps(typed[1] if typed else name, ensure_ascii=False)
        return Step(at + len(mark), (self._piece(f"{comma}{named}: {quote}"),))

    def _value(self, text: str, final: bool) -> Step | None:
        at, mark = first_mark(text, (self.PARAMETER_END,))
        if self._is_text:
            pieces = (self._piece(_escaped(text[:at])),) if at else ()
        elif mark is None and not final:
            return None  # JSON is looked at whole
        else:
            pieces = (self._piece(_json(text[:at]) if mark else text[:at]),)
        if mark is None:
            read = len(text) if final else at
            return Step(read, pieces) if read else None
        self._state = self._inside
        return Step(at + len(mark), (*pieces, *((self._piece('"'),) if self._is_text else ())))

    def _piece(self, text: str) -> Piece:
        return Piece("arguments", text, call=self.calls)

    def _cut(self, mark: str, text: str) -> Step:
        """What was to be a call when the text ended: it is said as it stands."""
        self._state = self._between
        return Step(len(text), (Piece("content", mark + text, -len(mark)),))


class DsmlV4(Dsml):
    BLOCK = "tool_calls"


def _escaped(text: str) -> str:
    """As it stands inside a JSON text; of parts joined it is that of the whole."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json(text: str) -> str:
    """A value that is said to be JSON; where it is none, it is a text."""
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    return text.strip()


V3, V31 = Syntax(CALLS_BEGIN, Fenced), Syntax(CALLS_BEGIN, Bare)
V32, V4 = Syntax(f"<｜DSML｜{Dsml.BLOCK}>", Dsml), Syntax(f"<｜DSML｜{DsmlV4.BLOCK}>", DsmlV4)


def syntax_of(tokenizer) -> Syntax | None:
    """How a checkpoint's chat format writes calls, by what it makes of one; None: in no way that is read here."""
    call = {"id": "call_0", "type": "function", "function": {"name": "probe", "arguments": '{"of": "calls"}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    try:
        text = tokenizer.render(messages, add_generation_prompt=False)
    except ValueError:  # a template without calls, or none at all
        return None
    for syntax in (V32, V4):
        if syntax.begin in text:
            return syntax
    if CALLS_BEGIN not in text:
        return None
    return V3 if Fenced.HEAD in text else V31
