"""V4's networks of experts: hash layers, sqrt-softplus and cut-off SwiGLU against transformers, and what moves in them.

Beside whole models, which tests/model compares: modules alone, tables, training.
"""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from reference import relative
from tiny import random_model, random_tokens, tiny_config, tokens_of
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock

import deepseek_jax as dsj
from deepseek_jax.configs import schema
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import HashTable, drawn_table, hash_table, is_trained, named, named_variables
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.router import KnockOut
from deepseek_jax.runs.checkpoint import Checkpoints
from deepseek_jax.train import balance
from deepseek_jax.train.lora import adapt
from deepseek_jax.train.objective import Knobs, NextToken
from deepseek_jax.train.schedule import Setting
from deepseek_jax.train.step import start, train_step
from deepseek_jax.train.tuning import LoRA

E, K, D, F, V = 16, 3, 24, 20, 50
# Small enough that it cuts off a good part of both factors.
LIMIT = 0.7
MOE = schema.MoE(E, K, F, scale=1.5, score="sqrtsoftplus", limit=LIMIT)
# V3's attention with V4's experts: the first layer's by token, those of two others and of the MTP module by score.
CFG = tiny_config(
    n_layers=3,
    n_dense_layers=0,
    moe=replace(tiny_config().moe, n_groups=1, top_groups=1, score="sqrtsoftplus", n_hash=1, limit=LIMIT),
)


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.mark.parametrize("hashed", [False, True], ids=["scores", "hash"])
def test_the_layer_and_its_gradients_equal_transformers(hashed):
    rng = np.random.default_rng(0)
    cfg = replace(MOE, n_hash=int(hashed)).at(0)
    ours, weights = MoE(cfg, D, jnp.float32, V), {}
    for name, variable in named_variables(ours).items():
        shape = variable.get_value().shape
        fan = 1 if name == "router.bias" else shape[-2] if name.endswith("down") else D
        value = rng.normal(0, fan**-0.5, shape).astype(np.float32)
        if isinstance(variable, HashTable):
            value = rng.random((V, E)).argsort(-1)[:, :K].astype(np.int32)
        variable.set_value(jnp.asarray(value))
        weights[name] = value
    theirs = DeepseekV4SparseMoeBlock(
        SimpleNamespace(
            mlp_layer_types=["hash_moe" if hashed else "moe"],
            num_experts_per_tok=K,
            num_local_experts=E,
            hidden_size=D,
            intermediate_size=F,
            vocab_size=V,
            scoring_func="sqrtsoftplus",
            routed_scaling_factor=cfg.scale,
            hidden_act="silu",
            mlp_bias=False,
            swiglu_limit=LIMIT,
            _experts_implementation="eager",
        ),
        0,
    )
    # Of each of our weights: where theirs is and how it lies there.
    there = {
        "router.weight": ("gate.weight", lambda a: a.T),
        "gate_up": ("experts.gate_up_proj", lambda a: a.transpose(0, 2, 3, 1).reshape(E, 2 * F, D)),
        "down": ("experts.down_proj", lambda a: a.transpose(0, 2, 1)),
        "shared.gate_up": (("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"), lambda a: a.T),
        "shared.down": ("shared_experts.down_proj.weight", lambda a: a.T),
    }

    def spread(values):
        found = {}
        for name, (their, arrange) in there.items():
            if name == "shared.gate_up":
                found |= {n: arrange(values[name][:, i]) for i, n in enumerate(their)}
            else:
                found[their] = arrange(values[name])
        return found

    state = {name: torch.tensor(np.ascontiguousarray(a)) for name, a in spread(weights).items()}
    chosen_by = ("gate.tid2eid", "router.table") if hashed else ("gate.e_score_correction_bias", "router.bias")
    chooser = torch.tensor(weights[chosen_by[1]])
    theirs.load_state_dict(state | {chosen_by[0]: chooser.long() if hashed else chooser})

    # The chosen scores' margin is far from rounding: no near-tie among these tokens.
    x, ids, dy = rng.normal(0, 2, (2, 40, D)), rng.integers(0, V, (2, 40)), rng.normal(0, 1, (2, 40, D))
    tokens = tokens_of(np.ones((2, 40)), jnp.asarray(ids, jnp.int32))
    params, rest = partition(ours)

    @jax.jit
    def run(params, x, dy):
        def f(params, x):
            y, aux, _ = combine(params, rest)(x, tokens, DEFAULT)
            return y, aux.expert_index

        y, back, index = jax.vjp(f, params, x, has_aux=True)
        return y, index, *back(dy)

    y, index, d_params, dx = run(params, jnp.asarray(x, jnp.float32), jnp.asarray(dy, jnp.float32))
    x_torch = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    ids_torch = torch.tensor(ids)
    inputs = (x_torch, ids_torch) if hashed else (x_torch,)
    with torch.no_grad():
        their_index = theirs.gate(*inputs)[-1].reshape(2, 40, K)
    np.testing.assert_array_equal(np.sort(index, -1), np.sort(their_index, -1))
    out = theirs(*inputs)
    assert relative(y, out.detach()) <= 2e-6
    out.backward(torch.tensor(dy, dtype=torch.float32))
    found = spread({name: np.asarray(a) for name, a in named(d_params).items()})
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) <= 1e-4, name
    assert relative(dx, x_torch.grad) <= 1e-4
    # It cuts off: without it the layer returns something else.
    ours.cfg, ours.shared.limit = replace(cfg, limit=None), None
    assert relative(jax.jit(lambda: ours(jnp.asarray(x, jnp.float32), tokens, DEFAULT)[0])(), out.detach()) > 0.05


def test_a_fresh_table_is_balanced_and_follows_from_key_name_and_layer():
    draw = jax.jit(lambda key, layers: drawn_table(hash_table(100, 6, 16), key, "layers.ffn.router.table", layers))
    table = np.asarray(draw(jax.random.key(0), jnp.arange(3)).get_value())
    assert (table.shape, table.dtype) == ((3, 100, 6), np.int32)
    assert all(len(set(token)) == 6 for token in table.reshape(-1, 6).tolist())
    # Of each 16 ids every expert has 6; of the last 4, which are no whole run, it has at most that.
    for layer in table:
        for run in range(6):
            assert (np.bincount(layer[run * 16 : (run + 1) * 16].ravel(), minlength=16) == 6).all()
        assert len({tuple(sorted(token)) for token in layer.tolist()}) > 90
    np.testing.assert_array_equal(draw(jax.random.key(0), jnp.array([2])).get_value()[0], table[2])
    assert (table[0] != table[1]).mean() > 0.8
    assert (table[0] != draw(jax.random.key(1), jnp.array([0])).get_value()[0]).mean() > 0.8


def test_a_table_is_state_that_no_one_trains_or_casts(model):
    name = "stacks.0.ffn.router.table"
    params, rest = partition(model)
    assert name not in named(params)
    assert name in named(rest)
    assert not is_trained(named_variables(model)[name])
    assert named(combine(params, rest)).keys() == named(model).keys()
    fresh = dsj.init(CFG, jax.random.key(0), jnp.bfloat16)
    assert named(fresh)[name].dtype == jnp.int32
    assert "stacks.0.ffn.router.bias" not in named(fresh)
    adapted = partition(adapt(model, LoRA(rank=2, targets=("*",))))
    assert name in named(adapted[1])


@jax.jit
def forward(model, tokens, segments, routing=None):
    return model(tokens, segments=segments, routing=routing, with_mtp=True)


def test_a_token_has_its_experts_wherever_it_stands(model):
    """In packed rows, behind padding and step by step: the table's; MTP's module goes by its scores."""
    tokens = random_tokens(CFG, 2, 24)
    segments = jnp.ones((2, 24), jnp.int32).at[0, :5].set(0).at[1, 11:].set(2)
    out = forward(model, tokens, segments)
    table = np.asarray(model.stacks[0].ffn.router.table.get_value()[0])
    expected = np.where(np.asarray(segments)[..., None] != 0, table[np.asarray(tokens)], -1)
    np.testing.assert_array_equal(out.aux.expert_index[0], expected)
    assert (np.asarray(out.aux.expert_index[1:, :, 5:]) != expected[:, 5:]).mean() > 0.5
    step = jax.jit(lambda token, segment, cache: model(token, segments=segment, cache=cache))
    cache, logits = model.init_cache(2, 24), []
    for i in range(24):
        one = step(tokens[:, i : i + 1], (segments[:, i : i + 1] == 1).astype(jnp.int32), cache)
        np.testing.assert_array_equal(
            one.aux.expert_index[0, :, 0], np.where(segments[:, i] == 1, expected[:, i].T, -1).T
        )
        cache, logits = one.cache, [*logits, one.logits]
    seen = np.asarray(segments) == 1
    assert relative(np.concatenate(logits, 1)[seen], np.asarray(out.logits)[seen]) <= 2e-5


def test_a_hash_layers_experts_may_be_replayed_and_not_knocked_out(model):
    tokens, ones = random_tokens(CFG, 1, 8), jnp.ones((1, 8), jnp.int32)
    given = jnp.broadcast_to(jnp.array([7, -1]), (3, 1, 8, 2))
    np.testing.assert_array_equal(forward(model, tokens, ones, given).aux.expert_index, given)
    with pytest.raises(ValueError, match=r"in a hash layer a token's id says its experts"):
        forward(model, tokens, ones, KnockOut(jnp.zeros((3, 8), bool)))


def test_a_hash_layer_takes_part_in_no_balance_loss(model):
    out = forward(model, random_tokens(CFG, 2, 24), jnp.ones((2, 24), jnp.int32))
    for term in (out.aux.balance["sequence"], out.aux.share):
        assert (term[0] == 0).all()
        assert (term[1:] > 0).all()
    assert (out.aux.load.sum(-1) == 2 * 24 * CFG.moe.top_k).all()


@pytest.mark.slow
def test_a_step_moves_biases_of_layers_that_choose_and_no_table(model, tmp_path):
    """And a run goes on from its checkpoint with the same table."""
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-1.0))
    objective = NextToken(dsj.LossWeights(balance=0.01, expert_balance=0.01), CFG.mtp_depth)
    knobs = Knobs.of(Setting(1e-2, 0.01, 0.3, 1, rows=0))

    @jax.jit
    def step(state, batch):
        return train_step(state, batch, knobs, optimizer=optimizer, objective=objective, ctx=Context())

    batch = {"tokens": np.asarray(random_tokens(CFG, 4, 24))[None]}
    begun = start(model, optimizer, average=False)
    state, metrics = step(begun, batch)
    name = "stacks.0.ffn.router.table"
    before, after = named(begun.model), named(state.model)
    np.testing.assert_array_equal(after[name], before[name])
    assert not [n for n, v in before.items() if n != name and (np.asarray(after[n]) == np.asarray(v)).all()]
    # A row an MoE layer, also of the biases: of a layer that has none, 0.
    assert metrics["load"].shape == metrics["bias"].shape == (3, 8)
    assert (metrics["bias"][0] == 0).all()
    np.testing.assert_array_equal(metrics["bias"][1:], after["stacks.1.ffn.router.bias"])
    load, moved = np.asarray(metrics["load"]), after["stacks.1.ffn.router.bias"] - before["stacks.1.ffn.router.bias"]
    np.testing.assert_allclose(moved, 0.01 * np.sign(load.mean(-1, keepdims=True) - load)[1:], atol=1e-7)
    table = np.asarray(before[name][0])
    np.testing.assert_array_equal(load[0], np.bincount(table[batch["tokens"][0]].ravel(), minlength=8))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {}, {})
    checkpoints.close()
    found = Checkpoints(tmp_path).restore(jax.eval_shape(lambda: state)).state
    restored = named(found.model)
    assert restored[name].dtype == jnp.int32
    assert np.asarray(restored[name]).tobytes() == np.asarray(after[name]).tobytes()
    assert float(step(found, batch)[1]["loss"]) == float(step(state, batch)[1]["loss"])


def test_rows_of_loads_and_biases_are_those_of_layers_that_alternate():
    cfg = zoo("tiny-v4")
    stacks = [number for number, stack in enumerate(cfg.stacks) if len(stack.numbers) > 1]
    assert any(cfg.stacks[number].numbers.step == 2 for number in stacks)
    rows = np.arange(cfg.n_moe_layers)
    for number, stack in enumerate(cfg.stacks):
        found = rows[balance._rows(cfg, number)].tolist()
        assert found == [cfg.moe_layers.index(layer) for layer in stack.numbers]
    # Each layer's bias is its number, but for hash layers, which have none.
    each = [
        jnp.broadcast_to(jnp.float32(list(s.numbers))[:, None], (len(s.numbers), cfg.moe.n_experts)) for s in cfg.stacks
    ]

    def router(stack, bias):
        held = SimpleNamespace(get_value=lambda: bias) if stack.layer.ffn.bias else None
        return SimpleNamespace(ffn=SimpleNamespace(router=SimpleNamespace(bias=held)))

    rest = SimpleNamespace(cfg=cfg, stacks=[router(s, b) for s, b in zip(cfg.stacks, each, strict=True)])
    expected = [0 if cfg.layers[n].ffn.n_hash else n for n in cfg.moe_layers]
    np.testing.assert_array_equal(balance.router_bias(rest)[:, 0], expected)
