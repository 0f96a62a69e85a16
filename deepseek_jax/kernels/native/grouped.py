"""Grouped matmul (`grouped.cc`): all cores work on one, and a group's matrix is read where it lies; the block form
copies it out of the stack first, and takes one block after the other. Numbers are of float32 or bfloat16, sums float32.

Suffixes: M rows sorted by group, E groups, D and Z widths.
"""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.bits import Bits
from deepseek_jax.kernels.native.library import call, check, fit

EXPERTS = 'Context(experts="native")'


def grouped_matmul(x_MD, w_EDZ: jax.Array | Bits, sizes_E, transpose: bool = False) -> jax.Array:
    """[M, Z] in x's dtype: rows of group e times w[e] (or its transpose), accumulated in float32; rows beyond the
    groups are zero.

    Raises ValueError for other dtypes, shapes that do not fit, where the platform is no CPU, or nothing can be built.
    """
    check(EXPERTS, x_MD, w_EDZ)
    w_EDZ = w_EDZ.values if isinstance(w_EDZ, Bits) else w_EDZ
    fit(x=("MZ" if transpose else "MD", x_MD), w=("EDZ", w_EDZ), sizes=("E", sizes_E))
    out = jax.ShapeDtypeStruct((x_MD.shape[0], w_EDZ.shape[1 if transpose else 2]), jnp.float32)
    x_MD, dtype = x_MD.astype(jnp.float32), x_MD.dtype
    multiply = call("GroupedRows", out, w_EDZ)
    return multiply(x_MD, w_EDZ, sizes_E.astype(jnp.int32), transpose=np.bool_(transpose)).astype(dtype)


def grouped_outer(x_MD, y_MZ, sizes_E, dtype) -> jax.Array:
    """[E, D, Z] in ``dtype``: x[rows of e].T @ y[rows of e], zero for a group of no rows. Errors: `grouped_matmul`."""
    check(EXPERTS, x_MD, y_MZ)
    fit(x=("MD", x_MD), y=("MZ", y_MZ))
    x_MD, y_MZ = x_MD.astype(jnp.float32), y_MZ.astype(jnp.float32)
    out = jax.ShapeDtypeStruct((sizes_E.size, x_MD.shape[1], y_MZ.shape[1]), jnp.float32)
    return call("GroupedOuter", out)(x_MD, y_MZ, sizes_E.astype(jnp.int32)).astype(dtype)
