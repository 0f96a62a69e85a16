"""The generate and score commands: text out, ids without a tokenizer, one line for bad input."""

import io
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.cli.generate import Printer
from deepseek_jax.cli.main import main
from deepseek_jax.convert.save import save_pretrained
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.text.presets import PRESETS
from deepseek_jax.version import __version__

TEXT = "def héllo(x):\n    return '日本語 🎉' + x\n"
PROMPTS = ["def h", "return '日本"]
NEW = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny model in the published layout with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("generate") / "ckpt"
    tokenizer = train_tokenizer([TEXT], 280)
    save_pretrained(random_model(tiny_config(n_layers=2, vocab_size=280)), folder)
    save_tokenizer(tokenizer, folder, version=__version__)
    return folder


@pytest.fixture(scope="module")
def bare(folder, tmp_path_factory):
    """The same without its tokenizer."""
    bare = tmp_path_factory.mktemp("generate") / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    return bare


@pytest.fixture(scope="module")
def expected(folder):
    """What `dsj.generate` makes of the prompts in float32."""
    model, tokenizer = dsj.load_pretrained(folder, dtype=np.float32), dsj.load_tokenizer(folder)
    tokens, info = dsj.generate(model, [tokenizer.encode(p) for p in PROMPTS], NEW)
    return tokenizer, tokens, info


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generate(capsys, ckpt, *arguments):
    return run(capsys, "generate", ckpt, "--dtype", "float32", "--max-new-tokens", NEW, *arguments)


def test_prompts_are_continued_in_order_and_recorded(capsys, folder, expected, tmp_path):
    tokenizer, tokens, info = expected
    path = tmp_path / "out.json"
    code, out, err = generate(capsys, folder, "--prompt", *PROMPTS, "--json", path)
    assert code == 0
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    assert out == "".join(f"[{i + 1}] {p!r}\n{t}\n" for i, (p, t) in enumerate(zip(PROMPTS, texts, strict=True)))
    assert f"{sum(map(len, tokens))} tokens in" in err
    record = json.loads(path.read_text())
    assert record["deepseek_jax"] == __version__
    assert [row["ids"] for row in record["rows"]] == tokens
    assert [row["text"] for row in record["rows"]] == texts
    assert [row["finish_reason"] for row in record["rows"]] == info.finish_reason
    for row, logprobs in zip(record["rows"], info.logprobs, strict=True):
        np.testing.assert_allclose(row["logprobs"], logprobs, atol=2e-5)
        assert row["behaviour_logprobs"] == [0.0] * len(logprobs)
    assert [row["seed"] for row in record["rows"]] == info.seed
    assert record["rows"][0]["prompt_ids"][0] == tokenizer.bos_id


def test_prompts_from_files_and_the_standard_input(capsys, folder, expected, tmp_path, monkeypatch):
    _, tokens, _ = expected
    (tmp_path / "1.txt").write_text(PROMPTS[1] + "\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPTS[0]}\n".encode())))
    code, out, err = generate(capsys, folder, "--prompt", "-", "--prompt-file", tmp_path / "1.txt", "--json", "-")
    assert code == 0
    assert [row["ids"] for row in json.loads(out)["rows"]] == tokens
    assert f"[1] {PROMPTS[0]!r}\n" in err
    code, _, err = generate(capsys, folder, "--prompt", "-", "-")
    assert (code, "can be read once" in err) == (1, True)
    code, _, err = generate(capsys, folder, "--prompt-file", tmp_path / "nowhere.txt")
    assert (code, "nowhere.txt: No such file" in err) == (1, True)


def test_an_interruption_keeps_what_was_made(capsys, folder, expected, tmp_path, monkeypatch):
    push = Printer.push

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        push(self, *arguments)

    monkeypatch.setattr(Printer, "push", interrupted)
    path = tmp_path / "out.json"
    code, out, err = generate(capsys, folder, "--prompt", *PROMPTS, "--json", path)
    assert code == 130
    assert "interrupted" in err
    tokenizer, tokens, _ = expected
    rows = json.loads(path.read_text())["rows"]
    assert 0 < len(rows[0]["ids"]) < NEW
    for row, whole, prompt in zip(rows, tokens, PROMPTS, strict=True):
        assert row["ids"] == whole[: len(row["ids"])]
        assert f"{prompt!r}\n{tokenizer.decode(row['ids'], skip_special_tokens=True)}\n" in out


def test_without_a_tokenizer_ids_go_in_and_come_out(capsys, folder, bare, expected):
    tokenizer, tokens, _ = expected
    ids = tokenizer.encode(PROMPTS[0])
    code, out, err = generate(capsys, bare, "--prompt-ids", *ids)
    assert code == 0
    assert "no tokenizer.json" in err
    assert [int(word) for word in out.split()] == tokens[0]
    with_text, text, _ = generate(capsys, folder, "--prompt-ids", *ids)
    assert with_text == 0
    assert text == tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"


def test_chat_renders_the_checkpoints_template(capsys, folder, expected, tmp_path):
    path = tmp_path / "out.json"
    code, _, _ = generate(capsys, folder, "--chat", "--prompt", "x", "--json", path)
    assert code == 0
    prompt = json.loads(path.read_text())["rows"][0]["prompt_ids"]
    assert prompt == expected[0].chat([{"role": "user", "content": "x"}])


def test_the_preset_of_r1_opens_a_thought_and_says_how_to_sample(capsys, folder, expected, tmp_path):
    path, tokenizer = tmp_path / "out.json", expected[0]
    for more, sampling in ((), (0.6, 0.95)), (("--temperature", 0.5, "--top-p", 1), (0.5, 1.0)):
        assert generate(capsys, folder, "--preset", "r1", "--prompt", "x", "--json", path, *more)[0] == 0
        found = json.loads(path.read_text())
        assert (found["temperature"], found["top_p"]) == sampling
        asked = tokenizer.render([{"role": "user", "content": "x"}]) + "<think>\n"
        assert tokenizer.decode(found["rows"][0]["prompt_ids"]) == asked
    zero = PRESETS["r1-zero"].ids(tokenizer, [{"role": "user", "content": "2 + 2?"}])
    assert tokenizer.decode(zero).endswith("</answer>. User: 2 + 2?. Assistant:")
    with pytest.raises(ValueError, match="no system prompt"):
        PRESETS["r1"].ids(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])


def test_drafts_are_counted(capsys, folder):
    code, _, err = generate(capsys, folder, "--prompt", "x", "--use-mtp", "--temperature", 3)
    assert code == 0
    assert "drafts accepted" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --prompt TEXT or --prompt-ids"),
        (("--prompt", "a", "--prompt-ids", 1), "give either --prompt TEXT or --prompt-ids"),
        (("--prompt-ids", 1, "--chat"), "--chat renders text"),
        (("--prompt", "a", "--chat", "--preset", "r1"), "--preset r1 says how prompts are put: leave out --chat"),
        (("--prompt-ids", 280), "outside the vocabulary of 280"),
        (("--prompt", "a", "--max-new-tokens", 999), "beyond the 256"),
        (("--prompt", "a", "--top-p", 2), "top_p=2"),
        (("--prompt", "a", "--json", "/no/such/folder/x.json"), "there is no folder"),
    ],
)
def test_bad_input_is_one_line(capsys, folder, arguments, message):
    code, out, err = run(capsys, "generate", folder, *arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_text_without_a_tokenizer_names_the_way_out(capsys, bare, tmp_path):
    (tmp_path / "x.txt").write_text("text")
    for command, option in ((("generate", bare, "--prompt", "a"), "--prompt-ids"),
                            (("score", bare, tmp_path / "x.txt"), "--ids")):  # fmt: skip
        code, _, err = run(capsys, *command)
        assert code == 1
        assert "no tokenizer.json" in err
        assert option in err
    code, _, err = run(capsys, "generate", tmp_path / "missing", "--prompt", "a")
    assert code == 1
    assert "missing is not a folder; give a folder with config.json" in err


def test_score_prints_and_records_log_probabilities(capsys, folder, bare, tmp_path):
    file, ids_file, path = tmp_path / "x.txt", tmp_path / "ids.txt", tmp_path / "x.json"
    file.write_bytes(TEXT.encode())
    arguments = ("--dtype", "float32", "--json", path)
    code, out, _ = run(capsys, "score", folder, file, "--tokens", *arguments)
    assert code == 0
    record = json.loads(path.read_text())
    model, tokenizer = dsj.load_pretrained(folder, dtype=np.float32), dsj.load_tokenizer(folder)
    ids = tokenizer.encode(TEXT)
    logits = np.asarray(jax.jit(lambda model, x: model(x).logits)(model, np.array([ids], np.int32))[0], np.float64)
    expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(record["logprobs"], expected, atol=2e-5)
    assert record["bytes"] == len(TEXT.encode())
    np.testing.assert_allclose(record["bits_per_byte"], -expected.sum() / np.log(2) / record["bytes"], rtol=1e-5)
    assert f"{record['bits_per_byte']:.4f}" in out
    assert f"{expected[0]:.4f}" in out

    ids_file.write_text(" ".join(map(str, ids)))
    code, out, _ = run(capsys, "score", bare, ids_file, "--ids", *arguments)
    assert code == 0
    assert "bits per byte" not in out
    np.testing.assert_allclose(json.loads(path.read_text())["logprobs"], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", (), "too few"),
        (b"\xff\xfe", (), "not UTF-8"),
        (b"1 two", ("--ids",), "holds 'two'"),
        (b"1 280", ("--ids",), "outside the vocabulary"),
    ],
)
def test_bad_files_to_score_are_one_line(capsys, folder, tmp_path, content, arguments, message):
    file = tmp_path / "x.txt"
    file.write_bytes(content)
    code, out, err = run(capsys, "score", folder, file, *arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
