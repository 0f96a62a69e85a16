"""The experts' grouped matmul on a CPU as compiled C++ (`native.cc`), built where it is first asked for.

All cores work on it, and a group's matrix is read where it lies; the block form copies it out of the stack first, and
takes one block after the other. XLA calls it as a custom call and lends it its own threads. Needs a C++ compiler at
hand; JAX brings the headers. In float32.

Suffixes: M rows sorted by group, E groups, D and Z widths.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from deepseek_jax.kept import cpu, home

WHAT = 'Context(experts="native")'
SOURCE = Path(__file__).with_name("native.cc")
# Headers of JAX are not ours to warn of.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
TARGETS = {"deepseek_jax_grouped_rows": "GroupedRows", "deepseek_jax_grouped_outer": "GroupedOuter"}
ROWS, OUTER = TARGETS


def grouped_matmul(x_MD, w_EDZ, sizes_E, transpose: bool = False) -> jax.Array:
    """[M, Z] in float32: rows of group e times w[e] (or its transpose); rows beyond the groups are zero.

    Raises ValueError where operands are not float32, the platform is no CPU, or nothing can be built.
    """
    _check(x_MD, w_EDZ)
    out = jax.ShapeDtypeStruct((x_MD.shape[0], w_EDZ.shape[1 if transpose else 2]), jnp.float32)
    return jax.ffi.ffi_call(ROWS, out)(x_MD, w_EDZ, sizes_E.astype(jnp.int32), transpose=np.bool_(transpose))


def grouped_outer(x_MD, y_MZ, sizes_E, dtype) -> jax.Array:
    """[E, D, Z] in ``dtype``: x[rows of e].T @ y[rows of e], zero for a group of no rows. Errors: `grouped_matmul`."""
    _check(x_MD, y_MZ)
    out = jax.ShapeDtypeStruct((sizes_E.size, x_MD.shape[1], y_MZ.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(OUTER, out)(x_MD, y_MZ, sizes_E.astype(jnp.int32)).astype(dtype)


def _check(*operands) -> None:
    if others := sorted({a.dtype.name for a in operands if a.dtype != jnp.float32}):
        raise ValueError(
            f"{WHAT}: it multiplies float32, and here are {' and '.join(others)}; load and run the model in float32 "
            '(--dtype float32), or choose "auto".'
        )
    if (platform := jax.devices()[0].platform) != "cpu":
        raise ValueError(
            f'{WHAT}: it is for CPUs, and the devices here are of the platform {platform!r}; choose "auto".'
        )
    _register()


@cache
def _register() -> None:
    library = ctypes.CDLL(str(built()))
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")


def compiler() -> str | None:
    """The path of what $CXX names, or else of the first of c++, g++ and clang++; None where there is none."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)


def built() -> Path:
    """The library for this CPU, in `kept.home`/native: one that was built before, or a new one, whole or not at all.

    Raises ValueError where there is no `compiler`, it fails, or the folder cannot be written.
    """
    by = compiler()
    if by is None:
        named = os.environ.get("CXX")
        missing = f"CXX={named} is not found" if named else "there is no c++, g++ or clang++ here"
        raise ValueError(f'{WHAT}: it is built by a C++ compiler, and {missing}; install one, or choose "auto".')
    made_of = [SOURCE.read_text(encoding="utf-8"), jax.__version__, jaxlib.__version__, by, *FLAGS]
    path = home() / "native" / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]}-{cpu()}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(by, path)
    except OSError as error:
        raise ValueError(
            f"{WHAT}: it is built in {path.parent}, which cannot be written: {error.strerror}; name another folder in "
            'XDG_CACHE_HOME, or choose "auto".'
        ) from None
    return path


def _compile(by: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        part = Path(unfinished) / path.name
        command = [by, *FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise ValueError(
                f'{WHAT}: {" ".join(command)} failed: {first}; set CXX to another compiler, or choose "auto".'
            )
        part.replace(path)
