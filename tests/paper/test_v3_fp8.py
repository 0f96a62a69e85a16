"""V3's FP8 (§3.3) measured on single arrays and products: scales beside outliers, formats, and narrow sums."""

import importlib.util
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.fp8 import HIGHEST, Fp8, accumulated, rounded

SIZES = {"tile": (1, 128), "block": (128, 128), "tensor": (None, None)}
fast_rounded = jax.jit(rounded, static_argnums=(1, 2, 3))


def errors(factor: float, kind: str = "e4m3") -> dict[str, float]:
    """The relative error of all other channels, where four of 1024 are so many times as large."""
    x = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    large = np.array([5, 300, 610, 900])
    x[:, large] *= factor
    others = np.delete(x, large, axis=1)
    found = {name: np.delete(fast_rounded(x, sizes, Fp8(), kind), large, axis=1) for name, sizes in SIZES.items()}
    return {name: float(np.linalg.norm(a - others) / np.linalg.norm(others)) for name, a in found.items()}


def test_smaller_scales_shield_more_values_from_outliers():
    # v3_fp8 C2
    """FP8 has exponents of its own: without outliers the scale hardly matters, and outliers have to be very large."""
    plain, beside = errors(1), errors(1e4)
    assert plain["tensor"] < 1.05 * plain["tile"]
    assert beside["tensor"] > 1.2 * beside["block"] > 1.2 * 1.1 * beside["tile"]
    assert beside["tensor"] > 1.5 * plain["tensor"]
    assert beside["tile"] < 1.1 * plain["tile"]


def test_e5m2_has_twice_the_error_and_more_range():
    plain, beside = (errors(factor, "e5m2") for factor in (1, 1e4))
    for name, error in errors(1).items():
        assert 1.9 < plain[name] / error < 2.1
        assert beside[name] < 1.05 * plain[name]


@pytest.mark.parametrize(
    ("promotion", "low", "high"),
    [(None, 2e-3, 4e-3), (512, 2e-4, 6e-4), (128, 5e-5, 2e-4)],
    ids=["never", "512", "128"],
)
def test_promotion_brings_back_what_sums_of_14_bits_lose(promotion, low, high):
    # v3_fp8 C3
    """The largest relative error of 4096 positive products a sum; the operands are FP8 already."""
    rng = np.random.default_rng(0)
    x, w = (
        np.asarray(fast_rounded(rng.random(shape, np.float32), (128, 128), Fp8(), "e4m3"))
        for shape in ((32, 4096), (4096, 32))
    )
    multiply = partial(jnp.einsum, "mk,kz->mz", precision=HIGHEST)
    found = jax.jit(lambda x, w: accumulated(multiply, x, w, (1, 0), Fp8(accumulation_bits=14, promotion=promotion)))(
        x, w
    )
    exact = x.astype(np.float64) @ w.astype(np.float64)
    assert low < np.abs(found / exact - 1).max() < high


def test_the_committed_error_study_is_what_the_code_measures(root):
    # v3_fp8 C4
    """A part of each of its tables, made anew."""
    folder = root / "experiments" / "v3_fp8"
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    spec = importlib.util.spec_from_file_location("v3_fp8_errors", folder / "errors.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    anew = {
        "channels": study.channels(factors=(10_000,)),
        "tokens": study.tokens(factors=(10_000,)),
        "formats": study.formats(spreads=(4,)),
        "sums": study.sums(widths=(4096,), promotions=(None, 128)),
    }

    def compare(found, committed):
        if isinstance(found, dict):
            for name, part in found.items():
                compare(part, committed[name])
        else:
            assert found == pytest.approx(committed, rel=1e-3)

    compare(anew, {name: record[name] for name in anew})
