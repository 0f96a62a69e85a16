"""Compiled programs kept on disk between commands. Loads no JAX before it is asked to."""

import glob
import re
import sys
import tempfile
import warnings
from pathlib import Path

from deepseek_jax.kept import cpu, home

# What programs take on disk at most. Above it the least recently used go, down to half.
MOST_BYTES = 2 * 10**9
FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL)


def keep_programs(wanted: bool = True) -> None:
    """Lets JAX keep what it compiles in `folder` and find it there the next time, and generation what it runs
    (`generation.programs`); not ``wanted``: neither.

    JAX's own settings have the word before it: JAX_COMPILATION_CACHE_DIR names another folder, which is left alone
    otherwise, JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing. A folder that cannot be written is said in one line.
    """
    import jax

    from deepseek_jax.generation.programs import keep_ready

    keep_ready(None)
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    try:
        path = folder(jax.__version__)
    except RuntimeError:
        _say("compiled programs are not kept: there is no home folder; name one in XDG_CACHE_HOME.")
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        trim(path.parent)
    except OSError as error:
        _say(f"compiled programs are not kept, {path} cannot be written: {error.strerror}.")
        return
    keep_ready(path / "ready")
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Of a command's seconds many go into programs that take less than JAX's default, a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.showwarning = _Warned(path, warnings.showwarning)


def folder(version: str) -> Path:
    """`kept.home`/xla/VERSION-CPU: a CPU of its own each."""
    return home() / "xla" / f"{version}-{cpu()}"


def trim(root: Path, most: int = MOST_BYTES) -> None:
    """Removes the programs not used for the longest time where all of them take more than ``most`` bytes."""
    found = []
    for file in root.rglob("*"):
        try:
            status = file.stat()
        except FileNotFoundError:  # another process trims, too
            continue
        if file.is_file():
            found.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    total = sum(size for _, size, _ in found)
    if total <= most:
        return
    for _, size, file in sorted(found):
        file.unlink(missing_ok=True)
        total -= size
        if total <= most / 2:
            return


class _Warned:
    """Takes the place of `warnings.showwarning`: JAX warns of every program that it cannot read or write.

    What cannot be read (a process ended while it wrote it) is removed, so that it is written anew; a full disk is said
    once.
    """

    def __init__(self, path: Path, other):
        self._path, self._other, self._said = path, other, False

    def __call__(self, message, category, filename, lineno, file=None, line=None) -> None:
        failed = FAILED.match(str(message))
        if failed is None:
            self._other(message, category, filename, lineno, file, line)
            return
        what, program, error = failed.groups()
        if what == "reading":
            for entry in self._path.glob(f"{glob.escape(program)}-*"):
                entry.unlink(missing_ok=True)
        elif not self._said:
            self._said = True
            _say(f"compiled programs are not kept in {self._path}: {' '.join(error.split())}.")


def _say(line: str) -> None:
    print(f"deepseek-jax: {line}", file=sys.stderr)
