"""The chat formats of V3.2 and V4, which publish no template, against the cases that their repositories publish.

`tests/text/published` holds the expected texts of test_output.txt beside DeepSeek-V3.2's encoder (in ai-dynamo/dynamo,
lib/llm/tests/data/deepseek-v3.2) and of test_output_1.txt beside V4's (kept by vllm-project/vllm in
tests/tokenizers_/fixtures/deepseek_v4, from where cases 2 to 4 are as well, shortened).
"""

import json
from pathlib import Path

import pytest

from deepseek_jax.text import bpe
from deepseek_jax.text.chat import TokenizerError
from deepseek_jax.text.encoders import v4, v32
from deepseek_jax.text.encoders.dsml import BOS, EOS
from deepseek_jax.text.tokenizer import load_tokenizer

PUBLISHED = Path(__file__).parent / "published"


def tool(name, description, required, **parameters):
    schema = {"type": "object", "properties": parameters, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def text(description, **more):
    return {"type": "string", **more, "description": description}


def called(*calls):
    return [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(calls)
    ]


def results(*contents):
    return [{"role": "tool", "tool_call_id": f"call_{i}", "content": json.dumps(c)} for i, c in enumerate(contents)]


def weather(location, date, high, low, sky, humidity):
    return {
        "location": location,
        "date": date,
        "temperature_high": high,
        "temperature_low": low,
        "weather": sky,
        "humidity": humidity,
    }


def both(date):
    return called(*(("get_weather", {"location": city, "date": date}) for city in ("San Francisco", "New York")))


def forecast(day, date, close, *cities):
    parts = [f"\n\n**{n}**:\n- Weather: {w}\n- High: {h}°F\n- Low: {o}°F\n- Humidity: {m}%" for n, w, h, o, m in cities]
    return f"{day} ({date}):{''.join(parts)}\n\n{close}"


V32_TOOLS = [
    tool(
        "get_datetime",
        "Get the current date and time",
        ["timezone"],
        timezone=text("The timezone, e.g. America/New_York, UTC"),
    ),
    tool(
        "get_weather",
        "Get the weather for a specific date and location",
        ["location", "date"],
        location=text("The city name, e.g. New York, San Francisco"),
        date=text("The date in YYYY-MM-DD format"),
    ),
]
V32_CHAT = [
    {"role": "system", "content": "You are a helpful Assistant."},
    {"role": "user", "content": "What's the weather tomorrow in San Francisco and New York?"},
    {
        "role": "assistant",
        "reasoning_content": "User is asking about tomorrow's weather. I need to first get the current date.",
        "tool_calls": called(("get_datetime", {"timezone": "America/New_York"})),
    },
    *results({"current_date": "2024-01-15", "current_time": "14:30:00", "timezone": "America/New_York"}),
    {"role": "assistant", "reasoning_content": "Now I know today is 2024-01-15.", "tool_calls": both("2024-01-16")},
    *results(
        weather("San Francisco", "2024-01-16", "65", "55", "partly cloudy", "70%"),
        weather("New York", "2024-01-16", "28", "15", "sunny", "35%"),
    ),
    {
        "role": "assistant",
        "reasoning_content": "Retrieved weather data for both cities.",
        "content": forecast(
            "Based on the forecast, here's tomorrow's weather",
            "January 16, 2024",
            "San Francisco will be mild and partly cloudy, while New York will be cold but sunny. If you're in New "
            "York, dress warmly!",
            ("San Francisco", "Partly cloudy", 65, 55, 70),
            ("New York", "Sunny", 28, 15, 35),
        ),
    },
    {"role": "user", "content": "Thanks! What about the day after tomorrow?"},
    {
        "role": "assistant",
        "reasoning_content": "User is now asking about the day after tomorrow, which is 2024-01-17. I can query "
        "directly since I already know today's date.",
        "tool_calls": both("2024-01-17"),
    },
    *results(
        weather("San Francisco", "2024-01-17", "68", "58", "light rain", "85%"),
        weather("New York", "2024-01-17", "32", "22", "cloudy", "50%"),
    ),
    {
        "role": "assistant",
        "reasoning_content": "Got the weather data for the day after tomorrow. Let me format this for the user.",
        "content": forecast(
            "Here's the forecast for the day after tomorrow",
            "January 17, 2024",
            "San Francisco will have light rain with temperatures rising slightly, so bring an umbrella. New York will "
            "be a bit warmer but still cold and cloudy, so continue to bundle up.",
            ("San Francisco", "Light rain", 68, 58, 85),
            ("New York", "Cloudy", 32, 22, 50),
        ),
    },
]
V4_TOOLS = [
    tool(
        "get_weather",
        "Get the weather for a specific location",
        ["location"],
        location=text("The city name"),
        unit=text("Temperature unit", enum=["celsius", "fahrenheit"]),
    ),
    tool(
        "search",
        "Search the web for information",
        ["query"],
        query=text("Search query"),
        num_results={"type": "integer", "description": "Number of results to return"},
    ),
]
V4_CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What's the weather in Beijing?"},
    {
        "role": "assistant",
        "reasoning_content": "The user wants to know the weather in Beijing. I should use the get_weather tool.",
        "tool_calls": called(("get_weather", {"location": "Beijing", "unit": "celsius"})),
    },
    *results({"temperature": 22, "condition": "sunny", "humidity": 45}),
    {
        "role": "assistant",
        "reasoning_content": "Got the weather data. Let me format a nice response.",
        "content": "The weather in Beijing is currently sunny with a temperature of 22°C and 45% humidity.",
    },
]
HELLO = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "reasoning_content": "I should greet back.", "content": "Hi there!"},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "reasoning_content": "It is Paris.", "content": "Paris."},
]


@pytest.mark.parametrize(
    ("encode", "chat", "tools", "file"),
    [(v32.encode, V32_CHAT, V32_TOOLS, "v32.txt"), (v4.encode, V4_CHAT, V4_TOOLS, "v4.txt")],
    ids=["v32", "v4"],
)
def test_a_chat_with_tools_is_the_published_text(encode, chat, tools, file):
    assert encode(chat, tools=tools, thinking=True) == (PUBLISHED / file).read_text(encoding="utf-8").removesuffix("\n")


def test_thoughts_before_the_last_question_are_left_out():
    """V4's published case 2."""
    assert v4.encode(HELLO) == (
        f"{BOS}You are a helpful assistant.<｜User｜>Hello<｜Assistant｜></think>Hi there!{EOS}"
        f"<｜User｜>What is the capital of France?<｜Assistant｜><think>It is Paris.</think>Paris.{EOS}"
    )
    assert v32.encode(HELLO, thinking=True) == v4.encode(HELLO)
    assert "</think>Hi there!" in v32.encode(HELLO)
    assert v32.encode(HELLO[:2]).endswith("<｜User｜>Hello<｜Assistant｜></think>")
    assert v32.encode(HELLO[:2], thinking=True).endswith("<｜Assistant｜><think>")
    assert v4.encode(HELLO, drop_thinking=False).count("<think>") == 2
    for encode in (v32.encode, v4.encode):
        assert encode(HELLO[:2], add_generation_prompt=False).endswith("<｜User｜>Hello")


def test_v4_reminders_developers_and_tasks():
    """V4's published cases 3 and 4: a developer's message keeps its thoughts with tools; a task has no answer's tag."""
    chat = [
        {"role": "system", "content": "S"},
        {"role": "latest_reminder", "content": "R"},
        {"role": "developer", "content": "D", "tools": V4_TOOLS},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "T",
            "tool_calls": called(("search", {"query": "q"})),
        },
        *results([0]),
        {"role": "assistant", "content": "A", "reasoning_content": "U", "tool_calls": []},
    ]
    found = v4.encode(chat)
    assert found.startswith(f"{BOS}S<｜latest_reminder｜>R<｜User｜>D\n\n## Tools\n\n")
    assert found.endswith(
        "invoke tool calls.\n<｜Assistant｜><think>T</think>\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="search">\n<｜DSML｜parameter name="query" string="true">q</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}<｜User｜><tool_result>[0]</tool_result><｜Assistant｜><think>U</think>A{EOS}"
    )
    asked = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "P", "task": "action"},
        {"role": "assistant", "content": "Search"},
    ]
    tail = f"<｜User｜>P<｜Assistant｜></think><｜action｜>Search{EOS}"
    assert v4.encode(asked, thinking=False) == f"{BOS}<｜User｜>Q<｜Assistant｜></think>A{EOS}{tail}"
    assert v4.encode([*asked[:2], {**asked[2], "task": "title"}]).endswith("<｜User｜>P<｜title｜>")


def test_v4_results_stand_in_the_order_of_their_calls_beside_what_the_user_says():
    chat = [
        {"role": "user", "content": "Q"},
        {
            "role": "assistant",
            "reasoning_content": "T",
            "tool_calls": called(("a", {}), ("b", {"n": 2, "l": [1, "x"]})),
        },
        *reversed(results("of a", "of b")),
        {"role": "user", "content": "and?"},
    ]
    found = v4.encode(chat, thinking=False)
    assert found.endswith(
        '<｜User｜><tool_result>"of a"</tool_result>\n\n<tool_result>"of b"</tool_result>\n\nand?'
        "<｜Assistant｜></think>"
    )
    assert '<｜DSML｜parameter name="l" string="false">[1, "x"]</｜DSML｜parameter>' in found
    assert v4.encode(chat, reasoning_effort="max").startswith(f"{BOS}Reasoning Effort: Absolute maximum")
    assert v4.encode(chat, thinking=False, reasoning_effort="max").startswith(f"{BOS}<｜User｜>")
    # The official release's words, as vllm-project/vllm's copy has them: each effort is one step further.
    efforts = {effort: v4.encode_official(chat, reasoning_effort=effort) for effort in (None, "low", "high", "max")}
    assert efforts[None] == efforts["low"] == v4.encode(chat)
    assert efforts["high"] == v4.encode(chat, reasoning_effort="max")
    assert efforts["max"].startswith(
        f"{BOS}Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    )
    assert efforts["max"].endswith("remains undiscovered.\n\n" + v4.encode(chat).removeprefix(BOS))
    assert v4.encode_official(chat, thinking=False, reasoning_effort="max") == v4.encode(chat, thinking=False)
    assert (
        v4.encode([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "prefix": True}])[-1] == "A"
    )


def test_v32_developers_and_forms():
    developer = {"role": "developer", "content": "D", "response_format": {"type": "object"}}
    asked = v32.encode([developer], tools=V32_TOOLS)
    assert asked.startswith(f"{BOS}<｜User｜>\n\n## Tools\n\n")
    assert asked.endswith(
        "</functions>\n\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object"}\n\n# The user\'s message is: D<｜Assistant｜></think>'
    )
    more = [developer, {"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"}]
    assert v32.encode(more, thinking=True) == f"{BOS}A{EOS}<｜User｜>Q<｜Assistant｜><think>"
    assert v32.encode(more, thinking=True, drop_thinking=False).count("<｜User｜>") == 2


USER = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("encode", "chat", "settings", "message"),
    [
        (v32.encode, [{"role": "robot", "content": "x"}], {}, "no role 'robot'"),
        (v4.encode, [{"role": "robot", "content": "x"}], {}, "no role 'robot'"),
        (v32.encode, [USER, {"role": "tool", "content": "x"}], {}, "must follow an assistant's"),
        (
            v32.encode,
            [USER, {"role": "assistant", "content": "x"}],
            {"thinking": True},
            "must have a reasoning_content",
        ),
        (v32.encode, [{"role": "developer"}], {}, "must have a content"),
        (v4.encode, [{"role": "developer"}], {}, "must have a content"),
        (v4.encode, [{"role": "user", "content": [{"type": "text", "text": "x"}]}], {}, "content must be text"),
        (v4.encode, [USER], {"reasoning_effort": "low"}, "must be high or max for this release, not 'low'"),
        (v4.encode_official, [USER], {"reasoning_effort": "xhigh"}, "must be low, high or max for this release"),
        (v4.encode, [{**USER, "task": "sing"}], {}, "task must be one of action"),
        (v4.encode, [USER], {"tools": ["x"]}, "must be an object with a function, not 'x'"),
        (
            v32.encode,
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            {},
            "arguments of a call of 'f' are not JSON",
        ),
        (
            v4.encode,
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}],
            {},
            "arguments of a call of 'f' are no object",
        ),
    ],
)
def test_what_a_format_does_not_have_is_named(encode, chat, settings, message):
    with pytest.raises(TokenizerError, match=message):
        encode(chat, **settings)


@pytest.fixture(scope="module")
def backend():
    return bpe.train_tokenizer(["some text to learn from"], 264)


def folder(path, backend, model_type, **config):
    bpe.save_tokenizer(backend, path, version="0")
    file = path / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}
    file.write_text(json.dumps(kept | config))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


@pytest.mark.parametrize(("model_type", "encode"), [("deepseek_v32", v32.encode), ("deepseek_v4", v4.encode)])
def test_a_folder_without_a_template_has_its_release_s_format(tmp_path, backend, model_type, encode):
    ours = load_tokenizer(folder(tmp_path / "plain", backend, model_type))
    assert ours.render(HELLO, thinking=True, tools=None) == encode(HELLO, thinking=True)
    assert ours.chat(HELLO) == ours.encode(encode(HELLO), add_bos=False)
    assert ours.template_reads("thinking")
    # The names that messages use elsewhere.
    assert ours.render([USER, {"role": "assistant", "reasoning": "T", "content": None}], thinking=True).count("T<") == 1
    for settings, message in (({"documents": []}, "no variable 'documents'"), ({"chat_template": "x"}, "no templates")):
        with pytest.raises(TokenizerError, match=message):
            ours.render(HELLO, **settings)
    with pytest.raises(ValueError, match="at least one message"):
        ours.render([])
    templated = load_tokenizer(
        folder(tmp_path / "jinja", backend, model_type, chat_template="{{ messages[0].content }}")
    )
    assert templated.render([USER]) == "Q"
    assert not load_tokenizer(folder(tmp_path / "other", backend, "deepseek_v3")).has_template


def test_the_official_v4_is_told_from_its_previews(tmp_path, backend):
    official = folder(tmp_path, backend, "deepseek_v4")
    (official / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "dspark_block_size": 5}))
    found = load_tokenizer(official)
    for effort in ("low", "max"):
        assert found.render(HELLO, reasoning_effort=effort) == v4.encode_official(HELLO, reasoning_effort=effort)
