"""Files that the commands read and write: looked at before the work begins, written whole or not at all."""

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from deepseek_jax.runs.signals import undoing
from deepseek_jax.version import __version__

STANDARD = Path("-")  # the standard output, or input
_kept: TextIO | None = None


def read(file: Path) -> str:
    """A UTF-8 file's text, line ends as they are; "-" is the standard input. Raises ValueError for other bytes."""
    name = "the standard input" if file == STANDARD else file
    try:
        return (sys.stdin.buffer.read() if file == STANDARD else file.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}.") from error


def check_destination(path: Path | None, option: str = "--json") -> None:
    """Raises ValueError where a file could not be written; None, an option that was not given, is fine.

    ``option``: the one that names the file, for the message.
    """
    if path is None or path == STANDARD:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}.")
    if path.is_dir():
        raise ValueError(f"{option} {path}: this is a folder.")
    if _in_place(path):
        if not os.access(path, os.W_OK):
            raise ValueError(f"{option} {path}: it cannot be written.")
    else:
        _check_writable(path.parent, f"{option} {path}")


def check_folder(path: Path, option: str) -> None:
    """Raises ValueError where a folder could not be made, or written in."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{option} {path}: {there} is a file.")
    _check_writable(there, f"{option} {path}")


def _check_writable(folder: Path, what: str) -> None:
    # Permissions do not tell: the disk may be read-only, or a server may decide.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{what}: {folder} cannot be written ({error.strerror}).") from None


def _in_place(path: Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/stdout: there is nothing to put in its place."""
    return path.exists() and not path.is_file()


def write_json(path: Path, record: dict) -> None:
    """Writes a record after the package's version, whole or not at all; "-" is the standard output. Raises OSError."""
    text = json.dumps({"deepseek_jax": __version__, **record}, indent=2) + "\n"
    if path == STANDARD:
        print(text, end="", file=_kept or sys.stdout, flush=True)
        return
    if _in_place(path):
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(path.name + ".part")
    with undoing(lambda: part.unlink(missing_ok=True)):
        part.write_text(text, encoding="utf-8")
        part.replace(path)


@contextlib.contextmanager
def json_alone(path: Path | None) -> Iterator[None]:
    """Where ``path`` is "-" the standard output is kept for `write_json` inside, and all else goes to stderr."""
    global _kept
    if path != STANDARD:
        yield
        return
    _kept = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _kept = None


def native_output_off() -> None:
    """From now on the standard output is Python's alone: what native code writes there (Gloo tells each process which
    others it has reached) goes nowhere."""
    global _kept
    sys.stdout.flush()
    before = _kept or sys.stdout
    own = os.fdopen(os.dup(before.fileno()), "w", encoding=before.encoding, errors=before.errors, buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    if _kept is None:
        sys.stdout = own
    else:
        _kept = own


def free_folder(parent: Path, stem: str) -> Path:
    """The first of PARENT/STEM-1, PARENT/STEM-2, ... that does not exist."""
    return next(path for n in itertools.count(1) if not (path := parent / f"{stem}-{n}").exists())
