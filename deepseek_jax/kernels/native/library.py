"""The compiled library: built by the machine's own compiler where it is first asked for, and known to XLA as custom
calls, which it lends its own threads. Needs a C++ compiler at hand; JAX brings the headers.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import jax
import jaxlib

from deepseek_jax.kept import cpu, home

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("*.cc"))
# Headers of JAX are not ours to warn of.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-w")
# What a number of a matrix is in memory -> how names of functions for it end. uint16 are the bits of a bfloat16
# (`core.bits`).
ENDINGS = {"float32": "Float32", "bfloat16": "Bfloat16", "uint16": "Bits"}
BY_DTYPE = ("GroupedRows", "Linear", "Routed", "RoutedGradients")
OF_KEYS = ("Attend", "AttendGradients", "AttendLatents")
OTHERS = ("GroupedOuter", "LinearGradient")
# Of `products.h`, the most that there are: columns of a panel, and numbers of the inner dimension packed together.
PANEL, DEEP = 32, 32


def call(name: str, outs, matrix: jax.Array | None = None):
    """XLA's call of a function of the library, that for the dtype of ``matrix`` where there are several."""
    symbol = name + (ENDINGS[matrix.dtype.name] if matrix is not None else "")
    return jax.ffi.ffi_call(_target(symbol), outs, vmap_method="sequential")


def check(what: str, *operands) -> None:
    """Raises ValueError where the platform is no CPU, an operand is neither float32 nor bfloat16, or nothing can be
    built. ``what``: the choice that asks for the library."""
    if others := sorted({a.dtype.name for a in operands} - {"float32", "bfloat16"}):
        raise ValueError(
            f"{what}: it multiplies float32 and bfloat16, and here are {' and '.join(others)}; choose another dtype, "
            'or "auto".'
        )
    if (platform := jax.devices()[0].platform) != "cpu":
        raise ValueError(
            f'{what}: it is for CPUs, and the devices here are of the platform {platform!r}; choose "auto".'
        )
    _register()


def fit(**operands: tuple[str, jax.Array]) -> None:
    """Raises ValueError for operands, each with a letter an axis, whose letters differ in size: the library reads and
    writes as much memory as these say."""
    seen: dict[str, tuple[str, int]] = {}
    for name, (letters, array) in operands.items():
        if len(letters) != array.ndim:
            raise ValueError(f"{name} must have axes {letters}; its shape is {array.shape}.")
        for letter, size in zip(letters, array.shape, strict=True):
            first, known = seen.setdefault(letter, (name, size))
            if size != known:
                raise ValueError(
                    f"{name} {array.shape} does not fit {first}: {letter} is {size} in it and {known} there."
                )


def whole_panels(columns: int) -> int:
    return -(-columns // PANEL) * PANEL


def panels_room(depth: int, columns: int) -> int:
    """Numbers that a packed matrix takes at most (`PanelsRoom` of `products.h`)."""
    return -(-depth // DEEP) * DEEP * 3 // 2 * whole_panels(columns)


def _target(symbol: str) -> str:
    """What XLA calls a function of the library."""
    return f"deepseek_jax.{symbol}"


@cache
def _flags() -> tuple[str, ...]:
    """`FLAGS`, and one against matrix units (AMX) where there are none: Linux lends their tiles to who asks, for the
    process and its threads."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return FLAGS
    ask, permission, tile_data = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA
    lent = ctypes.CDLL(None).syscall(ask, permission, tile_data) == 0
    return FLAGS if lent else (*FLAGS, "-U__AMX_BF16__")


@cache
def _register() -> None:
    library = ctypes.CDLL(str(built()))
    by_dtype = [name + ending for name in BY_DTYPE for ending in ENDINGS.values()]
    of_keys = [name + ENDINGS[dtype] for name in OF_KEYS for dtype in ("float32", "bfloat16")]
    for symbol in (*OTHERS, *by_dtype, *of_keys):
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
        raise ValueError(f'The "native" form is built by a C++ compiler, and {missing}; install one, or choose "auto".')
    texts = (file.read_text(encoding="utf-8") for file in sorted([*HERE.glob("*.h"), *SOURCES]))
    # Of a compiler when it was installed: asking it for its version would take longer than all else here.
    made_of = [*texts, jax.__version__, jaxlib.__version__, by, Path(by).stat().st_mtime_ns, *_flags()]
    path = home() / "native" / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]}-{cpu()}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(by, path)
    except OSError as error:
        raise ValueError(
            f'The "native" form is built in {path.parent}, which cannot be written: {error.strerror}; name another '
            'folder in XDG_CACHE_HOME, or choose "auto".'
        ) from None
    return path


def _compile(by: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished, ThreadPoolExecutor() as pool:
        headers = jax.ffi.include_dir()
        objects = [Path(unfinished) / f"{file.stem}.o" for file in SOURCES]
        for _ in pool.map(
            lambda file, to: _run(by, *_flags(), "-I", headers, "-c", str(file), "-o", str(to)),
            SOURCES,
            objects,
        ):
            pass
        part = Path(unfinished) / path.name
        _run(by, "-shared", *map(str, objects), "-o", str(part))
        part.replace(path)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        how = " ".join(command)
        raise ValueError(f'The "native" form: {how} failed: {first}; set CXX to another compiler, or choose "auto".')
