"""Reading configs, tokenizers, templates, indices and records: regular files of bounded size, and nothing else.

A folder from elsewhere may hold a FIFO, a link to a device, or a file of many gigabytes under such a name; opened
like any other, these hang or fill the memory. Whatever is read whole is read here.
"""

import json
import os
import stat
from pathlib import Path

from deepseek_jax.notes import cut

SMALL = 2**24  # bytes of a config or template; released ones have a few kilobytes
LARGE = 2**28  # bytes of a tokenizer, an index or a record: those of a 671B model have 10 MB


def read_small(path: Path, most: int = SMALL) -> bytes:
    """A regular file's bytes. Raises OSError, and ValueError for what is no regular file or has over ``most`` bytes."""
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file; nothing is read from a folder, a pipe or a device.")
        size = status.st_size
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            raw = b"" if size > most else file.read(most + 1)
    finally:
        os.close(descriptor)
    if max(size, len(raw)) > most:
        raise ValueError(f"{path} has {max(size, len(raw))} bytes, more than the {most} that are read of such a file.")
    return raw


def read_text(path: Path, most: int = SMALL) -> str:
    """A file's UTF-8 text. Raises as `read_small`, and ValueError for bytes that are not UTF-8."""
    try:
        return read_small(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from None


def read_json(path: Path, most: int = SMALL) -> dict:
    """A file's JSON object. Raises as `read_small`, and ValueError for what is not JSON or no object."""
    raw = read_small(path, most)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {cut(error)}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(data).__name__}.")
    return data
