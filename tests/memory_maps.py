"""Compiled programs take memory maps, some hundred each, of which Linux gives a process 65,530."""

from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")
MANY = 25_000


def forget_programs() -> None:
    """Drops all compiled programs of this process where they have taken many maps."""
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MANY:
        jax.clear_caches()
