"""Ctrl-C and SIGTERM at any moment: one line, the shell's exit code, nothing half made, and never a crash."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CKPT = str(ROOT / "checkpoints" / "tiny-v3")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {signal.SIGINT: "interrupted.", signal.SIGTERM: "terminated."}


def started(*command, **environment) -> subprocess.Popen:
    # A shell starts its background processes with SIGINT ignored, which they would pass on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, *command], **pipes, text=True, env=os.environ | environment, cwd=ROOT)
    finally:
        signal.signal(signal.SIGINT, before)


def until_ready(process) -> None:
    """Until the process takes signals itself; before that, they are Python's own."""
    status, wanted = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        if int(caught.split()[1], 16) & wanted:
            return
        time.sleep(0.001)


def scripted(body: str) -> subprocess.Popen:
    """A process that runs ``body`` as a command does its work, and says "ready" where it is to be interrupted."""
    head = """
        import ctypes, signal, sys, time
        from pathlib import Path
        from deepseek_jax.cli.interrupts import EXIT_CODES, Interrupts, remarks
        from deepseek_jax.runs.signals import StopSignals, undoing
        def ready(): print("ready", flush=True)
        def native():
            # As in a compilation, the main thread does not come back to Python, where its handlers would run.
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            ready()
            ctypes.CDLL(None).usleep(30_000_000)
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    process = started("-c", code)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", CODES)
def test_native_code_is_not_waited_for_and_what_is_half_made_is_undone(number, tmp_path):
    (tmp_path / "half").mkdir()
    process = scripted(f"""
        with Interrupts("deepseek-jax x"):
            remarks(ended=lambda: "More.")
            with undoing(Path({str(tmp_path / "half")!r}).rmdir):
                native()
    """)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (CODES[number], "", f"deepseek-jax x: {WORDS[number]} More.\n")
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_is_left_to_end():
    process = scripted("""
        with Interrupts("deepseek-jax x"):
            pass
        ready()
        time.sleep(0.5)
    """)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0


def test_what_is_held_goes_on_until_a_second_one():
    body = """
        with Interrupts("deepseek-jax x"), StopSignals() as stop:
            remarks(held="once more to stop at once.")
            stop.hold()
            ready()
            end = time.monotonic() + 30
            while not stop.asked and time.monotonic() < end: time.sleep(0.001)
            print(stop.asked, flush=True)
            SECOND
        sys.exit(EXIT_CODES[stop.asked])
    """
    process = scripted(body.replace("SECOND", ""))
    process.send_signal(signal.SIGTERM)
    held = "deepseek-jax x: once more to stop at once.\n"
    assert process.communicate(timeout=20) == ("SIGTERM\n", held)
    assert process.returncode == 143
    process = scripted(body.replace("SECOND", "native()"))
    process.send_signal(signal.SIGINT)
    assert [process.stdout.readline() for _ in range(2)] == ["SIGINT\n", "ready\n"]
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", held + "deepseek-jax x: interrupted.\n")
    assert process.returncode == 130


def test_a_process_that_is_not_the_commands_own_keeps_its_handlers():
    from deepseek_jax.cli.main import main

    before = [signal.getsignal(number) for number in CODES]
    assert main(["--version"]) == 0
    assert [signal.getsignal(number) for number in CODES] == before


@pytest.mark.slow
def test_signals_at_random_moments(tmp_path):
    """From the first moment that signals are ours, through imports, loading, compilation with and without programs on
    disk, to text and steps."""
    text, texts = tmp_path / "text.txt", tmp_path / "texts"
    text.write_text("def f(x):\n    return x\n" * 400)
    texts.mkdir()
    for i in range(12):
        (texts / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 60)
    small = ["--length", "32", "--batch-rows", "4", "--vocab-size", "276", "--tokens", "100000", "--log-every", "1"]
    rng, began, tries, whole, cold = random.Random(0), time.monotonic(), 0, 0, str(tmp_path / "cold")
    commands = {
        "score": [CKPT, str(text), "--dtype", "float32", "--no-compilation-cache"],
        "generate": [CKPT, "--prompt", "def", "--max-new-tokens", "1500"],
        "train": ["--data", str(texts), "--held-out-share", "0.2", *small, "--no-compilation-cache"],
        "demo": [],
    }
    while time.monotonic() - began < 45:
        name = list(commands)[tries % len(commands)]
        arguments = [str(tmp_path / f"run{tries}"), *commands[name]] if name == "train" else commands[name]
        process = started("-m", "deepseek_jax.cli.main", name, *arguments, JAX_COMPILATION_CACHE_DIR=cold)
        until_ready(process)
        moment, number = rng.choice((0.0, 0.3, 2, 6, 9)) * rng.random(), rng.choice(list(CODES))
        time.sleep(moment)
        process.send_signal(number)
        if again := rng.random() < 0.3:
            time.sleep(rng.random() * 0.2)
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        tries += 1
        # One that was done already is left to end.
        whole += process.returncode == 0
        told = f"{name} after {moment:.2f} s by {number.name}{', again' if again else ''}: {process.returncode}\n{err}"
        assert process.returncode in ({0, *CODES.values()} if again else {0, CODES[number]}), told
        assert len(err.splitlines()) <= 1 + again, told
        assert err or process.returncode == 0, told
        assert not list(tmp_path.glob("*.part")), told
    assert tries - whole >= 3
