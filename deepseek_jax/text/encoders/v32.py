"""DeepSeek-V3.2's chats: what ``encoding/encoding_dsv32.py`` of the published repository makes of messages.

The cases that it comes with are tests here (`tests/text/test_encoders.py`).
"""

from collections.abc import Mapping, Sequence

from deepseek_jax.text.chat import TokenizerError
from deepseek_jax.text.encoders.dsml import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    THINK,
    THOUGHT,
    USER,
    calls,
    last_asked,
    response_format,
    schemas,
    text_of,
    unknown_role,
    with_tools,
)

BLOCK = "function_calls"
TOOLS = (
    "\n\n## Tools\n\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    f'You can invoke functions by writing a "<{DSML}{BLOCK}>" block like the following as part of your reply to the '
    "user:\n"
    f"<{DSML}{BLOCK}>\n"
    f'<{DSML}invoke name="$FUNCTION_NAME">\n'
    f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f'<{DSML}invoke name="$FUNCTION_NAME2">\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f"</{DSML}{BLOCK}>\n\n"
    "String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects "
    'should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" '
    "for other types (numbers, booleans, arrays, objects).\n\n"
    "If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking "
    "block. Here is an example:\n\n"
    f"<{DSML}{BLOCK}>\n...\n</{DSML}{BLOCK}>\n\n"
    "<function_results>\n...\n</function_results>\n\n"
    f"{THINK}...thinking about results{THOUGHT}\n\n"
    "Here are the functions available in JSONSchema format:\n"
    "<functions>\n"
)
TOOLS_END = "\n</functions>\n"


def encode(
    messages: Sequence[dict],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[dict] | None = None,
    thinking: bool = False,
    drop_thinking: bool = True,
) -> str:
    """The text of a chat.

    ``thinking``: whether the last turn thinks; thoughts of the turns before it are left out, and so are developers'
    messages before it unless ``drop_thinking`` is False. A message of a system or developer may bring ``tools`` and a
    ``response_format``.

    Raises:
        TokenizerError: a role, content or order of messages that this format does not have.
    """
    messages = with_tools(messages, tools)
    if thinking and drop_thinking:
        last = last_asked(messages)
        messages = [m for i, m in enumerate(messages) if i >= last or m.get("role") != "developer"]
    last = last_asked(messages)
    opening = {i: THINK if thinking and i >= last else THOUGHT for i in range(len(messages))}
    parts = [BOS]
    for i, message in enumerate(messages):
        role, text = message.get("role"), text_of(message)
        prompt = add_generation_prompt or i + 1 < len(messages)
        if role == "system":
            parts.append(text + _more(message))
        elif role in ("user", "developer"):
            if role == "developer":
                if not text:
                    raise TokenizerError("a developer's message must have a content.")
                text = f"{_more(message)}\n\n# The user's message is: {text}"
            parts.append(f"{USER}{text}" + (f"{ASSISTANT}{opening[i]}" if prompt else ""))
        elif role == "tool":
            number, of = _result(messages, i)
            parts.append("\n\n<function_results>" if number == 1 else "")
            parts.append(f"\n<result>{text}</result>")
            if number == of:
                parts.append("\n</function_results>" + (f"\n\n{opening[i]}" if prompt else ""))
        elif role == "assistant":
            parts.append(_answer(message, text, thought=thinking and i > last))
        else:
            raise unknown_role(message)
    return "".join(parts)


def _more(message: Mapping) -> str:
    tools, schema = message.get("tools"), message.get("response_format")
    return (f"{TOOLS}{schemas(tools)}{TOOLS_END}" if tools else "") + (response_format(schema) if schema else "")


def _answer(message: Mapping, text: str, thought: bool) -> str:
    thoughts, called = message.get("reasoning_content"), message.get("tool_calls")
    if thought and not (thoughts or called):
        raise TokenizerError(
            "an assistant's message after the last question must have a reasoning_content, or call tools, where the "
            "chat thinks."
        )
    return (f"{thoughts or ''}{THOUGHT}" if thought else "") + text + (calls(called, BLOCK) if called else "") + EOS


def _result(messages: Sequence[Mapping], i: int) -> tuple[int, int]:
    """Which result of a message's calls this is, from 1, and of how many."""
    asked = i - 1
    while asked >= 0 and messages[asked].get("role") == "tool":
        asked -= 1
    made = messages[asked].get("tool_calls") if asked >= 0 and messages[asked].get("role") == "assistant" else None
    if len(made or ()) < i - asked:
        raise TokenizerError("a tool's message must follow an assistant's that calls as many tools.")
    return i - asked, len(made)
