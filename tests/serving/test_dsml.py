"""Calls in DSML that are required: what the published encoders write is let through, and nothing that is no call."""

import asyncio
import json

import pytest

from deepseek_jax.serving.calls import V4, V32
from deepseek_jax.serving.errors import ApiError
from deepseek_jax.serving.grammar import Grammars
from deepseek_jax.serving.parse import Parser
from deepseek_jax.text import bpe
from deepseek_jax.text.encoders import dsml
from deepseek_jax.text.tokenizer import Tokenizer

PROPERTIES = {
    "city": {"type": "string", "description": "where"},
    "unit": {"enum": ["C", "F"]},
    "days": {"type": "integer", "minimum": 1, "maximum": 9},
    "code": {"type": "string", "pattern": "^[a-c]{2}$"},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "spot": {"$ref": "#/$defs/spot"},
}
SPOT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": PROPERTIES,
                "required": ["city"],
                "$defs": {"spot": SPOT},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module", params=["special", "added", "none"])
def tokenizer(request):
    backend = bpe.train_tokenizer(["text a b c </div> name string"], 284)
    if request.param == "special":
        backend.add_special_tokens([dsml.DSML])
    elif request.param == "added":
        backend.add_tokens([dsml.DSML])
    return Tokenizer(backend)


def made(tokenizer, syntax, only=None, tools=TOOLS):
    return asyncio.run(Grammars(tokenizer, tokenizer.vocab_size, [1]).of_calls(tools, only, syntax, False))


def written(syntax, *calls):
    called = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return dsml.calls(called, syntax.reader.BLOCK)


def goes(tokenizer, make, text):
    """Whether the grammar lets a text through, up to its end and no further."""
    grammar = make()
    for i in [*tokenizer.encode(text, add_bos=False), 1]:
        if not grammar.mask().view("uint32")[i // 32] >> (i % 32) & 1:
            return False
        grammar.accept([i])
    return True


@pytest.mark.parametrize("syntax", [V32, V4])
def test_a_required_call_is_what_the_encoder_writes(tokenizer, syntax):
    any_call, named = made(tokenizer, syntax), made(tokenizer, syntax, "weather")
    good = [
        {"city": 'Köln </div> < </ \n"x"'},
        {"city": "", "unit": "F", "days": 3, "note": None, "spot": {"x": 1.5}},
        {"city": "x", "note": "so"},
    ]
    for arguments in good:
        text = written(syntax, ("weather", arguments))
        assert goes(tokenizer, any_call, text)
        assert goes(tokenizer, named, text)
        pieces = Parser("over", syntax).push(text)
        assert json.loads("".join(p.text for p in pieces if p.kind == "arguments")) == arguments
    both = written(syntax, ("now", {}), ("weather", good[0]), ("now", {"at": "noon", "n": [1]}))
    assert goes(tokenizer, any_call, both)
    assert not goes(tokenizer, named, both)
    for arguments in (
        {},
        {"city": 5},
        {"city": "x", "unit": "K"},
        {"city": "x", "days": 0},
        {"city": "x", "code": "ab"},  # bound by a pattern: it comes as JSON
        {"city": "x", "spot": {}},
        {"city": "x", "other": 1},
    ):
        assert not goes(tokenizer, any_call, written(syntax, ("weather", arguments)))
    assert not goes(tokenizer, any_call, written(syntax, ("nobody", {})))
    assert not goes(tokenizer, any_call, "text")
    coded = written(syntax, ("weather", {"city": "x", "code": "ab"}))
    assert goes(tokenizer, any_call, coded.replace('string="true">ab<', 'string="false">"ab"<'))
    assert not goes(tokenizer, any_call, coded.replace('string="true">ab<', 'string="false">"abc"<'))


def test_parameters_that_cannot_be_held_are_named(tokenizer):
    for schema, said in (
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"type": "array"}, "type"),
        ({"type": "object", "properties": {"x": {"type": "strin"}}}, "cannot be followed"),
    ):
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        with pytest.raises(ApiError, match=said) as found:
            made(tokenizer, V4, tools=tools)
        assert (found.value.status, found.value.param) == (400, "tools")
