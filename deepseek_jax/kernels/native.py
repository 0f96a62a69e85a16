"""On a CPU, the experts' networks (`native_experts.cc`), their grouped matmul alone (`native.cc`) and attention
(`native_attention.cc`, `native_gradients.cc`) as compiled C++, built where it is first asked for.

XLA calls them as custom calls and lends them its own threads. All cores work on a grouped matmul, and a group's matrix
is read where it lies; the block form copies it out of the stack first, and takes one block after the other. Without a
gradient, rows go through both products of an expert in one call, and stay in a core's cache between these. Attention
keeps a tile of keys and its scores in a core's cache, and reads no keys that no query sees. Needs a C++ compiler at
hand; JAX brings the headers. Numbers are of float32 or bfloat16, sums float32.

Suffixes: M rows sorted by group, E groups, D and Z widths; of experts, N tokens, K assignments of each, F inner width;
of attention, B batch, T queries, S keys, N heads, G key heads, K key dim, V value dim.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.core.bits import Bits
from deepseek_jax.kept import cpu, home

EXPERTS = 'Context(experts="native")'
ATTENTION = 'Context(attention="native")'
HEADERS = [Path(__file__).with_name(name) for name in ("native_tiles.h", "native_products.h", "native_attention.h")]
SOURCES = [
    Path(__file__).with_name(name)
    for name in ("native.cc", "native_experts.cc", "native_attention.cc", "native_gradients.cc")
]
# Headers of JAX are not ours to warn of.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
# A matrix' dtype as it lies in memory -> the function for it.
ROWS = {"float32": "GroupedRowsFloat32", "bfloat16": "GroupedRowsBfloat16", "uint16": "GroupedRowsBits"}
ROUTED = {"float32": "RoutedFloat32", "bfloat16": "RoutedBfloat16", "uint16": "RoutedBits"}
OUTER = "GroupedOuter"
ATTEND = {"float32": "AttendFloat32", "bfloat16": "AttendBfloat16"}
ATTEND_GRADIENTS = {"float32": "AttendGradientsFloat32", "bfloat16": "AttendGradientsBfloat16"}
LATENTS = {"float32": "AttendLatentsFloat32", "bfloat16": "AttendLatentsBfloat16"}
# Most assignments whose experts are parted, and fewest of an expert's inner numbers in a part: a strip of them is read
# slower than a matrix in the order of memory.
FEW, PART = 128, 256


def grouped_matmul(x_MD, w_EDZ: jax.Array | Bits, sizes_E, transpose: bool = False) -> jax.Array:
    """[M, Z] in x's dtype: rows of group e times w[e] (or its transpose), accumulated in float32; rows beyond the
    groups are zero.

    Raises ValueError for other dtypes, shapes that do not fit, where the platform is no CPU, or nothing can be built.
    """
    _check(x_MD, w_EDZ)
    w_EDZ = w_EDZ.values if isinstance(w_EDZ, Bits) else w_EDZ
    _fit(x=("MZ" if transpose else "MD", x_MD), w=("EDZ", w_EDZ), sizes=("E", sizes_E))
    out = jax.ShapeDtypeStruct((x_MD.shape[0], w_EDZ.shape[1 if transpose else 2]), jnp.float32)
    call = jax.ffi.ffi_call(_target(ROWS[w_EDZ.dtype.name]), out)
    x_MD, dtype = x_MD.astype(jnp.float32), x_MD.dtype
    return call(x_MD, w_EDZ, sizes_E.astype(jnp.int32), transpose=np.bool_(transpose)).astype(dtype)


def grouped_outer(x_MD, y_MZ, sizes_E, dtype) -> jax.Array:
    """[E, D, Z] in ``dtype``: x[rows of e].T @ y[rows of e], zero for a group of no rows. Errors: `grouped_matmul`."""
    _check(x_MD, y_MZ)
    _fit(x=("MD", x_MD), y=("MZ", y_MZ))
    x_MD, y_MZ = x_MD.astype(jnp.float32), y_MZ.astype(jnp.float32)
    out = jax.ShapeDtypeStruct((sizes_E.size, x_MD.shape[1], y_MZ.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(_target(OUTER), out)(x_MD, y_MZ, sizes_E.astype(jnp.int32)).astype(dtype)


def routed(x_ND, index_NK, weight_NK, gate_up_EDZ: jax.Array | Bits, down_EFD: jax.Array | Bits, limit) -> jax.Array:
    """[N, D] in x's dtype, without a gradient: the sum over K of weight times down(`ffn.swiglu`(gate_up(x), limit)),
    where -1 and what else is no expert adds nothing.

    Inputs and weights are rounded to x's dtype, the sum is, and nothing between: that is float32.
    Errors: `grouped_matmul`.
    """
    _check(x_ND, gate_up_EDZ, down_EFD)
    gate_up, down = (w.values if isinstance(w, Bits) else w for w in (gate_up_EDZ, down_EFD))
    M, F = index_NK.size, down.shape[1]
    # Of gate and up, 2F wide, a letter of its own.
    _fit(x=("ND", x_ND), index=("NK", index_NK), weight=("NK", weight_NK), gate_up=("EDZ", gate_up), down=("EFD", down))
    if gate_up.shape[2] != 2 * F:
        raise ValueError(f"gate_up is {gate_up.shape[2]} wide, which is not twice the {F} of down.")
    # Room for what threads add up apart where there are fewer experts than threads.
    parts = max(1, F // PART) if M <= FEW else 1
    outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x_ND.shape, (parts * M, x_ND.shape[1]))]
    call = jax.ffi.ffi_call(_target(ROUTED[down.dtype.name]), outs)
    operands = (x_ND.astype(jnp.float32), index_NK.astype(jnp.int32), weight_NK.astype(jnp.float32), gate_up, down)
    return call(*operands, limit=np.float32(np.inf if limit is None else limit))[0].astype(x_ND.dtype)


def attention(q_BTNK, k_BSGK, v_BSGV, places: Sequence[jax.Array], scale: float) -> jax.Array:
    """float32 [B, T, N, V]: softmax attention of queries over keys that N / G heads share, of float32 or bfloat16.

    ``places``: int32, the positions and segments [B, T] of the queries, and those [B, S] of the keys. A query sees the
    keys of its own segment at its own and earlier positions; one of segment 0 sees none, and is zero. Has a gradient,
    which computes the probabilities again; a row's key head is one thread's there.

    Raises ValueError for other dtypes, shapes that do not fit, where the platform is no CPU, or nothing can be built.
    """
    _check(q_BTNK, k_BSGK, v_BSGV, what=ATTENTION)
    _fit(q=("BTNK", q_BTNK), k=("BSGK", k_BSGK), v=("BSGV", v_BSGV), **_placed(places))
    if q_BTNK.shape[2] % k_BSGK.shape[2]:
        raise ValueError(f"{k_BSGK.shape[2]} heads of keys do not serve {q_BTNK.shape[2]} of queries alike.")
    return _attention(q_BTNK, k_BSGK, v_BSGV, tuple(a.astype(jnp.int32) for a in places), scale)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BTNK, k_BSGK, v_BSGV, places, scale: float) -> jax.Array:
    return _attention_forward(q_BTNK, k_BSGK, v_BSGV, places, scale)[0]


def _attention_forward(q_BTNK, k_BSGK, v_BSGV, places, scale: float):
    o = jax.ShapeDtypeStruct((*q_BTNK.shape[:3], v_BSGV.shape[-1]), jnp.float32)
    logs = jax.ShapeDtypeStruct(q_BTNK.shape[:3], jnp.float32)
    call = jax.ffi.ffi_call(_target(ATTEND[k_BSGK.dtype.name]), (o, logs))
    found = call(q_BTNK.astype(jnp.float32), k_BSGK, v_BSGV, *places, scale=np.float32(scale))
    # With its sums, which the backward pass needs and `remat` may keep.
    o_BTNV, logs_BTN = (checkpoint_name(a, "core") for a in found)
    return o_BTNV, (q_BTNK, k_BSGK, v_BSGV, places, o_BTNV, logs_BTN)


def _attention_backward(scale: float, kept, do_BTNV):
    q_BTNK, k_BSGK, v_BSGV, places, o_BTNV, logs_BTN = kept
    operands = (q_BTNK, k_BSGK, v_BSGV)
    call = jax.ffi.ffi_call(
        _target(ATTEND_GRADIENTS[k_BSGK.dtype.name]), [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in operands]
    )
    sums = (o_BTNV, logs_BTN, do_BTNV)
    gradients = call(q_BTNK.astype(jnp.float32), k_BSGK, v_BSGV, *places, *sums, scale=np.float32(scale))
    return *(g.astype(a.dtype) for g, a in zip(gradients, operands, strict=True)), None


_attention.defvjp(_attention_forward, _attention_backward)


def latent_attention(q_BTNK, k_LBSK, layer, V: int, places: Sequence[jax.Array], scale: float) -> jax.Array:
    """`attention` over a cache's ``layer``, of keys that all heads share and whose first ``V`` numbers are the values,
    without a gradient.

    Of the whole cache: XLA copies a part of it before it hands it on.
    """
    _check(q_BTNK, k_LBSK, what=ATTENTION)
    _fit(q=("BTNK", q_BTNK), k=("LBSK", k_LBSK), **_placed(places))
    if k_LBSK.shape[3] < V:
        raise ValueError(f"values of {V} numbers are no part of keys of {k_LBSK.shape[3]}.")
    out = jax.ShapeDtypeStruct((*q_BTNK.shape[:3], V), jnp.float32)
    call = jax.ffi.ffi_call(_target(LATENTS[k_LBSK.dtype.name]), out)
    places = (a.astype(jnp.int32) for a in places)
    return call(q_BTNK.astype(jnp.float32), k_LBSK, jnp.asarray(layer, jnp.int32), *places, scale=np.float32(scale))


def _check(*operands, what: str = EXPERTS) -> None:
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


def _fit(**operands: tuple[str, jax.Array]) -> None:
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


def _placed(places: Sequence[jax.Array]) -> dict[str, tuple[str, jax.Array]]:
    names = ("positions", "segments", "positions of keys", "segments of keys")
    return {name: (axes, place) for name, axes, place in zip(names, ("BT", "BT", "BS", "BS"), places, strict=True)}


def _target(symbol: str) -> str:
    """What XLA calls a function of the library."""
    return f"deepseek_jax.{symbol}"


@cache
def _register() -> None:
    library = ctypes.CDLL(str(built()))
    by_dtype = (ROWS, ROUTED, ATTEND, ATTEND_GRADIENTS, LATENTS)
    for symbol in (OUTER, *(symbol for symbols in by_dtype for symbol in symbols.values())):
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
    texts = (file.read_text(encoding="utf-8") for file in (*HEADERS, *SOURCES))
    # Of a compiler when it was installed: asking it for its version would take longer than all else here.
    made_of = [*texts, jax.__version__, jaxlib.__version__, by, Path(by).stat().st_mtime_ns, *FLAGS]
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
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        part = Path(unfinished) / path.name
        command = [by, *FLAGS, "-I", jax.ffi.include_dir(), *map(str, SOURCES), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            how = " ".join(command)
            raise ValueError(
                f'The "native" form: {how} failed: {first}; set CXX to another compiler, or choose "auto".'
            )
        part.replace(path)
