"""The experts' grouped matmul on a CPU as compiled C++ (`native.cc`), built where it is first asked for.

All cores work on it, and a group's matrix is read where it lies; the block form copies it out of the stack first, and
takes one block after the other. XLA calls it as a custom call and lends it its own threads. Needs a C++ compiler at
hand; JAX brings the headers. Rows and matrices are of float32 or bfloat16, sums float32.

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

from deepseek_jax.core.bits import Bits
from deepseek_jax.kept import cpu, home

WHAT = 'Context(experts="native")'
SOURCE = Path(__file__).with_name("native.cc")
# Headers of JAX are not ours to warn of.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
# A matrix' dtype as it lies in memory -> the function for it.
ROWS = {"float32": "GroupedRowsFloat32", "bfloat16": "GroupedRowsBfloat16", "uint16": "GroupedRowsBits"}
OUTER = "GroupedOuter"


def grouped_matmul(x_MD, w_EDZ: jax.Array | Bits, sizes_E, transpose: bool = False) -> jax.Array:
    """[M, Z] in x's dtype: rows of group e times w[e] (or its transpose), accumulated in float32; rows beyond the
    groups are zero.

    Raises ValueError for other dtypes, where the platform is no CPU, or nothing can be built.
    """
    _check(x_MD, w_EDZ)
    w_EDZ = w_EDZ.values if isinstance(w_EDZ, Bits) else w_EDZ
    out = jax.ShapeDtypeStruct((x_MD.shape[0], w_EDZ.shape[1 if transpose else 2]), jnp.float32)
    call = jax.ffi.ffi_call(_target(ROWS[w_EDZ.dtype.name]), out)
    x_MD, dtype = x_MD.astype(jnp.float32), x_MD.dtype
    return call(x_MD, w_EDZ, sizes_E.astype(jnp.int32), transpose=np.bool_(transpose)).astype(dtype)


def grouped_outer(x_MD, y_MZ, sizes_E, dtype) -> jax.Array:
    """[E, D, Z] in ``dtype``: x[rows of e].T @ y[rows of e], zero for a group of no rows. Errors: `grouped_matmul`."""
    _check(x_MD, y_MZ)
    x_MD, y_MZ = x_MD.astype(jnp.float32), y_MZ.astype(jnp.float32)
    out = jax.ShapeDtypeStruct((sizes_E.size, x_MD.shape[1], y_MZ.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(_target(OUTER), out)(x_MD, y_MZ, sizes_E.astype(jnp.int32)).astype(dtype)


def _check(*operands) -> None:
    if others := sorted({a.dtype.name for a in operands} - {"float32", "bfloat16"}):
        raise ValueError(
            f"{WHAT}: it multiplies float32 and bfloat16, and here are {' and '.join(others)}; choose another dtype, "
            'or "auto".'
        )
    if (platform := jax.devices()[0].platform) != "cpu":
        raise ValueError(
            f'{WHAT}: it is for CPUs, and the devices here are of the platform {platform!r}; choose "auto".'
        )
    _register()


def _target(symbol: str) -> str:
    """What XLA calls a function of the library."""
    return f"deepseek_jax.{symbol}"


@cache
def _register() -> None:
    library = ctypes.CDLL(str(built()))
    for symbol in (*ROWS.values(), OUTER):
        jax.ffi.register_ffi_target(_target(symbol), jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")


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
