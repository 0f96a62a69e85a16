"""A command of `deepseek-jax` in a process that notes which rows of a text it reads, a number a line.

Usage: reading_command.py NOTES COMMAND ARGUMENT...
"""

import os
import sys

from deepseek_jax.cli.main import main
from deepseek_jax.data.rows import SourceRows


def note_rows(path: str) -> None:
    notes, read = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), SourceRows.__getitem__

    def noted(self, index: int):
        os.write(notes, f"{index}\n".encode())
        return read(self, index)

    SourceRows.__getitem__ = noted


if __name__ == "__main__":
    note_rows(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
