"""Programs kept on disk ready to run: a command that starts again neither traces nor lowers nor compiles them.

JAX's own cache of programs is asked after tracing and lowering, most of what a small model's start takes. Here a
program is found by all that it depends on: the arguments' tree (a model's config is in it), shapes and dtypes, what is
static, this package's source, the versions of what it is built on, JAX's settings, the device. In a command's process
nothing else matters: nobody replaces functions there. A Python program is served from here only if it asks to.
"""

import contextlib
import hashlib
import os
import pickle
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from deepseek_jax.core.context import Context

_PACKAGE = Path(__file__).parents[1]
_folder: Path | None = None


def keep_ready(folder: Path | None) -> None:
    """Keeps programs in a folder, which is made with the first, and finds them there; None: no longer."""
    global _folder
    _folder = folder


class Ready:
    """A jitted function of one device's arrays, whose programs are kept where `keep_ready` says.

    ``jitted``: takes what varies by position and what is static by name. A program that cannot be kept is compiled as
    ever: where an argument is on a mesh, a static one cannot be pickled, or it calls a library that each process loads
    while it traces (`kernels.native`).
    """

    def __init__(self, jitted: Callable):
        self.jitted = jitted
        self._programs: dict = {}

    def __call__(self, *args, **static):
        if _folder is None:
            return self.jitted(*args, **static)
        leaves, tree = jax.tree.flatten(args)
        arrays = tuple(_described(a) for a in leaves)
        called = (tree, arrays, tuple(sorted(static.items())))
        if called not in self._programs:
            self._programs[called] = self._found(called, args, static)
        program = self._programs[called]
        return self.jitted(*args, **static) if program is None else program(*args)

    def _found(self, called, args, static):
        native = any(ctx.native for ctx in static.values() if isinstance(ctx, Context))
        if native or len({places for *_, places in called[1]} - {""}) != 1:
            return None
        try:
            key = pickle.dumps((self.jitted.__module__, self.jitted.__qualname__, called, _surroundings()))
        except (pickle.PicklingError, AttributeError, TypeError):
            return None
        file = _folder / f"{self.jitted.__name__}-{hashlib.sha256(key).hexdigest()}-ready"
        device = next(iter(d for a in jax.tree.leaves(args) if isinstance(a, jax.Array) for d in a.devices()))
        if (program := _read(file, device)) is None:
            program = _compiled_anew(self.jitted.lower(*args, **static))
            _write(file, program)
        return program


def _described(a) -> tuple[tuple[int, ...], str, bool, str]:
    """Shape, dtype, whether the type is weak, and the device, none of a NumPy array."""
    if isinstance(a, jax.Array):
        return a.shape, str(a.dtype), a.weak_type, str(sorted(map(str, a.devices())))
    return np.shape(a), str(np.asarray(a).dtype), isinstance(a, bool | int | float | complex), ""


@cache
def _surroundings() -> tuple:
    """What a program depends on besides its function and arguments."""
    source = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        source.update(str(file.relative_to(_PACKAGE)).encode() + b"\0" + file.read_bytes())
    versions = platform.python_version(), jax.__version__, jaxlib.__version__, flax.__version__, np.__version__
    settings = sorted((name, repr(value)) for name, value in jax.config.values.items())
    named = sorted(
        (k, v) for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "LIBTPU_", "CUDA_", "NVIDIA_"))
    )
    devices = [(d.platform, d.device_kind, d.client.platform_version) for d in jax.local_devices()]
    return source.hexdigest(), versions, settings, named, devices


def _read(file: Path, device):
    """The program, or None where there is none that is whole."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    digest, data = data[:32], data[32:]
    if hashlib.sha256(data).digest() != digest:
        file.unlink(missing_ok=True)
        return None
    return serialize_executable.deserialize_and_load(*pickle.loads(data), execution_devices=[device])


def _write(file: Path, program) -> None:
    """Whole or not at all. What a full disk or a read-only folder refuses is compiled again the next time: JAX's own
    cache, beside this one, is what says so."""
    data = pickle.dumps(serialize_executable.serialize(program))
    part = file.with_name(f"{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(hashlib.sha256(data).digest() + data)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


def _compiled_anew(lowered):
    """Past JAX's cache of programs: on a CPU, one that comes from there is written without its code."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        # JAX looks at its setting once, with the first program.
        compilation_cache.reset_cache()
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
