"""Peaks of devices by the names that JAX gives them, and the FLOPs of training."""

import pytest

from deepseek_jax.analysis.counts import counts
from deepseek_jax.analysis.peaks import GPU_PEAKS, TPU_PEAKS, decoding_bytes, peak_of, training_flops
from deepseek_jax.configs.zoo import zoo


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362.05e12),
        ("TPU v5", 459e12),
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_names_of_devices(kind, flops):
    assert peak_of(kind).flops == flops


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v4 lite", "NVIDIA L40", "NVIDIA A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_what_is_not_known_has_no_peak(kind):
    assert peak_of(kind) is None


def test_every_peak_names_its_source():
    peaks = [*GPU_PEAKS.values(), *TPU_PEAKS.values()]
    assert all(1e14 < peak.flops < 1e16 and peak.source for peak in peaks)


def test_flops_of_training_v3():
    # 250 GFLOPs a token: "Insights into DeepSeek-V3" (2505.09343), table 2, without MTP.
    cfg = zoo("deepseek-v3")
    assert training_flops(cfg, 4096, mtp=False) == pytest.approx(250e9, rel=0.01)
    assert training_flops(cfg, 4096, mtp=True) > training_flops(cfg, 4096, mtp=False)


def test_bytes_of_decoding():
    v3 = zoo("deepseek-v3")
    figures = counts(v3, 1000)
    # V3 keeps 576 numbers a token and layer.
    cache = 2 * 61 * 576 * 1000
    assert decoding_bytes(v3, 1, 1000) == 2 * figures.activated_no_embedding + cache
    # So many rows choose all experts.
    every = 2 * (figures.total - figures.embedding) + 10**5 * cache
    assert decoding_bytes(v3, 10**5, 1000) == pytest.approx(every, rel=1e-6)
    # Two rows choose 8 each of 256: 15.75 different ones.
    more = decoding_bytes(v3, 2, 1000, width=1) - decoding_bytes(v3, 1, 1000, width=1)
    assert more == pytest.approx(58 * 7.75 * 3 * 7168 * 2048 + cache / 2)
    dense = zoo("r1-distill-qwen-1.5b")
    assert decoding_bytes(dense, 8, 10) - decoding_bytes(dense, 1, 10) == 7 * counts(dense, 10).kv_bytes
