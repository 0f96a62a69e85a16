"""Documents from text files, folders, the standard library and generated tasks; `records.py` reads lines and rows.

A folder's files are read in the order of their relative paths. A text file of a folder is a document; a text file
given by itself, or one above ``LARGEST_TEXT``, is cut at line ends into documents of about 16 KiB, ``file#0``,
``file#1``, ... Nothing but the document under way is held in memory.
"""

import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_jax.data.config import TASK, SourceSpec
from deepseek_jax.data.damage import Damage
from deepseek_jax.data.records import LINES, PARQUET, ZSTD_LINES, Record, json_lines, parquet_rows, zstd_json_lines
from deepseek_jax.data.tasks import Task

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# Not the library's own source text: installed packages, caches, compiled modules.
OTHER_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
PIECE_BYTES = 16 * 1024
LARGEST_TEXT = 16 * 1024 * 1024
MODULES = "modules"
LIBRARY, FILE, FOLDER = "library", "file", "folder"


@dataclass(frozen=True)
class Document:
    """A text, its name within its source, and the part of the source it belongs to ("" where there are no parts)."""

    name: str
    text: str
    part: str = ""


@dataclass(frozen=True)
class Source:
    """A source whose files are listed: ``files`` are relative to ``root``, sorted, with forward slashes; ``kind``
    says how they are read. Of a ``task`` there are no files, and ``kind`` has its settings."""

    label: str
    title: str
    root: Path
    files: tuple[str, ...]
    text_field: str
    kind: str
    broken_links: tuple[str, ...] = ()
    task: Task | None = None


def open_source(spec: SourceSpec, text_field: str = "text") -> Source:
    """Lists the files of a source.

    A folder gives all its files but hidden ones and byte code; links to folders are not followed. The standard
    library gives its ``.py`` files without tests, generated files and installed packages.

    Raises:
        FileNotFoundError: nothing stands at the path.
        ValueError: this Python carries no readable standard library (a frozen or zipped one).
    """
    if spec.task is not None:
        kind = f"{TASK}{spec.task.spelled}"
        return Source(spec.label, kind, Path(), (), text_field, kind, task=spec.task)
    if spec.path is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = _walk(root, TEST_FOLDERS | OTHER_FOLDERS) if root.is_dir() else []
        names = sorted(p.relative_to(root).as_posix() for p in found if _is_library_source(p.relative_to(root)))
        if len(names) < 2:
            raise ValueError(
                f"The standard library at {root} holds {len(names)} .py files; this Python seems to be frozen or "
                "zipped. Give text of your own with --data."
            )
        title = f"Python {platform.python_version()} standard library"
        return Source(spec.label, title, root, tuple(names), text_field, LIBRARY)
    path = spec.path
    if path.is_file():
        return Source(spec.label, str(path), path.parent, (path.name,), text_field, FILE)
    if not path.is_dir():
        raise FileNotFoundError(f"No text file or folder at {path}.")
    found = [p.relative_to(path) for p in _walk(path, frozenset({"__pycache__"}))]
    kept = sorted(p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts))
    names = tuple(name for name in kept if (path / name).exists())
    broken = tuple(name for name in kept if name not in set(names))
    return Source(spec.label, str(path), path, names, text_field, FOLDER, broken_links=broken)


def read_documents(source: Source, damage: Damage) -> Iterator[Document]:
    """The documents of ``source`` in order; what cannot be read is counted and named in ``damage``.

    Raises:
        OSError: a file cannot be opened or read.
        ValueError: a package that a file's format needs is not installed, or a Parquet file has no such column.
    """
    if source.task is not None:
        for number, text in enumerate(source.task.training()):
            damage.records += 1
            damage.source_bytes += len(text)
            yield Document(f"{source.task.name}#{number}", text)
    for name in source.broken_links:
        damage.leave_out(f"{name} (broken link)")
    for name in source.files:
        file = source.root / name
        size = file.stat().st_size
        damage.source_bytes += size
        part = (name.split("/")[0] if "/" in name else MODULES) if source.kind == LIBRARY else ""
        for record in _records(source, file, name, size):
            if record.damage is not None:
                damage.add(record.where, record.damage, records=record.count, lost_bytes=record.lost_bytes)
            elif record.text is None:
                damage.leave_out(name)
            else:
                damage.records += 1
                if record.text:
                    yield Document(record.where, record.text, part)
                else:
                    damage.empty += 1


def _records(source: Source, file: Path, name: str, size: int) -> Iterator[Record]:
    if name.endswith(LINES):
        return json_lines(file, name, source.text_field)
    if name.endswith(ZSTD_LINES):
        return zstd_json_lines(file, name, source.text_field, size)
    if name.endswith(PARQUET):
        return parquet_rows(file, name, source.text_field, size)
    return _text(file, name, pieces=source.kind == FILE or size > LARGEST_TEXT)


def _text(file: Path, name: str, pieces: bool) -> Iterator[Record]:
    with file.open("rb") as opened:
        # Git's rule for what is not text.
        if b"\0" in opened.peek(8192)[:8192]:
            yield Record(name, None)
            return
        if not pieces:
            yield _decoded(name, opened.read())
            return
        piece, size, count = [], 0, 0
        while line := _line(opened):
            piece.append(line)
            size += len(line)
            if size >= PIECE_BYTES:
                yield _decoded(f"{name}#{count}", b"".join(piece))
                piece, size, count = [], 0, count + 1
        if piece:
            yield _decoded(f"{name}#{count}", b"".join(piece))


def _line(opened) -> bytes:
    """A line; of a very long one a part that ends where a character ends."""
    line = opened.readline(4 * PIECE_BYTES)
    if not line.endswith(b"\n"):
        for _ in range(3):
            if opened.peek(1)[:1] and 0x80 <= opened.peek(1)[0] < 0xC0:
                line += opened.read(1)
    return line


def _decoded(where: str, raw: bytes) -> Record:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Record(where, None, f"byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8", lost_bytes=len(raw))
    if "\0" in text:
        return Record(where, None, f"a NUL byte at {raw.index(0)}", lost_bytes=len(raw))
    return Record(where, text)


def _walk(root: Path, left_out: frozenset[str]) -> Iterator[Path]:
    for path in root.iterdir():
        if path.is_dir():
            if path.name not in left_out and not path.is_symlink():
                yield from _walk(path, left_out)
        elif path.is_file() or path.is_symlink():
            yield path


def _is_library_source(relative: Path) -> bool:
    # Generated files are not source text: one machine's build settings, and the language reference as one
    # literal of 750 kB, which alone would be two thirds of the split it falls into.
    generated = relative.name.startswith("_sysconfigdata") or relative.as_posix() == "pydoc_data/topics.py"
    return relative.suffix == ".py" and not generated and not relative.parts[0].startswith("config-")
