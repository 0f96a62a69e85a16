"""The chat command: turns by the checkpoint's template, from a pipe and from a terminal."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.cli import chat
from deepseek_jax.cli.main import main
from deepseek_jax.convert.save import save_pretrained
from deepseek_jax.generation.conversation import Conversation
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.text.stream import Stream
from deepseek_jax.version import __version__

ROOT = Path(__file__).parent.parent.parent
TEXT = "def héllo(x):\n    return '日本語 🎉' + x\n"
NEW, CONTEXT = 12, 200
THINKING = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    "<assistant>{{ '<think>\\n' if thinking else '</think>' }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny model in the published layout with a byte-level tokenizer and the template of ours."""
    folder = tmp_path_factory.mktemp("chat") / "ckpt"
    save_pretrained(random_model(tiny_config(n_layers=2, vocab_size=280)), folder)
    save_tokenizer(train_tokenizer([TEXT], 280), folder, version=__version__)
    return folder


@pytest.fixture(scope="module")
def thinker(folder, tmp_path_factory):
    """The same with a template that has a switch for thoughts."""
    thinker = tmp_path_factory.mktemp("chat") / "thinker"
    shutil.copytree(folder, thinker)
    (thinker / "chat_template.jinja").write_text(THINKING)
    return thinker


@pytest.fixture
def talk(capsys, monkeypatch):
    """Runs the command on lines of a pipe, or typed ones; gives its code, output, errors and the prompts' ids."""

    def run(ckpt, lines, *arguments, typed=False):
        prompts, run.fed, stream = [], [], Conversation.stream
        limits = ("--context", CONTEXT, "--max-new-tokens", NEW)
        with monkeypatch.context() as patch:

            def heard(*given, **settings):
                prompts.append(given[1])
                going = stream(*given, **settings)
                run.fed.append(going._fed)
                return going

            patch.setattr(Conversation, "stream", heard)
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
            if typed:
                waiting = iter(lines)
                patch.setattr("sys.stdin.isatty", lambda: True)
                patch.setattr(chat, "_line", lambda typed, prompt: next(waiting, None))
            code = main([str(a) for a in ("chat", ckpt, "--dtype", "float32", *limits, *arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, prompts

    return run


@pytest.fixture(scope="module")
def answer(folder):
    """The answer of `dsj.generate` to a chat, as text."""
    model, tokenizer = dsj.load_pretrained(folder, dtype=np.float32), dsj.load_tokenizer(folder)

    def answer(*contents, system=(), **sampling):
        roles = [*("system" for _ in system), *("user", "assistant") * len(contents)]
        chat = [{"role": r, "content": c} for r, c in zip(roles, [*system, *contents], strict=False)]
        (tokens,), _ = dsj.generate(model, [tokenizer.chat(chat)], NEW, cache_length=CONTEXT, **sampling)
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return answer


def test_each_line_of_a_pipe_is_a_turn_of_one_conversation(folder, talk, answer):
    lines = ["héllo", "", "/reset", '"""two', 'lines"""', "return <｜User｜>", "/quit", "never read"]
    code, out, err, prompts = talk(folder, lines, "--system", "日本")
    first, second = (answer(text, system=["日本"]) for text in ("héllo", "two\nlines"))
    # The name of a control token that somebody types is text.
    third = answer("two\nlines", second, "return <｜User｜>", system=["日本"])
    assert (code, out) == (0, f"{first}\n{second}\n{third}\n")
    assert err.count(f"the answer is cut at --max-new-tokens {NEW}.") == 3
    # What a turn shares with the one before is not fed again: the system message, then the whole turn.
    assert 0 == talk.fed[0] < talk.fed[1] < len(prompts[1]) - 5
    assert talk.fed[2] >= len(prompts[1]) - 1


def test_the_release_says_how_to_sample_and_options_say_otherwise(folder, talk, answer, tmp_path):
    ckpt = tmp_path / "ckpt"
    shutil.copytree(folder, ckpt)
    said = {"temperature": 1.5, "top_k": 20, "top_p": None, "max_length": 9}
    for sampled in (True, False):
        (ckpt / "generation_config.json").write_text(json.dumps(said | {"do_sample": sampled}))
        expected = answer("x", **({"temperature": 1.5, "top_k": 20} if sampled else {}))
        assert talk(ckpt, ["x"])[:2] == (0, f"{expected}\n")
    assert talk(ckpt, ["x"], "--temperature", 2, "--seed", 3)[1] == answer("x", temperature=2, seed=3) + "\n"


def test_thoughts_are_switched_where_the_template_can(folder, thinker, talk):
    tokenizer = dsj.load_tokenizer(thinker)
    code, out, _, prompts = talk(thinker, ["a", "/think on", "b", "/think off", "c"], typed=True)
    ends = [tokenizer.decode(ids).rpartition("<assistant>")[2] for ids in prompts]
    assert (code, ends) == (0, ["</think>", "<think>\n", "</think>"])
    assert out.count("<think>") == 1
    assert tokenizer.decode(talk(thinker, ["a"], "--thinking", "on")[3][0]).endswith("<think>\n")
    # R1's preset opens them where the template has not.
    for ckpt, more in (folder, ()), (thinker, ("--thinking", "on")):
        code, out, _, prompts = talk(ckpt, ["a"], "--preset", "r1", *more)
        assert (code, out.count("<think>")) == (0, 1)
        asked = dsj.load_tokenizer(ckpt).decode(prompts[0])
        assert asked.endswith("<think>\n")
        assert asked.count("<think>") == 1
    assert "R1 wants no system prompt" in talk(folder, ["a"], "--preset", "r1", "--system", "b")[2]
    assert "no such switch" in talk(folder, ["a"], "--thinking", "off")[2]
    assert "no switch for thoughts" in talk(folder, ["/think on"])[2]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(folder, talk, answer, monkeypatch):
    push = Stream.push

    def interrupted(self, ids):
        signal.raise_signal(signal.SIGINT)
        return push(self, ids)

    monkeypatch.setattr(Stream, "push", interrupted)
    code, out, _, prompts = talk(folder, ["def", "x"], typed=True)
    assert code == 0
    said = out.partition("\n")[0]
    assert answer("def").startswith(said)
    roles = ("user", "assistant", "user")
    chat = [{"role": r, "content": c} for r, c in zip(roles, ("def", said, "x"), strict=True)]
    assert prompts[1] == dsj.load_tokenizer(folder).chat(chat)
    assert talk(folder, ["def", "x"])[0] == 130


def test_a_full_context_is_one_sentence(folder, talk):
    length = len(dsj.load_tokenizer(folder).chat([{"role": "user", "content": "x"}])) + 5
    code, _, err, prompts = talk(folder, ["x"] * 9, "--context", length)
    assert (code, len(prompts)) == (1, 1)
    full = f"the context of {length} tokens is full. /reset begins anew, --context holds up to 256."
    assert f"the answer is cut: {full}\n" in err
    last = err.splitlines()[-1]
    assert last.startswith("deepseek-jax chat: the conversation and this message have")
    assert last.endswith(full)
    code, _, err, prompts = talk(folder, ["x" * 60, "/nothing", "a", "/help"], "--context", 40, typed=True)
    assert (code, len(prompts)) == (0, 1)
    assert "the context of 40 tokens is full" in err
    assert "there is no command '/nothing'" in err
    assert "/reset" in err


@pytest.mark.parametrize(
    ("removed", "arguments", "message"),
    [
        ("tokenizer.json", (), "has no tokenizer.json, so it holds no conversations"),
        ("chat_template", (), "has no chat template, so it holds no conversations"),
        ("", ("--context", 257), "--context 257: ckpt takes 2 to 256 tokens"),
        ("", ("--max-new-tokens", 0), "--max-new-tokens 0"),
    ],
)
def test_what_holds_no_conversation_is_one_line(folder, talk, tmp_path, removed, arguments, message):
    ckpt = tmp_path / "ckpt"
    shutil.copytree(folder, ckpt, ignore=shutil.ignore_patterns(removed or "nothing"))
    if removed == "chat_template":
        config = json.loads((ckpt / "tokenizer_config.json").read_text())
        (ckpt / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != removed}))
    code, out, err, _ = talk(ckpt, ["x"], *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


@pytest.mark.slow
def test_a_terminal_is_given_back_as_it_was():
    """A typed turn, stopped by Ctrl-C; then Ctrl-C at the prompt ends."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "deepseek_jax.cli.main", "chat", "checkpoints/tiny-v3"]
    # A shell starts its background processes with SIGINT ignored, which they would pass on.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "30"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    signal.signal(signal.SIGINT, ignored)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert select.select([ours], [], [], end - time.monotonic())[0], seen
            seen += os.read(ours, 1000).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        until(">>> ")
        os.write(ours, b"def f(x):\n")
        until("def f(x):")
        until("\n")
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        until(">>> ")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
