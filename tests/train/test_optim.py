"""Optimizers against numbers computed by hand: who is a matrix, decay, moments, the size of a step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.params import decays, gain, named, named_variables, param
from deepseek_jax.core.partition import partition
from deepseek_jax.model.transformer import abstract
from deepseek_jax.train.muon import matrices
from deepseek_jax.train.optim import make, muon_matrix
from deepseek_jax.train.recipe import Optimizer

# A stacked leaf as a model has it: its own axes are the last two.
Q_A = param("float32", (1, 2), ("embed", "q_rank"), inputs=1)


def head(*shape: int) -> dict:
    return {"head": param("float32", shape, ("embed", "vocab"), inputs=1)}


# Every parameter of V3's architecture: the matrices that Muon orthogonalises, inputs x outputs behind what numbers
# them, written out from the published matrices; None: AdamW's. Only norms do not decay.
ATTENTION = {
    "attn_norm.weight": None,
    "attn.q_a": (256, 128),
    "attn.q_norm.weight": None,
    "attn.q_b": (128, 4 * 48),
    "attn.kv_a": (256, 80),
    "attn.kv_norm.weight": None,
    "attn.kv_b": (64, 4 * 64),
    "attn.o": (4 * 32, 256),
    "ffn_norm.weight": None,
}
EXPERTS = {
    "ffn.router.weight": (256, 16),
    "ffn.gate_up": (16, 2, 256, 64),
    "ffn.down": (16, 64, 256),
    "ffn.shared.gate_up": (2, 256, 64),
    "ffn.shared.down": (64, 256),
}
MODULE = {"embed_norm.weight": None, "hidden_norm.weight": None, "proj": (512, 256), "norm.weight": None}


def below(prefix: str, table: dict, *lead: int) -> dict:
    return {f"{prefix}.{name}": shape and (*lead, *shape) for name, shape in table.items()}


TINY_V3 = {
    "embed": None,
    **below("stacks.0", ATTENTION | {"ffn.gate_up": (2, 256, 320), "ffn.down": (320, 256)}, 1),
    **below("stacks.1", ATTENTION | EXPERTS, 4),
    "norm.weight": None,
    "head": None,
    **below("mtp.0", MODULE),
    **below("mtp.0.block", ATTENTION | EXPERTS),
}


def test_every_parameter_of_tiny_v3_is_moved_by_its_rule():
    """Heads together, gate and up apart, every expert and layer by itself; norms alone do not decay."""
    found, decayed = {}, {}
    for name, v in named_variables(partition(abstract(zoo("tiny-v3")))[0]).items():
        form, decayed[name] = muon_matrix(v, name), decays(v, name)
        found[name] = None if form is None else jax.eval_shape(partial(matrices, form=form), v.get_value()).shape
    assert found == TINY_V3
    assert {name for name in decayed if not decayed[name]} == {n for n in TINY_V3 if n.endswith("norm.weight")}


def test_a_parameter_of_a_new_name_moves_as_it_says():
    """Heads in front of an output, a matrix a head, biases and gains: what is said where it is made is what counts."""
    params = {
        "mixed": param("float32", (2, 3, 5), ("heads", "head_dim", "embed"), inputs=2),
        "each": param("float32", (2, 3, 5), ("heads", "head_dim", "embed"), inputs=1, apart=(0,)),
        "bias": param("float32", (2, 3), ("heads", "head_dim"), inputs=0, decay=False),
        "temperature": param("float32", (2,), ("heads",), inputs=0, decay=True),
        "still": param("float32", (3, 5), ("embed", "ffn"), inputs=1, decay=False),
        "table": param("float32", (7, 3), ("vocab", "embedding"), inputs=1),
    }
    values = {name: jnp.ones(v.shape) for name, v in named(params).items()}
    optimizer = make(Optimizer(muon=True, weight_decay=0.25), params)
    rng = np.random.default_rng(0)
    g = {name: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for name, v in values.items()}
    change, _ = optimizer.update(g, optimizer.init(values), values)
    moved = {n: -np.asarray(c) - (0.0 if n in ("bias", "still") else 0.25) for n, c in change.items()}
    for name in ("bias", "temperature", "table"):
        np.testing.assert_allclose(moved[name], np.sign(g[name]), rtol=1e-5)
    for name, shape in (("mixed", (1, 6, 5)), ("each", (2, 3, 5)), ("still", (1, 3, 5))):
        singular = np.linalg.svd(moved[name].reshape(shape), compute_uv=False)
        np.testing.assert_allclose(singular, 0.18 * max(shape[1:]) ** 0.5, rtol=0.02)


def test_a_parameter_that_says_nothing_is_an_error():
    params = head(2, 2) | {"sink": nnx.Param(jnp.zeros(2), axes=("heads",))}
    for cfg in (Optimizer(), Optimizer(muon=True)):
        with pytest.raises(ValueError, match=r"sink does not say .*core\.params\.param\(\.\.\., inputs=\.\.\., decay="):
            make(cfg, params)
    with pytest.raises(ValueError, match=r"\('heads',\) and no inputs has to say whether it decays"):
        param("float32", (2,), ("heads",), inputs=0)
    with pytest.raises(ValueError, match="cannot have 2 inputs"):
        param("float32", (2, 3), ("embed", "ffn"), inputs=2)
    with pytest.raises(ValueError, match="neither in front nor after the inputs"):
        param("float32", (2, 3, 2), ("embed", "ffn", None), inputs=1, apart=(2,))


def test_adamw_is_the_rule_and_decays_matrices_only():
    embedding = param("float32", (2, 2), ("vocab", "embedding"), inputs=1)
    params = {"embed": embedding, "norm.weight": gain("float32", 2, "embed")}
    values = {"embed": jnp.full((2, 2), 2.0), "norm.weight": jnp.full(2, 2.0)}
    optimizer = make(Optimizer(moments="float32"), params)
    gradients = [{"embed": jnp.full((2, 2), g), "norm.weight": jnp.full(2, g)} for g in (0.5, -0.1)]
    state = optimizer.init(values)
    for g in gradients:
        change, state = optimizer.update(g, state, values)
    m = (0.9 * 0.1 * 0.5 + 0.1 * -0.1) / (1 - 0.9**2)
    v = (0.95 * 0.05 * 0.25 + 0.05 * 0.01) / (1 - 0.95**2)
    step = m / (v**0.5 + 1e-8)
    np.testing.assert_allclose(change["norm.weight"], -step, rtol=1e-5)
    np.testing.assert_allclose(change["embed"], -step - 0.1 * 2.0, rtol=1e-5)


def test_epsilon_is_the_recipes():
    values = {"head": jnp.zeros((1, 1))}
    tiny = {"head": jnp.full((1, 1), 1e-12)}
    for eps, expected in ((1e-20, -1.0), (1e-12, -0.5)):
        optimizer = make(Optimizer(eps=eps), head(1, 1))
        change, _ = optimizer.update(tiny, optimizer.init(values), values)
        np.testing.assert_allclose(change["head"], expected, rtol=0.01)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_moments_are_kept_as_asked_and_steps_are_float32(moments):
    values = {"head": jnp.ones((2, 2)), "stacks.0.attn.q_a": jnp.ones((1, 2, 2))}
    for muon in (False, True):
        optimizer = make(Optimizer(muon=muon, moments=moments), head(2, 2) | {"stacks.0.attn.q_a": Q_A})
        state = optimizer.init(values)
        change, after = jax.jit(optimizer.update)(values, state, values)
        kept = [a.dtype for a in jax.tree.leaves(after) if jnp.issubdtype(a.dtype, jnp.floating)]
        # With Muon one parameter has two moments, the other a momentum in float32.
        assert sorted(map(str, kept)) == sorted([moments] * 2 + ["float32"] if muon else [moments] * 4)
        assert {a.dtype for a in change.values()} == {jnp.dtype("float32")}
        assert jax.tree.structure(after) == jax.tree.structure(state)


def test_bfloat16_moments_follow_float32_ones():
    rng = np.random.default_rng(0)
    values = {"head": jnp.zeros((64, 64))}
    rules = [make(Optimizer(moments=m), head(64, 64)) for m in ("float32", "bfloat16")]
    states = [rule.init(values) for rule in rules]
    updates = [jax.jit(rule.update) for rule in rules]
    for _ in range(20):
        g = {"head": jnp.asarray(rng.normal(0.3, 1, (64, 64)), jnp.float32)}
        (exact, states[0]), (rounded, states[1]) = (u(g, s, values) for u, s in zip(updates, states, strict=True))
    # A moment is rounded to 8 bits each step, and forgets earlier roundings as it forgets gradients.
    difference = np.linalg.norm(exact["head"] - rounded["head"]) / np.linalg.norm(exact["head"])
    assert difference < 0.01


def test_with_muon_every_parameter_moves_by_its_rule():
    rng = np.random.default_rng(0)
    values = {name: jnp.ones(shape) for name, shape in (("head", (4, 6)), ("stacks.0.attn.q_a", (2, 4, 6)))}
    optimizer = make(Optimizer(muon=True, weight_decay=0.1), head(4, 6) | {"stacks.0.attn.q_a": Q_A})
    g = {name: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for name, v in values.items()}
    change, _ = optimizer.update(g, optimizer.init(values), values)
    # AdamW's first step is the gradient's sign.
    np.testing.assert_allclose(change["head"], -np.sign(g["head"]) - 0.1, rtol=1e-5)
    singular = np.linalg.svd(np.asarray(change["stacks.0.attn.q_a"]) + 0.1, compute_uv=False)
    np.testing.assert_allclose(singular, 0.18 * 6**0.5, rtol=0.01)
