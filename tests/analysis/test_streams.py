"""How far mixed streams are amplified, beside what the sublayers do one by one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, tiny_config

from deepseek_jax.analysis.streams import mixing, stream_gains
from deepseek_jax.configs.schema import HyperConnections
from deepseek_jax.core.params import map_variables
from deepseek_jax.model.residual import Streams

CFG = replace(tiny_config(mtp_depth=0), residual=HyperConnections(constrained=False))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 6)), jnp.int32)


def test_matrices_are_those_by_which_the_model_mixes(monkeypatch):
    """Every kind of layer, in the order of the model; the two calls of a layer see other streams."""
    seen, weights = [], Streams.weights

    def kept(self, x_BTHD, ctx):
        found = weights(self, x_BTHD, ctx)
        seen.append(found[2])
        return found

    @jax.jit
    def run(model):
        model(TOKENS)
        return seen

    # As many kinds of layers as layers, which then run one by one.
    cfg = replace(CFG, n_layers=2, n_dense_layers=1)
    model = random_model(cfg)
    monkeypatch.setattr(Streams, "weights", kept)
    used = run(model)
    monkeypatch.undo()
    assert len(used) == 4
    found = mixing(model, TOKENS)
    np.testing.assert_allclose(found, np.stack(used), rtol=1e-5, atol=1e-6)
    assert np.ptp(np.asarray(found), axis=(1, 2)).min() > 1e-4, "the matrices do not depend on the token"


def test_gains_are_those_of_the_products():
    """With matrices alike for all tokens, beside products in numpy."""
    rng = np.random.default_rng(1)
    H, S = CFG.residual.n_streams, 2 * CFG.n_layers
    mix_SHH = np.eye(H) + 0.3 * rng.normal(size=(S, H, H))

    def change(path, variable):
        if path[-2:-1] not in (("attn_streams",), ("ffn_streams",)):
            return variable
        value = np.array(variable.get_value())
        if path[-1] == "scale":
            value[:] = 0
        if path[-1] == "base":
            first = sum(len(stack.numbers) for stack in CFG.stacks[: path[1]])
            for i in range(len(value)):
                place = 2 * (first + i) + (path[-2] == "ffn_streams")
                value[i, 2 * H :] = mix_SHH[place].reshape(-1)
        return variable.replace(jnp.asarray(value))

    gains = stream_gains(map_variables(change, random_model(CFG)), TOKENS)
    product, forward, backward = np.eye(H), [], []
    for mix_HH in mix_SHH[::-1]:
        product = mix_HH @ product
        forward.insert(0, np.abs(product).sum(0).max())
        backward.insert(0, np.abs(product).sum(1).max())
    np.testing.assert_allclose(gains.forward_S, forward, rtol=1e-5)
    np.testing.assert_allclose(gains.backward_S, backward, rtol=1e-5)
    np.testing.assert_allclose(gains.single_forward_S, np.abs(mix_SHH).sum(1).max(-1), rtol=1e-5)
    np.testing.assert_allclose(gains.single_backward_S, np.abs(mix_SHH).sum(2).max(-1), rtol=1e-5)
    assert gains.largest == pytest.approx(max(*forward, *backward), rel=1e-5)


def test_one_stream_has_no_gain():
    with pytest.raises(ValueError, match="has one residual stream"):
        stream_gains(random_model(replace(CFG, residual=None)), TOKENS)
