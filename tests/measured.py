"""Errors that tests measure, kept for the table of what is supported, which `experiments/bench_support` makes."""

import json
import os
from pathlib import Path

PLACE = "DEEPSEEK_JAX_MEASURED"


def measured(architecture: str, what: str, error: float) -> None:
    """Adds a line to the file that the environment names, if it names one."""
    if PLACE in os.environ:
        with Path(os.environ[PLACE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"architecture": architecture, "what": what, "error": float(error)}) + "\n")
