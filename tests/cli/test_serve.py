"""The serve command: what it refuses before it loads anything, and its life as a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx2
import pytest

from deepseek_jax.cli.main import main
from deepseek_jax.cli.serve import MISSING


@pytest.fixture
def refused(capsys, monkeypatch):
    monkeypatch.delenv("DEEPSEEK_JAX_KEY", raising=False)

    def refused(*arguments):
        code = main(["serve", *map(str, arguments)])
        return code, capsys.readouterr().err

    return refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines: give --key KEY"),
        (["--host", "example.org"], "can be reached from other machines"),
        (["--key", ""], "--key is empty"),
        (["--port", 70000], "--port 70000: must be from 0 to 65535"),
        (["--slots", 0], "--slots 0: must be at least 1"),
        (["--queue", 0], "--queue 0: must be at least 1"),
        (["--context", 1], "takes 2 to 2048 tokens"),
        (["--context", 4096], "takes 2 to 2048 tokens"),
        (["--mesh", "data=1"], "one process on one device"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(refused, root, arguments, message):
    code, err = refused(root / "checkpoints" / "tiny-v3", *arguments)
    assert (code, err.count("\n")) == (1, 1)
    assert message in err


def test_packages_that_are_missing_are_named(refused, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepseek_jax.serving.api", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "deepseek_jax.serving.server", raising=False)
    monkeypatch.delitem(sys.modules, "deepseek_jax.serving.api", raising=False)
    code, err = refused(root / "checkpoints" / "tiny-v3")
    assert (code, MISSING in err) == (1, True)


@pytest.mark.slow
def test_the_command_answers_and_ends(root, tmp_path):
    """With the shipped checkpoint, a key from the environment, a free port; SIGTERM ends it with 0."""
    command = [
        "serve",
        root / "checkpoints" / "tiny-v3",
        "--port",
        0,
        "--dtype",
        "float32",
        "--slots",
        2,
        "--context",
        64,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "deepseek_jax.cli.main", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DEEPSEEK_JAX_KEY": "k"},
        cwd=root,
    )
    try:
        said = process.stderr.readline()
        url = re.search(r"tiny-v3 at (http://127\.0\.0\.1:\d+)/v1: 2 slots of 64 tokens, MTP drafts, key;", said)[1]
        assert httpx2.get(f"{url}/health").status_code in (200, 503)
        assert process.stderr.readline().startswith("ready after ")
        known = {"authorization": "Bearer k"}
        body = {"prompt": "def", "max_tokens": 5, "temperature": 0}
        found = httpx2.post(f"{url}/v1/completions", json=body, headers=known, timeout=60)
        assert len(found.json()["choices"][0]["text"]) > 0
        assert httpx2.post(f"{url}/v1/completions", json=body).status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_loaded_ends_the_command(root, tmp_path):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((root / "checkpoints" / "tiny-v3" / file).read_bytes())
    header = json.dumps({}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    run = subprocess.run(
        [sys.executable, "-m", "deepseek_jax.cli.main", "serve", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=root,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("deepseek-jax serve: ")
