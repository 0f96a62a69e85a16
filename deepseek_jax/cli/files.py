"""Result files that the commands write: looked at before the work begins, written whole or not at all."""

import json
from pathlib import Path

from deepseek_jax.version import __version__


def check_destination(path: Path | None, option: str = "--json") -> None:
    """Raises ValueError where a file could not be written; None, an option that was not given, is fine.

    ``option``: the one that names the file, for the message.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}.")
    if path.is_dir():
        raise ValueError(f"{option} {path}: this is a folder.")


def write_json(path: Path, record: dict) -> None:
    """Writes a record after the package's version, whole or not at all. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps({"deepseek_jax": __version__, **record}, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
