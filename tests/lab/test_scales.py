"""The larger scale of every study: 100 to 300 million parameters, the same question, names that say what they are."""

import inspect
from pathlib import Path

import pytest

from deepseek_jax.analysis.counts import counts
from deepseek_jax.lab import bases
from deepseek_jax.lab.bases import GPU, MICRO
from deepseek_jax.lab.study import Setup, load, stems

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = {stem: load(EXPERIMENTS, stem) for stem in stems(EXPERIMENTS)}
SCALES = ("cpu", "gpu")


def setups(stem: str, scale: str) -> dict[str, Setup]:
    study = STUDIES[stem].at(scale)
    return {name: study.setup(name) for name in study.variants}


@pytest.mark.parametrize("stem", STUDIES)
def test_every_study_has_models_of_100_to_300_million_parameters_for_an_accelerator(stem):
    sizes = {name: counts(setup.model) for name, setup in setups(stem, "gpu").items()}
    assert {name: 1e8 <= size.total + size.mtp <= 3e8 for name, size in sizes.items()} == dict.fromkeys(sizes, True)


@pytest.mark.parametrize("base", [MICRO, GPU], ids=["micro", "gpu"])
def test_the_bases_say_what_they_count(base):
    size, recipe = counts(base.model), base.recipe
    steps = recipe.tokens // (recipe.batch_rows * recipe.length)
    said = " ".join(inspect.getsource(bases).replace("\n#", " ").split())
    assert f"{size.total / 1e6:.2f}M parameters, {size.activated / 1e6:.2f}M of them activated; {steps:,} steps" in said
    assert f"{steps:,} steps of {recipe.batch_rows * recipe.length:,} tokens" in said


@pytest.mark.parametrize("stem", STUDIES)
def test_variants_differ_in_the_same_fields_at_both_scales(stem):
    """But for those that only name at one of them what the base is at the other."""
    one, other = ([set(c) for c in STUDIES[stem].at(scale).variants.values()] for scale in SCALES)
    if stem == "v3_balance":
        assert other[3] == {"recipe.bias_speed"}
        one[3] = other[3]
    assert one == other


@pytest.mark.parametrize("scale", SCALES)
def test_what_is_named_by_a_number_has_it(scale):
    balance = setups("v3_balance", scale)
    for name, setup in balance.items():
        kind, _, value = name.partition("-")
        speed, weight = setup.recipe.bias_speed, setup.recipe.weights.batch_balance
        assert (speed, weight) == {"none": (0, 0), "aux": (0, float(value or 0)), "sign": (float(value or 0), 0)}[kind]
    for name, setup in setups("v3_specialisation", scale).items():
        kind, _, value = name.partition("-")
        weights = setup.recipe.weights
        found = (setup.recipe.bias_speed > 0, weights.batch_balance, weights.balance)
        value = float(value or 0)
        assert found == {"free": (True, 0, 0), "batch": (False, value, 0), "sequence": (False, 0, value)}[kind]
    for name, setup in setups("v1_moe", scale).items():
        if name[0].isdigit():
            moe = setup.model.moe
            assert name == f"{moe.n_experts}k{moe.top_k}"
            assert moe.shared_width == setups("v1_moe", scale)["16k4"].model.moe.expert_dim
    for name, setup in setups("v4_hyper_connections", scale).items():
        kind, _, depth = name.partition("-")
        assert setup.model.n_layers == setup.model.n_dense_layers == int(depth)
        assert {"plain": None, "hc": False, "mhc": True}[kind] == getattr(setup.model.residual, "constrained", None)
    study = STUDIES["v4_muon"].at(scale)
    for side, names in study.tuned.items():
        peaks = [study.setup(name).recipe.rate.peak for name in names]
        assert list(names) == [name for name in study.variants if name.startswith(f"{side}-")]
        assert [float(name.removeprefix(f"{side}-")) for name in names] == peaks
        assert peaks == pytest.approx([study.base.recipe.rate.peak * factor for factor in (1, 2, 4)])
        for name in names:
            recipe = study.setup(name).recipe
            assert recipe.optimizer.muon == (side == "muon")
            assert recipe.rate.decay_to == recipe.rate.peak / 20


def test_what_is_compared_is_in_proportion():
    shares = {}
    for scale in SCALES:
        mtp, fp8 = setups("v3_mtp", scale)["mtp"], setups("v3_fp8", scale)
        sparse, yarn = setups("v32_sparse_attention", scale), setups("v3_yarn", scale)
        keys = {name: setup.model.attention.indexer.index_top_k for name, setup in sparse.items()}
        rope = yarn["yarn"].model.attention.rope.yarn
        stages = [sparse["sparse"], sparse["sparse"].first, sparse["sparse"].first.first]
        assert sparse["unwarmed"].first == stages[2]
        assert fp8["fine"].fp8.tile == fp8["fine"].fp8.block == fp8["blocks"].fp8.block
        assert {setup.recipe.dtype for setup in fp8.values()} == {"float32"}
        shares[scale] = {
            "mtp": (mtp.recipe.mtp_change / mtp.recipe.tokens, mtp.recipe.weights.mtp, mtp.recipe.mtp_later),
            "tiles": fp8["fine"].model.dim / fp8["fine"].fp8.tile,
            "keys": {name: n / sparse[name].recipe.length for name, n in keys.items()},
            "stages": [stage.recipe.tokens / stages[-1].recipe.tokens for stage in stages],
            "lengths": [(s.first.recipe.length, s.recipe.length) for s in yarn.values()],
            "yarn": (rope.factor, rope.original_length),
            "extension": yarn["yarn"].recipe.tokens / yarn["yarn"].first.recipe.tokens,
        }
    assert shares["cpu"] == shares["gpu"]
    assert shares["cpu"]["keys"] == {"sparse": 1 / 16, "dense": 1, "unwarmed": 1 / 16}
