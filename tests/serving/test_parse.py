"""Thoughts, content and calls of tools in an answer's text: the same pieces however the text is cut."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_jax.serving.answer import Vocabulary
from deepseek_jax.serving.calls import V3, V4, V31, V32, syntax_of
from deepseek_jax.serving.parse import Parser, thinking_of
from deepseek_jax.text import bpe
from deepseek_jax.text.chat import TokenizerError
from deepseek_jax.text.tokenizer import Tokenizer

CALLS = [("weather", {"city": 'München "süd"\n```', "days": 3}), ("add", {"of": [1, {"a": "b"}], "fast": True})]


def written(syntax, calls):
    """Calls as the release's chat format writes them."""
    if syntax in (V3, V31):
        close = "\n```" if syntax is V3 else ""
        parts = []
        for name, arguments in calls:
            head = f"function<｜tool▁sep｜>{name}\n```json\n" if syntax is V3 else f"{name}<｜tool▁sep｜>"
            text = json.dumps(arguments, ensure_ascii=False)
            parts.append(f"<｜tool▁call▁begin｜>{head}{text}{close}<｜tool▁call▁end｜>")
        between = "\n" if syntax is V3 else ""
        return f"<｜tool▁calls▁begin｜>{between.join(parts)}<｜tool▁calls▁end｜>"
    block = syntax.begin[1:-1]
    parts = []
    for name, arguments in calls:
        lines = [
            f'<｜DSML｜parameter name="{k}" string="{str(isinstance(v, str)).lower()}">'
            f"{v if isinstance(v, str) else json.dumps(v)}</｜DSML｜parameter>"
            for k, v in arguments.items()
        ]
        parts.append("\n".join([f'<｜DSML｜invoke name="{name}">', *lines, "</｜DSML｜invoke>"]))
    return "\n".join([f"\n\n<{block}>", *parts, f"</{block}>"])


def gathered(pieces):
    """Thoughts, content, and names with arguments, of pieces in order."""
    reasoning = "".join(p.text for p in pieces if p.kind == "reasoning")
    content = "".join(p.text for p in pieces if p.kind == "content")
    calls = []
    for piece in pieces:
        if piece.kind == "call":
            assert piece.call == len(calls)
            calls.append([piece.text, ""])
        elif piece.kind == "arguments":
            assert piece.call == len(calls) - 1
            calls[-1][1] += piece.text
    return reasoning, content, [tuple(call) for call in calls]


def parsed(text, cuts=(), **settings):
    parser, pieces, edges = Parser(**settings), [], [0, *sorted({c for c in cuts if c < len(text)}), len(text)]
    for begin, end in itertools.pairwise(edges):
        for piece in parser.push(text[begin:end]):
            if piece.kind in ("reasoning", "content"):
                assert text[piece.at : piece.at + len(piece.text)] == piece.text
            pieces.append(piece)
    pieces += parser.finish()
    return (*gathered(pieces), parser.stopped)


FRAGMENTS = st.sampled_from(
    [
        *(
            "<think>",
            "</think>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
        ),
        *("<｜tool▁calls▁end｜>", "function", "\n```json\n", "\n```", "<｜DSML｜function_calls>"),
        *("</｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", '<｜DSML｜invoke name="', '">'),
        *("</｜DSML｜invoke>", '<｜DSML｜parameter name="', '" string="true', '" string="false'),
        *("</｜DSML｜parameter>", "\n\n", " ", "end", "en", "ab", "<", '"', "{}"),
    ]
)
TEXTS = st.one_of(
    st.lists(FRAGMENTS, max_size=12).map("".join),
    st.builds(
        lambda syntax, before, after, n: before + written(syntax, CALLS * n) + after,
        st.sampled_from([V3, V31, V32, V4]),
        st.sampled_from(["", "x</think>", "end it </think> then \n"]),
        st.sampled_from(["", "\n", " more"]),
        st.integers(1, 2),
    ),
)


@given(
    TEXTS,
    st.lists(st.integers(0, 700), max_size=30),
    st.sampled_from(["begun", "over", "open"]),
    st.sampled_from([None, V3, V31, V32, V4]),
    st.sampled_from([(), ("end",), ("end", "n"), ("\n\n", "ab<"), ("dab", "abb")]),
    st.booleans(),
)
@example(written(V3, CALLS), [60, 61, 62], "over", V3, (), True)
def test_every_cutting_of_a_text_gives_what_the_whole_gives(text, cuts, thinking, syntax, stops, one_by_one):
    """sglang #35563, #34600; vllm #36056, #42879, #40800."""
    cuts = range(len(text)) if one_by_one else cuts
    whole = parsed(text, thinking=thinking, syntax=syntax, stops=stops)
    assert parsed(text, cuts, thinking=thinking, syntax=syntax, stops=stops) == whole


@pytest.mark.parametrize("syntax", [V3, V31, V32, V4], ids=["v3", "v31", "v32", "v4"])
def test_calls_in_one_block_are_told_apart(syntax):
    text = "hm</think>I look. \n" + written(syntax, CALLS)
    reasoning, content, calls, _ = parsed(text, thinking="begun", syntax=syntax)
    assert (reasoning, content) == ("hm", "I look.")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == CALLS
    # Two blocks, and text behind them.
    again = parsed(written(syntax, CALLS) + "\n" + written(syntax, CALLS[:1]) + "\nsaid", syntax=syntax)
    assert (again[1], [name for name, _ in again[2]]) == ("said", ["weather", "add", "weather"])
    # Where no tools were offered they are text.
    assert parsed(text, thinking="begun")[1:3] == ("I look. \n" + written(syntax, CALLS), [])


@pytest.mark.parametrize("syntax", [V3, V31, V32, V4], ids=["v3", "v31", "v32", "v4"])
def test_a_call_that_the_limit_cuts_keeps_what_came_of_it(syntax):
    text = written(syntax, CALLS[:1])
    for end in range(len(text)):
        _, content, calls, _ = parsed(text[:end], syntax=syntax)
        whole = json.dumps(CALLS[0][1], ensure_ascii=False)
        assert all(name == "weather" and whole.startswith(arguments) for name, arguments in calls)
        assert not calls or not content.strip()


def test_parameters_are_json_or_text():
    text = (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">not json'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="b" string="true">1</｜DSML｜parameter>\n<｜DSML｜parameter '
        'name="c" string="false"> 1 </｜DSML｜parameter>\n<｜DSML｜parameter name="d">x</｜DSML｜parameter>'
        '</｜DSML｜invoke><｜DSML｜invoke name="g">\n</｜DSML｜invoke></｜DSML｜function_calls>'
    )
    (_, arguments), none = parsed(text, syntax=V32)[2]
    assert json.loads(arguments) == {"a": "not json", "b": "1", "c": 1, "d": "x"}
    assert none == ("g", "{}")


def test_what_is_no_call_is_said_as_it_stands():
    broken = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function weather<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    for syntax in (V3, V31):
        assert parsed(broken, syntax=syntax)[1:3] == ("<｜tool▁call▁begin｜>function weather<｜tool▁call▁end｜>", [])


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("…<｜Assistant｜><think>\n", "hm</think>Yes", "hm", "Yes"),
        ("…<｜Assistant｜><think>", "never ends", "never ends", ""),
        ("…<｜Assistant｜></think>", "<think>x</think>", "", "<think>x</think>"),
        ("…<｜Assistant｜>", "\n<think>hm</think>\n\nYes", "hm", "\n\nYes"),
        ("…<｜Assistant｜>", "No tag <think>", "", "No tag <think>"),
        ("…<｜Assistant｜>", "<thin", "", "<thin"),
    ],
)
def test_thoughts_begin_where_the_prompt_says(prompt, text, reasoning, content):
    """vllm #12999, #23429; sglang #4539."""
    assert parsed(text, thinking=thinking_of(prompt))[:2] == (reasoning, content)
    assert parsed(text, range(len(text)), thinking=thinking_of(prompt))[:2] == (reasoning, content)


def test_a_stop_string_ends_the_content_and_no_part_of_it_comes_out():
    """vllm #3574, #11089; not in thoughts, and not in calls."""
    text = "STOP in thoughts</think>one two STOP three"
    assert parsed(text, range(60), thinking="begun", stops=["STOP"]) == ("STOP in thoughts", "one two ", [], True)
    assert parsed("one STO", range(9), stops=["STOP"]) == ("", "one STO", [], False)
    # One that begins earlier and may still come is waited for.
    assert parsed("abcx", range(9), stops=["bc", "abcd"])[1] == "a"
    assert parsed("abcd", range(9), stops=["bc", "abcd"])[1] == ""
    assert parsed(written(V31, [("f", {"a": "STOP"})]), syntax=V31, stops=["STOP"])[2:] == (
        [("f", '{"a": "STOP"}')],
        False,
    )
    parser = Parser(stops=["b"])
    assert [p.text for p in parser.push("abc")] == ["a"]
    assert parser.push("abc") == parser.finish() == []


def test_marks_of_calls_are_kept_where_the_tokenizer_has_them_as_special_tokens():
    """Others are no part of a text; and a mark is none where no tools are offered."""
    backend = bpe.train_tokenizer(["text"], 264)
    backend.add_special_tokens(["｜DSML｜", "<｜tool▁calls▁begin｜>", "</think>"])
    tokenizer = Tokenizer(backend)
    unsaid = set(range(len(bpe.SPECIAL_TOKENS)))
    dsml, begin = (tokenizer.id_of(mark) for mark in ("｜DSML｜", "<｜tool▁calls▁begin｜>"))
    assert Vocabulary(tokenizer).unsaid == unsaid | {dsml, begin}
    assert Vocabulary(tokenizer, V4).unsaid == unsaid | {begin}
    assert Vocabulary(tokenizer, V31).unsaid == unsaid | {dsml}


V3_TEMPLATE = (
    "{% for m in messages %}{% if m.tool_calls is defined %}<｜tool▁calls▁begin｜>{% for t in m.tool_calls %}"
    "<｜tool▁call▁begin｜>{{ t['type'] + '<｜tool▁sep｜>' + t['function']['name'] + '\\n```json\\n' }}"
    "{{ t['function']['arguments'] }}"
    "\n```<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_the_grammar_is_that_of_the_chat_format():
    from deepseek_jax.text.encoders import v4, v32
    from deepseek_jax.text.encoders.choice import Encoder

    backend = bpe.train_tokenizer(["text"], 264)
    bare = V3_TEMPLATE.replace("t['type'] + '<｜tool▁sep｜>' + ", "").replace("'\\n```json\\n'", "'<｜tool▁sep｜>'")
    for template, syntax in (
        (V3_TEMPLATE, V3),
        (bare, V31),
        (Encoder(v32.encode), V32),
        (Encoder(v4.encode), V4),
        (bpe.CHAT_TEMPLATE, None),
        (None, None),
    ):
        assert syntax_of(Tokenizer(backend, {}, template)) is syntax
    with pytest.raises(TokenizerError):
        Tokenizer(backend, {}, bpe.CHAT_TEMPLATE).render([{"role": "tool", "content": "x"}])
