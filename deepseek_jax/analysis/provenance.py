"""Where a result comes from: the commit, the date and the machine. Loads no JAX."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from deepseek_jax.version import __version__

LIBRARIES = ("jax", "flax", "torch", "transformers", "libtpu")


def provenance() -> dict:
    """ "deepseek_jax", "commit", "date" (UTC), "machine" and "versions", to stand at the head of a record."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    return {
        "deepseek_jax": __version__,
        "commit": commit(Path(__file__).parents[2]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": versions,
    }


def commit(folder: Path) -> str | None:
    """The commit that ``folder`` is a checkout of, "+changes" behind it where tracked files differ; None for none.

    Pictures and the records of measurements, results.json, may differ: experiments write them, one after the other, and
    nothing that runs reads them.
    """
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        written = [f":(exclude){name}" for name in ("*.png", "*results.json")]
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return head + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        # No git, or no checkout: an installed package.
        return None


def committed(path: Path) -> str | None:
    """The commit that last changed a file; None where the file differs from it, is in none, or there is no git."""
    try:
        if _git(path.parent, "status", "--porcelain", "--", path.name):
            return None
        return _git(path.parent, "log", "-1", "--format=%h", "--", path.name) or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
