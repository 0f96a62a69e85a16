"""How a model runs, apart from what it is: one frozen, hashable value handed down explicitly."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.configs.checks import check_types
from deepseek_jax.configs.fp8 import Fp8
from deepseek_jax.core.layout import Layout
from deepseek_jax.core.ops import ONE_DEVICE, Operations
from deepseek_jax.notes import shown

# Activations that `remat` may name: what the backward pass finds on the device, and what in the host's memory. All else
# is computed again. "stream": a layer's input; "core": the softmax's output with its sums, of all heads; "attn" and
# "ffn": the sublayers' outputs.
REMAT = {
    "none": None,
    "full": ((), ()),
    "attention": (("attn",), ()),
    "core": (("core", "attn"), ()),
    "sublayers": (("attn", "ffn"), ()),
    "offload": ((), ("stream",)),
    "offload_attention": ((), ("stream", "attn")),
}
EXPERTS = ("auto", "dense", "blocks", "ragged", "kernel", "hopper", "native")
MLA_FORMS = ("auto", "expanded", "absorbed")
ATTENTION = ("auto", "xla", "kernel", "hopper", "native")
LINEAR = ("auto", "native")
CACHES = ("compute", "served")


@dataclass(frozen=True)
class Context:
    """How a model runs. Frozen and hashable, so that it is part of every jit cache key.

    ``dtype``: compute dtype, None for that of the parameters. Computing in float32, native forms read parameters in
    bfloat16 as they lie, half the bytes, and give the bits that these give as float32. ``experts``: the form of the
    expert computation, "auto" for `jax.lax.ragged_dot` on TPU and block-wise elsewhere; "kernel" is Pallas' megablox,
    for TPU; "hopper" is JAX's and our Pallas kernels for NVIDIA H100 and H200 (`kernels.hopper`), for 16-bit dtypes;
    "native" is C++ for CPUs, built where it is first asked for (`kernels.native`).
    ``mla``: "auto" takes the form with fewer operations. ``attention``: what runs the softmax over whole rows without
    a cache, "auto" for a Pallas kernel on TPU and XLA's own operations elsewhere; "hopper" is cuDNN for rows without
    segments and, for a step of one token over a cache of MLA on one device, a Pallas kernel of ours
    (`kernels.hopper_decode`), both in 16-bit dtypes; "native", for CPUs, is C++ (`kernels.native`) for calls on one
    device, over a cache too, but for an indexer's and compressed attention's; for other calls they take XLA's. A
    "kernel" that is named runs interpreted on the CPU: to check it, slowly; "hopper" runs on those GPUs alone.
    ``linear``: what multiplies linear maps, "auto" for XLA; "native", for CPUs, is C++ (`kernels.native`) for maps of
    up to 12 rows, and of 64 or more, on one device; those of weights that are quantised or have an adapter, and all
    others, are XLA's. On processors with matrix units (AMX) native products of many rows are sums of six of bfloat16
    parts, which are as near to the exact ones as float32's; of what is not finite they make NaNs (`kernels.native`).
    ``cache``: what caches hold keys in, the compute dtype or, "served", FP8 and FP4 as releases are served
    (`core.served`); for MLA and compressed attention.
    ``remat``: what the backward pass keeps of a layer, a key of `REMAT`. ``unrolled``: a stack's layers one after the
    other in the program, not a loop over them: no array of all layers' activations is made to be filled, and compiling
    takes as many times as long as there are layers.
    ``loss_chunk``: tokens of each row whose logits the loss has in memory at once; None for all.
    ``fp8``: how products of linear maps and experts are emulated in FP8, on one device; None: they are not.

    ``mesh`` and ``layout``: the devices, and where arrays lie on them; both or neither. `deepseek_jax.Context` takes a
    layout's name, and has the `ops` of a mesh. ``expert_buffer``: rows that a device takes in from others at once, as a
    multiple of the mean. What does not fit follows in further rounds, or with ``drop`` is dropped and counted.
    ``expert_chunks``: parts in which a device's tokens go, so that one can travel while another is computed.
    ``balanced``: a row's tokens stand in `parallel.sequence.balanced_order`. ``folded``: a row here is one of so many
    parts of a longer one.

    Raises ValueError for unknown choices and values of another type.
    """

    mesh: Mesh | AbstractMesh | None = None
    layout: Layout | Any = None
    dtype: Any = None
    experts: str = "auto"
    mla: str = "auto"
    attention: str = "auto"
    linear: str = "auto"
    cache: str = "compute"
    remat: str = "none"
    unrolled: bool = False
    loss_chunk: int | None = None
    expert_buffer: float = 2.0
    expert_chunks: int = 1
    drop: bool = False
    balanced: bool = False
    folded: int = 1
    fp8: Fp8 | None = None

    def __post_init__(self):
        check_types(self, ValueError)
        if self.dtype is not None and not _is_float(self.dtype):
            raise ValueError(f"Context(dtype={shown(self.dtype)}): must be a floating dtype, or None.")
        if (self.mesh is None) != (self.layout is None):
            raise ValueError("Context(mesh=..., layout=...): give both or neither.")
        if self.mesh is not None and self.ops is ONE_DEVICE:
            raise ValueError("Context(mesh=...): this one is of one device; deepseek_jax.Context takes meshes.")
        if self.mesh is not None and self.fp8 is not None:
            raise ValueError("Context(mesh=..., fp8=...): FP8 is emulated on one device; leave out one of the two.")
        if self.fp8 is not None and (why := {"dense": "the oracle", "hopper": "it"}.get(self.experts)):
            raise ValueError(f'Context(experts="{self.experts}", fp8=...): {why} is not emulated; choose another form.')
        if not self.expert_buffer > 0:
            raise ValueError(f"Context(expert_buffer={self.expert_buffer!r}): must be positive.")
        if self.expert_chunks < 1:
            raise ValueError(f"Context(expert_chunks={self.expert_chunks!r}): must be at least 1.")
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise ValueError(f"Context(loss_chunk={self.loss_chunk!r}): must be at least one token, or None.")
        fields = {
            "experts": EXPERTS,
            "mla": MLA_FORMS,
            "attention": ATTENTION,
            "linear": LINEAR,
            "cache": CACHES,
            "remat": tuple(REMAT),
        }
        for name, choices in fields.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"Context({name}={value!r}): choose one of {', '.join(choices)}.")

    @property
    def native(self) -> tuple[str, ...]:
        """The choices that name compiled C++ for CPUs (`kernels.native`)."""
        return tuple(name for name in ("experts", "attention", "linear") if getattr(self, name) == "native")

    @property
    def platform(self) -> str | None:
        """That of the mesh's devices, which may be described only; None without a mesh or for an abstract one.

        Where it is known, a program has no branch for other platforms, across which nothing would overlap.
        """
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else None

    @property
    def ops(self) -> Operations:
        """What the model asks of its devices."""
        return ONE_DEVICE

    def whole_rows(self) -> "Context":
        """The same, but with every row on one device: for calls of few tokens, such as a decoding step."""
        return self


def _is_float(dtype) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


DEFAULT = Context()
