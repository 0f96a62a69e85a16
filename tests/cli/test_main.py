"""The command line answers at once, and every error is one line and an exit code."""

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from itertools import pairwise

import jax
import pytest

from deepseek_jax.cli import main as cli
from deepseek_jax.notes import CheckpointWarning, note
from deepseek_jax.version import __version__


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "deepseek_jax.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def replace_run(monkeypatch, run) -> None:
    """Gives ``summary`` another body, so that what `main` does with its outcome can be seen."""

    @dataclass(frozen=True)
    class Command:
        """A stand-in."""

        def run(self):
            return run()

    monkeypatch.setattr("deepseek_jax.cli.summary.Summary", Command)


def test_help_lists_every_command():
    result = run_process("--help")
    assert result.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in result.stdout


def test_help_loads_no_heavy_module():
    code = (
        "import sys; from deepseek_jax.cli.main import main; main(['--help'])\n"
        "heavy = {'jax', 'flax', 'numpy', 'orbax', 'grain', 'torch', 'rich', 'tyro'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_help_fits_a_narrow_terminal():
    result = run_process("--help", COLUMNS="50")
    assert max(map(len, result.stdout.splitlines())) <= 50


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_no_command_shows_the_help(arguments, capsys):
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: deepseek-jax COMMAND")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_its_name_in_full_lines(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([name, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"usage: deepseek-jax {name}" in captured.out
    assert captured.err == ""
    boxed = [line.strip("│ ") if line[2:26].isspace() else "" for line in captured.out.splitlines()]
    for line, following in pairwise(boxed):
        # A line ends where the next word would not have fitted, not where the source breaks its line.
        assert not line or not following or len(f"{line} {following.split()[0]}") > 52, (line, following)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"deepseek-jax {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sumary"], "deepseek-jax: there is no command 'sumary'; the commands are demo, summary,"),
        (["summary"], "MODEL"),
        (["summary", "tiny-v3", "--context", "long"], "--context"),
        (["summary", "tiny-v3", "--contxt", "3"], "--contxt"),
        (["summary", "tiny-v3", "extra"], "extra"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("the value 3\nis wrong."), "the value 3 is wrong."),
        (cli.CommandError("no such thing."), "no such thing."),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("x" * 100_000), "x" * 4000 + " ... (100000 characters)"),
        (MemoryError(), "out of memory."),
        (MemoryError("Unable to allocate 9 EiB"), "out of memory. Unable to allocate 9 EiB"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nA table."),
            "out of memory. RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_is_one_line_and_exit_code_1(error, line, monkeypatch, capsys):
    def run():
        raise error

    replace_run(monkeypatch, run)
    assert cli.main(["summary"]) == 1
    assert capsys.readouterr().err == f"deepseek-jax summary: {line}\n"


def test_a_note_is_one_line_said_once(monkeypatch, capsys):
    def run():
        for text in ("x is\ntaken for y.", "x is\ntaken for y.", "z is left out."):
            note(text)
        with pytest.warns(DeprecationWarning, match="another's"):
            warnings.warn("another's", DeprecationWarning, stacklevel=1)

    replace_run(monkeypatch, run)
    assert cli.main(["summary"]) == 0
    assert capsys.readouterr().err == "note: x is taken for y.\nnote: z is left out.\n"
    with pytest.warns(CheckpointWarning, match="outside"):
        note("outside of a command.")


def test_a_missing_argument_is_exit_code_2(monkeypatch, capsys):
    def run():
        raise cli.UsageError("X is missing.")

    replace_run(monkeypatch, run)
    assert cli.main(["summary"]) == 2
    assert capsys.readouterr().err == "deepseek-jax summary: X is missing.\n"


def test_an_interrupt_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def run():
        raise KeyboardInterrupt

    replace_run(monkeypatch, run)
    assert cli.main(["summary"]) == 130
    assert capsys.readouterr().err == "deepseek-jax summary: interrupted.\n"


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    def run():
        raise ValueError("seen")

    replace_run(monkeypatch, run)
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ValueError, match="seen"):
        cli.main(["summary"])


@pytest.mark.parametrize("kind", [RuntimeError, jax.errors.JaxRuntimeError])
def test_an_error_of_ours_keeps_its_traceback(kind, monkeypatch):
    def run():
        raise kind("INTERNAL: a bug")

    replace_run(monkeypatch, run)
    with pytest.raises(kind, match="a bug"):
        cli.main(["summary"])


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_sets_the_exit_code(returned, code, monkeypatch):
    replace_run(monkeypatch, lambda: returned)
    assert cli.main(["summary"]) == code


def test_a_reader_that_leaves_ends_the_command_quietly():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "deepseek_jax.cli.main", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")
