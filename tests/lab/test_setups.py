"""Setups that go on with what another one trained, in whole or in part, on a tiny text."""

from dataclasses import replace

import numpy as np
import pytest

from deepseek_jax.configs.schema import MLA, ModelConfig, Rope
from deepseek_jax.core.params import named
from deepseek_jax.data.config import DataConfig
from deepseek_jax.lab.corpus import corpus
from deepseek_jax.lab.lean import carry_out
from deepseek_jax.lab.records import spec
from deepseek_jax.lab.stages import beginning, stepping
from deepseek_jax.lab.study import Setup
from deepseek_jax.text.tokenizer import load_tokenizer
from deepseek_jax.train.recipe import LearningRate, Optimizer, Recipe
from deepseek_jax.train.weights import LossWeights

MODEL = ModelConfig(
    name="toy",
    vocab_size=300,
    dim=16,
    n_layers=1,
    n_dense_layers=1,
    ffn_dim=16,
    attention=MLA(n_heads=1, q_rank=None, kv_rank=8, nope_dim=8, rope_dim=8, v_dim=8),
    moe=None,
    max_length=32,
)
RECIPE = Recipe(
    model="",
    tokens=2 * 4 * 16,
    length=16,
    batch_rows=4,
    first_rows=None,
    ramp_tokens=0,
    micro_rows=None,
    fim_rate=0.0,
    dtype="float32",
    rate=LearningRate(1e-3, 0, None, drops=()),
    ema_decay=0.0,
    mtp_change=None,
    optimizer=Optimizer(moments="float32"),
    weights=LossWeights(mtp=0.0, balance=0.0),
    bias_speed=0.0,
    bias_until=None,
)


def values(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in named(model).items()}


def run(setup: Setup, text) -> list[dict[str, np.ndarray]]:
    """The weights after each step."""
    return [values(stepped.state.model) for stepped in stepping(setup, text, lambda: None)]


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        words = " ".join(f"word{(number * 7 + at * at) % 97}" for at in range(60))
        (folder / f"{number}.txt").write_text(words)
    return Setup(MODEL, RECIPE, DataConfig(data=(f"toy={folder}",), held_out_share=0.3)).seeded(3)


@pytest.fixture(scope="module")
def text(setup, tmp_path_factory):
    return corpus(setup, tmp_path_factory.mktemp("home"))


def test_a_setup_goes_on_with_what_its_first_one_came_to(setup, text):
    longer = replace(setup.recipe, length=32, tokens=2 * 4 * 32)
    other = replace(MODEL, attention=replace(MODEL.attention, rope=Rope(500.0)))
    later = Setup(other, longer, setup.text, first=setup, trained=("head",))
    called = []
    begun = beginning(later, text, lambda: called.append(1))
    came = run(setup, text)[-1]
    assert begun.cfg == other
    assert values(begun).keys() == came.keys()
    for name, value in values(begun).items():
        np.testing.assert_array_equal(value, came[name], err_msg=name)
    # Made once: it is found again, bit by bit, and is the run's of that seed alone.
    assert len(called) == 2
    found = values(beginning(later, text, lambda: called.append(1)))
    assert len(called) == 2
    assert all((found[name] == came[name]).all() for name in came)
    files = [path.name for path in (text.folder / "models").iterdir()]
    assert files == [f"{spec(setup, 3)}-{text.hash}.npz"]
    # Of its parameters those that are asked for are trained.
    after = run(later, text)[-1]
    assert {name for name in came if (after[name] != came[name]).any()} == {"head"}


def test_the_order_of_the_text_has_a_seed_of_its_own(setup, text):
    """``data_seed`` alone decides which rows are read, and no weights; without it the run's seed does."""

    def rows(data_seed: int | None, seed: int = 3) -> np.ndarray:
        one = replace(setup, recipe=replace(setup.recipe, data_seed=data_seed)).seeded(seed)
        return np.stack([stepped.fed.batch["tokens"] for stepped in stepping(one, text, lambda: None)])

    def first(data_seed: int | None, seed: int = 3) -> dict[str, np.ndarray]:
        return values(beginning(replace(setup, recipe=replace(setup.recipe, data_seed=data_seed)).seeded(seed), text))

    assert (rows(1) != rows(2)).any()
    np.testing.assert_array_equal(rows(1), rows(1, seed=4))
    np.testing.assert_array_equal(rows(None), rows(3, seed=4))
    one, same, other = first(1), first(2), first(1, seed=4)
    assert all((one[name] == same[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)


def test_a_stage_reads_those_sources_alone_that_it_names(setup, tmp_path):
    data = ("sums=task:addition,documents=300", "words=task:copy,documents=300")
    both = replace(setup, text=DataConfig(data=data, held_out_share=0.3))
    text = corpus(both, tmp_path)
    tokenizer = load_tokenizer(text.folder / "tokenizer")

    def read(setup: Setup) -> str:
        rows = [np.asarray(stepped.fed.batch["tokens"]) for stepped in stepping(setup, text, lambda: None)]
        return tokenizer.backend.decode(np.stack(rows).reshape(-1).tolist())

    sums, words = (read(replace(both, reads=(label,))) for label in ("sums", "words"))
    assert "=" in sums
    assert "|" not in sums
    assert "|" in words
    assert "=" not in words
    assert "=" in (all_of_it := read(both))
    assert "|" in all_of_it
    assert spec(replace(both, reads=("sums",)), 0) != spec(both, 0)
    with pytest.raises(ValueError, match="reads 'letters', which its text has not: choose of sums, words"):
        replace(both, reads=("letters",))


def test_a_run_whose_first_setup_diverges_has_diverged(setup, text):
    bound = replace(setup.recipe, tokens=6 * 4 * 16, rate=replace(setup.recipe.rate, peak=1e38), max_skipped=2)
    found = carry_out(replace(setup, first=replace(setup, recipe=bound)), 4, text, lambda *_: None)
    assert 2 < found["diverged"] < 6
    assert (found["tokens"], found["curve"], found["evaluations"], found["probes"]) == (0, [], [], {})
    assert not (text.folder / "models" / f"{found['first']}-{text.hash}.npz").exists()


def test_what_a_setup_goes_on_with_is_a_part_of_its_hash(setup):
    later = replace(setup, first=setup)
    again = replace(later, first=replace(setup, recipe=replace(RECIPE, tokens=64)))
    assert len({spec(one, 0) for one in (setup, later, again)}) == 3
    assert later.seeded(5).first.recipe.seed == 5
    with pytest.raises(ValueError, match="goes on with what its first one trained"):
        replace(later, text=DataConfig())
    with pytest.raises(ValueError, match="sample masks must be the same"):
        replace(later, recipe=replace(RECIPE, sample_masks=True))
