"""Answers that must follow a JSON schema, or be calls of tools: masks by llguidance, from where the thoughts end."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence

import llguidance
import numpy as np

from deepseek_jax.notes import cut
from deepseek_jax.serving.calls import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    V3,
    V4,
    V32,
    Syntax,
)
from deepseek_jax.serving.dsml import TOKEN, dsml_grammar
from deepseek_jax.serving.errors import bad
from deepseek_jax.serving.parse import THOUGHT
from deepseek_jax.text.stream import Stream
from deepseek_jax.text.tokenizer import Tokenizer

SECONDS = 5.0  # that a grammar may take to be compiled
# Between parts of JSON: a model that is unsure would go on with white space for ever.
JSON = {"whitespace_pattern": r"[ \n\t]{0,16}"}


class Grammars:
    """Makes grammars for one tokenizer; ``vocab_size``: the model's rows. ``eos_ids``: tokens that end an answer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        described = tokenizer.backend.to_str()
        self._ll = llguidance.LLTokenizer(described, n_vocab=vocab_size, eos_token=list(eos_ids))

    async def of_schema(self, schema: Mapping, thinking: bool) -> Callable[[], "Bound"]:
        """What makes a choice's grammar: JSON by ``schema``, after its thoughts where the prompt has begun them.

        Raises `ApiError` for a schema that is none, that asks for what cannot be held, or takes too long.
        """
        text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON)
        return await self._compiled("response_format", text, thinking)

    async def of_calls(
        self, tools: Sequence[Mapping], only: str | None, syntax: Syntax, thinking: bool
    ) -> Callable[[], "Bound"]:
        """The same for calls of ``tools``: one of the one called ``only``, or else one or more of any.

        Raises `ApiError` also for parameters that the chat format's calls cannot be bound to.
        """
        functions = [tool["function"] for tool in tools if only in (None, tool["function"]["name"])]
        if syntax in (V32, V4):
            mark = self._tokenizer.id_of(TOKEN)
            special = None if mark is None or not self._tokenizer.control[mark].special else mark
            text = dsml_grammar(functions, syntax.reader.BLOCK, only is not None, special)
        else:
            text = calls_grammar(functions, syntax, only is not None, self._is_token)
        return await self._compiled("tools", text, thinking)

    async def _compiled(self, param: str, text: str, thinking: bool) -> Callable[[], "Bound"]:
        def compiled():
            matcher = llguidance.LLMatcher(self._ll, text, log_level=0)
            first = matcher.deep_copy()
            first.compute_bitmask()  # a schema that nothing satisfies, such as one that is made of itself, fails here
            return matcher, matcher.get_error() or first.get_error().partition("\n")[0]

        try:
            matcher, error = await asyncio.wait_for(asyncio.to_thread(compiled), SECONDS)
        except TimeoutError:
            raise bad(param, f"takes more than {SECONDS:g} seconds to compile; give a simpler one.") from None
        if error:
            raise bad(param, f"cannot be followed: {cut(error)}.")
        return lambda: Bound(matcher.deep_copy(), self._tokenizer, self._vocab_size, self._ll, thinking)

    def _is_token(self, text: str) -> bool:
        return self._tokenizer.id_of(text) is not None


class Bound:
    """The `Grammar` of one choice. While it thinks, everything may follow."""

    def __init__(self, matcher, tokenizer: Tokenizer, vocab_size: int, ll, thinking: bool):
        self._matcher, self._tokenizer, self._ll, self._thinking = matcher, tokenizer, ll, thinking
        self._stream, self._thoughts = Stream(tokenizer, skip_special_tokens=False), ""
        self._mask = np.zeros(-(-vocab_size // 32), np.int32)

    def mask(self) -> np.ndarray | None:
        if self._thinking:
            return None
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return self._mask

    def accept(self, ids: Sequence[int]) -> None:
        for i in ids:
            if self._thinking:
                self._thoughts = self._thoughts[1 - len(THOUGHT) :] + self._stream.push([i])
                _, end, behind = self._thoughts.partition(THOUGHT)
                # A token may end the thoughts and go on.
                if end and (self._matcher.consume_tokens(self._ll.tokenize_str(behind.lstrip())) or self._check()):
                    self._thinking = False
            elif not self._matcher.is_stopped():
                self._matcher.consume_token(i)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(cut(self._matcher.get_error()))


def calls_grammar(functions: Sequence[Mapping], syntax: Syntax, once: bool, is_token: Callable[[str], bool]) -> str:
    """llguidance's grammar of V3's and V3.1's calls; ``is_token``: whether a mark is a token of its own."""

    def mark(text: str) -> str:
        return text if is_token(text) else json.dumps(text, ensure_ascii=False)

    between = '"\\n" ' if syntax is V3 else ""
    rules = [f"start: {mark(CALLS_BEGIN)} call {'' if once else f'({between}call)* '}{mark(CALLS_END)}"]
    names = []
    for i, function in enumerate(functions):
        schema = json.dumps(function.get("parameters") or {"type": "object"})
        name = json.dumps(function["name"], ensure_ascii=False)
        if syntax is V3:
            fence = json.dumps(f"{function['name']}\n```json\n", ensure_ascii=False)
            head, tail = f'"function" {mark(SEPARATOR)} {fence}', ' "\\n```"'
        else:
            head, tail = f"{name} {mark(SEPARATOR)}", ""
        rules += [f"call{i}: {mark(CALL_BEGIN)} {head} args{i}{tail} {mark(CALL_END)}", f"args{i}: %json {schema}"]
        names.append(f"call{i}")
    return "\n".join([*rules, f"call: {' | '.join(names)}", ""])
