"""What identifies a token folder: its tokenizer, its source's files, and what differs from those of now."""

import hashlib
from pathlib import Path

from deepseek_jax.data.readers import Source
from deepseek_jax.text.tokenizer import Tokenizer


class TokenFileError(ValueError):
    """A token folder is damaged, or holds the tokens of something else."""


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """The sha256 of all that decides a text's ids."""
    described = tokenizer.backend.to_str()
    if any(not added.special for added in tokenizer.backend.get_added_tokens_decoder().values()):
        # Their names used to be read as the tokens in training text; token folders of then are not those of now.
        described += "control tokens are read as text"
    return hashlib.sha256(described.encode()).hexdigest()


def check_same(manifest: dict, wanted: dict, source: Source, folder: Path) -> None:
    """Raises TokenFileError, naming what differs, when ``manifest`` is not of ``source`` as it is now, or not what is
    ``wanted``. A file of the same size and time of change is the same."""
    different = [f"{name} is {manifest.get(name)} there and {value} here" for name, value in wanted.items()
                 if manifest.get(name) != value]  # fmt: skip
    stored = {entry["name"]: entry for entry in manifest["files"]}
    for what, names in (
        ("new", [n for n in source.files if n not in stored]),
        ("gone", sorted(set(stored) - set(source.files))),
        ("changed", [n for n in source.files if n in stored and _changed(source.root / n, stored[n])]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            different.append(f"{what}: {', '.join(names[:3])}{more}")
    if different:
        raise TokenFileError(
            f"{folder} holds the tokens of other text than {source.title} as it is now: {'; '.join(different)}. Delete "
            "that folder, or name another with --token-folder."
        )


def _changed(file: Path, stored: dict) -> bool:
    size, modified = stamp(file)
    if size == stored["size"] and modified == stored["modified_ns"]:
        return False
    return size != stored["size"] or sha256(file) != stored["sha256"]


def described(file: Path, name: str) -> dict:
    """A file's entry in the manifest."""
    size, modified = stamp(file)
    return {"name": name, "size": size, "modified_ns": modified, "sha256": sha256(file)}


def stamp(file: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def sha256(file: Path) -> str:
    """A file's sha256, read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
