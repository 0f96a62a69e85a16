"""Where this package keeps on disk what is made anew when it is gone: compiled programs and libraries, corpora."""

import hashlib
import os
import platform
from pathlib import Path

# What /proc/cpuinfo calls a CPU's name and instructions, on x86 and ARM.
FEATURES = ("model name", "flags", "CPU part", "Features")


def home() -> Path:
    """$XDG_CACHE_HOME/deepseek-jax; ~/.cache where that is not set. Raises RuntimeError where there is no home."""
    named = os.environ.get("XDG_CACHE_HOME")
    root = Path(named) if named and Path(named).is_absolute() else Path.home() / ".cache"
    return root / "deepseek-jax"


def cpu() -> str:
    """A name for this machine's kind of CPU: eight digits of a hash of its features.

    What is compiled for one may hold instructions that another lacks, and homes are shared.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    # Of each name the first: the lines repeat themselves for every core.
    known = dict(reversed([line.partition(":")[::2] for line in lines if ":" in line]))
    features = [text for name, text in sorted(known.items()) if name.strip() in FEATURES]
    text = "\n".join([platform.machine(), platform.processor(), *features])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
