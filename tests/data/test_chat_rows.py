"""The tokens the assistant says, under templates that strip, add and close turns in different ways."""

import inspect
import json
import textwrap
from functools import cache

import numpy as np
import pytest
from tokenizers import AddedToken

from deepseek_jax.data.chat import UnsuitableTemplate, encode_chat
from deepseek_jax.data.chat_rows import ChatConfig, load_chats
from deepseek_jax.data.damage import DamagedSource
from deepseek_jax.text import bpe
from deepseek_jax.text.tokenizer import load_tokenizer

END = "{{ eos_token }}"
# As V3's: every turn by a tag, the end token behind the assistant's.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ m.content }}"
    + END
    + "{% elif m.role == 'user' %}<U>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)
# As R1's: thoughts are cut out of every turn, the prompt opens one.
STRIPPING = PLAIN.replace("<A>{{ m.content }}", "<A>{{ m.content.split('</think>')[-1] }}").replace(
    "%}<A>{% endif", "%}<A><think>\n{% endif"
)
# As V3.1's: a turn begins with what closes a thought, and so does the prompt.
CLOSED = STRIPPING.replace("<A>{{", "<A></think>{{").replace("<A><think>\n", "<A></think>")
# Thoughts of the last turn only, in a field or in the content, and an empty thought where it has none.
LAST = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% set c = m.content or '' %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n"
    "{% elif '</think>' in c %}{{ c.split('</think>')[0] }}</think>\n{% else %}"
    "<think>\n</think>\n{% endif %}{% endif %}"
    "{{ c.split('</think>')[-1].strip() }}"
    "{% for t in m.tool_calls or [] %}<call>{{ t.name }}</call>{% endfor %}"
    + END
    + "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# No token closes a turn, and the prompt is the same with and without an answer to come.
BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA: "
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)

# Thoughts of all turns since the last question, so of several calls of tools in a row.
SINCE = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and "
    "m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}" + END + "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


@cache
def base_tokenizer():
    return bpe.train_tokenizer([inspect.getsource(textwrap)], 300)


@pytest.fixture
def tokenizer(tmp_path):
    def make(template):
        bpe.save_tokenizer(base_tokenizer(), tmp_path, version="0")
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        return load_tokenizer(tmp_path)

    return make


def said(tokenizer, chat) -> list[str]:
    """The runs of learned tokens as text."""
    edges = np.flatnonzero(np.diff(chat.mask_n, prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(chat.ids_n[a:b]) for a, b in edges]


SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [SYSTEM, user("one?"), says("<think>hm</think>First."), user("two?"), says("<think>so</think> Second.")]
CASES = {
    "plain": (PLAIN, TALK, ["<think>hm</think>First.$", "<think>so</think> Second.$"]),
    "thoughts cut out": (STRIPPING, TALK, ["First.$", " Second.$"]),
    "thoughts closed": (CLOSED, TALK, ["First.$", " Second.$"]),
    "former thoughts cut out": (LAST, TALK, ["First.$", "<think>so</think>\nSecond.$"]),
    "thought in a field": (
        LAST,
        [user("q"), says("old", reasoning_content="x"), user("q"), says("new", reasoning_content="why")],
        ["old$", "<think>\nwhy\n</think>\nnew$"],
    ),
    "an empty thought is added": (LAST, [user("q"), says("yes")], ["<think>\n</think>\nyes$"]),
    "calls of tools": (
        LAST,
        [user("q"), says(None, tool_calls=[{"name": "f"}]), {"role": "tool", "content": "7"}, says("seven")],
        ["<call>f</call>$", "<think>\n</think>\nseven$"],
    ),
    "former thoughts cut out of a chain of calls": (
        SINCE,
        [
            user("q"),
            says("call", reasoning_content="a"),
            {"role": "tool", "content": "1"},
            says("done", reasoning_content="b"),
            user("r"),
            says("call", reasoning_content="c"),
            {"role": "tool", "content": "2"},
            says("end", reasoning_content="d"),
        ],
        ["call$", "done$", "<think>c</think>call$", "<think>d</think>end$"],
    ),
    "no end token": (BARE, [user("q"), says("yes"), user("r"), says("no")], ["yes\n", "no\n"]),
    "the same words on both sides": (PLAIN, [user("yes"), says("yes"), user("yes"), says("yes")], ["yes$", "yes$"]),
    "the assistant begins": (PLAIN, [says("Hello."), user("q"), says("a")], ["Hello.$", "a$"]),
    "twice in a row": (PLAIN, [user("q"), says("a"), says("b")], ["a$", "b$"]),
    "an empty answer": (PLAIN, [user("q"), says("")], ["$"]),
    "content like the prompt": (STRIPPING, [user("q"), says("<thin ice")], ["<thin ice$"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_assistant_says_is_learned(tokenizer, name):
    template, messages, expected = CASES[name]
    tok = tokenizer(template)
    chat = encode_chat(tok, messages)
    runs = [run.replace("$", tok.eos_token) for run in expected]
    if name == "twice in a row":
        assert said(tok, chat) == ["a" + tok.eos_token, "b" + tok.eos_token]
    else:
        assert said(tok, chat) == runs
    assert tok.decode(chat.ids_n) == tok.render(messages, add_generation_prompt=False)
    assert chat.ids_n.shape == chat.mask_n.shape


def test_tokens_are_those_of_the_template_and_the_prompt_is_that_of_generation(tokenizer):
    tok = tokenizer(PLAIN)
    chat = encode_chat(tok, TALK)
    assert chat.ids_n.tolist() == tok.chat(TALK, add_generation_prompt=False)
    last = np.flatnonzero(np.diff(chat.mask_n) == 1)[-1] + 1
    assert chat.ids_n[:last].tolist() == tok.chat(TALK[:-1])


def test_a_token_never_reaches_over_the_edge_of_a_turn(tokenizer):
    tok = tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    word = next(t for t in sorted(tok.backend.get_vocab(with_added_tokens=False)) if t.isascii() and len(t) == 3)
    assert len(tok.chat([user(word)], False)) == 1
    chat = encode_chat(tok, [user(word[:1]), says(word[1:])])
    assert said(tok, chat) == [word[1:]]
    assert tok.decode(chat.ids_n) == word


# Tokens of control that DeepSeek's files do not mark special; the last one takes white space along.
CONTROL = ("<think>", "</think>", "<call>", "<|assistant|>")


def controlled(tokenizer, template):
    tok = tokenizer(template)
    tok.backend.add_tokens([AddedToken(t, special=False, normalized=False, rstrip=t == CONTROL[3]) for t in CONTROL])
    return tok


# The prompt opens a thought, and the history closes one (V3.2), calls a tool (R1's distilled models) or says nothing.
OPENING = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% elif m.tool_calls %}<A><call>"
    "{{ m.tool_calls[0].name }}" + END + "{% else %}<A></think>{{ m.content }}" + END + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
EDGES = {
    "closed where the prompt opens": (OPENING, [user("1+1?"), says("2")], ["</think>2$"]),
    "an empty answer": (OPENING, [user("1+1?"), says("")], ["</think>$"]),
    "a call where the prompt opens": (
        OPENING,
        [user("q"), says(None, tool_calls=[{"name": "f"}]), user("r"), says("a")],
        ["<call>f$", "</think>a$"],
    ),
    "a call without text": (
        OPENING.replace("{% elif m.tool_calls %}", "{% elif m['content'] is none %}")
        .replace("a }}", "a + '' }}")
        .replace("name }}" + END, "name }}</think>"),
        [user("q"), says(None, tool_calls=[{"name": "f"}]), user("r"), says("a")],
        ["<call>f</think>", "</think>a$"],
    ),
    "closed in both": (OPENING.replace("<think>\n", "</think>"), [user("q"), says("a")], ["a$"]),
    "white space that a token takes along": (
        LAST.replace("<|{{ m.role }}|>\n", "<|{{ m.role }}|>{{ '\n' }}").replace("|>\n{% endif %}", "|>{% endif %}"),
        [user("q"), says("old"), user("r"), says("new", reasoning_content="why")],
        ["old$", "<think>\nwhy\n</think>\nnew$"],
    ),
    "what follows begins like what closes": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if loop.last %}<call>{% else %}</think>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        [user("q"), says("a"), user("r"), says("b")],
        ["a", "b<call>"],
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_no_edge_of_a_turn_lies_inside_a_control_token(tokenizer, name):
    template, messages, expected = EDGES[name]
    tok = controlled(tokenizer, template)
    chat = encode_chat(tok, messages)
    assert chat.ids_n.tolist() == tok.chat(messages, add_generation_prompt=False)
    assert said(tok, chat) == [run.replace("$", tok.eos_token) for run in expected]


def test_a_turn_that_leaves_the_prompt_in_ordinary_text_begins_at_a_whole_token(tmp_path):
    """The tags are ordinary text here, which share the character ``<`` and no token."""
    tags = bpe.train_tokenizer([inspect.getsource(textwrap) + "<think>\n</think>" * 500], 300)
    bpe.save_tokenizer(tags, tmp_path, version="0")
    (tmp_path / "chat_template.jinja").write_text(OPENING.replace("<A>", "{{ 'A\\n' }}"))
    tok, messages = load_tokenizer(tmp_path), [user("q"), says("a")]
    opened, closed = (tok.encode(tag, add_bos=False) for tag in ("<think>", "</think>"))
    assert opened[0] != closed[0]
    chat = encode_chat(tok, messages)
    assert said(tok, chat) == ["</think>a" + tok.eos_token]
    assert chat.ids_n.tolist() == tok.chat(messages, add_generation_prompt=False)


def test_thoughts_left_out_are_counted(tokenizer):
    assert encode_chat(tokenizer(PLAIN), TALK).stripped == 0
    assert encode_chat(tokenizer(STRIPPING), TALK).stripped == 2
    assert encode_chat(tokenizer(LAST), TALK).stripped == 1


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for m in messages %}{{ m.content.upper() }}{% endfor %}", "0 times instead of once"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times instead of once"),
        ("{{ messages[-1].content | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "in another way"),
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last and messages | length > 2 %}"
            "{{ messages | map(attribute='content') | join | length }}{% endif %}{% endfor %}",
            "other parts",
        ),
    ],
)
def test_a_template_whose_turns_cannot_be_found_is_one_clear_error(tokenizer, template, match):
    with pytest.raises(UnsuitableTemplate, match=match):
        encode_chat(tokenizer(template), [user("q"), says("an answer here"), user("r"), says("another")])


def test_records_without_anything_to_learn_are_refused(tokenizer):
    tok = tokenizer(PLAIN)
    with pytest.raises(ValueError, match="nothing to learn"):
        encode_chat(tok, [user("q")])
    with pytest.raises(ValueError, match="message 1 is not an object with a role"):
        encode_chat(tok, [user("q"), "text"])


def write(path, records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def chats(count, size=3):
    return [{"messages": [user(f"number {i}?"), says("word " * (size + i % 4) + str(i))]} for i in range(count)]


def test_rows_hold_whole_chats_apart_from_each_other(tokenizer, tmp_path):
    tok = tokenizer(PLAIN)
    data = load_chats(write(tmp_path / "c.jsonl", chats(40)), tok, 64)
    assert len(data.train) + data.record()["held_out_chats"] == 40
    rows = data.rows(64, seed=1)
    epoch = [rows[i] for i in rows.first_epoch(1000)]
    assert len(epoch) == data.rows_an_epoch(64, seed=1) < 38
    found = set()
    for row in epoch:
        segments = row["segments"]
        real = segments[: np.flatnonzero(segments)[-1] + 1]
        assert set(np.diff(real)) <= {0, 1}
        assert real[0] == 1
        assert not row["tokens"][segments == 0].any()
        assert not row["loss_mask"][segments == 0].any()
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            found.add((tuple(row["tokens"][here]), tuple(row["loss_mask"][here])))
    assert found == {(tuple(c.ids_n), tuple(c.mask_n)) for c in data.train}
    held_out = {tuple(c.ids_n) for c in data.chats} - {ids for ids, _ in found}
    assert len(held_out) == data.record()["held_out_chats"] == 2
    second = [rows[len(epoch) + i] for i in range(5)]
    assert any(not np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(epoch, second, strict=False))


def test_batches_go_on_from_a_state_and_do_not_depend_on_hosts_or_workers(tokenizer, tmp_path):
    tok = tokenizer(PLAIN)
    file = write(tmp_path / "c.jsonl", chats(30))
    data = load_chats(file, tok, 48)
    batches = data.batches(length=48, rows=4, seed=3)
    expected = [next(batches) for _ in range(12)]
    assert {name: a.shape for name, a in expected[0].items()} == dict.fromkeys(
        ("tokens", "segments", "loss_mask"), (4, 48)
    )
    again = data.batches(length=48, rows=4, seed=3)
    for _ in range(5):
        next(again)
    state = json.loads(json.dumps(again.get_state()))
    hosts = [
        load_chats(file, tok, 48, ChatConfig(workers=w)).batches(length=48, rows=4, seed=3, shard=(w, 2))
        for w in (0, 1)
    ]
    for host in hosts:
        host.set_state(state)
    for batch in expected[5:]:
        parts = [next(host) for host in hosts]
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])
    other = load_chats(write(tmp_path / "other.jsonl", chats(29)), tok, 48).batches(length=48, rows=4, seed=3)
    with pytest.raises(ValueError, match="chats was"):
        other.set_state(state)
    for made in (batches, again, *hosts):
        made.close()


def test_long_chats_are_cut_or_dropped_and_counted(tokenizer, tmp_path):
    tok, lines = tokenizer(PLAIN), []
    late = {"messages": [user("x y z " * 30), says("late")]}
    records = [*chats(6), {"messages": [user("q"), says("many words " * 40)]}, late]
    file = write(tmp_path / "c.jsonl", records)
    data = load_chats(file, tok, 40, report=lines.append)
    assert (data.counts["cut"], data.counts["dropped"], len(data.chats)) == (1, 1, 7)
    assert max(len(c.ids_n) for c in data.chats) == 40
    assert any("1 chats longer than 40 tokens were cut" in line for line in lines)
    dropped = load_chats(file, tok, 40, ChatConfig(too_long="drop"))
    assert (dropped.counts["cut"], dropped.counts["dropped"], len(dropped.chats)) == (0, 2, 6)


def test_damaged_records_are_counted_and_named(tokenizer, tmp_path):
    tok, lines = tokenizer(PLAIN), []
    bad = ["{\n", '{"messages": []}\n', '{"text": "x"}\n', '{"messages": [{"role": "user", "content": "q"}]}\n', "[]\n"]
    file = write(tmp_path / "c.jsonl", [*chats(6), *bad, '{"messages": [{"content": "q"}]}\n'])
    with pytest.raises(DamagedSource, match="6 of 12 records are damaged"):
        load_chats(file, tok, 64)
    data = load_chats(file, tok, 64, ChatConfig(damaged_share=0.6), report=lines.append)
    assert (data.damage.records, data.damage.damaged, len(data.chats)) == (12, 6, 6)
    for number, what in (
        (7, "not JSON"),
        (8, "no list of messages"),
        (9, "no list"),
        (10, "nothing to learn"),
        (11, "list"),
    ):
        assert any(f"c.jsonl#{number}: " in line and what in line for line in lines), (number, lines)


def test_held_out_measures_what_the_assistant_says(tokenizer, tmp_path):
    tok = tokenizer(PLAIN)
    data = load_chats(write(tmp_path / "c.jsonl", chats(20)), tok, 64, ChatConfig(held_out_share=0.2))
    held_out = data.held_out(64)
    measured = [c for c, out in zip(data.chats, data._is_held_out, strict=True) if out]
    assert len(measured) == 4
    words = "".join("".join(said(tok, c)) for c in measured).replace(tok.eos_token, "")
    nats_WT1 = np.ones((len(held_out.windows_WT), 63))
    tokens = sum(int(c.mask_n.sum()) for c in measured)
    bits = held_out.bits_per_byte(held_out.scores(nats_WT1))
    assert bits == pytest.approx(tokens / np.log(2) / len(words.encode()))


def test_files_that_do_not_serve_are_refused(tokenizer, tmp_path):
    tok = tokenizer(PLAIN)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_chats(tmp_path / "nowhere.jsonl", tok, 64)
    with pytest.raises(ValueError, match="at least two"):
        load_chats(write(tmp_path / "one.jsonl", chats(1)), tok, 64)
    with pytest.raises(ValueError, match=r"All chats of .* are the same"):
        load_chats(write(tmp_path / "same.jsonl", chats(1) * 5), tok, 64)
    upper = tokenizer("{% for m in messages %}{{ m.content.upper() }}{% endfor %}")
    with pytest.raises(UnsuitableTemplate, match=r"c\.jsonl#1: "):
        load_chats(write(tmp_path / "c.jsonl", chats(3)), upper, 64)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="chat template"):
        load_chats(tmp_path / "c.jsonl", load_tokenizer(tmp_path), 64)
    for wrong in ({"too_long": "no"}, {"held_out_share": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ChatConfig(**wrong)
