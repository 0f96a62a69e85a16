"""Token files: exact, reused while nothing changed, refused by name when something did, never half-written."""

import json

import numpy as np
import pytest

from deepseek_jax.data import tokens
from deepseek_jax.data.config import parse_source
from deepseek_jax.data.damage import DamagedSource
from deepseek_jax.data.manifest import TokenFileError
from deepseek_jax.data.readers import open_source
from deepseek_jax.data.split import find_split
from deepseek_jax.data.tokens import TokenFile, token_file
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.text.tokenizer import load_tokenizer
from deepseek_jax.version import __version__

TEXTS = {f"{i:02}.txt": f"Document {i} says naïve 你好 <｜end▁of▁sentence｜>.\n" * (i + 1) for i in range(40)}


def learn(folder, size):
    save_tokenizer(train_tokenizer(TEXTS.values(), size), folder, version="0")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("tokenizer"), 280)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "text" / name).write_text(text)
    return open_source(parse_source(str(tmp_path / "text")))


@pytest.fixture
def make(source, tokenizer, tmp_path):
    def make(source=source, tokenizer=tokenizer, folder=tmp_path / "tokens", held_out=0.05, damaged=0.01):
        return token_file(source, tokenizer, folder, held_out_share=held_out, damaged_share=damaged)

    return make


def test_every_document_is_there_between_bos_and_eos(make, source, tokenizer):
    file, split = make(), find_split(source, 0.05)
    ends = file.documents_D["end"].tolist()
    for text, start, end, record in zip(TEXTS.values(), [0, *ends], ends, file.documents_D, strict=False):
        ids = file.read(start, end)
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(ids[1:-1].tolist()) == text
        assert record["bytes"] == len(text.encode())
    for name, of in (("held_out", split.held_out_D), ("key", split.keys_D), ("family", split.families_D)):
        assert np.array_equal(file.documents_D[name], of)
    assert len(file.documents_D) == len(TEXTS)
    assert file.read(0, 5).dtype == np.uint16


def test_the_manifest_says_what_it_is(make, tokenizer, source, tmp_path):
    manifest = make().manifest
    assert manifest["deepseek_jax"] == __version__
    assert manifest["tokens"] == manifest["train"]["tokens"] + manifest["held_out"]["tokens"]
    assert manifest["train"]["documents"] + manifest["held_out"]["documents"] == len(TEXTS)
    assert manifest["split"]["one_by_one"] == len(TEXTS)  # one template
    assert [entry["name"] for entry in manifest["files"]] == list(TEXTS)
    assert json.loads((tmp_path / "tokens" / "manifest.json").read_text()) == manifest
    assert "files" in make().record()


def test_large_vocabularies_take_four_bytes(make, source, tokenizer, tmp_path):
    class Large:
        """Ids moved up beyond two bytes."""

        backend, bos_id, eos_id, vocab_size = tokenizer.backend, 70_000, 70_001, 2**16 + 1

        def encode_batch(self, texts, add_bos, special_tokens):
            return [[70_000, *(i + 65_000 for i in ids)] for ids in tokenizer.encode_batch(texts, add_bos=False)]

    file = make(tokenizer=Large(), folder=tmp_path / "large")
    assert file.read(0, 1).dtype == np.uint32
    assert file.read(0, 1).tolist() == [70_000]


def test_finished_files_are_reused_and_not_written_again(make, source, tmp_path):
    before = make()
    stamps = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "tokens").iterdir()}
    # A new time of change alone, as copying makes it, is no change.
    (source.root / "00.txt").touch()
    again = make()
    assert again.identity == before.identity
    assert stamps == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "tokens").iterdir()}


def test_what_differs_is_named(make, source, tokenizer, tmp_path):
    make()
    with pytest.raises(TokenFileError, match=r"tokenizer is .* there and .* here.*Delete that folder"):
        make(tokenizer=learn(tmp_path / "other", 290))
    with pytest.raises(TokenFileError, match=r"held_out_share is 0\.05 there and 0\.1 here"):
        make(held_out=0.1)
    (source.root / "03.txt").write_text("another text")
    (source.root / "04.txt").write_text(TEXTS["04.txt"].replace("4", "5"))
    (source.root / "05.txt").unlink()
    (source.root / "99.txt").write_text("a new one")
    with pytest.raises(TokenFileError, match=r"new: 99\.txt; gone: 05\.txt; changed: 03\.txt, 04\.txt\. Delete"):
        make(source=open_source(parse_source(str(source.root))))


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "checks.bin", "manifest.json"])
def test_cut_off_files_are_refused(make, tmp_path, name):
    make()
    file = tmp_path / "tokens" / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(TokenFileError, match=rf"{name}.*Delete .* to have the text tokenised anew"):
        make()
    file.unlink()
    with pytest.raises(TokenFileError, match=name):
        make()


def test_one_changed_byte_is_found_where_it_is_read(make, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 1024)
    size = make().manifest["tokens"] * 2
    assert size > 4096
    file = tmp_path / "tokens" / "tokens.bin"
    raw = bytearray(file.read_bytes())
    raw[2500] ^= 1
    file.write_bytes(raw)
    found = make()
    assert len(found.read(0, 1024)) == 1024
    assert len(found.read(1536, size // 2)) == size // 2 - 1536
    with pytest.raises(TokenFileError, match="between bytes 2048 and 3072"):
        found.read(1020, 1025)
    raw[2500] ^= 1
    file.write_bytes(raw)
    assert len(make().read(0, size // 2)) == size // 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_nothing(make, source, tokenizer, tmp_path, monkeypatch, error):
    def stop(documents):
        yield from iter([[next(iter(documents))]])
        raise error

    monkeypatch.setattr(tokens, "_batches", stop)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else OSError
    with pytest.raises(expected) as raised:
        make()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]
    if expected is OSError:
        assert f"The token folder {tmp_path / 'tokens'} cannot be written" in str(raised.value)


def test_a_file_that_changes_meanwhile_is_refused(make, source, monkeypatch, tmp_path):
    batches = tokens._batches

    def change(documents):
        yield from batches(documents)
        (source.root / "07.txt").write_text("changed")

    monkeypatch.setattr(tokens, "_batches", change)
    with pytest.raises(TokenFileError, match=r"07\.txt changed while it was read"):
        make()
    monkeypatch.setattr(tokens, "_batches", batches)
    split = tokens.find_split(source, 0.05)
    monkeypatch.setattr(tokens, "find_split", lambda source, share: split)
    (source.root / "08.txt").write_text("changed after it was split")
    with pytest.raises(TokenFileError, match=r"08\.txt of .*text changed while it was read"):
        make()
    assert not (tmp_path / "tokens").exists()


def test_too_much_damage_stops_before_anything_is_kept(make, source, tmp_path):
    (source.root / "bad.txt").write_bytes(b"\xff")
    changed = open_source(parse_source(str(source.root)))
    with pytest.raises(DamagedSource, match=r"1 of 41 records are damaged: bad\.txt: byte 0xff at 0 is not UTF-8"):
        make(source=changed)
    assert not (tmp_path / "tokens").exists()
    file = make(source=changed, damaged=0.03)
    assert file.manifest["damage"]["named"] == ["bad.txt: byte 0xff at 0 is not UTF-8"]
    assert len(file.documents_D) == len(TEXTS)
    with pytest.raises(DamagedSource):
        make(source=changed, damaged=0.01)


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("short")
    (tmp_path / "two.bin").write_bytes(b"\xff\0")
    (tmp_path / "three.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"1 document.*three\.txt: byte 0xff.*Not text: two\.bin"):
        find_split(open_source(parse_source(str(tmp_path))), 0.05)
    with pytest.raises(ValueError, match="1 document"):
        find_split(open_source(parse_source(str(tmp_path / "one.txt"))), 0.05)
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"0 document.*--text-field.*no field 'text' among 'body'"):
        find_split(open_source(parse_source(str(tmp_path / "other.jsonl"))), 0.05)


def test_a_folder_that_is_something_else_is_refused(make, tmp_path):
    (tmp_path / "tokens").mkdir()
    with pytest.raises(TokenFileError, match="has no manifest"):
        make()
    (tmp_path / "tokens" / "manifest.json").write_text('{"format": 0}')
    with pytest.raises(TokenFileError, match="not a token folder of format 2"):
        TokenFile(tmp_path / "tokens")
