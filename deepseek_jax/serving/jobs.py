"""From a request of the API to requests of the engine, and from their deltas to pieces of answers."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from deepseek_jax.generation.request import Delta, Request, Stats
from deepseek_jax.notes import cut
from deepseek_jax.serving.answer import Answer, Echo, Pieces, Vocabulary
from deepseek_jax.serving.calls import syntax_of
from deepseek_jax.serving.errors import ApiError, bad
from deepseek_jax.serving.grammar import Grammars
from deepseek_jax.serving.parse import Parser, thinking_of
from deepseek_jax.serving.pictures import Shows, rendered
from deepseek_jax.serving.replies import ChatReply, Reply, TextReply
from deepseek_jax.serving.schema import ChatRequest, CompletionRequest, Limits, Sampling
from deepseek_jax.text.chat import EffortError
from deepseek_jax.text.fim import fim_prompt
from deepseek_jax.text.tokenizer import Tokenizer

# What a request may say of its effort, and what formats that have the switch know.
EFFORTS = {"minimal": "low", "medium": "high", "xhigh": "high"}


class Engine(Protocol):
    """What is seen of `worker.Worker` here."""

    state: str
    error: BaseException | None

    def check(self, request: Request) -> None: ...
    def stream(self, request: Request) -> AsyncIterator[Delta]: ...
    def stats(self) -> Stats | None: ...
    def stepping(self) -> float: ...


@dataclass(frozen=True)
class Job:
    """``requests``: one a prompt, each with n choices. ``answers``: of all choices, prompt by prompt."""

    requests: Sequence[Request]
    answers: Sequence[Answer]
    reply: Reply

    @property
    def prompts(self) -> list[Sequence[int]]:
        return [request.prompt for request in self.requests]


@dataclass
class Jobs:
    """Makes jobs for one checkpoint. ``eos_ids``: tokens that end its answers. ``drafts``: whether its MTP modules
    draft. ``routing``: whether the engine records experts. ``shows``: of a model that is shown pictures."""

    name: str
    tokenizer: Tokenizer
    limits: Limits
    eos_ids: Sequence[int]
    drafts: bool = False
    routing: bool = False
    shows: Shows | None = None
    grammars: Grammars = field(init=False)

    def __post_init__(self):
        self.grammars = Grammars(self.tokenizer, self.limits.vocab_size, self.eos_ids)
        self.syntax = syntax_of(self.tokenizer)
        self._vocabulary = Vocabulary(self.tokenizer)
        self._with_calls = Vocabulary(self.tokenizer, self.syntax)

    def render(self, asked: ChatRequest) -> tuple[str, list[int]]:
        """A chat's text and ids. Raises `ApiError` for what the checkpoint's format does not have."""
        return self._rendered(asked)[:2]

    def _rendered(self, asked: ChatRequest) -> tuple[str, list[int], list]:
        """The same, and pictures."""
        tokenizer, variables = self.tokenizer, dict(asked.variables)
        if self.shows is not None:
            for name in [*variables, *(["tools"] if asked.tools else [])]:
                raise bad(name, f"the chat format of {self.name} has none.", "unsupported_parameter")
            return rendered(self.shows, asked.messages)
        if not tokenizer.has_template:
            raise bad("messages", f"{self.name} has no chat format; ask /v1/completions to continue a text.")
        for name, what in (("thinking", "thoughts"), ("reasoning_effort", "effort")):
            if name in variables and not tokenizer.template_reads(name):
                raise bad(name, f"the chat format of {self.name} has no switch for {what}.", "unsupported_parameter")
        if asked.tools and (self.syntax is None or not tokenizer.template_reads("tools")):
            raise bad("tools", f"the chat format of {self.name} has no tools.", "unsupported_parameter")
        if "reasoning_effort" in variables:
            effort = variables["reasoning_effort"]
            variables["reasoning_effort"] = EFFORTS.get(effort, effort)
        variables |= {"tools": list(asked.tools)} if asked.tools else {}
        try:
            return tokenizer.render(asked.messages, **variables), tokenizer.chat(asked.messages, **variables), []
        except EffortError as error:
            raise bad("reasoning_effort", cut(error).removeprefix("reasoning_effort ")) from error
        except ValueError as error:
            raise bad("messages", cut(error)) from error

    async def chat(self, asked: ChatRequest) -> Job:
        """Raises `ApiError`."""
        if asked.routing and not self.routing:
            raise bad("routing", "is not recorded here: start the server with --routing.", "unsupported_parameter")
        text, prompt, pictures = await asyncio.to_thread(self._rendered, asked)
        sampling, thinking = asked.sampling, thinking_of(text)
        grammar, named = None, asked.tool_choice.partition("named:")[2] or None
        if sampling.schema is not None:
            grammar = await self.grammars.of_schema(sampling.schema, thinking == "begun")
        elif named or asked.tool_choice == "required":
            grammar = await self.grammars.of_calls(asked.tools, named, self.syntax, thinking == "begun")
        vocabulary, syntax = (self._with_calls, self.syntax) if asked.tools else (self._vocabulary, None)
        wanted = sampling.logprobs is not None
        reply = ChatReply(self.name, sampling.include_usage, wanted, named is not None)
        request = self._request(sampling, prompt, "messages", grammar)
        request = replace(request, routing=asked.routing, pictures=pictures)
        known = len(prompt) if asked.routing else None
        answers = [
            Answer(vocabulary, Parser(thinking, syntax, sampling.stop), self._stops(sampling), wanted, known)
            for _ in range(sampling.n)
        ]
        return Job([request], answers, reply)

    async def completion(self, asked: CompletionRequest) -> Job:
        """Raises `ApiError`."""
        sampling, tokenizer = asked.sampling, self.tokenizer
        given = await asyncio.to_thread(lambda: [self._ids(prompt, asked.suffix) for prompt in asked.prompts])
        grammar = None
        if sampling.schema is not None:
            grammar = await self.grammars.of_schema(sampling.schema, thinking=False)
        wanted = sampling.logprobs is not None
        scored = asked.echo and (wanted or sampling.max_tokens == 0)
        requests = [
            replace(self._request(sampling, prompt, "prompt", grammar), prompt_logprobs=scored) for prompt in given
        ]
        said = [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=True) for p in asked.prompts]
        echoes = [Echo(text, ids) if asked.echo else None for text, ids in zip(said, given, strict=True)]
        echoes = [echo for echo in echoes for _ in range(sampling.n)]
        answers = [
            Answer(self._vocabulary, Parser(stops=sampling.stop), self._stops(sampling), wanted, echo=echo)
            for echo in echoes
        ]
        texts = ["" if echo is None else echo.text for echo in echoes]
        return Job(requests, answers, TextReply(self.name, sampling.include_usage, wanted, texts))

    def _ids(self, prompt: str | Sequence[int], suffix: str) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if not suffix:
            return self.tokenizer.encode(prompt)
        try:
            return fim_prompt(self.tokenizer, prompt, suffix)
        except ValueError as error:
            raise bad("suffix", cut(error), "unsupported_parameter") from error

    def _stops(self, sampling: Sampling) -> list[int]:
        return [*self.eos_ids, *sampling.stop_token_ids]

    def _request(self, sampling: Sampling, prompt: Sequence[int], param: str, grammar) -> Request:
        if not prompt:
            raise bad(param, "makes no tokens at all: there is nothing to continue.")
        context = self.limits.context
        new = context - len(prompt) if sampling.max_tokens is None else sampling.max_tokens
        if len(prompt) + new > context or (new < 1 and sampling.max_tokens is None):
            asked = "" if sampling.max_tokens is None else f" and {new} new ones"
            message = f"{len(prompt)} tokens{asked} do not fit the context of {context}: shorten it, or ask for fewer."
            raise bad(param, message, "context_length_exceeded")
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed % 2**32
        return Request(
            prompt=prompt,
            max_new_tokens=new,
            temperature=sampling.temperature,
            top_k=min(sampling.top_k, self.limits.vocab_size),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            stop_ids=self._stops(sampling),
            n=sampling.n,
            top_logprobs=sampling.logprobs or 0,
            logit_bias=sampling.logit_bias,
            grammar=grammar,
            use_mtp=self.drafts and grammar is None,
        )


def checked(engine: Engine, job: Job) -> None:
    """Raises `ApiError` where the engine would not take a job's requests."""
    for request in job.requests:
        try:
            engine.check(request)
        except ValueError as error:
            raise ApiError(400, str(error)) from error


async def pieces_of(engine: Engine, job: Job, seen=lambda prompt, delta: None) -> AsyncIterator[tuple[int, Pieces]]:
    """Pieces of a job's answers as they come, with the answer's number; a choice that ends comes a last time.

    Ends when all have. ``seen``: is shown each delta. Raises what the engine does, and `ApiError` for an answer that
    its grammar could not go on with.
    """
    waiting, n = set(range(len(job.answers))), len(job.answers) // len(job.requests)
    async with aclosing(_merged(engine, job.requests)) as deltas:
        async for prompt, delta in deltas:
            seen(prompt, delta)
            number = prompt * n + delta.choice
            if number not in waiting:  # a stop string has ended it
                continue
            answer = job.answers[number]
            pieces = answer.take(delta)
            if answer.finish == "error":
                raise ApiError(400, f"the answer cannot go on: {answer.error}", "response_format", "grammar_error")
            if answer.finish is not None:
                waiting.discard(number)
            yield number, pieces
            if not waiting:
                return


async def _merged(engine: Engine, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Delta]]:
    """Deltas of several requests, with each the number of its own."""
    if len(requests) == 1:
        async with aclosing(engine.stream(requests[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    queue: asyncio.Queue = asyncio.Queue()

    async def forward(number: int, request: Request) -> None:
        try:
            async with aclosing(engine.stream(request)) as deltas:
                async for delta in deltas:
                    await queue.put((number, delta))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    tasks = [asyncio.create_task(forward(i, request)) for i, request in enumerate(requests)]
    try:
        left = len(tasks)
        while left:
            number, came = await queue.get()
            if isinstance(came, Exception):
                raise came
            if came is None:
                left -= 1
            else:
                yield number, came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
