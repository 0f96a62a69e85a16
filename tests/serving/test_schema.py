"""Requests are values or errors that name a field; nothing that a client can send is anything else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.serving import fields
from deepseek_jax.serving.errors import ApiError
from deepseek_jax.serving.schema import ChatRequest, CompletionRequest, Limits, chat_request, completion_request

LIMITS = Limits(vocab_size=100, context=64, defaults={"temperature": 0.6})
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
WRONG = [
    (chat_request, [], "body"),
    (chat_request, {}, "messages"),
    (completion_request, {}, "prompt"),
    (chat_request, {"messages": []}, "messages"),
    (chat_request, {"messages": [5]}, "messages[0]"),
    (chat_request, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (chat_request, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (chat_request, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (chat_request, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (chat_request, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    (chat_request, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    (chat_request, CHAT | {"temperature": 2.5}, "temperature"),
    (chat_request, CHAT | {"temperature": "1"}, "temperature"),
    (chat_request, CHAT | {"temperature": float("nan")}, "temperature"),
    (chat_request, CHAT | {"top_p": 0}, "top_p"),
    (chat_request, CHAT | {"top_k": -2}, "top_k"),
    (chat_request, CHAT | {"min_p": True}, "min_p"),
    (chat_request, CHAT | {"n": 0}, "n"),
    (chat_request, CHAT | {"n": 17}, "n"),
    (chat_request, CHAT | {"n": 1.5}, "n"),
    (chat_request, CHAT | {"seed": 2**64}, "seed"),
    (chat_request, CHAT | {"max_tokens": 0}, "max_tokens"),
    (chat_request, CHAT | {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    (chat_request, CHAT | {"stop": [""]}, "stop"),
    (chat_request, CHAT | {"stop": ["x"] * 17}, "stop"),
    (chat_request, CHAT | {"stop": 5}, "stop"),
    (chat_request, CHAT | {"stop_token_ids": [100]}, "stop_token_ids[0]"),
    (chat_request, CHAT | {"stream": "yes"}, "stream"),
    (chat_request, CHAT | {"stream_options": {"include_usage": True}}, "stream_options"),
    (chat_request, CHAT | {"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
    (chat_request, CHAT | {"logprobs": 5}, "logprobs"),
    (chat_request, CHAT | {"top_logprobs": 5}, "top_logprobs"),
    (chat_request, CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (chat_request, CHAT | {"logit_bias": {"100": 1}}, "logit_bias"),
    (chat_request, CHAT | {"logit_bias": {"-1": 1}}, "logit_bias"),
    (chat_request, CHAT | {"logit_bias": {"1": 101}}, "logit_bias.1"),
    (chat_request, CHAT | {"response_format": {"type": "xml"}}, "response_format.type"),
    (chat_request, CHAT | {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        chat_request,
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (chat_request, CHAT | {"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format"),
    (chat_request, CHAT | {"tools": [{"type": "search"}]}, "tools[0].type"),
    (chat_request, CHAT | {"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    (chat_request, CHAT | {"tool_choice": "required"}, "tool_choice"),
    (
        chat_request,
        CHAT | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
    ),
    (chat_request, CHAT | {"chat_template_kwargs": {"thinking": "yes"}}, "chat_template_kwargs.thinking"),
    (chat_request, CHAT | {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    (chat_request, CHAT | {"thinking": {"type": "some"}}, "thinking.type"),
    (chat_request, CHAT | {"reasoning_effort": "very"}, "reasoning_effort"),
    (chat_request, CHAT | {"model": 5}, "model"),
    (chat_request, CHAT | {"routing": 1}, "routing"),
    (chat_request, CHAT | {"presence_penalty": 0.5}, "presence_penalty"),
    (chat_request, CHAT | {"parallel_tool_calls": False}, "parallel_tool_calls"),
    (chat_request, CHAT | {"guided_json": {}}, "guided_json"),
    (chat_request, CHAT | {"prompt": "x"}, "prompt"),
    (chat_request, CHAT | {"echo": True}, "echo"),
    (completion_request, TEXT | {"messages": []}, "messages"),
    (completion_request, TEXT | {"suffix": 5}, "suffix"),
    (completion_request, TEXT | {"suffix": "x", "echo": True}, "suffix"),
    (completion_request, {"prompt": [1, 2], "suffix": "x"}, "suffix"),
    (chat_request, CHAT | {"suffix": "x"}, "suffix"),
    (completion_request, TEXT | {"best_of": 2}, "best_of"),
    (completion_request, TEXT | {"best_of": True}, "best_of"),
    (completion_request, TEXT | {"logprobs": 21}, "logprobs"),
    (completion_request, TEXT | {"max_tokens": 0}, "max_tokens"),
    (completion_request, TEXT | {"max_tokens": -1, "echo": True}, "max_tokens"),
    (completion_request, {"prompt": []}, "prompt"),
    (completion_request, {"prompt": [[1], [100]]}, "prompt[1][0]"),
    (completion_request, {"prompt": [1, True]}, "prompt[1]"),
    (completion_request, {"prompt": [[]]}, "prompt[0]"),
    (completion_request, {"prompt": ["x"] * 17}, "prompt"),
]


@pytest.mark.parametrize(
    ("read", "body", "param"), WRONG, ids=[f"{param}-{i}" for i, (_, _, param) in enumerate(WRONG)]
)
def test_what_is_wrong_is_named(read, body, param):
    with pytest.raises(ApiError) as found:
        read(body, LIMITS)
    error = found.value.body()["error"]
    assert (found.value.status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: ")
    assert error["message"].endswith(".")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted(fields.CHAT | fields.COMPLETION | set(fields.NEUTRAL) | {"unknown"})


@given(st.one_of(JSON, st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4)), st.booleans())
def test_no_json_is_anything_but_a_request_or_a_named_error(body, whole):
    if isinstance(body, dict) and whole:
        body = CHAT | TEXT | body
    for read, names, kind in (
        (chat_request, fields.CHAT, ChatRequest),
        (completion_request, fields.COMPLETION, CompletionRequest),
    ):
        mine = {k: v for k, v in body.items() if k in names or k == "unknown"} if isinstance(body, dict) else body
        found = error = None
        try:
            found = read(mine, LIMITS)
        except ApiError as raised:
            error = raised
        assert isinstance(found, kind) if error is None else (error.status, type(error.param)) == (400, str)


def test_what_a_request_says_is_what_is_asked_of_the_engine():
    full = {
        "model": "m",
        "max_completion_tokens": 5,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "n": 2,
        "seed": -1,
        "stop": "x",
        "stop_token_ids": [3],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "logit_bias": {"5": -100},
        "frequency_penalty": 0,
        "user": "u",
        "nobody_knows_this": 1,
        "temperature": None,
    }
    found = chat_request(CHAT | full, LIMITS)
    sampling = found.sampling
    drawn = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
    assert np.allclose(drawn, (0.6, 0.5, 0, 0.1))  # the checkpoint's own temperature, as none is given
    assert (sampling.max_tokens, sampling.n, sampling.seed, sampling.stop) == (5, 2, -1, ("x",))
    assert (sampling.stop_token_ids, sampling.logprobs, sampling.logit_bias) == ((3,), 3, {5: -100.0})
    assert sampling.stream
    assert sampling.include_usage
    plain = completion_request(TEXT, LIMITS).sampling
    assert (plain.max_tokens, plain.logprobs, plain.stop, plain.n) == (16, None, (), 1)
    assert chat_request(CHAT, LIMITS).sampling.max_tokens is None
    for given_, read in (("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], "b"], ((1,), "b"))):
        assert completion_request({"prompt": given_}, LIMITS).prompts == read


@pytest.mark.parametrize(
    ("asked", "variables"),
    [
        ({"chat_template_kwargs": {"thinking": True, "x": 1}}, {"thinking": True, "x": 1}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"thinking": False}),
        ({"enable_thinking": True}, {"thinking": True}),
        ({"thinking": {"type": "disabled"}, "enable_thinking": True}, {"thinking": False}),
        ({"thinking": {"type": "enabled"}}, {"thinking": True}),
        ({"reasoning_effort": "max"}, {"reasoning_effort": "max"}),
        ({"reasoning_effort": "none"}, {"thinking": False}),
    ],
)
def test_thoughts_are_switched_in_the_hosted_api_s_way_and_in_the_templates(asked, variables):
    assert chat_request(CHAT | asked, LIMITS).variables == variables


def test_messages_are_what_templates_read():
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    asked = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
        {"role": "assistant", "tool_calls": []},
    ]
    assert chat_request({"messages": asked}, LIMITS).messages == (
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [{"type": "function"} | call]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
        {"role": "assistant", "content": ""},
    )
    found = chat_request(CHAT | {"tools": [TOOL]}, LIMITS)
    assert (found.tools, found.tool_choice) == ((TOOL,), "auto")
    none = chat_request(CHAT | {"tools": [TOOL], "tool_choice": "none"}, LIMITS)
    assert (none.tools, none.tool_choice) == ((), "none")
