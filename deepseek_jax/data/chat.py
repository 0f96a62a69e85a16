"""Chats to tokens and a mask of those the assistant says, by the checkpoint's own template.

The template is a program that nobody can read the turns out of, so they are found by rendering: a chat is rendered
again with a mark in the place of each assistant message's text, or of the name of what it calls. What stands before the
mark is what the message is put into, and what stands behind it is what follows; both must be parts of the whole
rendering, and what lies between them is what the template makes of the message, whatever it strips (the thoughts of
former turns) or adds. The turn begins where the generation prompt ends, or where it leaves it, at a whole token (a
prompt may open a thought where the history closes one), and ends with its end token. Control tokens are never cut.

Legend: n tokens of a chat.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from deepseek_jax.text.chat import REASONING
from deepseek_jax.text.tokenizer import Tokenizer

ASSISTANT = "assistant"


class UnsuitableTemplate(ValueError):
    """A chat template in whose text the assistant's turns cannot be found."""


@dataclass(frozen=True, eq=False)
class Chat:
    """A chat's tokens and which of them the assistant says.

    Attributes:
        ids_n: int32 [n].
        mask_n: int32 [n], 1 at the assistant's tokens, the end of each of its turns included.
        stripped: assistant messages whose thoughts the template left out.
    """

    ids_n: np.ndarray
    mask_n: np.ndarray
    stripped: int = 0


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping], **variables) -> Chat:
    """The tokens of a chat as `Tokenizer.chat` gives them, and those that are learned: every assistant turn.

    A turn is encoded by itself, as it would be generated behind its prompt, where a token would otherwise reach over
    its edge. ``variables``: more of the template's, such as ``tools``.

    Raises:
        UnsuitableTemplate: the template does not render a turn in a way that can be found again.
        ValueError: no assistant message, a message without a role, or one that the template refuses.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} is not an object with a role")
    turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not turns:
        raise ValueError("no message of the assistant, so there is nothing to learn")
    text = tokenizer.render(messages, add_generation_prompt=False, **variables)
    control = _control_spans(tokenizer, text)
    edges, stripped = [0], 0
    for turn in turns:
        start, stop = (_outside(control, at) for at in _find(tokenizer, text, messages, turn, variables))
        if start < edges[-1]:
            raise UnsuitableTemplate(f"The chat template renders message {turn} before the end of one ahead of it.")
        edges += [start, stop]
        stripped += any(thought not in text[start:stop] for thought in _thoughts(messages[turn]))
    edges.append(len(text))
    parts = [text[a:b] for a, b in pairwise(edges)]
    ids = tokenizer.encode_batch(parts, add_bos=False)
    whole = tokenizer.encode(text, add_bos=False)
    joined = [i for part in ids for i in part]
    if joined != whole and tokenizer.decode(joined) != tokenizer.decode(whole):
        raise UnsuitableTemplate("This tokenizer adds to each part of a chat, so its turns cannot be told apart.")
    mask = [i % 2 for i, part in enumerate(ids) for _ in part]
    return Chat(np.asarray(joined, np.int32), np.asarray(mask, np.int32), stripped)


def _find(
    tokenizer: Tokenizer, text: str, messages: Sequence[Mapping], turn: int, variables: Mapping
) -> tuple[int, int]:
    """Where in ``text`` an assistant turn begins, behind the generation prompt, and ends, behind its end token."""

    def render(messages, prompt=False) -> str:
        return tokenizer.render(messages, prompt, **variables)

    before = list(messages[:turn])
    mark = _mark(text)
    for marked in _marked(messages[turn], mark):
        found = render([*before, marked, *messages[turn + 1 :]])
        if found.count(mark) == 1:
            break
    else:
        raise UnsuitableTemplate(
            f"The chat template writes message {turn} of the assistant {found.count(mark)} times instead of once, so "
            "its tokens cannot be told from the others'."
        )
    head, behind = found.split(mark)
    if not before:
        # The assistant speaks first, and there is no prompt to give it.
        opening = prompted = head
    else:
        opening, prompted = _prompt(render, before)
    # A template may leave out of a former turn what it showed while that turn was the last.
    start = len(opening) if head.startswith(opening) else None
    if start is None:
        prompt = prompted[len(opening) :]
        if not prompt or prompt not in head:
            raise UnsuitableTemplate(
                f"The chat template renders what comes before message {turn} in another way once that message is "
                "there, so its beginning cannot be found."
            )
        start = head.rindex(prompt)
    start += _shared(tokenizer, head[start:] + mark, prompted[len(opening) :])
    if not text.startswith(found[:start]) or not text.endswith(behind) or len(text) < start + len(behind):
        raise UnsuitableTemplate(
            f"The chat template changes other parts of the text with the content of message {turn}, so the message's "
            "own tokens cannot be found."
        )
    # The same turn as the last one shows which of what follows belongs to it.
    closing = render([*before, marked]).partition(mark)[2]
    closing = closing[: _common(closing, behind)]
    return start, len(text) - len(behind) + _end(tokenizer, closing)


def _marked(message: Mapping, mark: str) -> Iterator[dict]:
    """The message with a mark in it, in the ways that a template may show it."""
    calls = message.get("tool_calls")
    if message.get("content") is None and isinstance(calls, list) and calls and isinstance(calls[0], Mapping):
        # A template may have another branch for calls without text, which a text would leave.
        call = calls[0]
        function = call.get("function")
        named = {"function": {**function, "name": mark}} if isinstance(function, Mapping) else {"name": mark}
        yield {**message, "tool_calls": [{**call, **named}, *calls[1:]]}
    yield {**message, "content": mark}
    if calls:
        yield {"role": ASSISTANT, "content": mark}


def _prompt(render, before: list[Mapping]) -> tuple[str, str]:
    """The text of the messages before a turn, without and with the generation prompt."""
    plain, prompted = render(before), render(before, prompt=True)
    if not prompted.startswith(plain):
        # The prompt takes something back, such as an end of the conversation.
        plain = plain[: _common(plain, prompted)]
    return plain, prompted


def _shared(tokenizer: Tokenizer, turn: str, prompt: str) -> int:
    """How much of the generation prompt a turn's text begins with: all of it, or the tokens up to where it differs."""
    if turn.startswith(prompt):
        return len(prompt)
    ids, prompted = tokenizer.encode_batch([turn, prompt], add_bos=False)
    return min(len(tokenizer.decode(ids[: _common(ids, prompted)])), _common(turn, prompt))


def _control_spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int, int]]:
    """Each control token's beginning in ``text``, the end of its name, and that of the white space it takes along."""
    control, found = tokenizer.backend.get_added_tokens_decoder(), []
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        if i in control:
            name = text.find(control[i].content, start, stop)
            found.append((start, stop if name < 0 else name + len(control[i].content), stop))
    return found


def _outside(control: list[tuple[int, int, int]], at: int) -> int:
    """``at``, or where the control token that it lies in begins; behind one, where its white space ends."""
    for start, name, stop in control:
        if start < at < stop:
            return start if at < name else stop
    return at


def _end(tokenizer: Tokenizer, closing: str) -> int:
    """How much of what closes a turn the assistant says: up to its last token of control, or all where it has none."""
    control = [added.content for added in tokenizer.backend.get_added_tokens_decoder().values()]
    ends = [at + len(token) for token in control if token.strip() and (at := closing.rfind(token)) >= 0]
    return max(ends, default=len(closing))


def _thoughts(message: Mapping) -> list[str]:
    """The thoughts of a message: a field of their own, or what its content closes with </think>."""
    found = [message[name] for name in REASONING if isinstance(message.get(name), str)][:1]
    content = message.get("content")
    if isinstance(content, str) and "</think>" in content:
        found.append(content.rpartition("</think>")[0].rpartition("<think>")[2])
    return [thought.strip() for thought in found if thought.strip()]


def _mark(text: str) -> str:
    """A word that does not stand in ``text``."""
    number = 0
    while (mark := f"turn{number}mark") in text:
        number += 1
    return mark


def _common(a: Sequence, b: Sequence) -> int:
    """How much of two texts, or two lists of ids, is the same from the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
