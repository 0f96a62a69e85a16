"""Hyper-connections: mHC's against transformers' modules, and in a V3; the baseline without the constraint."""

import importlib.util
import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import forward, relative
from tiny import random_model, random_tokens, tiny_config

from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.schema import HyperConnections
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.core.params import decays, map_variables, named, named_variables, unstack
from deepseek_jax.core.partition import combine, partition
from deepseek_jax.model.residual import READ, Collapse, Streams, doubly_stochastic
from deepseek_jax.model.transformer import abstract, init
from deepseek_jax.train.loss import loss
from deepseek_jax.train.optim import muon_matrix

MHC, HC = HyperConnections(), HyperConnections(constrained=False)
V3 = tiny_config(mtp_depth=2)
CFG = replace(V3, residual=MHC)
B, T, H, D = 2, 6, 4, CFG.dim
TOKENS = random_tokens(CFG, 2, 24)


def modules():
    """A sublayer's hyper-connection and a collapse with random weights, transformers' with the same, and streams."""
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)  # noqa: E731
    theirs_cfg = DeepseekV4Config(hidden_size=D, hc_mult=H, rms_norm_eps=CFG.norm_eps)
    assert (theirs_cfg.hc_sinkhorn_iters, theirs_cfg.hc_eps) == (MHC.sinkhorn_steps, MHC.eps)
    ours, theirs = (
        [Streams(CFG, 0), Collapse(CFG)],
        [DeepseekV4HyperConnection(theirs_cfg), DeepseekV4HyperHead(theirs_cfg)],
    )
    for own, other, names in zip(
        ours, theirs, (("fn", "base", "scale"), ("hc_fn", "hc_base", "hc_scale")), strict=True
    ):
        for name, leaf in zip(names, (own.map, own.base, own.scale), strict=True):
            value = draw(*leaf.get_value().shape) * (leaf.get_value().shape[0] ** -0.5 if name.endswith("fn") else 1)
            leaf.set_value(jnp.asarray(value))
            getattr(other, name).data = torch.tensor(value.T.copy())
    return ours, theirs, draw(B, T, H, D), draw(B, T, D)


def test_streams_and_their_gradients_are_the_references():
    # v4_hyper_connections C1
    """Read, write and collapse one after the other; gradients of the streams, the output and every weight."""
    (streams, collapse), (connection, head), x, out = modules()
    direction = [
        np.random.default_rng(i).normal(0, 1, s).astype(np.float32)
        for i, s in enumerate([x.shape, out.shape, out.shape])
    ]

    @jax.jit
    def ours(streams, collapse, x, out):
        def run(streams, collapse, x, out):
            read, back = streams.read(x, DEFAULT)
            written = streams.write(x, out, back, DEFAULT)
            return written, read, collapse(written, DEFAULT)

        found, back = jax.vjp(run, streams, collapse, x, out)
        return found, back(tuple(jnp.asarray(d) for d in direction))

    found, (of_streams, of_collapse, *of_inputs) = ours(streams, collapse, jnp.asarray(x), jnp.asarray(out))
    x, out = (torch.tensor(a, requires_grad=True) for a in (x, out))
    with torch.enable_grad():
        post, comb, read = connection(x)
        # As the reference's decoder layer writes.
        written = post.unsqueeze(-1) * out.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)
        expected = [written, read, head(written)]
        sum((a * torch.tensor(d)).sum() for a, d in zip(expected, direction, strict=True)).backward()
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b.detach().numpy()) <= 2e-5
    theirs = [connection.fn, connection.base, connection.scale, head.hc_fn, head.hc_base, head.hc_scale, x, out]
    mine = [getattr(m, leaf).get_value() for m in (of_streams, of_collapse) for leaf in ("map", "base", "scale")]
    for a, b in zip([*mine, *of_inputs], theirs, strict=True):
        a, b = np.asarray(a), b.grad.numpy()
        b = b.T if a.shape != b.shape else b
        assert np.linalg.norm(b) > 0
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_what_is_mixed_keeps_its_sum():
    # v4_hyper_connections C2
    """After 20 steps columns add up to 1 but for eps, rows to 2e-4 from logits of deviation 1."""
    rng = np.random.default_rng(1)
    hard = jax.nn.softmax(jnp.asarray(rng.normal(0, 1, (500, 4, 4)), jnp.float32)) + MHC.eps
    mix = np.asarray(jax.jit(lambda m: doubly_stochastic(m, MHC))(hard))
    assert np.abs(mix.sum(-2) - 1).max() <= 2e-6
    assert np.abs(mix.sum(-1) - 1).max() <= 2e-4
    assert np.median(np.abs(mix.sum(-1) - 1).max(-1)) <= 2e-6
    # One step is of columns alone, and the second begins with rows.
    once, twice = (np.asarray(doubly_stochastic(hard, replace(MHC, sinkhorn_steps=n))) for n in (1, 2))
    np.testing.assert_allclose(once.sum(-2), 1, atol=1e-5)
    assert np.abs(once.sum(-1) - 1).max() > 0.1
    rows = once / (once.sum(-1, keepdims=True) + MHC.eps)
    np.testing.assert_allclose(twice, rows / (rows.sum(-2, keepdims=True) + MHC.eps), atol=1e-6)
    # So the largest of a product of many cannot grow, which is what the constraint is for (eq. 4 to 6).
    product = mix[0]
    for other in mix[1:]:
        product = product @ other
    assert np.abs(product).sum(-2).max() <= 1 + 1e-4


@cache
def streamed(residual=MHC, seed=0):
    return random_model(replace(V3, residual=residual), seed)


def plain_of(model):
    """V3 with the weights that both have; an MTP module's projection has the two of the streams' side by side."""
    held = named(model)

    def fill(path, v):
        name = ".".join(map(str, path))
        if path[-1] != "proj":
            return v.replace(held[name])
        return v.replace(jnp.concatenate([held[name.replace("proj", f"{part}_proj")] for part in ("embed", "hidden")]))

    return map_variables(fill, abstract(replace(model.cfg, residual=None)))


def as_one_stream(model):
    """Streams that stay copies: each is written to with a weight of 1, and read with weights that add up to 1. The
    norms whose results MTP reads in one of both models only are 1."""
    r = model.cfg.residual
    H = r.n_streams
    if r.constrained:
        # The sigmoid of 1 / H; of a single stream nearly 1. How copies mix does not matter.
        mix = np.random.default_rng(0).normal(0, 1, H * H)
        base = np.concatenate([np.full(H, -np.log(max(H - 1, 1e-3))), np.zeros(H), mix])
    else:
        base = np.concatenate([np.full(H, 1 / H), np.ones(H), np.eye(H).reshape(-1)])

    def fill(path, v):
        shape = v.get_value().shape
        if path[-2:] == ("norm", "weight"):
            value = 1.0
        elif not {"attn_streams", "ffn_streams", "collapse"} & set(path):
            return v
        else:
            value = base[: shape[-1]] if path[-1] == "base" else 0.0
        return v.replace(jnp.broadcast_to(jnp.asarray(value, jnp.float32), shape))

    return map_variables(fill, model)


ONE = pytest.param(replace(MHC, n_streams=1), id="one stream", marks=pytest.mark.slow)


@pytest.mark.parametrize("residual", [pytest.param(MHC, id="mhc"), ONE, pytest.param(HC, id="hc")])
def test_streams_that_stay_copies_are_a_plain_residual(residual):
    """And MTP on streams, a module on the one before, is V3's."""
    model = as_one_stream(streamed(residual))
    ours, theirs = forward(model, TOKENS, with_mtp=True), forward(plain_of(model), TOKENS, with_mtp=True)
    assert ours.streams.shape == (2, 24, *model.cfg.stream_shape)
    for a, b in zip((ours.logits, *ours.mtp_logits), (theirs.logits, *theirs.mtp_logits), strict=True):
        assert relative(a, b) <= 2e-5
    np.testing.assert_array_equal(ours.aux.expert_index, theirs.aux.expert_index)


def test_decoding_with_a_cache_equals_the_full_forward():
    model, prompt = streamed(), 20
    whole = forward(model, TOKENS, with_mtp=True)
    out = forward(model, TOKENS[:, :prompt], cache=model.init_cache(2, 32), with_mtp=True)
    found = [(out.logits, out.streams)]
    for i in range(prompt, TOKENS.shape[1]):
        out = forward(model, TOKENS[:, i : i + 1], cache=out.cache)
        found.append((out.logits, out.streams))
    logits, streams = (jnp.concatenate(parts, 1) for parts in zip(*found, strict=True))
    assert relative(logits, whole.logits) <= 2e-5
    assert relative(streams, whole.streams) <= 2e-5


def with_idle_modules(model):
    """MTP modules whose layers add nothing and leave each stream as it is (but for eps)."""

    def fill(path, v):
        value = v.get_value()
        if path[0] != "mtp" or "block" not in path:
            return v
        if path[-1] in ("o", "down", "scale"):
            value = jnp.zeros_like(value)
        elif path[-1] == "base":
            value = jnp.concatenate([jnp.zeros(2 * H), 50 * jnp.eye(H).reshape(-1)])
        return v.replace(value)

    return map_variables(fill, model)


def test_captured_streams_are_those_that_are_handed_on():
    """To the collapse, and to MTP: a module reads the model's streams, the next one its own."""
    model = with_idle_modules(streamed())
    out = forward(model, TOKENS, with_mtp=True, capture=("block", "block_norm"))
    block = np.asarray(out.captured["block"])
    assert block.shape == (3, 2, 24, H, D)
    np.testing.assert_array_equal(block[-1], out.streams)
    np.testing.assert_allclose(out.captured["block_norm"], np.sqrt(np.square(block).mean((-2, -1))), rtol=1e-5)
    # They have grown apart.
    assert np.abs(block - block.mean(-2, keepdims=True)).max() > 0.1 * np.abs(block).max()
    carry = block[-1]
    for depth, module in enumerate(model.mtp):
        known = slice(0, 23 - depth)
        embedding = model.embed.get_value()[TOKENS[:, 1 + depth :]]
        read = module.hidden_norm(jnp.asarray(carry[:, known])) @ module.hidden_proj.get_value()
        expected = (module.embed_norm(embedding) @ module.embed_proj.get_value())[:, :, None] + read
        streams = out.mtp_captured["block"][depth]
        hidden = module.norm(module.collapse(streams, DEFAULT))
        assert relative(out.mtp_hidden[depth][:, known], hidden[:, known]) <= 1e-5
        assert not np.asarray(out.mtp_hidden[depth][:, known.stop :]).any()
        carry = np.asarray(streams)
        assert relative(carry[:, known], expected) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("residual", [pytest.param(MHC, id="mhc"), pytest.param(HC, id="hc")])
def test_the_loss_reaches_every_leaf_of_a_fresh_model(residual):
    """From `init` on, whose logits are nearly those of a plain residual: streams that are copies can grow apart."""
    cfg = replace(V3, residual=residual)
    model, plain = (init(c, jax.random.key(0)) for c in (cfg, replace(cfg, residual=None)))
    params, rest = partition(model)

    @jax.jit
    def gradient(params, rest):
        def value(params):
            total, out = loss(combine(params, rest), {"tokens": TOKENS})
            return total, out.logits

        (_, logits), found = jax.value_and_grad(value, has_aux=True)(params)
        return logits, found

    logits, found = gradient(params, rest)
    assert relative(logits, forward(plain, TOKENS, with_mtp=True).logits) <= 1e-2
    found = {name: np.asarray(a) for name, a in named(found).items()}
    assert all(np.isfinite(a).all() for a in found.values())
    # The weights of reading from copies change what is read by a factor only, which the norm takes out, and how copies
    # mix changes nothing: their gradients come with the streams' differences, of the first layers small.
    assert [name for name, a in found.items() if not a.any()] == []
    of_writing = found["stacks.1.attn_streams.base"][0, H : 2 * H]
    assert np.ptp(of_writing) > 0.1 * np.abs(of_writing).max()


def test_sublayers_read_one_stream_after_the_other_at_first():
    for residual, most in ((MHC, READ), (HC, 1.0)):
        model = init(replace(V3, mtp_depth=0, residual=residual), jax.random.key(0))
        blocks = [unstack(s, i) for s in model.stacks for i in range(s.attn_norm.weight.get_value().shape[0])]
        sublayers = [s for b in blocks for s in (b.attn_streams, b.ffn_streams)]
        reading = np.stack([s.base.get_value()[:H] for s in sublayers])
        assert reading.argmax(-1).tolist() == [0, 1, 2, 3, 0, 1]
        assert (reading.max(-1) == most).all()
        assert (np.stack([s.scale.get_value() for s in sublayers]) == np.float32(0.01)).all()
        _, post, mix = unstack(model.stacks[0], 0).attn_streams.weights(jnp.ones((1, 1, H, D)), DEFAULT)
        # Nearly a plain residual: what is read moves a weight by a hundredth of itself, for that is the scale.
        np.testing.assert_allclose(post, 1, atol=1e-2)
        assert (np.diagonal(mix[0, 0]) > 0.9).all()


def test_maps_are_muons_and_biases_and_scales_do_not_decay():
    held = named_variables(partition(abstract(CFG, jnp.bfloat16))[0])
    own = {name: v for name, v in held.items() if "streams" in name or "collapse" in name}
    assert len(own) == 3 * (2 * 2 + 1 + 2 * 3)
    for name, v in own.items():
        assert v.get_value().dtype == jnp.float32
        assert (muon_matrix(v, name) is not None) == decays(v, name) == name.endswith("map")
    assert abstract(CFG, jnp.bfloat16).compute_dtype() == jnp.bfloat16


def test_weights_are_float32_in_a_bfloat16_model():
    streams = Streams(CFG, 0)
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (B, T, H, D)), jnp.bfloat16)
    assert {a.dtype for a in streams.weights(x, DEFAULT)} == {jnp.dtype(jnp.float32)}
    y, back = streams.read(x, DEFAULT)
    assert y.dtype == streams.write(x, y, back, DEFAULT).dtype == jnp.bfloat16


def test_a_config_says_one_thing_and_llamas_files_carry_no_streams():
    with pytest.raises(ConfigError, match="sinkhorn_steps=3 belongs to the constraint, but constrained is False"):
        replace(HC, sinkhorn_steps=3)
    with pytest.raises(ConfigError, match=r"eps=.* belongs to the constraint"):
        replace(HC, eps=0.1)
    with pytest.raises(ConfigError, match="n_streams must be positive, not 0"):
        replace(MHC, n_streams=0)
    with pytest.raises(ConfigError, match=r"cannot carry this model, which is not saved: residual is HyperConn"):
        config_to_json(replace(zoo("tiny-llm"), residual=MHC))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HC", "mHC"])
def test_the_committed_gains_are_what_the_code_measures(kind, root):
    # v4_hyper_connections C3
    """The smallest depth, one seed."""
    folder = root / "experiments" / "v4_hyper_connections"
    committed = json.loads((folder / "results.json").read_text(encoding="utf-8"))["gains"][kind]["0.3"]["8"]
    spec = importlib.util.spec_from_file_location("hyper_connections_amax", folder / "amax.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    found = study.measured(kind, depth=8, scale=0.3, seed=0)
    assert found == pytest.approx({name: values[0] for name, values in committed.items()}, rel=1e-3)
