"""Token files: a source tokenised once, read through memory maps, checked as it is read.

A token folder holds, all little-endian:

- ``tokens.bin``: every document as BOS, its tokens, EOS, one after the other; uint16, or uint32 for ids from 65536 on;
- ``documents.bin``: a record a document: the end of its tokens, its key, UTF-8 bytes, family, part and split;
- ``checks.bin``: a CRC-32 for each 64 KiB of ``tokens.bin``;
- ``manifest.json``: format, tokenizer, source files with their sha256, counts, damage, how the text
  was split, the package's version.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from deepseek_jax.data.damage import Damage
from deepseek_jax.data.manifest import TokenFileError, check_same, described, sha256, stamp, tokenizer_hash
from deepseek_jax.data.readers import Document, Source, read_documents
from deepseek_jax.data.shuffle import text_key
from deepseek_jax.data.split import find_split
from deepseek_jax.small_files import LARGE, read_json
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.version import __version__

FORMAT = 2
BLOCK = 64 * 1024
BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 4 * 1024 * 1024
REPORT_SECONDS = 20
RECORD = np.dtype(
    [("end", "<u8"), ("key", "<u8"), ("bytes", "<u8"), ("family", "<u8"), ("part", "<u2"), ("held_out", "?")]
)


class TokenFile:
    """A source's tokens, opened with `token_file` or from a finished folder.

    Attributes:
        folder: where it lies.
        manifest: the manifest, a dict.
        documents_D: a record array over the documents in the source's order; fields end, key (uint64), bytes, family
            (of near-duplicates, `split`), part (an index of ``manifest["parts"]``) and held_out.

    Raises:
        TokenFileError: the folder is not finished, of another format, or its files are damaged or cut off.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.manifest = read_json(folder / "manifest.json", LARGE)
        except FileNotFoundError as error:
            raise TokenFileError(f"{folder} has no manifest.json: it is not a token folder.") from error
        except ValueError as error:
            raise TokenFileError(f"{error} {self._way_out}") from error
        if self.manifest.get("format") != FORMAT:
            raise TokenFileError(f"{folder} is not a token folder of format {FORMAT}. {self._way_out}")
        for name, expected in self.manifest["sha256"].items():
            if not (folder / name).is_file() or sha256(folder / name) != expected:
                raise TokenFileError(f"{folder / name} is damaged: its sha256 is not the manifest's. {self._way_out}")
        self.documents_D = np.memmap(folder / "documents.bin", RECORD, mode="r")
        self._checks = np.fromfile(folder / "checks.bin", "<u4")
        path, dtype = folder / "tokens.bin", np.dtype(self.manifest["dtype"])
        size, expected = path.stat().st_size if path.is_file() else 0, self.manifest["tokens"] * dtype.itemsize
        if size != expected:
            raise TokenFileError(f"{path} has {size} bytes where {expected} were written. {self._way_out}")
        self._tokens = np.memmap(path, dtype, mode="r")
        self._bytes = self._tokens.view(np.uint8)
        self._checked = np.zeros(len(self._checks), bool)

    @property
    def _way_out(self) -> str:
        return f"Delete {self.folder} to have the text tokenised anew."

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens ``start`` to ``stop``, a view in the file's dtype [stop - start].

        Raises:
            TokenFileError: the bytes there are not those that were written; each block is checked once.
        """
        if stop > start:
            size = self._tokens.itemsize
            for block in range(start * size // BLOCK, (stop * size - 1) // BLOCK + 1):
                if not self._checked[block]:
                    self._check(block)
        return self._tokens[start:stop]

    def _check(self, block: int) -> None:
        raw = self._bytes[block * BLOCK : (block + 1) * BLOCK]
        if zlib.crc32(raw) != self._checks[block]:
            at = block * BLOCK
            raise TokenFileError(
                f"{self.folder / 'tokens.bin'} is damaged between bytes {at} and {at + len(raw)}. {self._way_out}"
            )
        self._checked[block] = True

    @property
    def identity(self) -> str:
        """A hash of all tokens, documents and splits."""
        sums = self.manifest["sha256"]
        return hashlib.sha256((sums["checks.bin"] + sums["documents.bin"]).encode()).hexdigest()[:16]

    def record(self) -> dict:
        """What identifies this text, for a run's records: the manifest without the list of files."""
        kept = {k: v for k, v in self.manifest.items() if k not in ("files", "parts", "dtype")}
        return {**kept, "files": len(self.manifest["files"])}


def token_file(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    held_out_share: float,
    damaged_share: float,
    report: Callable[[str], None] = lambda line: None,
) -> TokenFile:
    """The tokens of ``source`` in ``folder``: those that are there, or made now, in a temporary folder beside it.

    An interrupt or an error leaves nothing behind. ``report`` is told of the progress in lines.

    Raises:
        TokenFileError: ``folder`` holds the tokens of something else, and the message says what differs; or it is
            damaged; or a file of the source changed while it was read.
        DamagedSource: more than ``damaged_share`` of the source is damaged.
        ValueError: a tokenizer without BOS or EOS, or too little text for both splits.
        OSError: a file cannot be read, or the folder not be written.
    """
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ValueError("Training text needs a tokenizer with a BOS and an EOS token; this one names none.")
    wanted = {
        "tokenizer": {"sha256": tokenizer_hash(tokenizer), "bos": tokenizer.bos_id, "eos": tokenizer.eos_id},
        "read_as": source.kind,
        "text_field": source.text_field,
        "held_out_share": held_out_share,
    }
    if folder.exists():
        found = TokenFile(folder)
        check_same(found.manifest, wanted, source, folder)
        damage = Damage(**found.manifest["damage"])
        damage.check(source.title, damaged_share)
        report(f"{source.label}: {found.manifest['tokens']:,} tokens from {folder}")
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".writing", dir=folder.parent))
    try:
        files = [described(source.root / name, name) for name in source.files]
        manifest = _write(source, tokenizer, temporary, held_out_share, damaged_share, report)
        for name, entry in zip(source.files, files, strict=True):
            if stamp(source.root / name) != (entry["size"], entry["modified_ns"]):
                raise TokenFileError(f"{source.root / name} changed while it was read: start again.")
        manifest = {"deepseek_jax": __version__, "format": FORMAT, **wanted, **manifest, "files": files}
        text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
        (temporary / "manifest.json").write_text(text, encoding="utf-8")
        temporary.chmod(0o777 & ~_umask())
        try:
            os.rename(temporary, folder)  # noqa: PTH104 (Path.rename would do the same)
        except OSError:
            # Hosts that share the folder may all be making it; the first one to finish is as good as any.
            if not (folder / "manifest.json").is_file():
                raise
    except OSError as error:
        # A full disk is reported without the name of what was being written.
        raise error if error.filename else OSError(f"The token folder {folder} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenFile(folder)


def _write(source, tokenizer, folder, held_out_share, damaged_share, report) -> dict:
    split, number = find_split(source, held_out_share), 0
    report(f"{source.label}: {split.line()}")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    damage, parts = Damage(), {}
    splits = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in ("train", "held_out")}
    hashes = {name: hashlib.sha256() for name in splits}
    tokens, unchecked, began = 0, b"", time.monotonic()
    told = began
    with (
        (folder / "tokens.bin").open("wb") as tokens_file,
        (folder / "documents.bin").open("wb") as documents_file,
        (folder / "checks.bin").open("wb") as checks_file,
    ):
        for batch in _batches(read_documents(source, damage)):
            encoded = tokenizer.encode_batch([d.text for d in batch], add_bos=True, special_tokens=False)
            records, pieces = [], [unchecked]
            for document, ids in zip(batch, encoded, strict=True):
                if number == len(split.texts_D) or text_key(document.text) != split.texts_D[number]:
                    raise TokenFileError(f"{document.name} of {source.title} changed while it was read: start again.")
                pieces.append(np.asarray([*ids, tokenizer.eos_id], dtype).tobytes())
                text, count = document.text.encode(), len(ids) + 1
                tokens += count
                name = "held_out" if split.held_out_D[number] else "train"
                part = parts.setdefault(document.part, len(parts))
                key, family = split.keys_D[number], split.families_D[number]
                records.append((tokens, key, len(text), family, part, name == "held_out"))
                number += 1
                hashes[name].update(text)
                for key, value in (("documents", 1), ("tokens", count), ("bytes", len(text))):
                    splits[name][key] += value
            raw = b"".join(pieces)
            tokens_file.write(raw[len(unchecked) :])
            documents_file.write(np.array(records, RECORD).tobytes())
            whole = len(raw) // BLOCK * BLOCK
            checks_file.write(_checks(raw[:whole]))
            unchecked = raw[whole:]
            if time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                report(f"{source.label}: {tokens:,} tokens, {tokens / (told - began):,.0f} a second")
        checks_file.write(_checks(unchecked))
    damage.check(source.title, damaged_share)
    report(f"{source.label}: {tokens:,} tokens in {time.monotonic() - began:.1f} s")
    return {
        "source": source.title,
        "python": platform.python_version(),
        "dtype": dtype.str,
        "tokens": tokens,
        **{name: {**split, "sha256": hashes[name].hexdigest()} for name, split in splits.items()},
        "parts": list(parts),
        "damage": vars(damage),
        "split": split.record,
        "sha256": {name: sha256(folder / name) for name in ("documents.bin", "checks.bin")},
    }


def _checks(raw: bytes) -> bytes:
    blocks = range(0, len(raw), BLOCK)
    return np.array([zlib.crc32(raw[at : at + BLOCK]) for at in blocks], "<u4").tobytes()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
