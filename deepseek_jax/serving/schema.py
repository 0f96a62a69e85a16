"""Requests of the API as values: what a client sent is either one of these, or an `ApiError` that names the field."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from deepseek_jax.generation.request import MAX_TOP_LOGPROBS
from deepseek_jax.notes import shown
from deepseek_jax.serving import fields as f
from deepseek_jax.serving.errors import bad
from deepseek_jax.serving.pictures import picture_file

MOST_CHOICES, MOST_PROMPTS, MOST_MESSAGES, MOST_TOOLS, MOST_PICTURES = 16, 16, 4096, 128, 16
COMPLETION_TOKENS = 16  # OpenAI's default
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class Sampling:
    """What both kinds of completions have. ``max_tokens``: None for what is left of the context. ``seed``: None for one
    by chance. ``logprobs``: alternatives that come with each token, None for no log-probabilities at all."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # A JSON schema that the answer must follow; None: free text.
    schema: Mapping | None = None


@dataclass(frozen=True)
class ChatRequest:
    """``messages``: a content is text, or a list of texts and pictures' files. ``variables``: of the chat's format,
    ``thinking`` among them. ``tool_choice``: "none", "auto", "required", or the name of the tool that is to be called,
    after "named:". ``routing``: the experts of each token are wanted."""

    messages: tuple[dict, ...]
    sampling: Sampling
    tools: tuple[dict, ...] = ()
    tool_choice: str = "none"
    variables: Mapping = field(default_factory=dict)
    routing: bool = False


@dataclass(frozen=True)
class CompletionRequest:
    """``prompts``: texts, or lists of token ids. ``echo``: they are repeated before what follows, with their tokens'
    log-probabilities where those are wanted. ``suffix``: what is to stand behind the answer, "" for nothing certain."""

    prompts: tuple[str | tuple[int, ...], ...]
    sampling: Sampling
    echo: bool = False
    suffix: str = ""


@dataclass(frozen=True)
class Limits:
    """What requests are checked against. ``defaults``: of temperature, top_p, top_k and min_p, where the checkpoint's
    generation_config.json says them. ``pictures``: the model is shown some."""

    vocab_size: int
    context: int
    defaults: Mapping[str, float] = field(default_factory=dict)
    pictures: bool = False


def chat_request(body, limits: Limits) -> ChatRequest:
    """Raises `ApiError`."""
    given = f.known_fields(body, f.CHAT)
    if "messages" not in given:
        raise bad("messages", "is missing: a chat needs at least one message.")
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise bad("max_tokens", "is the older name of max_completion_tokens; give one of them.")
    message = partial(_message, pictures=limits.pictures)
    messages = f.listed("messages", given["messages"], message, least=1, most=MOST_MESSAGES)
    parted = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    if sum(isinstance(part, bytes) for parts in parted for part in parts) > MOST_PICTURES:
        raise bad("messages", f"hold more than {MOST_PICTURES} pictures.")
    tools = f.listed("tools", given.get("tools", []), _tool, most=MOST_TOOLS)
    choice = _tool_choice(given.get("tool_choice"), [tool["function"]["name"] for tool in tools])
    wanted = f.boolean("logprobs", given.get("logprobs", False))
    top = f.integer("top_logprobs", given.get("top_logprobs", 0), 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise bad("top_logprobs", "needs logprobs to be true.")
    limit = next((name for name in ("max_completion_tokens", "max_tokens") if name in given), "max_completion_tokens")
    sampling = _sampling(given, limits, limit, None, top if wanted else None)
    if sampling.schema is not None and choice != "none":
        raise bad("response_format", 'cannot bind an answer that may call tools; set tool_choice to "none".')
    # Where none may be called, the model is not told of them.
    tools = tuple(tools if choice != "none" else ())
    routing = f.boolean("routing", given.get("routing", False))
    return ChatRequest(tuple(messages), sampling, tools, choice, _variables(given), routing)


def completion_request(body, limits: Limits) -> CompletionRequest:
    """Raises `ApiError`."""
    given = f.known_fields(body, f.COMPLETION)
    if "prompt" not in given:
        raise bad("prompt", "is missing: give text, token ids, or a list of either.")
    prompts = _prompts(given["prompt"], limits.vocab_size)
    logprobs = given.get("logprobs")
    if logprobs is not None:
        logprobs = f.integer("logprobs", logprobs, 0, MAX_TOP_LOGPROBS)
    echo = f.boolean("echo", given.get("echo", False))
    # A prompt that is repeated is an answer by itself.
    sampling = _sampling(given, limits, "max_tokens", COMPLETION_TOKENS, logprobs, least=0 if echo else 1)
    if echo and sampling.schema is not None:
        raise bad("echo", "cannot be combined with response_format.")
    suffix = f.text("suffix", given.get("suffix", ""))
    if suffix and not all(isinstance(prompt, str) for prompt in prompts):
        raise bad("suffix", "needs a prompt that is text, and not token ids.")
    if suffix and echo:
        raise bad("suffix", "cannot be combined with echo: the text between two texts is asked for.")
    return CompletionRequest(prompts, sampling, echo, suffix)


def _sampling(
    given: Mapping, limits: Limits, limit: str, most: int | None, logprobs: int | None, least: int = 1
) -> Sampling:
    number = {
        "temperature": lambda v: f.number("temperature", v, 0, 2),
        "top_p": lambda v: f.number("top_p", v, 0, 1),
        # 0 and -1 both stand for all.
        "top_k": lambda v: max(0, f.integer("top_k", v, -1)),
        "min_p": lambda v: f.number("min_p", v, 0, 1),
    }
    drawn = dict(limits.defaults) | {name: check(given[name]) for name, check in number.items() if name in given}
    if drawn.get("top_p") == 0:
        raise bad("top_p", "must be above 0: temperature 0 takes the likeliest token.")
    options = f.mapping("stream_options", given.get("stream_options", {}))
    stream = f.boolean("stream", given.get("stream", False))
    if options and not stream:
        raise bad("stream_options", "needs stream to be true.")
    for name in sorted(set(options) - {"include_usage"}):
        if options[name]:
            raise bad(f"stream_options.{name}", "is not supported.", "unsupported_parameter")
    ids = lambda name, value: f.integer(name, value, 0, limits.vocab_size - 1)  # noqa: E731
    return Sampling(
        model=f.text("model", given["model"]) if "model" in given else None,
        max_tokens=f.integer(limit, given[limit], least) if limit in given else most,
        n=f.integer("n", given.get("n", 1), 1, MOST_CHOICES),
        seed=f.integer("seed", given["seed"], -(2**63), 2**63 - 1) if "seed" in given else None,
        stop=f.stops("stop", given.get("stop", [])),
        stop_token_ids=tuple(f.listed("stop_token_ids", given.get("stop_token_ids", []), ids, most=f.MOST_STOP_IDS)),
        stream=stream,
        include_usage=f.boolean("stream_options.include_usage", options.get("include_usage") or False),
        logprobs=logprobs,
        logit_bias=f.biases("logit_bias", given.get("logit_bias", {}), limits.vocab_size),
        schema=_schema(given.get("response_format")),
        **drawn,
    )


def _message(name: str, value, pictures: bool) -> dict:
    message = dict(f.mapping(name, value))
    role = f.text(f"{name}.role", message.get("role"))
    content = message.get("content")
    if isinstance(content, list):
        parts = f.listed(f"{name}.content", content, partial(_part, pictures=pictures and role == "user"))
        texts = all(isinstance(part, str) for part in parts)
        message["content"] = "\n".join(parts) if texts else parts
    elif content is not None:
        f.text(f"{name}.content", content)
    elif role != "assistant":
        raise bad(f"{name}.content", f"is missing in a message of role {shown(role)}.")
    calls = message.get("tool_calls")
    if not calls:
        message.pop("tool_calls", None)
        if role == "assistant" and content is None:
            message["content"] = ""
    else:
        message["tool_calls"] = f.listed(f"{name}.tool_calls", calls, _call)
    return {key: entry for key, entry in message.items() if entry is not None or key == "content"}


def _part(name: str, value, pictures: bool) -> str | bytes:
    """A text, or a picture's file."""
    part = f.mapping(name, value)
    if pictures and part.get("type") == "image_url":
        return picture_file(f"{name}.image_url", part.get("image_url"))
    if part.get("type") != "text":
        raise bad(f"{name}.type", f"must be text: this model reads nothing else, and no {shown(part.get('type'))}.")
    return f.text(f"{name}.text", part.get("text"))


def _call(name: str, value) -> dict:
    call = f.mapping(name, value)
    function = f.mapping(f"{name}.function", call.get("function"))
    f.text(f"{name}.function.name", function.get("name"))
    f.text(f"{name}.function.arguments", function.get("arguments"))
    return {"type": "function", **call}


def _tool(name: str, value) -> dict:
    tool = f.mapping(name, value)
    f.one_of(f"{name}.type", tool.get("type"), ("function",))
    function = f.mapping(f"{name}.function", tool.get("function"))
    if not f.text(f"{name}.function.name", function.get("name")):
        raise bad(f"{name}.function.name", "is empty.")
    f.mapping(f"{name}.function.parameters", function.get("parameters", {}))
    return tool


def _tool_choice(value, names: Sequence[str]) -> str:
    if value is None:
        return "auto" if names else "none"
    if isinstance(value, dict):
        f.one_of("tool_choice.type", value.get("type"), ("function",))
        function = f.mapping("tool_choice.function", value.get("function"))
        name = f.text("tool_choice.function.name", function.get("name"))
        if name not in names:
            raise bad("tool_choice", f"names {shown(name)}, which is none of the tools.")
        return f"named:{name}"
    choice = f.one_of("tool_choice", value, ("none", "auto", "required"))
    if choice == "required" and not names:
        raise bad("tool_choice", "requires a call, and there are no tools.")
    return choice if names else "none"


def _variables(given: Mapping) -> dict:
    """The chat format's variables: whether to think is said in three places, of which the clearest counts."""
    variables = dict(f.mapping("chat_template_kwargs", given.get("chat_template_kwargs", {})))
    for name in ("messages", "tools", "add_generation_prompt", "tokenize", "chat_template"):
        if name in variables:
            raise bad(f"chat_template_kwargs.{name}", "is not for a request to set.")
    if "enable_thinking" in variables:  # other families' name
        variables.setdefault("thinking", variables.pop("enable_thinking"))
    if "thinking" in variables:
        f.boolean("chat_template_kwargs.thinking", variables["thinking"])
    if "enable_thinking" in given:
        variables["thinking"] = f.boolean("enable_thinking", given["enable_thinking"])
    if "thinking" in given:  # the hosted API's
        kind = f.mapping("thinking", given["thinking"]).get("type")
        variables["thinking"] = f.one_of("thinking.type", kind, ("enabled", "disabled")) == "enabled"
    if "reasoning_effort" in given:
        variables["reasoning_effort"] = f.one_of("reasoning_effort", given["reasoning_effort"], EFFORTS)
    if variables.get("reasoning_effort") == "none":
        del variables["reasoning_effort"]
        variables["thinking"] = False
    return variables


def _schema(value) -> Mapping | None:
    if value is None:
        return None
    kind = f.one_of(
        "response_format.type",
        f.mapping("response_format", value).get("type"),
        ("text", "json_object", "json_schema"),
    )
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    named = f.mapping("response_format.json_schema", value.get("json_schema"))
    return f.mapping("response_format.json_schema.schema", named.get("schema"))


def _prompts(value, vocab_size: int) -> tuple:
    ids = lambda name, entry: f.integer(name, entry, 0, vocab_size - 1)  # noqa: E731
    if isinstance(value, str):
        return (f.text("prompt", value),)
    if isinstance(value, list) and value and all(isinstance(entry, int) for entry in value):
        return (tuple(f.listed("prompt", value, ids)),)

    def one(name: str, entry):
        return tuple(f.listed(name, entry, ids, least=1)) if isinstance(entry, list) else f.text(name, entry)

    return tuple(f.listed("prompt", value, one, least=1, most=MOST_PROMPTS))
