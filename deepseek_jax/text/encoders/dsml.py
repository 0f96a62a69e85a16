"""What the chat formats of V3.2 and V4 share: tags, and DSML, the markup of tools and their calls.

A call names its parameters one by one. Text stands as it is, all else as JSON; ``string`` says which it is.
"""

import json
from collections.abc import Mapping, Sequence

from deepseek_jax.notes import cut, shown
from deepseek_jax.text.chat import TokenizerError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, THOUGHT = "<think>", "</think>"
DSML = "｜DSML｜"
# Both releases ask for a form of the answer in these words.
RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
# A turn begins with one of these.
ASKING = ("user", "developer")


def to_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def with_tools(messages: Sequence[dict], tools: Sequence[dict] | None) -> list[dict]:
    """The messages, the request's tools with the first one where it is a system's or developer's, else before it."""
    messages = list(messages)
    if not tools:
        return messages
    if messages and messages[0].get("role") in ("system", "developer"):
        return [{**messages[0], "tools": tools}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": tools}, *messages]


def text_of(message: Mapping) -> str:
    """A message's text, "" where it has none. Raises TokenizerError for parts and other things."""
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise TokenizerError(f"a message's content must be text here, not {shown(content)}.")
    return content


def schemas(tools: Sequence[dict]) -> str:
    """What the functions of tools are called, do and take, a line each."""
    return "\n".join(to_json(_function(tool)) for tool in tools)


def response_format(schema) -> str:
    return f"\n\n{RESPONSE_FORMAT}{to_json(schema)}"


def calls(tool_calls: Sequence[dict], block: str) -> str:
    """A message's calls; ``block``: the name of what is around them."""
    written = []
    for call in tool_calls:
        function = _function(call)
        lines = [f'<{DSML}invoke name="{function.get("name")}">']
        parameters = [_parameter(name, value) for name, value in _arguments(function).items()]
        lines += ["\n".join(parameters), f"</{DSML}invoke>"]
        written.append("\n".join(lines))
    return "\n\n" + "\n".join([f"<{DSML}{block}>", *written, f"</{DSML}{block}>"])


def last_asked(messages: Sequence[Mapping]) -> int:
    """Where the last turn begins; -1 where nobody asked."""
    return max((i for i, message in enumerate(messages) if message.get("role") in ASKING), default=-1)


def unknown_role(message: Mapping) -> TokenizerError:
    return TokenizerError(f"this release's chats have no role {shown(message.get('role'))}.")


def _parameter(name: str, value) -> str:
    text = isinstance(value, str)
    written = value if text else to_json(value)
    return f'<{DSML}parameter name="{name}" string="{"true" if text else "false"}">{written}</{DSML}parameter>'


def _function(entry) -> Mapping:
    function = entry.get("function") if isinstance(entry, Mapping) else None
    if not isinstance(function, Mapping):
        raise TokenizerError(f"a tool or a call of one must be an object with a function, not {shown(entry)}.")
    return function


def _arguments(function: Mapping) -> Mapping:
    """As a mapping; a call's arguments are JSON, or what that says. None at all are no parameters."""
    given = function.get("arguments") or {}
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise TokenizerError(
            f"the arguments of a call of {shown(function.get('name'))} are not JSON: {cut(error)}."
        ) from None
    if not isinstance(arguments, Mapping):
        raise TokenizerError(f"the arguments of a call of {shown(function.get('name'))} are no object.")
    return arguments
