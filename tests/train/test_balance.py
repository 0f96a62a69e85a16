"""The router bias's update and the balance losses against numbers computed by hand."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.configs.schema import MoE
from deepseek_jax.core.params import variables
from deepseek_jax.model.outputs import Aux, Output
from deepseek_jax.train.balance import max_violation, router_bias, routing_entropy
from deepseek_jax.train.balance_loss import balance_losses, check_devices
from deepseek_jax.train.weights import LossWeights

CFG = tiny_config()
LOAD = jnp.array([[4, 0, 2, 2, 2, 2, 2, 2], [9, 1, 1, 1, 1, 1, 1, 1]], jnp.int32)
# Up below the mean of 2, down above it, unmoved on it.
MOVES = [[-1, 1, 0, 0, 0, 0, 0, 0], [-1, 1, 1, 1, 1, 1, 1, 1]]


def biases(rest):
    return np.asarray(rest.stacks[1].ffn.router.bias.get_value()), np.asarray(
        rest.mtp[0].block.ffn.router.bias.get_value()
    )


def test_each_bias_moves_by_the_speed_towards_balance():
    _, rest = dsj.partition(random_model(CFG))
    before, mtp_before = biases(rest)
    after, mtp_after = biases(dsj.update_router_bias(rest, LOAD, LOAD[1:], 0.001))
    np.testing.assert_allclose(after - before, 0.001 * np.array(MOVES), atol=1e-8)
    np.testing.assert_allclose(mtp_after - mtp_before, 0.001 * np.array(MOVES[1]), atol=1e-8)
    assert after.dtype == np.float32
    # Pure: the tree that was handed in is as it was.
    np.testing.assert_array_equal(biases(rest)[0], before)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("centred", [False, True])
def test_each_rule_goes_as_far_as_it_says(rule, centred):
    _, rest = dsj.partition(random_model(CFG))
    after = biases(dsj.update_router_bias(rest, LOAD, LOAD[1:], 0.01, rule=rule, centred=centred))
    # Table 3 of 2408.15664: u times the error, of the mean load of 2.
    errors = [[-1, 1, 0, 0, 0, 0, 0, 0], [-3.5, *[0.5] * 7]]
    step = 0.01 * np.array(MOVES if rule == "sign" else errors, float)
    if centred:
        step = step - step.mean(-1, keepdims=True)
    for now, before, moves in zip(after, biases(rest), (step, step[1]), strict=True):
        np.testing.assert_allclose(now - before, moves, atol=1e-7)
    still = biases(dsj.update_router_bias(rest, LOAD, LOAD[1:], 0.0, rule=rule, centred=centred))
    np.testing.assert_array_equal(still[0], biases(rest)[0])
    nothing = biases(dsj.update_router_bias(rest, 0 * LOAD, None, 0.01, rule=rule, centred=centred))
    np.testing.assert_array_equal(nothing[0], biases(rest)[0])


def test_an_unknown_rule_is_refused():
    _, rest = dsj.partition(random_model(CFG))
    with pytest.raises(ValueError, match=r"rule must be one of sign, proportional, not 'magnitude'\."):
        dsj.update_router_bias(rest, LOAD, None, 0.001, rule="magnitude")


def test_without_a_load_for_mtp_its_bias_stays():
    _, rest = dsj.partition(random_model(CFG))
    np.testing.assert_array_equal(biases(dsj.update_router_bias(rest, LOAD, None, 0.001))[1], biases(rest)[1])


def test_biases_that_are_not_chosen_keep_their_bytes():
    _, rest = dsj.partition(random_model(CFG))
    for moved, layers, mtp in (
        (lambda path: False, (False, False), False),
        (lambda path: (1,) if path == "stacks.1.ffn.router.bias" else False, (False, True), False),
        (lambda path: path.startswith("mtp."), (False, False), True),
        (lambda path: True, (True, True), True),
    ):
        after = biases(dsj.update_router_bias(rest, LOAD, LOAD[1:], 0.001, moved))
        for i, (value, before) in enumerate(zip(after[0], biases(rest)[0], strict=True)):
            assert (value.tobytes() != before.tobytes()) == layers[i]
        assert (after[1].tobytes() != biases(rest)[1].tobytes()) == mtp


def test_a_load_for_other_layers_is_refused():
    _, rest = dsj.partition(random_model(CFG))
    with pytest.raises(ValueError, match=r"load must have shape \(2, 8\)"):
        dsj.update_router_bias(rest, LOAD[:1], None, 0.001)
    with pytest.raises(ValueError, match=r"mtp_load must have shape \(1, 8\)"):
        dsj.update_router_bias(rest, LOAD, LOAD, 0.001)


def test_a_model_without_router_biases_stays_as_it_is():
    cfg = ARCHITECTURES["v2"]
    _, rest = dsj.partition(random_model(cfg))
    # All is trained: there is nothing else that could move.
    assert variables(dsj.update_router_bias(rest, LOAD, None, 0.001)) == variables(rest) == []
    with pytest.raises(ValueError, match=r"load must have shape \(2, 8\)"):
        dsj.update_router_bias(rest, LOAD[:1], None, 0.001)


def test_biases_of_all_layers_stand_below_each_other():
    _, rest = dsj.partition(random_model(CFG))
    np.testing.assert_array_equal(router_bias(rest), biases(rest)[0])
    assert router_bias(rest).shape == (2, 8)


def test_max_violation():
    np.testing.assert_allclose(max_violation(LOAD), [1.0, 3.5])


def test_routing_entropy():
    load = jnp.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]], jnp.int32)
    np.testing.assert_allclose(routing_entropy(load), [np.log(4), 0, np.log(2)], atol=1e-6)


MOE = MoE(n_experts=8, top_k=2, expert_dim=4, n_groups=4, top_groups=2)


def random_aux(L=2, B=3, T=12, seed=0) -> tuple[Aux, np.ndarray]:
    """Two experts a token by score, some padding, the last row padding alone; and the normalised scores."""
    rng = np.random.default_rng(seed)
    score = rng.random((L, B, T, 8)).astype(np.float32)
    score /= score.sum(-1, keepdims=True)
    index = np.argsort(-score, axis=-1)[..., :2].astype(np.int32)
    index[:, 0, 9:] = index[:, -1] = -1
    score[:, 0, 9:] = score[:, -1] = 0
    load = np.stack([np.bincount(i[i >= 0].ravel(), minlength=8) for i in index])
    balance = {"sequence": jnp.asarray(rng.random((L, B)) * (np.arange(B) < B - 1), jnp.float32)}
    arrays = jnp.asarray(index), jnp.asarray(load), balance, jnp.asarray(score.sum(2)), jnp.zeros(L, jnp.int32)
    return Aux(*arrays), score


def by_hand(aux: Aux, score: np.ndarray, layer: int, rows: list[int]) -> dict[str, float]:
    """Each term over the tokens of ``rows`` taken together, by loops, from the papers' sums over tokens."""
    index = np.concatenate([np.asarray(aux.expert_index[layer, b]) for b in rows])
    share = np.concatenate([score[layer, b] for b in rows])
    kept = index[:, 0] >= 0
    index, share = index[kept], share[kept]
    T, E, G, K, M = len(index), 8, 4, 2, 2
    f = [E / (K * T) * sum(e in token for token in index) for e in range(E)]
    p = share.mean(0)
    groups = [range(2 * g, 2 * g + 2) for g in range(G)]
    sent = [G / (M * T) * sum(any(e in token for e in group) for token in index) for group in groups]
    return {
        "expert": sum(f[e] * p[e] for e in range(E)),
        "device": sum(np.mean([f[e] for e in group]) * sum(p[e] for e in group) for group in groups),
        "communication": sum(sent[g] * sum(p[e] for e in group) for g, group in enumerate(groups)),
    }


def test_terms_are_the_papers_sums():
    aux, score = random_aux()
    out = Output(hidden=jnp.zeros(()), logits=None, aux=aux)
    weights = LossWeights(
        balance=0.5, batch_balance=1.0, expert_balance=2.0, device_balance=3.0, communication_balance=4.0
    )
    total, terms = balance_losses(out, MOE, weights, jnp.array([2.0]), jnp.array([21.0]))
    rows = [[by_hand(aux, score, layer, [b]) for b in range(2)] for layer in range(2)]
    expected = {name: sum(np.mean([row[name] for row in layer]) for layer in rows) for name in rows[0][0]}
    # The batch-wise term is the expert-level one with the batch as one sequence.
    expected["batch"] = sum(by_hand(aux, score, layer, [0, 1])["expert"] for layer in range(2))
    expected["sequence"] = float(aux.balance["sequence"].sum()) / 2
    assert {n: float(t) for n, t in terms.items()} == {n: pytest.approx(t, rel=1e-5) for n, t in expected.items()}
    factors = {"sequence": 0.5, "batch": 1.0, "expert": 2.0, "device": 3.0, "communication": 4.0}
    np.testing.assert_allclose(total, sum(factors[n] * t for n, t in expected.items()), rtol=1e-5)


def test_balanced_choices_give_one_a_layer():
    # Every expert is chosen by as many tokens and every device is sent as many.
    index = np.array([[[[0, 2], [4, 6], [1, 3], [5, 7]]]], np.int32)
    aux = Aux(jnp.asarray(index), jnp.ones((1, 8), jnp.int32), {}, jnp.full((1, 1, 8), 0.5), jnp.zeros(1, jnp.int32))
    weights = LossWeights(balance=0, batch_balance=1, expert_balance=1, device_balance=1, communication_balance=1)
    _, terms = balance_losses(Output(jnp.zeros(()), None, aux=aux), MOE, weights, jnp.ones(1), jnp.full(1, 4.0))
    assert {n: float(t) for n, t in terms.items()} == dict.fromkeys(terms, pytest.approx(1.0))
    assert set(terms) == {"batch", "expert", "device", "communication"}


@pytest.mark.parametrize("names", [{"sequence"}, {"batch"}, {"batch", "expert"}, {"sequence", "expert"}])
def test_terms_of_weight_0_are_left_out_and_ask_for_no_devices(names):
    aux, _ = random_aux()
    given = {"balance" if name == "sequence" else f"{name}_balance": 1.0 for name in names}
    weights, plain = LossWeights(**{"mtp": 0, "balance": 0} | given), replace(MOE, n_groups=1, top_groups=1)
    assert (
        set(balance_losses(Output(jnp.zeros(()), None, aux=aux), plain, weights, jnp.ones(1), jnp.ones(1))[1]) == names
    )


def test_terms_of_parts_add_up_but_for_the_batch_wise_one():
    aux, _ = random_aux(B=4)
    weights = LossWeights(balance=1, batch_balance=1, expert_balance=1, device_balance=1, communication_balance=1)
    rows, tokens = jnp.array([3.0]), jnp.array([33.0])

    def terms(part):
        cut = replace(
            aux,
            expert_index=aux.expert_index[:, part],
            share=aux.share[:, part],
            balance={"sequence": aux.balance["sequence"][:, part]},
        )
        return balance_losses(Output(jnp.zeros(()), None, aux=cut), MOE, weights, rows, tokens)[1]

    whole, first, second = terms(slice(0, 4)), terms(slice(0, 2)), terms(slice(2, 4))
    for name in ("sequence", "expert", "device", "communication"):
        np.testing.assert_allclose(first[name] + second[name], whole[name], rtol=1e-5)
    assert abs(float(first["batch"] + second["batch"] - whole["batch"])) > 1e-3


def test_devices_that_do_not_fit_are_refused():
    out = Output(jnp.zeros(()), None, aux=random_aux()[0])
    one = jnp.ones(1)
    for weights, moe, message in (
        (LossWeights(device_balance=1), replace(MOE, n_groups=1, top_groups=1), "devices=1 does not do"),
        (LossWeights(device_balance=1, devices=3), MOE, "devices=3 does not do"),
        (LossWeights(communication_balance=1, devices=2), MOE, "4 groups: devices=2"),
    ):
        with pytest.raises(ValueError, match=message):
            balance_losses(out, moe, weights, one, one)
        with pytest.raises(ValueError, match=message):
            check_devices(moe, weights)
    check_devices(None, LossWeights(device_balance=1))
    check_devices(replace(MOE, n_groups=1, top_groups=1), LossWeights(balance=1, expert_balance=1))
    # DeepSeekMoE's router has no groups, its experts lie on 4 devices all the same.
    plain = replace(MOE, n_groups=1, top_groups=1)
    assert "device" in balance_losses(out, plain, LossWeights(device_balance=1, devices=4), one, one)[1]
