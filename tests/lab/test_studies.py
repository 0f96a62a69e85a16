"""Every study: its variants build and take a step in shapes at each scale, one of each compiles, and its registration
holds."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.configs.fp8 import Fp8
from deepseek_jax.lab.probes import chosen
from deepseek_jax.lab.records import MEASURES
from deepseek_jax.lab.rules import Ordering
from deepseek_jax.lab.stages import context, parameters
from deepseek_jax.lab.study import Claim, Scale, Setup, Study, changed, described, digest, load, stems
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import check_fit
from deepseek_jax.train.begin import fresh, prepared
from deepseek_jax.train.objective import Knobs
from deepseek_jax.train.schedule import setting
from deepseek_jax.train.step import start

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = {stem: load(EXPERIMENTS, stem) for stem in stems(EXPERIMENTS)}
SCALED = {(stem, scale): study.at(scale) for stem, study in STUDIES.items() for scale in study.scales}


def stages() -> dict[str, Setup]:
    """All that any variant trains at any scale, its earlier stages too."""
    found = {}
    for (stem, scale), study in SCALED.items():
        for variant in study.variants:
            setup, name = study.setup(variant), f"{stem}-{scale}-{variant}"
            while setup is not None:
                found[name], setup, name = setup, setup.first, f"{name}-first"
    return found


def program(setup: Setup) -> tuple:
    """What the shapes of a step follow from: a setup without its rates, weights and budget."""
    recipe = setup.recipe
    sizes = (recipe.length, recipe.batch_rows, recipe.micro_rows, recipe.dtype, recipe.optimizer)
    terms = tuple(bool(value) for value in vars(recipe.weights).values())
    return setup.model, setup.fp8, setup.trained, sizes, terms, recipe.bias_speed > 0


STAGES = stages()
PROGRAMS = {program(setup): name for name, setup in STAGES.items()}


def step_of(setup: Setup):
    """A setup's step, and shapes of what it takes."""
    recipe, ctx = setup.recipe, context(setup)
    model = jax.eval_shape(partial(fresh, setup.model, recipe, ctx))
    trained = parameters(setup, model)
    optimizer, step = prepared(model, recipe, ctx, trained)
    begin = partial(start, optimizer=optimizer, average=recipe.ema_decay > 0, trained=trained)
    state = jax.eval_shape(begin, model)
    shape = (recipe.micro_batches, recipe.pass_rows, recipe.length)
    return step, (state, {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32)}, Knobs.of(setting(recipe, 0, 0)))


def test_every_variant_fits_its_recipe_and_its_probes():
    for setup in STAGES.values():
        check_fit(setup.model, setup.recipe, Options())
        chosen(setup)


# The first of each study; slowly the others, and those of an accelerator's scale.
FIRST = {name.split("-cpu-")[0]: name for name in reversed(PROGRAMS.values()) if "-cpu-" in name}.values()
NAMED = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in PROGRAMS.values()]


@pytest.mark.parametrize("name", NAMED)
def test_every_variant_takes_a_step_in_shapes(name):
    """Those of one program but for numbers take it once."""
    step, arguments = step_of(STAGES[name])
    state, metrics = jax.eval_shape(step, *arguments)
    assert [a.shape for a in jax.tree.leaves(state)] == [a.shape for a in jax.tree.leaves(arguments[0])]
    assert {"main", "skipped"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("stem", STUDIES)
def test_a_variant_of_each_compiles(stem):
    step, arguments = step_of(STUDIES[stem].setup(next(iter(STUDIES[stem].variants))))
    assert jax.jit(step, donate_argnums=0).lower(*arguments).compile().memory_analysis() is not None


@pytest.mark.parametrize(("stem", "scale"), SCALED)
def test_a_study_is_named_as_its_folder_and_asks_for_measures_that_there_are(stem, scale):
    study = SCALED[stem, scale]
    assert study.stem == stem
    assert len(study.rule_hash) == 12
    assert {claim.rule.measure for claim in study.claims} <= set(MEASURES)
    # A curve is no number that a figure could show over another.
    assert {*(study.against or ())} <= {*MEASURES} - {"curve"}
    # A panel has one axis for the paper's values of another measure.
    named = {(claim.rule.measure, claim.paper_as) for claim in study.claims if claim.paper_as is not None}
    assert len(named) == len({measure for measure, _ in named})
    assert len({claim.id for claim in study.claims}) == len(study.claims)
    tokens = {study.setup(name).recipe.tokens for name in study.variants}
    assert len(tokens) == 1, "variants have other budgets than the base"


def test_a_change_is_of_a_field_that_there_is():
    base = STUDIES["v3_balance"].base
    other = changed(base, {"recipe.rate.peak": 1e-3, "model.moe.top_k": 2})
    assert (other.recipe.rate.peak, other.model.moe.top_k) == (1e-3, 2)
    assert replace(other, model=base.model, recipe=base.recipe) == base
    with pytest.raises(ValueError, match=r"recipe.rate.peek: 'peek' is no field there; the fields are peak, warm"):
        changed(base, {"recipe.rate.peek": 1})
    with pytest.raises(ValueError, match="no field there; the fields are none"):
        changed(base, {"recipe.tokens.peak": 1})
    with pytest.raises(ValueError, match="top_k"):
        changed(base, {"model.moe.top_k": 99})


def test_a_hash_is_of_what_a_run_computes_and_of_nothing_else():
    base = STUDIES["v3_balance"].base
    same = {"model.name": "x", "recipe.log_every": 3, "recipe.evaluate_every": 3, "text.workers": 0}
    assert digest(described(changed(base, same))) == digest(described(base))
    others = [base, base.seeded(1), changed(base, {"recipe.bias_speed": 0.1}), changed(base, {"model.moe.scale": 2.0})]
    others += [changed(base, {"fp8": Fp8(tile=size)}) for size in (32, 64)]
    assert len({digest(described(one)) for one in others}) == 6
    # What has its default is left out, so that a new field changes no hash.
    assert "normalize" not in described(base.model.moe)
    assert described(base.model.moe)[""] == "MoE"


def test_a_rules_hash_is_of_whole_parts_of_a_setup_as_well():
    study = STUDIES["v3_fp8"]
    variants = study.variants | {"tensor": {"fp8": Fp8(tile=None)}}
    other = replace(study, scales={"cpu": replace(study.scales["cpu"], variants=variants)})
    assert len({study.rule_hash, replace(study).rule_hash, other.rule_hash}) == 2
    assert [context(study.setup(name)).fp8 for name in ("float32", "tensor")] == [None, Fp8(tile=None, block=None)]


def test_a_study_that_does_not_fit_is_refused():
    base = STUDIES["v3_balance"].base
    claim = Claim("C1", "s", "s", "e", Ordering("bits_per_byte", low="a", high="b"))
    with pytest.raises(ValueError, match="claim C1 of x compares b: no such variant"):
        Study("x", "q", {"cpu": Scale(base, {"a": {}})}, (claim,), 1)
    with pytest.raises(ValueError, match="must learn from the same tokens"):
        Study("x", "q", {"cpu": Scale(base, {"a": {}, "b": {"model.vocab_size": 512}})}, (claim,), 1)
    whole = Scale(base, {"a": {}, "b": {}})
    with pytest.raises(ValueError, match="x has no variant 'c'; choose one of a, b"):
        Study("x", "q", {"cpu": whole}, (claim,), 1).setup("c")
    # What claims compare is there at every scale, of which "cpu" is one.
    with pytest.raises(ValueError, match="claim C1 of x compares b: no such variant"):
        Study("x", "q", {"cpu": whole, "gpu": Scale(base, {"a": {}, "c": {}})}, (claim,), 1)
    with pytest.raises(ValueError, match="x has no scale 'cpu'; choose one of gpu"):
        Study("x", "q", {"gpu": whole}, (claim,), 1)


def test_what_is_no_study_says_how_it_is_run():
    with pytest.raises(ValueError, match="is run by itself: python"):
        load(EXPERIMENTS, "v3_mtp_targets")
    with pytest.raises(ValueError, match=r"there is no experiment 'nothing' .* calibration, v1_moe"):
        load(EXPERIMENTS, "nothing")
    with pytest.raises(ValueError, match="is not a folder"):
        stems(EXPERIMENTS / "nowhere")
