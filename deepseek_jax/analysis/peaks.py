"""Peak rates of accelerators and the FLOPs of training, for the model FLOPs utilisation (MFU), and the bytes that
decoding reads, for the use of a memory's bandwidth. Loads no JAX.

MFU is the useful FLOPs a second over the peak of the devices used. Useful FLOPs of a token are those of
`deepseek_jax.analysis.counts`: 6 for each activated parameter but the input embedding's, plus causal attention at
half the row's length (that of PaLM, 2204.02311 appendix B, counts attention in full). What recomputation (remat) and
padding of experts add is not useful and does not count.
"""

from dataclasses import dataclass

from deepseek_jax.analysis.counts import counts
from deepseek_jax.configs.schema import ModelConfig


@dataclass(frozen=True)
class Peak:
    """``flops``: dense bfloat16 with float32 accumulation, a second and device. ``source``: the vendor's text."""

    flops: float
    source: str


# jax.Device.device_kind -> peak. NVIDIA's data sheets give rates with sparsity: halved. A GPU's kind may go on after
# the name (its memory); the longest name that fits is taken.
GPU_PEAKS = {
    "NVIDIA A100": Peak(312e12, "NVIDIA A100 Tensor Core GPU data sheet"),
    "NVIDIA L40S": Peak(362.05e12, "NVIDIA L40S data sheet"),
    "NVIDIA H100": Peak(989.4e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    "NVIDIA H100 PCIe": Peak(756e12, "NVIDIA H100 Tensor Core GPU data sheet, PCIe"),
    "NVIDIA H100 NVL": Peak(835.5e12, "NVIDIA H100 Tensor Core GPU data sheet, NVL"),
    "NVIDIA H200": Peak(989.4e12, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    "NVIDIA H200 NVL": Peak(835.5e12, "NVIDIA H200 Tensor Core GPU data sheet, NVL"),
    "NVIDIA B200": Peak(2250e12, "NVIDIA HGX platform data sheet, HGX B200, an eighth"),
}
TPU_PEAKS = {
    "TPU v4": Peak(275e12, "Google Cloud documentation, TPU v4"),
    "TPU v5": Peak(459e12, "Google Cloud documentation, TPU v5p"),
    "TPU v5p": Peak(459e12, "Google Cloud documentation, TPU v5p"),
    "TPU v5 lite": Peak(197e12, "Google Cloud documentation, TPU v5e"),
    "TPU v5e": Peak(197e12, "Google Cloud documentation, TPU v5e"),
    "TPU v6 lite": Peak(918e12, "Google Cloud documentation, TPU v6e"),
    "TPU v6e": Peak(918e12, "Google Cloud documentation, TPU v6e"),
}


def peak_of(device_kind: str) -> Peak | None:
    """The peak of a `jax.Device.device_kind`; None where it is unknown: a CPU, a slice of a GPU (MIG)."""
    if device_kind in TPU_PEAKS or "MIG" in device_kind:
        return TPU_PEAKS.get(device_kind)
    fits = [name for name in GPU_PEAKS if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))]
    return GPU_PEAKS[max(fits, key=len)] if fits else None


def training_flops(cfg: ModelConfig, length: int, mtp: bool) -> int:
    """FLOPs of training on one token in rows of ``length`` tokens; ``mtp``: the MTP modules train too.

    Of all parameters: where only a part is trained or adapters are, the gradients of the others are not computed, and
    an MFU from this number says more than the device did.
    """
    figures = counts(cfg, length)
    return figures.flops_per_token + (figures.flops_per_token_mtp if mtp else 0)


def decoding_bytes(cfg: ModelConfig, rows: int, context: int, width: int = 2) -> float:
    """Bytes that a decoding step of ``rows`` tokens reads, each after ``context`` cached ones: ``width`` of each
    parameter and cached number, every one once. Of the routed experts those that any row chooses: their mean number,
    where each is as likely as the others. Without the rows of the embedding."""
    figures = counts(cfg, context)
    parameters = float(figures.activated_no_embedding)
    if cfg.moe is not None:
        chosen = cfg.moe.n_experts * (1 - (1 - cfg.moe.top_k / cfg.moe.n_experts) ** rows)
        parameters += cfg.n_moe_layers * (chosen - cfg.moe.top_k) * figures.expert
    return width * (parameters + rows * figures.kv_bytes / 2)  # the counts' caches are in bfloat16
