"""Records of JSON lines, plain and in zstd frames, and of Parquet files: a text each, or what is wrong with them.

JSON lines are counted from 1, as editors count them; Parquet rows from 0. Lines of nothing but white space are no
records. A file whose rest is lost counts as one damaged record and by the bytes that were lost.
"""

import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_jax.notes import shown

LINES, ZSTD_LINES, PARQUET = (".jsonl", ".ndjson"), (".jsonl.zst", ".ndjson.zst"), (".parquet",)
LONGEST_LINE = 256 * 1024 * 1024  # bytes; a damaged file without line ends must not fill the memory
CHUNK = 1024 * 1024
# Compressed bytes at a time: they may stand for many thousand times as much.
ZSTD_CHUNK = 16 * 1024
LARGEST_WINDOW = 2**31  # of frames written with zstd --long
ROWS_AT_ONCE = 256


class MissingPackage(ValueError):
    """A file's format needs a package that is not installed."""


@dataclass(frozen=True)
class Record:
    """One record: its text; or ``damage``, for ``count`` records; or neither, for a file that is not text."""

    where: str
    text: str | None
    damage: str | None = None
    count: int = 1
    lost_bytes: int = 0


@dataclass(frozen=True)
class Object:
    """One line of JSON lines: its object, or what is wrong with it; ``size`` in bytes where it is known."""

    where: str
    value: dict | None
    damage: str | None = None
    size: int = 0


def json_objects(file: Path, name: str, size: int) -> Iterator[Object]:
    """The objects of a file of JSON lines of ``size`` bytes, plain or in zstd frames."""
    if name.endswith(ZSTD_LINES):
        lost: list[Record] = []
        yield from _objects(_split(_decompressed(file, name, size, lost)), name, counted_bytes=False)
        yield from (Object(record.where, None, record.damage, record.lost_bytes) for record in lost)
        return
    with file.open("rb") as opened:
        yield from _objects(_split(iter(lambda: opened.read(CHUNK), b"")), name, counted_bytes=True)


def json_lines(file: Path, name: str, field: str) -> Iterator[Record]:
    """The records of a file of JSON lines."""
    with file.open("rb") as opened:
        yield from _parse(_split(iter(lambda: opened.read(CHUNK), b"")), name, field, counted_bytes=True)


def zstd_json_lines(file: Path, name: str, field: str, size: int) -> Iterator[Record]:
    """The records of JSON lines in one or more zstd frames; ``size`` of the file in bytes."""
    lost: list[Record] = []
    yield from _parse(_split(_decompressed(file, name, size, lost)), name, field, counted_bytes=False)
    yield from lost


def parquet_rows(file: Path, name: str, field: str, size: int) -> Iterator[Record]:
    """The records of a Parquet file, a few rows at a time.

    Raises:
        ValueError: the file has no column ``field``, or one that does not hold text.
    """
    arrow, parquet = _package("pyarrow", file), _package("pyarrow.parquet", file)
    failures = (arrow.ArrowException, OSError, UnicodeDecodeError)
    try:
        opened = parquet.ParquetFile(file, page_checksum_verification=True)
    except failures as error:
        yield Record(name, None, f"not a readable Parquet file ({_first_line(error)})", lost_bytes=size)
        return
    with opened:
        schema = opened.schema_arrow
        if field not in schema.names:
            raise ValueError(
                f"{file} has no column {field!r} but {', '.join(schema.names)}: name the text with --text-field."
            )
        kind = schema.field(field).type
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)):
            raise ValueError(f"Column {field!r} of {file} holds {kind}, not text: name another with --text-field.")
        row = 0
        for group in range(opened.num_row_groups):
            end = row + opened.metadata.row_group(group).num_rows
            try:
                for batch in opened.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[field]):
                    for value in batch.column(0):
                        yield _cell(f"{name}#{row}", value)
                        row += 1
            except failures as error:
                what = f"rows {row} to {end - 1} cannot be read ({_first_line(error)})"
                yield Record(name, None, what, count=end - row)
            row = end


def _cell(where: str, value) -> Record:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Record(where, None, f"text that is not UTF-8 ({error.reason} at byte {error.start})")
    return Record(where, None, "no text (null)") if text is None else Record(where, text)


def _package(name: str, file: Path):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise MissingPackage(
            f"Reading {file} needs the package {package}: pip install 'deepseek-jax[data]'."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _split(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines with their ends; None in place of one above the longest."""
    rest, size, skipping = [], 0, False
    for chunk in chunks:
        for line in _at_newlines(chunk):
            size += len(line)
            if size > LONGEST_LINE:
                rest, skipping = [], True
            elif not skipping:
                rest.append(line)
            if line.endswith(b"\n"):
                yield None if skipping else b"".join(rest)
                rest, size, skipping = [], 0, False
    if skipping or rest:
        yield None if skipping else b"".join(rest)


def _at_newlines(chunk: bytes) -> Iterator[bytes]:
    # Not bytes.splitlines: it also cuts at a carriage return, which JSON takes for white space.
    start = 0
    while end := chunk.find(b"\n", start) + 1:
        yield chunk[start:end]
        start = end
    if start < len(chunk):
        yield chunk[start:]


def _parse(lines: Iterable[bytes | None], name: str, field: str, counted_bytes: bool) -> Iterator[Record]:
    for found in _objects(lines, name, counted_bytes):
        text, damage = (None, found.damage) if found.value is None else _text_of(found.value, field)
        lost = found.size if damage is not None and counted_bytes else 0
        yield Record(found.where, text, damage, lost_bytes=lost)


def _objects(lines: Iterable[bytes | None], name: str, counted_bytes: bool) -> Iterator[Object]:
    for number, line in enumerate(lines, start=1):
        where = f"{name}#{number}"
        if line is None:
            yield Object(where, None, f"a line of more than {LONGEST_LINE} bytes")
        elif line.strip():
            value, damage = _object_of(line, first=number == 1)
            yield Object(where, value, damage, len(line) if counted_bytes else 0)


def _object_of(line: bytes, first: bool) -> tuple[dict | None, str | None]:
    try:
        # Some writers begin a file with a byte-order mark.
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return None, f"byte 0x{line[error.start]:02x} at {error.start} is not UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({_first_line(error)})"
    if not isinstance(record, dict):
        return None, f"a JSON {type(record).__name__} instead of an object"
    return record, None


def _text_of(record: dict, field: str) -> tuple[str | None, str | None]:
    if field not in record:
        return None, f"no field {field!r} among {', '.join(map(shown, list(record)[:5])) or 'none'}"
    text = record[field]
    if not isinstance(text, str):
        return None, f"field {field!r} is a {type(text).__name__}, not a string"
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, f"field {field!r} holds half of a surrogate pair"
    return text, None


def _decompressed(file: Path, name: str, size: int, lost: list[Record]) -> Iterator[bytes]:
    zstandard = _package("zstandard", file)
    begun, done = False, 0
    frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
    with file.open("rb") as opened:
        while chunk := opened.read(ZSTD_CHUNK):
            while chunk:
                begun = True
                try:
                    text = frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    what = f"a damaged zstd frame after {done} bytes; the rest is lost ({_first_line(error)})"
                    lost.append(Record(name, None, what, lost_bytes=size - done))
                    return
                done += len(chunk)
                chunk = b""
                if frame.eof:
                    chunk, begun = frame.unused_data, False
                    done -= len(chunk)
                    frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
                if text:
                    yield text
    if begun:
        lost.append(Record(name, None, "the last zstd frame is cut off; what follows is lost"))
