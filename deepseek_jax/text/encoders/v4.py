"""DeepSeek-V4's chats: what ``encoding/encoding_dsv4.py`` of the published repositories makes of messages.

`encode`: the first published form, of the previews; `encode_official`: that of V4-Flash-0731 and after, in which each
effort says what the next higher one said before. The cases that the first comes with are tests here
(`tests/text/test_encoders.py`).
"""

from collections.abc import Mapping, Sequence

from deepseek_jax.notes import shown
from deepseek_jax.text.chat import EffortError, TokenizerError
from deepseek_jax.text.encoders.dsml import (
    ASKING,
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

BLOCK = "tool_calls"
REMINDER = "<｜latest_reminder｜>"
# Small tasks of the release's own products: a token in the answer's place asks for one word.
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
MOST_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying "
    "cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
# What each effort puts before a chat.
EFFORTS = {"high": "", "max": MOST_EFFORT}
OFFICIAL_EFFORTS = {"low": "", "high": MOST_EFFORT, "max": BEYOND}
TOOLS = (
    "\n\n## Tools\n\n"
    "You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "
    f'"<{DSML}{BLOCK}>" block like the following:\n\n'
    f"<{DSML}{BLOCK}>\n"
    f'<{DSML}invoke name="$TOOL_NAME">\n'
    f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f'<{DSML}invoke name="$TOOL_NAME2">\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f"</{DSML}{BLOCK}>\n\n"
    'String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, '
    'arrays, objects), pass the value in JSON format and set `string="false"`.\n\n'
    f"If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside "
    f"{THINK}...{THOUGHT} BEFORE any tool calls or final response.\n\n"
    f"Otherwise, output directly after {THOUGHT} with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n"
)
TOOLS_END = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"


def encode(
    messages: Sequence[dict],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[dict] | None = None,
    thinking: bool = True,
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
) -> str:
    """The text of a chat.

    ``thinking``: whether answers think. ``drop_thinking``: thoughts before the last turn are left out, and developers'
    messages there; chats with tools keep them all the same. ``reasoning_effort``: "max" asks for the most of it, "high"
    and None say nothing. A system's or developer's message may bring ``tools`` and a ``response_format``, one that asks
    a ``task``.

    Raises:
        TokenizerError: a role, content or setting that this format does not have.
    """
    return _written(messages, add_generation_prompt, tools, thinking, drop_thinking, EFFORTS, reasoning_effort)


def encode_official(
    messages: Sequence[dict],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[dict] | None = None,
    thinking: bool = True,
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
) -> str:
    """As `encode`; of the efforts "low" and None say nothing, "high" asks for much and "max" for more still."""
    return _written(messages, add_generation_prompt, tools, thinking, drop_thinking, OFFICIAL_EFFORTS, reasoning_effort)


def _written(messages, add_generation_prompt, tools, thinking, drop_thinking, efforts, effort) -> str:
    if effort is not None and (not isinstance(effort, str) or effort not in efforts):
        known = f"{', '.join(list(efforts)[:-1])} or {list(efforts)[-1]}"
        raise EffortError(f"reasoning_effort must be {known} for this release, not {shown(effort)}.")
    messages = _merged(with_tools(messages, tools))
    drop = drop_thinking and not any(message.get("tools") for message in messages)
    if thinking and drop:
        last = last_asked(messages)
        messages = [m for i, m in enumerate(messages) if i >= last or m.get("role") != "developer"]
    last = last_asked(messages)
    parts = [BOS, efforts[effort] if thinking and effort is not None else ""]
    for i, message in enumerate(messages):
        role, text = message.get("role"), text_of(message)
        if role == "system":
            parts.append(text + _more(message))
        elif role == "developer":
            if not text:
                raise TokenizerError("a developer's message must have a content.")
            parts.append(USER + text + _more(message))
        elif role == "user":
            parts.append(USER + text)
        elif role == "latest_reminder":
            parts.append(REMINDER + text)
        elif role == "assistant":
            thought = thinking and (i > last or not drop) and not (i and messages[i - 1].get("task"))
            parts.append(f"{message.get('reasoning_content') or ''}{THOUGHT}" if thought else "")
            called = message.get("tool_calls")
            # The reference's names for an answer that is to be gone on with.
            open_end = message.get("prefix") or message.get("wo_eos")
            parts.append(text + (calls(called, BLOCK) if called else "") + ("" if open_end else EOS))
        else:
            raise unknown_role(message)
        follows = messages[i + 1].get("role") if i + 1 < len(messages) else None
        if follows in ("assistant", "latest_reminder") or (follows is None and add_generation_prompt):
            parts.append(_opening(message, thinking, thinks=thinking and (not drop or i >= last)))
    return "".join(parts)


def _opening(message: Mapping, thinking: bool, thinks: bool) -> str:
    """What makes the model answer a message."""
    task = message.get("task")
    if task is None:
        return f"{ASSISTANT}{THINK if thinks else THOUGHT}" if message.get("role") in ASKING else ""
    if task not in TASKS:
        raise TokenizerError(f"a message's task must be one of {', '.join(TASKS)}, not {shown(task)}.")
    before = f"{ASSISTANT}{THINK if thinking else THOUGHT}" if task == "action" else ""
    return f"{before}<｜{task}｜>"


def _more(message: Mapping) -> str:
    tools, schema = message.get("tools"), message.get("response_format")
    return (f"{TOOLS}{schemas(tools)}{TOOLS_END}" if tools else "") + (response_format(schema) if schema else "")


def _merged(messages: Sequence[dict]) -> list[dict]:
    """Results of tools are a part of what the user says, in the order of their calls; neighbours are one message."""
    found: list[dict] = []
    order: dict[str, int] = {}
    for message in messages:
        role = message.get("role")
        if role not in ("user", "tool"):
            found.append(dict(message))
            if role == "assistant" and message.get("tool_calls"):
                order = {call.get("id"): i for i, call in enumerate(message["tool_calls"]) if call.get("id")}
            continue
        before = found[-1] if found else {}
        joins = before.get("role") == "user" and (role == "tool" or before.get("task") is None)
        if not joins:
            found.append({**message, "role": "user", "parts": [], "order": order})
        call = message.get("tool_call_id") if role == "tool" else None
        found[-1]["parts"].append((role, call, text_of(message)))
    for message in found:
        if "parts" in message:
            message["content"] = "\n\n".join(_sorted(message["parts"], message["order"]))
    return found


def _sorted(parts: list[tuple], order: Mapping[str, int]) -> list[str]:
    """Texts of a user's message: results change places among themselves, text stays where it is."""
    results = [part for part in parts if part[0] == "tool"]
    results = iter(sorted(results, key=lambda part: order.get(part[1], 0)) if order else results)
    return [f"<tool_result>{next(results)[2]}</tool_result>" if role == "tool" else text for role, _, text in parts]
