"""The API with the real client, over a real socket, in front of an engine that says what it is told."""

import asyncio
import json
import threading
import time

import httpx2
import openai
import pytest
import tokenizers
from served import CONTEXT, Told, client, serving

from deepseek_jax.data.fim import Fim
from deepseek_jax.generation.request import Delta
from deepseek_jax.serving.errors import NotServing
from deepseek_jax.serving.server import listening
from deepseek_jax.text.encoders import v4
from deepseek_jax.text.encoders.choice import Encoder
from deepseek_jax.text.tokenizer import Tokenizer, load_tokenizer

HI = [{"role": "user", "content": "hi"}]
# In the manner of V3.1: a switch for thoughts, tools, and calls of them.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls is defined %}<｜tool▁calls▁begin｜>{% for t in m.tool_calls %}<｜tool▁call▁begin｜>"
    "{{ t.function.name }}<｜tool▁sep｜>{{ t.function.arguments }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}<assistant>"
    "{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    }
    for name in ("count", "skip")
]


@pytest.fixture(scope="module")
def plain(root):
    return load_tokenizer(root / "checkpoints" / "tiny-v3")


@pytest.fixture(scope="module")
def thinker(plain):
    return Tokenizer(plain.backend, {"bos_token": plain.bos_token, "add_bos_token": True}, TEMPLATE)


def saying(tokenizer, *texts, eos=True):
    """An engine that says these texts, a choice each."""
    ids = [tokenizer.encode(text, add_bos=False) + [1] * eos for text in texts]
    return Told(lambda request, choice: ids[choice % len(ids)])


@pytest.fixture
def ask(plain):
    """Asks for a chat at a server of one engine."""

    def ask(engine, tokenizer=plain, **settings):
        with serving(engine, tokenizer, drafts=True, context=4 * CONTEXT) as url, client(url) as c:
            made = c.chat.completions.create(model="tiny", messages=HI, **settings)
            return list(made) if settings.get("stream") else made

    return ask


def joined(chunks, field="content", choice=0):
    deltas = [c.choices[0].delta for c in chunks if c.choices and c.choices[0].index == choice]
    return "".join(getattr(delta, field, None) or "" for delta in deltas)


TEXT = "naïve 🙂 日本\n"


def test_a_stream_is_the_whole_in_pieces(ask, plain):
    engine = saying(plain, TEXT, TEXT * 2)
    whole = ask(engine, n=2)
    assert engine.asked[0].use_mtp
    assert [(c.index, c.message.content, c.finish_reason) for c in whole.choices] == [
        (0, TEXT, "stop"),
        (1, TEXT * 2, "stop"),
    ]
    chunks = ask(saying(plain, TEXT, TEXT * 2), n=2, stream=True, stream_options={"include_usage": True})
    assert [joined(chunks, choice=i) for i in range(2)] == [TEXT, TEXT * 2]
    assert not any("\ufffd" in (c.choices[0].delta.content or "") for c in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop", "stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    # Counts come once, at the end, in a chunk without choices.
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    counts = {k: v for k, v in whole.usage.model_dump().items() if v is not None}
    assert counts == {k: v for k, v in chunks[-1].usage.model_dump().items() if v is not None}
    made = len(plain.encode(TEXT, add_bos=False)) + len(plain.encode(TEXT * 2, add_bos=False)) + 2
    asked = len(plain.chat(HI))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (
        asked,
        made,
        asked + made,
    )
    details = whole.usage.completion_tokens_details
    assert (details.drafted_tokens, details.accepted_draft_tokens) == (8, 6)
    assert (whole.usage.prompt_tokens_details.cached_tokens, whole.usage.prompt_cache_miss_tokens) == (2, asked - 2)


def test_every_setting_reaches_the_engine(ask, plain):
    engine = saying(plain, "x")
    more = {"top_k": 7, "min_p": 0.125, "stop_token_ids": [9]}
    settings = {"max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.75, "n": 2, "seed": -1, "logprobs": True}
    ask(engine, **settings, top_logprobs=3, logit_bias={"5": -3}, extra_body=more)
    (asked,) = engine.asked
    assert (asked.max_new_tokens, asked.temperature, asked.top_p, asked.n) == (5, 0.5, 0.75, 2)
    assert (asked.top_k, asked.min_p, asked.seed, asked.top_logprobs) == (7, 0.125, 2**32 - 1, 3)
    assert (asked.stop_ids, asked.logit_bias, asked.grammar) == ([1, 9], {5: -3.0}, None)
    # And of those that are not given.
    engine = saying(plain, "x")
    ask(engine)
    (free,) = engine.asked
    assert (free.temperature, free.top_p, free.top_k, free.min_p, free.n) == (1.0, 1.0, 0, 0.0, 1)
    assert free.max_new_tokens == 4 * CONTEXT - len(free.prompt)


def test_thoughts_have_both_names_and_begin_where_the_prompt_says(ask, thinker):
    on = {"extra_body": {"thinking": {"type": "enabled"}}}
    message = ask(saying(thinker, "so <b></think>Yes."), thinker, **on).choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Yes.", "so <b>", "so <b>")
    chunks = ask(saying(thinker, "so <b></think>Yes."), thinker, stream=True, **on)
    assert (joined(chunks), joined(chunks, "reasoning_content"), joined(chunks, "reasoning")) == (
        "Yes.",
        "so <b>",
        "so <b>",
    )
    off = ask(saying(thinker, "<think>Yes."), thinker)
    assert off.choices[0].message.content == "<think>Yes."
    assert not hasattr(off.choices[0].message, "reasoning")
    cut = ask(saying(thinker, "so it goes on", eos=False), thinker, max_tokens=3, **on)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (None, "length")
    assert cut.usage.completion_tokens_details.reasoning_tokens == 3


def test_calls_of_tools_are_parsed_as_they_come(ask, thinker):
    text = (
        'hm</think>I count.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>count<｜tool▁sep｜>{"n": 12}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>skip<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    settings = {"tools": TOOLS, "extra_body": {"chat_template_kwargs": {"thinking": True}}}
    choice = ask(saying(thinker, text), thinker, **settings).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I count.")
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]
    assert calls == [("count", '{"n": 12}'), ("skip", "{}")]
    chunks = ask(saying(thinker, text), thinker, stream=True, **settings)
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or ()]
    named = [(d.index, d.function.name) for d in deltas if d.id]
    assert named == [(0, "count"), (1, "skip")]
    assert len({d.id for d in deltas if d.id}) == 2
    assert ["".join(d.function.arguments or "" for d in deltas if d.index == i) for i in (0, 1)] == ['{"n": 12}', "{}"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # The limit cuts a call; and where no tools are offered it is text.
    cut = ask(saying(thinker, text[: text.index("12")], eos=False), thinker, **settings).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls[0].function.arguments) == ("length", '{"n": ')
    streamed = ask(saying(thinker, text[: text.index("12")], eos=False), thinker, stream=True, **settings)
    assert streamed[-1].choices[0].finish_reason == "length"
    # Log-probabilities are those of the text beside the calls, and of the thoughts.
    for stream in (False, True):
        found = ask(saying(thinker, text), thinker, stream=stream, logprobs=True, **settings)
        listed = (
            [c.choices[0].logprobs for c in found if c.choices[0].logprobs] if stream else [found.choices[0].logprobs]
        )
        assert bytes(b for part in listed for entry in part.content for b in entry.bytes).decode() == "I count."
    assert "<｜tool▁sep｜>" in ask(saying(thinker, text), thinker).choices[0].message.content


@pytest.mark.parametrize("named", [False, True])
def test_a_call_can_be_required(ask, thinker, named):
    """The engine of this test refuses what the grammar does not let follow."""
    text = (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>skip<｜tool▁sep｜>{"n": 12}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    )
    choice = {"type": "function", "function": {"name": "skip"}} if named else "required"
    found = ask(saying(thinker, text), thinker, tools=TOOLS, tool_choice=choice).choices[0]
    assert found.finish_reason == ("stop" if named else "tool_calls")
    assert [c.function.name for c in found.message.tool_calls] == ["skip"]
    with pytest.raises(openai.InternalServerError):
        ask(saying(thinker, text.replace("skip", "none")), thinker, tools=TOOLS, tool_choice=choice)


def test_the_official_v4_has_required_calls_and_three_efforts(ask, plain):
    """Two words mean high, as in the hosted API; previews know no low one."""
    official = Tokenizer(plain.backend, {}, Encoder(v4.encode_official))
    text = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="skip">\n<｜DSML｜parameter name="n" string="false">12'
    text = f"so</think>{text}</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    (choice,) = ask(saying(official, text), official, tools=TOOLS, tool_choice="required").choices
    assert (choice.message.reasoning, choice.finish_reason) == ("so", "tool_calls")
    assert [(c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [("skip", '{"n": 12}')]
    prompts = {}
    for effort in ("minimal", "low", "medium", "high", "xhigh", "max"):
        engine = saying(official, "so</think>x")
        ask(engine, official, reasoning_effort=effort)
        prompts[effort] = tuple(engine.asked[0].prompt)
    assert prompts["medium"] == prompts["xhigh"] == prompts["high"]
    assert prompts["minimal"] == prompts["low"]
    assert len(set(prompts.values())) == 3
    preview = Tokenizer(plain.backend, {}, Encoder(v4.encode))
    with pytest.raises(openai.BadRequestError, match="must be high or max for this release, not 'low'") as found:
        ask(saying(preview, "x"), preview, reasoning_effort="low")
    assert found.value.param == "reasoning_effort"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def formatted(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def test_an_answer_follows_a_schema_from_where_its_thoughts_end(ask, plain, thinker):
    settings = {"response_format": formatted(SCHEMA), "extra_body": {"thinking": {"type": "enabled"}}}
    for text in ('hm</think>{"a":12}', 'hm</think>\n\n{"a":12}'):
        engine = saying(thinker, text)
        if "\n" in text:  # nothing but the JSON may follow
            with pytest.raises(openai.InternalServerError):
                ask(engine, thinker, **settings)
        else:
            found = ask(engine, thinker, n=2, **settings)
            assert [json.loads(c.message.content) for c in found.choices] == [{"a": 12}] * 2
            assert not engine.asked[0].use_mtp
    assert ask(saying(plain, "{}"), response_format={"type": "json_object"}).choices[0].message.content == "{}"
    assert ask(saying(plain, "free"), response_format={"type": "text"}).choices[0].message.content == "free"


def test_a_schema_that_takes_too_long_is_named(ask, plain, monkeypatch):
    monkeypatch.setattr("deepseek_jax.serving.grammar.SECONDS", 0.0)
    engine = saying(plain, "{}")
    with pytest.raises(openai.BadRequestError, match="takes more than 0 seconds to compile"):
        ask(engine, response_format=formatted(SCHEMA))
    assert engine.asked == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"not": {}}, "not"),
        ({"$ref": "#"}, "NoExtension"),
        (
            {"type": "object", "properties": {f"p{i}": {"enum": [f"{i}-{j}" for j in range(500)]} for i in range(300)}},
            "too big",
        ),
    ],
)
def test_a_schema_that_cannot_be_held_is_named(ask, plain, schema, message):
    with pytest.raises(openai.BadRequestError, match=message) as found:
        ask(saying(plain, "{}"), response_format=formatted(schema))
    assert found.value.param == "response_format"


def test_log_probabilities_stand_beside_their_text(ask, plain, thinker):
    ids = [*plain.encode("naïve", add_bos=False), 7, 1]
    logprobs = ask(Told(lambda request, choice: ids, never=ids[-3]), logprobs=True, top_logprobs=2).choices[0].logprobs
    assert bytes(b for e in logprobs.content for b in e.bytes).decode() == plain.decode(ids[:-1], True)
    # JSON has no minus infinity; the token of no text is not listed.
    assert [e.logprob for e in logprobs.content] == [-0.5] * (len(ids) - 3) + [-9999.0]
    assert [len(e.top_logprobs) for e in logprobs.content] == [2] * (len(ids) - 2)
    text = "so</think>Yes 🙂"
    on = {"extra_body": {"thinking": {"type": "enabled"}}, "logprobs": True}
    whole = ask(saying(thinker, text), thinker, **on).choices[0].logprobs
    assert bytes(b for e in whole.content for b in e.bytes).decode() == "Yes 🙂"
    assert bytes(b for e in whole.reasoning_content for b in e["bytes"]).decode() == "so"
    chunks = ask(saying(thinker, text), thinker, stream=True, **on)
    listed = [e for c in chunks for e in (c.choices[0].logprobs.content if c.choices[0].logprobs else ())]
    assert listed == whole.content


def test_experts_stand_beside_the_tokens_that_went_to_them(plain):
    """The engine of this test sends the token at position p to p and p + 1."""
    engine, known = saying(plain, TEXT), len(plain.chat(HI))
    made = len(plain.encode(TEXT, add_bos=False)) + 1  # with the token that ends it, which is never fed
    rows = [[[known + i, known + i + 1]] for i in range(made - 1)]
    asked = {"model": "tiny", "messages": HI, "logprobs": True, "extra_body": {"routing": True}}
    with serving(engine, plain, routing=True) as url, client(url) as c:
        whole = c.chat.completions.create(**asked).choices[0]
        assert whole.routing == {"at": 0, "experts": rows}
        assert [e.index for e in whole.logprobs.content] == list(range(made - 1))
        told = {}
        for chunk in c.chat.completions.create(stream=True, **asked):
            part = getattr(chunk.choices[0], "routing", None) or {"at": 0, "experts": []}
            told |= {part["at"] + i: row for i, row in enumerate(part["experts"])}
        assert told == dict(enumerate(rows))
        assert c.models.retrieve("tiny").routing
    says = pytest.raises(openai.BadRequestError, match="start the server with --routing")
    with serving(saying(plain, TEXT), plain) as url, client(url) as c, says:
        c.chat.completions.create(**asked)


def test_stop_strings_and_stop_tokens_are_no_part_of_the_text(ask, plain):
    for stream in (False, True):
        engine = saying(plain, "one two three four five six seven")
        found = ask(engine, stop=["three"], stream=stream)
        assert (joined(found) if stream else found.choices[0].message.content) == "one two "
        assert engine.cancelled == 1  # what follows is not waited for
    (dot,) = plain.encode(".", add_bos=False)
    ids = plain.encode("one. two", add_bos=False)
    found = ask(Told(lambda r, c: ids[: ids.index(dot) + 1]), extra_body={"stop_token_ids": [dot]}).choices[0]
    assert (found.message.content, found.finish_reason) == ("one", "stop")


def test_completions_take_texts_and_ids(plain):
    engine = Told(lambda request, choice: [*request.prompt[1:], *plain.encode(str(choice), add_bos=False), 1])
    with serving(engine, plain) as url, client(url) as c:
        ids = plain.encode("ab 🙂")
        for prompt in ("ab 🙂", ids):
            found = c.completions.create(model="tiny", prompt=prompt, echo=True, seed=5, max_tokens=9)
            assert found.choices[0].text == "ab 🙂ab 🙂0"
        many = c.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=9)
        assert [(choice.index, choice.text) for choice in many.choices] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
        chunks = list(c.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=9, stream=True))
        assert ["".join(x.choices[0].text for x in chunks if x.choices[0].index == i) for i in range(4)] == [
            "a0",
            "a1",
            "b0",
            "b1",
        ]
        listed = c.completions.create(model="tiny", prompt="x", logprobs=1, max_tokens=9).choices[0].logprobs
        assert (listed.tokens, listed.text_offset, listed.token_logprobs) == (["x", "0"], [0, 1], [-0.5, -0.5])
        assert listed.top_logprobs[0] == {plain.bos_token: 0.0, "x": -0.5}
        assert [request.seed for request in engine.asked[:2]] == [5, 5]


def test_a_repeated_prompt_has_log_probabilities_as_harnesses_read_them(plain):
    """They take what stands behind the context, and leave the one new token out, whatever that is."""
    with serving(Told(lambda request, choice: [1]), plain) as url, client(url) as c:
        texts = ["ab 🙂", "x <｜User｜>"]
        ids = [plain.encode(text) for text in texts]
        asked = {"model": "tiny", "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
        for prompt in (texts, ids):
            found = c.completions.create(prompt=prompt, **asked)
            assert found.choices[0].text == texts[0]
            assert found.choices[1].text == (texts[1] if prompt is texts else "x ")
            for choice, known in zip(found.choices, ids, strict=True):
                logprobs = choice.logprobs
                assert logprobs.token_logprobs == [None, *(-float(p) for p in range(1, len(known))), -0.5]
                assert logprobs.tokens[0] == plain.bos_token
                assert logprobs.tokens[-1] == plain.eos_token
                assert logprobs.top_logprobs[0] is None
                values = zip(logprobs.top_logprobs[1:], logprobs.tokens[1:], logprobs.token_logprobs[1:], strict=True)
                assert all(plain.bos_token in top and top[token] == value for top, token, value in values)
                # Where each begins; what is no part of the text begins where it would.
                assert logprobs.text_offset[:2] == [0, 0]
                assert logprobs.text_offset[-1] == len(choice.text)
                whole = [t for t in zip(logprobs.tokens, logprobs.text_offset, strict=True) if t[0] in choice.text]
                assert len(whole) > 1
                assert all(choice.text.startswith(token, at) for token, at in whole)
        one = c.completions.create(prompt=texts[0], **asked | {"n": 2})
        assert [choice.logprobs.token_logprobs[-1] for choice in one.choices] == [-0.5, -0.5]
        chunks = list(c.completions.create(prompt=texts[0], stream=True, **asked))
        assert "".join(chunk.choices[0].text for chunk in chunks) == texts[0]
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [getattr(chunk.choices[0].logprobs, field) for chunk in chunks if chunk.choices[0].logprobs]
            assert [entry for part in parts for entry in part] == getattr(one.choices[0].logprobs, field)
        # Nothing but the prompt, whose tokens are asked for or not.
        none = c.completions.create(prompt=texts[0], **asked | {"max_tokens": 0})
        assert (none.choices[0].text, none.choices[0].finish_reason) == (texts[0], "length")
        assert none.choices[0].logprobs.token_logprobs == one.choices[0].logprobs.token_logprobs[:-1]
        assert none.usage.completion_tokens == 0
        bare = c.completions.create(model="tiny", prompt=texts[0], max_tokens=0, echo=True)
        assert (bare.choices[0].text, bare.choices[0].logprobs) == (texts[0], None)


def test_a_suffix_asks_for_what_stands_between(plain):
    """The prompt is a document that training turned, up to its middle; marks typed in it are text."""
    engine, text, hole = saying(plain, "mid"), "a = <｜fim▁hole｜>", plain.id_of("<｜fim▁hole｜>")
    with serving(engine, plain) as url, client(url) as c:
        found = c.completions.create(model="tiny", prompt=text, suffix="\nb = 2", max_tokens=9)
        assert found.choices[0].text == "mid"
        fim = Fim.of(plain, 1.0)
        before, after = (plain.encode(t, add_bos=False, special_tokens=False) for t in (text, "\nb = 2"))
        asked = engine.asked[0].prompt
        assert asked == [plain.bos_id, fim.begin, *before, fim.hole, *after, fim.end]
        assert asked.count(hole) == 1
        c.completions.create(model="tiny", prompt=text, suffix="", max_tokens=9)
        assert engine.asked[1].prompt == plain.encode(text)
    bare = Tokenizer(tokenizers.Tokenizer.from_str(plain.backend.to_str().replace("fim▁hole", "fim▁none")))
    with serving(saying(plain, "x"), bare) as url, client(url) as c:
        with pytest.raises(openai.BadRequestError, match="this tokenizer has not the tokens") as found:
            c.completions.create(model="tiny", prompt="a", suffix="b")
        assert found.value.param == "suffix"


def test_what_cannot_be_answered_has_its_status_and_is_never_our_failure(plain):
    engine = saying(plain, "x")
    with serving(engine, plain, body=5000) as url, httpx2.Client(base_url=url) as web:
        chat = "/v1/chat/completions"

        def error(response, status):
            assert response.status_code == status, response.text
            found = response.json()["error"]
            assert set(found) == {"message", "type", "param", "code"}
            assert found["message"]
            return found

        assert error(web.post(chat, content=b"{", headers={"content-type": "application/json"}), 400)["param"] == "body"
        deep = b"[" * 4000
        assert error(web.post(chat, content=deep, headers={"content-type": "application/json"}), 400)["param"] == "body"
        nested = {"type": "array"}
        for _ in range(101):
            nested = {"items": nested}
        assert error(web.post(chat, json={"messages": HI, "tools": nested}), 400)["param"] == "body"
        error(web.post(chat, content=b"{}", headers={"content-type": "text/plain"}), 415)
        assert error(web.post(chat, json={"messages": HI, "x": "y" * 5000}), 413)["code"] == "body_too_large"
        parts = iter([b"{", b" " * 6000])
        error(web.post(chat, content=parts, headers={"content-type": "application/json"}), 413)
        assert error(web.post(chat, json={"messages": HI, "model": "other"}), 404)["code"] == "model_not_found"
        too_long = error(web.post(chat, json={"messages": HI, "max_tokens": CONTEXT}), 400)
        assert (too_long["param"], too_long["code"]) == ("messages", "context_length_exceeded")
        error(web.post("/v1/completions", json={"prompt": [5] * CONTEXT}), 400)
        assert error(web.post("/v1/completions", json={"prompt": "x", "n": 9}), 400)["message"].startswith("n=9")
        assert error(web.post(chat, json={"messages": [{"role": "robot", "content": "x"}]}), 400)["param"] == "messages"
        for field, value in (("tools", TOOLS), ("thinking", {"type": "enabled"}), ("reasoning_effort", "high")):
            assert error(web.post(chat, json={"messages": HI, field: value}), 400)["param"] == field
        error(web.get("/nowhere"), 404)
        error(web.get(chat), 405)
        error(web.get("/v1/models/other"), 404)
        error(web.get("/v1/models", headers={"host": "evil.example"}), 403)
        assert engine.asked == []


def test_a_full_queue_and_an_engine_that_is_not_there_are_said_so(plain):
    engine = saying(plain, "x")
    with serving(engine, plain) as url, client(url) as c, httpx2.Client(base_url=url) as web:
        engine.full = True
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="2 requests are waiting") as found:
                c.chat.completions.create(model="tiny", messages=HI, stream=stream)
            assert found.value.response.headers["retry-after"] == "1"
        assert web.get("/health").json() == {"status": "ready"}
        engine.seconds = 1e3
        assert (web.get("/health").status_code, web.get("/health").json()["status"]) == (503, "hanging")
        engine.seconds = 0.0
        for state in ("starting", "draining", "dead"):
            engine.state, engine.error = state, RuntimeError("why") if state == "dead" else None
            with pytest.raises(openai.InternalServerError) as refused:
                c.chat.completions.create(model="tiny", messages=HI)
            assert refused.value.status_code == 503
            health = web.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, state)
        assert "RuntimeError: why" in health.json()["error"]


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(plain):
    class Dies(Told):
        async def stream(self, request):
            yield Delta(1, 0, (100,), (-1.0,))
            await asyncio.sleep(0)
            raise NotServing("the engine has failed.")

    with serving(Dies(None), plain) as url, client(url) as c:
        stream = c.chat.completions.create(model="tiny", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="engine has failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="engine has failed"):
            c.chat.completions.create(model="tiny", messages=HI)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(plain, stream):
    engine = saying(plain, "one two three four five six")
    engine.goes_on.clear()
    with serving(engine, plain) as url, client(url, timeout=30 if stream else 2) as c:
        if stream:
            made = c.chat.completions.create(model="tiny", messages=HI, stream=True)
            next(made)
            made.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                c.chat.completions.create(model="tiny", messages=HI)
        end = time.monotonic() + 5
        while not engine.cancelled and time.monotonic() < end:
            time.sleep(0.01)
        assert engine.cancelled == 1
        ended = httpx2.get(f"{url}/metrics").text
        assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 1.0' in ended


def test_a_key_guards_everything_but_health(plain):
    engine = saying(plain, "x")
    with (
        serving(engine, plain, key="sësame", origins=("https://page.example",)) as url,
        httpx2.Client(base_url=url) as web,
    ):
        assert web.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/version"):
            refused = web.get(path)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert web.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
        known = {"authorization": "Bearer sësame".encode()}
        assert web.get("/v1/models", headers=known).status_code == 200
        asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
        assert web.options("/v1/models", headers=asks).headers["access-control-allow-origin"] == "https://page.example"
    with serving(saying(plain, "x"), plain) as url, httpx2.Client(base_url=url) as web:
        assert "access-control-allow-origin" not in web.get("/v1/models", headers=asks).headers


def test_a_page_asks_nobody_but_this_server(plain):
    with serving(saying(plain, "x"), plain, key="k") as url, httpx2.Client(base_url=url) as web:
        page = web.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        # One file: nothing is loaded from anywhere, and text is never read as markup.
        for word in ("://", "src=", "href=", "@import", "innerHTML", "insertAdjacentHTML", "eval("):
            assert word not in page.text


def test_tokens_and_metrics_are_told(plain):
    with serving(saying(plain, TEXT), plain) as url, client(url) as c, httpx2.Client(base_url=url) as web:
        assert [m.id for m in c.models.list()] == ["tiny"]
        assert c.models.retrieve("tiny").max_model_len == CONTEXT
        for body, ids in (
            ({"prompt": TEXT}, plain.encode(TEXT)),
            ({"prompt": TEXT, "add_special_tokens": False}, plain.encode(TEXT, add_bos=False)),
            ({"messages": HI}, plain.chat(HI)),
        ):
            assert web.post("/tokenize", json=body).json() == {
                "count": len(ids),
                "max_model_len": CONTEXT,
                "tokens": ids,
            }
        ids = plain.encode(TEXT, add_bos=False)
        assert web.post("/detokenize", json={"tokens": ids}).json() == {"prompt": TEXT}
        assert web.post("/detokenize", json={"tokens": [2048]}).json()["error"]["param"] == "tokens[0]"
        assert web.post("/tokenize", json={"prompt": 5}).json()["error"]["param"] == "prompt"
        assert set(web.get("/version").json()) == {"version"}
        c.chat.completions.create(model="tiny", messages=HI)
        text = web.get("/metrics").text
        for line in (
            'vllm:num_requests_running{model_name="tiny"} 1.0',
            'vllm:kv_cache_usage_perc{model_name="tiny"} 0.1',
            'vllm:generation_tokens_total{model_name="tiny"} 7.0',
            'vllm:spec_decode_num_accepted_tokens_total{model_name="tiny"} 3.0',
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="0"} 2.0',
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="1"} 1.0',
            'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 1.0',
            'vllm:time_to_first_token_seconds_count{model_name="tiny"} 1.0',
            'vllm:e2e_request_latency_seconds_count{model_name="tiny"} 1.0',
        ):
            assert line in text


def test_a_port_that_is_taken_is_said_so():
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1, port {port}: Address already in use\."):
            listening("127.0.0.1", port)
    with pytest.raises(OSError, match=r"cannot listen on no\.such\.host\.invalid"):
        listening("no.such.host.invalid", 0)


def test_an_end_waits_for_answers_under_way(plain):
    engine = saying(plain, "one two three four five six")
    engine.goes_on.clear()
    found = []

    def ask(url):
        with client(url) as c:
            found.append(c.chat.completions.create(model="tiny", messages=HI).choices[0].message.content)

    with serving(engine, plain) as url:
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        while not engine.asked:
            time.sleep(0.01)
        letting = threading.Timer(0.5, engine.goes_on.set)
        letting.start()
    thread.join(10)
    letting.join()
    assert found == ["one two three four five six"]
    assert (engine.state, engine.drained, engine.cancelled) == ("dead", True, 0)
