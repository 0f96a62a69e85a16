"""JSON lines, zstd frames and Parquet: whole records come through exactly, broken ones are named with their place."""

import json
import sys

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from deepseek_jax.data import records
from deepseek_jax.data.config import parse_source
from deepseek_jax.data.damage import Damage
from deepseek_jax.data.readers import open_source, read_documents

TEXTS = [f"text {i} with 你好 and a line\nend" for i in range(50)]
LINES = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)).encode()


def read(path, text_field="text"):
    damage = Damage()
    return {d.name: d.text for d in read_documents(open_source(parse_source(str(path)), text_field), damage)}, damage


def expected(name, numbers, first=1):
    return {f"{name}#{i + first}": TEXTS[i] for i in numbers}


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"\n", b"\r") + b"\n"), max_size=20), st.integers(1, 9))
def test_lines_are_cut_at_newlines_alone(lines, size):
    raw = b"".join(lines)
    chunks = [raw[at : at + size] for at in range(0, len(raw), size)]
    assert list(records._split(chunks)) == lines


def test_json_lines_in_full(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n \n", 3).rstrip(b"\n"))
    documents, damage = read(tmp_path / "a.jsonl")
    assert list(documents.values()) == TEXTS
    assert not damage.damaged
    # Every one of the first three lines has two blank ones after it; lines are counted as an editor counts them.
    assert list(documents)[:4] == ["a.jsonl#1", "a.jsonl#4", "a.jsonl#7", "a.jsonl#10"]


BAD_LINES = {
    b'{"text": "cut': "not JSON (",
    b'["text"]': "a JSON list instead of an object",
    b'{"content": "x"}': "no field 'text' among 'content'",
    b"{}": "no field 'text' among none",
    b'{"text": 3}': "field 'text' is a int, not a string",
    b'{"text": null}': "field 'text' is a NoneType, not a string",
    b'{"text": "\xff"}': "byte 0xff at 10 is not UTF-8",
    b'{"text": "\\ud800"}': "field 'text' holds half of a surrogate pair",
    b"[" * 100_000: "not JSON (",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: BAD_LINES[bad])
def test_a_bad_line_is_named_and_the_others_are_kept(tmp_path, bad):
    lines = LINES.splitlines()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines[:7], bad, *lines[7:]]))
    documents, damage = read(tmp_path / "a.jsonl")
    assert list(documents.values()) == TEXTS
    assert (damage.records, damage.damaged, damage.lost_bytes) == (51, 1, len(bad) + 1)
    assert damage.named[0].startswith(f"a.jsonl#8: {BAD_LINES[bad]}")


def test_a_line_above_the_longest_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 1000)
    monkeypatch.setattr(records, "CHUNK", 100)
    lines = LINES.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines[:5], b"x" * 5000 + b"\n", *lines[5:], b"y" * 2000]))
    documents, damage = read(tmp_path / "a.jsonl")
    assert list(documents.values()) == TEXTS
    assert damage.named == [f"a.jsonl#{n}: a line of more than 1000 bytes" for n in (6, 52)]


def test_empty_texts_are_counted_and_other_fields_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": ""}\n')
    documents, damage = read(tmp_path / "a.jsonl", "body")
    assert documents == {"a.jsonl#1": "x"}
    assert (damage.empty, damage.damaged) == (1, 0)


def test_zstd_lines_in_one_frame_and_in_many(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ZSTD_CHUNK", 50)
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "one.jsonl.zst").write_bytes(compress(LINES))
    (tmp_path / "many.jsonl.zst").write_bytes(
        b"".join(compress(LINES[at : at + 700]) for at in range(0, len(LINES), 700))
    )
    documents, damage = read(tmp_path)
    assert documents == expected("one.jsonl.zst", range(50)) | expected("many.jsonl.zst", range(50))
    assert not damage.damaged


def test_a_cut_off_frame_gives_its_beginning_and_is_named(tmp_path):
    frame = zstandard.ZstdCompressor().compressobj()
    whole = frame.compress(LINES[:1500]) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    whole += frame.compress(LINES[1500:]) + frame.flush()
    for cut in (len(whole) - 1, len(whole) - 300, 3):
        (tmp_path / "a.jsonl.zst").write_bytes(whole[:cut])
        documents, damage = read(tmp_path / "a.jsonl.zst")
        assert list(documents.values()) == TEXTS[: len(documents)]
        assert "a.jsonl.zst: the last zstd frame is cut off; what follows is lost" in damage.named
    assert not documents


def test_a_damaged_frame_is_named_with_its_lost_bytes(tmp_path):
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    first, second = compress(LINES), bytearray(compress(LINES))
    second[len(second) // 2] ^= 255
    (tmp_path / "a.jsonl.zst").write_bytes(first + b"no frame at all" * 9)
    documents, damage = read(tmp_path / "a.jsonl.zst")
    assert list(documents.values()) == TEXTS
    assert damage.damaged == 1
    assert "a damaged zstd frame" in damage.named[0]
    assert damage.lost_bytes > 0
    (tmp_path / "a.jsonl.zst").write_bytes(second)
    documents, damage = read(tmp_path / "a.jsonl.zst")
    assert damage.damaged >= 1
    assert any("a damaged zstd frame" in named for named in damage.named)


def test_parquet_by_row_groups(tmp_path):
    for name, kind in (("a", pyarrow.string()), ("b", pyarrow.large_string()), ("c", pyarrow.string_view())):
        table = pyarrow.table({"id": range(50), "text": pyarrow.array(TEXTS, kind)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
    words = pyarrow.array(TEXTS).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": words}), tmp_path / "d.parquet")
    documents, damage = read(tmp_path)
    assert documents == {k: v for name in "abcd" for k, v in expected(f"{name}.parquet", range(50), first=0).items()}
    assert (damage.records, damage.damaged) == (200, 0)


def test_nulls_and_bad_text_in_parquet_are_named(tmp_path):
    bad = pyarrow.array([b"good", b"\xff\xfe", None, b"", b"fine"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    documents, damage = read(tmp_path / "a.parquet")
    assert documents == {"a.parquet#0": "good", "a.parquet#4": "fine"}
    assert damage.named == [
        "a.parquet#1: text that is not UTF-8 (invalid start byte at byte 0)",
        "a.parquet#2: no text (null)",
    ]
    assert (damage.records, damage.damaged, damage.empty) == (5, 2, 1)


def test_a_damaged_row_group_loses_its_rows_only(tmp_path):
    file = tmp_path / "a.parquet"
    options = {"row_group_size": 10, "write_page_checksum": True, "compression": "none", "use_dictionary": False}
    parquet.write_table(pyarrow.table({"text": TEXTS}), file, **options)
    column = parquet.ParquetFile(file).metadata.row_group(2).column(0)
    raw = bytearray(file.read_bytes())
    raw[column.data_page_offset + column.total_compressed_size - 5] ^= 255
    file.write_bytes(raw)
    documents, damage = read(file)
    assert documents == expected("a.parquet", [i for i in range(50) if i // 10 != 2], first=0)
    assert (damage.records, damage.damaged) == (50, 10)
    assert damage.named[0].startswith("a.parquet: rows 20 to 29 cannot be read (")


def test_an_unreadable_parquet_file_counts_by_its_bytes(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size - 20])
    documents, damage = read(file)
    assert not documents
    assert (damage.damaged, damage.lost_bytes) == (1, size - 20)
    assert damage.named[0].startswith("a.parquet: not a readable Parquet file (")


def test_a_column_that_is_not_there_is_an_error(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'text' but id, body: name the text with --text-field"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"'id' of .* holds int64, not text"):
        read(tmp_path / "a.parquet", "id")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        records.MissingPackage, match=rf"needs the package {package}: pip install 'deepseek-jax\[data\]'"
    ):
        read(tmp_path / name)
