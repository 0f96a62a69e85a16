"""The expert-, device- and communication-level losses: their values at balance and collapse, and what each one sees."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.configs.schema import MoE
from deepseek_jax.model.outputs import Aux, Output
from deepseek_jax.train.balance_loss import balance_losses
from deepseek_jax.train.weights import LossWeights

# V2's shape in small: 8 experts on 4 devices, 2 a token, from at most 2 devices.
MOE = MoE(n_experts=8, top_k=2, expert_dim=4, n_groups=4, top_groups=2)
WEIGHTS = LossWeights(mtp=0, balance=0, expert_balance=1, device_balance=1, communication_balance=1)


def terms(index, score, weights=WEIGHTS) -> dict[str, float]:
    """The terms of one row of tokens with these experts and these scores, [T, K] and [T, E]."""
    index, score = jnp.asarray(index), jnp.asarray(score, jnp.float32)
    aux = Aux(
        expert_index=index[None, None],
        load=jnp.bincount(index.reshape(-1), length=8)[None],
        balance={},
        share=score.sum(0)[None, None],
        dropped=jnp.zeros(1, jnp.int32),
    )
    out = Output(jnp.zeros(()), None, aux=aux)
    return balance_losses(out, MOE, weights, jnp.ones(1), jnp.full(1, float(len(index))))[1]


def uniform(tokens: int) -> np.ndarray:
    return np.full((tokens, 8), 1 / 8)


def test_every_term_is_one_at_balance():
    index = [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert {n: float(t) for n, t in terms(index, uniform(4)).items()} == {
        "expert": pytest.approx(1),
        "device": pytest.approx(1),
        "communication": pytest.approx(1),
    }


def test_a_row_of_one_token_counts_in_full():
    # Its two experts have f = 8 / 2 and P = 1 / 8 each.
    assert float(terms([[0, 2]], uniform(1))["expert"]) == pytest.approx(1)


def test_collapse_onto_one_device_costs_what_the_papers_sums_say():
    # All tokens choose both experts of device 0, with all of the score: f is 8 / 2 there, f' 4, f'' 4 / 2.
    score = np.zeros((4, 8))
    score[:, :2] = 0.5
    found = terms([[0, 1]] * 4, score)
    assert {n: float(t) for n, t in found.items()} == {
        "expert": pytest.approx(4),
        "device": pytest.approx(4),
        "communication": pytest.approx(2),
    }


def test_the_device_term_does_not_see_imbalance_within_a_device():
    # The first expert of each device takes every choice.
    index = [[0, 2], [4, 6]] * 2
    score = np.zeros((4, 8))
    score[:, ::2] = 0.25
    found = terms(index, score)
    assert float(found["device"]) == pytest.approx(1)
    assert float(found["expert"]) == pytest.approx(2)


def test_the_communication_term_counts_a_token_once_a_device():
    # Device 0 gets as many choices as the others together, but no more tokens.
    index = [[0, 1], [0, 1], [2, 4], [2, 6]]
    score = np.zeros((4, 8))
    score[:, :2] = 0.5
    found = terms(index, score)
    # Two of four tokens are sent to device 0: f'' = 4 / (2 * 4) * 2. Four of its two experts' eight choices: f' = 2.
    assert float(found["communication"]) == pytest.approx(1)
    assert float(found["device"]) == pytest.approx(2)


@pytest.mark.parametrize("name", ["expert", "device", "communication"])
def test_the_gradient_pushes_the_busy_down_and_only_through_the_scores(name):
    weights = replace(LossWeights(mtp=0, balance=0), **{f"{name}_balance": 1.0})
    index = jnp.array([[0, 2], [0, 2], [0, 4], [0, 6]])

    def value(logit):
        return terms(index, jax.nn.softmax(logit), weights)[name]

    gradient = np.asarray(jax.grad(value)(jnp.zeros((4, 8))))
    # Descent lowers the scores of the busiest expert, or of its device's, and raises those of the idle.
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 7] < 0).all()
    if name != "expert":
        np.testing.assert_allclose(gradient[:, 0], gradient[:, 1], rtol=1e-6)
