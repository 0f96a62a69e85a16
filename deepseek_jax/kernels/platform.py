"""Where a kernel runs: compiled on the platform it is for, elsewhere its XLA form, or interpreted."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp


def on_platform(kernel, xla=None, platform: str | None = None):
    """What `kernel(interpret)` gives, for the platform the program is lowered for.

    On TPU it is compiled; elsewhere ``xla`` takes its place, or without ``xla`` the kernel runs interpreted on the
    CPU: for checking it, slowly. Without ``xla`` other platforms cannot lower the program. ``platform``: the only one
    that the program is for, if it is known (`Context.platform`).
    """
    if platform is not None:
        return kernel(platform != "tpu") if xla is None or platform == "tpu" else xla
    if xla is None:
        return lambda *args: jax.lax.platform_dependent(*args, tpu=kernel(False), cpu=kernel(True))
    return lambda *args: jax.lax.platform_dependent(*args, tpu=kernel(False), default=xla)


def require_hopper(what: str) -> None:
    """Raises ValueError where this machine's devices are not NVIDIA GPUs of compute capability 9 (H100, H200)."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability.startswith("9."):
        found = f"compute capability {capability}" if capability else f"the platform {device.platform!r}"
        raise ValueError(
            f"{what}: it is for NVIDIA GPUs of compute capability 9 (Hopper), and the devices here are of {found}; "
            'choose "auto".'
        )


def one_pass(dtype):
    """The context to multiply arrays of ``dtype`` in, whatever `jax.default_matmul_precision` says.

    TPU kernels have one precision only for operands narrower than float32, whose products are exact in one pass.
    """
    return nullcontext() if dtype == jnp.float32 else jax.default_matmul_precision("default")
