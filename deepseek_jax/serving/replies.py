"""What is answered, in OpenAI's shapes: a completion whole, or in chunks as it comes."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from deepseek_jax.serving.answer import Answer, Pieces


def usage_of(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> dict:
    """Counts of tokens; a prompt is counted once, however many answers it has."""
    n = len(answers) // len(prompts)
    cached = sum(
        max((a.last.cached for a in answers[i * n : (i + 1) * n] if a.last is not None), default=0)
        for i in range(len(prompts))
    )
    asked, answered = sum(map(len, prompts)), sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": sum(answer.reasoning_tokens for answer in answers),
            "drafted_tokens": sum(answer.last.drafted for answer in answers if answer.last is not None),
            "accepted_draft_tokens": sum(answer.last.accepted for answer in answers if answer.last is not None),
        },
        # The hosted API's names.
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": asked - cached,
    }


class Reply(ABC):
    """A kind of completion. ``usage``: whether chunks have a field for it, null but in the last one. ``wanted``:
    whether log-probabilities are asked for."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, model: str, usage: bool, wanted: bool):
        self.id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._model, self._usage, self._wanted = model, usage, wanted

    def begin(self, choice: int, answer: Answer) -> Iterator[dict]:
        """Chunks before the first piece."""
        yield from ()

    @abstractmethod
    def pieces(self, choice: int, pieces: Pieces) -> Iterator[dict]:
        """A chunk for each piece."""

    @abstractmethod
    def end(self, choice: int, answer: Answer) -> dict:
        """The chunk that says why a choice has ended."""

    def routed(self, choice: int, answer: Answer) -> Iterator[dict]:
        """A chunk of experts, where there are new ones."""
        yield from ()

    def usage(self, usage: dict) -> dict:
        """The last chunk."""
        return self._head(self.chunk_object) | {"choices": [], "usage": usage}

    def whole(self, choices: Sequence[tuple[Answer, Pieces]], usage: dict) -> dict:
        rows = [self._choice(i, answer, pieces) for i, (answer, pieces) in enumerate(choices)]
        return self._head(self.whole_object) | {"choices": rows, "usage": usage}

    @abstractmethod
    def _choice(self, choice: int, answer: Answer, pieces: Pieces) -> dict:
        """A choice of a whole completion."""

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choice: dict) -> dict:
        return self._head(self.chunk_object) | {"choices": [choice]} | ({"usage": None} if self._usage else {})


class ChatReply(Reply):
    """``named``: whether the request names the tool to be called; OpenAI's reason for the end is "stop" then."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, usage: bool, wanted: bool, named: bool = False):
        super().__init__(model, usage, wanted)
        self._named = named
        self._ids: dict[tuple[int, int], str] = {}
        self._routed: dict[int, int] = {}

    def begin(self, choice: int, answer: Answer) -> Iterator[dict]:
        yield self._delta(choice, {"role": "assistant", "content": ""}, None)

    def pieces(self, choice: int, pieces: Pieces) -> Iterator[dict]:
        for piece, beside in pieces:
            if piece.kind == "content":
                delta = {"content": piece.text}
            elif piece.kind == "reasoning":
                delta = _thoughts(piece.text)
            elif piece.kind == "call":
                delta = {"tool_calls": [{"index": piece.call, **self._call(choice, piece.call, piece.text)}]}
            else:
                delta = {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}
            entries = [entry for _, entry in beside]
            listed = self._listed(*([entries] if piece.kind == "content" else [[], entries])) if entries else None
            yield self._delta(choice, delta, listed)

    def routed(self, choice: int, answer: Answer) -> Iterator[dict]:
        """The experts of tokens that were not told of before."""
        at = self._routed.get(choice, 0)
        if at < len(answer.experts):
            self._routed[choice] = len(answer.experts)
            chunk = self._delta(choice, {}, None)
            chunk["choices"][0]["routing"] = {"at": at, "experts": answer.experts[at:]}
            yield chunk

    def end(self, choice: int, answer: Answer) -> dict:
        chunk = self._delta(choice, {}, None)
        chunk["choices"][0]["finish_reason"] = self._reason(answer)
        return chunk

    def _choice(self, choice: int, answer: Answer, pieces: Pieces) -> dict:
        said = {kind: "".join(p.text for p, _ in pieces if p.kind == kind) for kind in ("content", "reasoning")}
        calls = []
        for piece, _ in pieces:
            if piece.kind == "call":
                calls.append(self._call(choice, piece.call, piece.text))
            elif piece.kind == "arguments":
                calls[piece.call]["function"]["arguments"] += piece.text
        # Thoughts or calls alone are an answer without content; nothing at all is an empty one.
        content = said["content"] or (None if said["reasoning"] or calls else "")
        message = {"role": "assistant", "content": content, "refusal": None}
        message |= (_thoughts(said["reasoning"]) if said["reasoning"] else {}) | (
            {"tool_calls": calls} if calls else {}
        )
        beside = [[e for p, tokens in pieces if p.kind == kind for _, e in tokens] for kind in said]
        logprobs = self._listed(*beside) if self._wanted else None
        routing = {"routing": {"at": 0, "experts": answer.experts}} if answer.experts else {}
        reason = {"finish_reason": self._reason(answer)}
        return {"index": choice, "message": message, "logprobs": logprobs} | reason | routing

    def _reason(self, answer: Answer) -> str | None:
        called = answer.parser.calls and answer.finish == "stop" and not self._named
        return "tool_calls" if called else answer.finish

    def _call(self, choice: int, call: int, name: str) -> dict:
        number = self._ids.setdefault((choice, call), f"call_{uuid.uuid4().hex[:24]}")
        return {"id": number, "type": "function", "function": {"name": name, "arguments": ""}}

    def _delta(self, choice: int, delta: dict, logprobs: dict | None) -> dict:
        return self._chunk({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": None})

    @staticmethod
    def _listed(content: list[dict], reasoning: list[dict] | None = None) -> dict:
        """Each token stands with the text that it is a part of, as in the hosted API."""
        return {"content": content, "refusal": None} | ({"reasoning_content": reasoning} if reasoning else {})


class TextReply(Reply):
    """``echoes``: of each choice the prompt's text, where it is to be repeated, else ""."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, usage: bool, wanted: bool, echoes: Sequence[str]):
        super().__init__(model, usage, wanted)
        self._echoes = echoes

    def begin(self, choice: int, answer: Answer) -> Iterator[dict]:
        if self._echoes[choice]:
            yield self._part(choice, self._echoes[choice], self._listed(answer.echoed), None)

    def pieces(self, choice: int, pieces: Pieces) -> Iterator[dict]:
        for piece, beside in pieces:
            yield self._part(choice, piece.text, self._listed(self._behind(choice, beside)), None)

    def end(self, choice: int, answer: Answer) -> dict:
        return self._part(choice, "", None, answer.finish)

    def _choice(self, choice: int, answer: Answer, pieces: Pieces) -> dict:
        tokens = self._behind(choice, [token for _, beside in pieces for token in beside])
        logprobs = self._listed([*answer.echoed, *tokens])
        text = self._echoes[choice] + "".join(piece.text for piece, _ in pieces)
        return self._row(choice, text, logprobs, answer.finish)

    def _part(self, *parts) -> dict:
        return self._chunk(self._row(*parts))

    @staticmethod
    def _row(choice: int, text: str, logprobs: dict | None, reason: str | None) -> dict:
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _behind(self, choice: int, tokens: Sequence[tuple[int, dict]]) -> list[tuple[int, dict]]:
        """Where they are in the choice's text, the repeated prompt included."""
        return [(len(self._echoes[choice]) + at, entry) for at, entry in tokens]

    def _listed(self, tokens: Sequence[tuple[int, dict]]) -> dict | None:
        if not self._wanted:
            return None
        listed = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for at, entry in tokens:
            listed["tokens"].append(entry["token"])
            listed["token_logprobs"].append(entry["logprob"])
            # The token itself is among them, likely or not.
            top = {e["token"]: e["logprob"] for e in entry["top_logprobs"] or ()} | {entry["token"]: entry["logprob"]}
            listed["top_logprobs"].append(None if entry["logprob"] is None else top)
            listed["text_offset"].append(at)
        return listed


def _thoughts(text: str) -> dict:
    """Under both names that clients read."""
    return {"reasoning_content": text, "reasoning": text}
