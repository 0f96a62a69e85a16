"""V4's attention by layer against transformers', and its cache: rings, entries, and taking tokens back."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import fill_randomly, random_model, tiny_config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as reference
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

import deepseek_jax as dsj
from deepseek_jax.configs.schema import Compressed, Indexer, Rope, Yarn
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.core.params import map_variables, named
from deepseek_jax.model import compressed
from deepseek_jax.model.attention import MIN_BLOCK
from deepseek_jax.model.cache import make_cache, seen_tokens
from deepseek_jax.model.indexer import chosen_keys, index_scores
from deepseek_jax.model.transformer import abstract

ATTENTION = Compressed(
    n_heads=4,
    head_dim=16,
    rope_dim=8,
    q_rank=32,
    o_groups=2,
    o_rank=8,
    window=16,
    ratios=(0, 4, 8),
    indexer=Indexer(index_heads=16, index_dim=16, index_top_k=5),
    entry_rope=Rope(160000.0, Yarn(4.0, 64)),
)
CFG = tiny_config(n_dense_layers=0, attention=ATTENTION, mtp_depth=0, model_type="deepseek_v4")
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
B, T = 2, 100
NEAR_TIE = 1e-5


@cache
def module(layer: int) -> compressed.Compressed:
    """The attention of a layer with random weights."""
    return fill_randomly(compressed.Compressed(ATTENTION.at(layer), CFG.dim, jnp.float32, CFG.norm_eps), seed=layer)


@cache
def inputs() -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).normal(0, 1, (B, T, CFG.dim)), jnp.float32)


@cache
def whole(layer: int):
    """What attention makes of whole rows."""
    x_BTD = inputs()
    return jax.jit(lambda m, x: m(x, seen(x.shape[1])[0], DEFAULT)[0])(module(layer), x_BTD)


def seen(length: int, segments=None, cache=None):
    """Tokens of the rows, and the cache with them."""
    return seen_tokens(CFG, jnp.zeros((B, length), jnp.int32), None, segments, cache, DEFAULT)


@cache
def theirs(layer: int) -> reference.DeepseekV4Attention:
    a, yarn = ATTENTION, ATTENTION.entry_rope.yarn
    config = DeepseekV4Config(
        hidden_size=CFG.dim,
        num_hidden_layers=3,
        num_attention_heads=a.n_heads,
        head_dim=a.head_dim,
        qk_rope_head_dim=a.rope_dim,
        q_lora_rank=a.q_rank,
        o_groups=a.o_groups,
        o_lora_rank=a.o_rank,
        sliding_window=a.window,
        max_position_embeddings=256,
        layer_types=list(KINDS),
        compress_rates={KINDS[1]: 4, KINDS[2]: 8},
        compress_rope_theta=a.entry_rope.theta,
        rope_parameters={
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        },
        index_n_heads=a.indexer.index_heads,
        index_head_dim=a.indexer.index_dim,
        index_topk=a.indexer.index_top_k,
        attn_implementation="eager",
    )
    made = reference.DeepseekV4Attention(config, layer)
    made.rotary = reference.DeepseekV4RotaryEmbedding(config)
    with torch.no_grad():
        for name, value in published(module(layer)).items():
            dict(made.named_parameters())[name].copy_(torch.tensor(value))
    return made


def published(m) -> dict[str, np.ndarray]:
    """The module's leaves, or their gradients, under transformers' names; written out apart from the converter."""
    w = {name: np.asarray(value) for name, value in named(m).items()}
    flat = lambda a, inputs: a.reshape(int(np.prod(a.shape[:inputs])), -1).T  # noqa: E731
    out = {
        "q_a_proj.weight": w["q_a"].T,
        "q_a_norm.weight": w["q_norm.weight"],
        "q_b_proj.weight": flat(w["q_b"], 1),
        "kv_proj.weight": w["kv"].T,
        "kv_norm.weight": w["kv_norm.weight"],
        "sinks": w["sink"],
        "o_a_proj.weight": flat(w["o_a"], 2),
        "o_b_proj.weight": flat(w["o_b"], 2),
    }
    for ours, name in (("compressor", "compressor"), ("indexer.compressor", "compressor.indexer")):
        if f"{ours}.kv" in w:
            out |= {
                f"{name}.kv_proj.weight": w[f"{ours}.kv"].T,
                f"{name}.gate_proj.weight": w[f"{ours}.gate"].T,
                f"{name}.position_bias": w[f"{ours}.position"],
                f"{name}.kv_norm.weight": w[f"{ours}.norm.weight"],
            }
    if "indexer.q" in w:
        out["compressor.indexer.q_b_proj.weight"] = flat(w["indexer.q"], 1)
        out["compressor.indexer.scorer.weights_proj.weight"] = w["indexer.weight"].T
    return out


def their_run(layer: int, x):
    attention, position = theirs(layer), torch.arange(T)[None].expand(B, T)
    tables = {kind: attention.rotary(x, position, layer_type=kind) for kind in ("main", "compress")}
    ago = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.where((ago >= 0) & (ago < ATTENTION.window), 0.0, -torch.inf)[None, None].expand(B, 1, T, T)
    return attention(x, tables, position, mask)[0]


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("layer", range(3), ids=KINDS)
def test_outputs_and_gradients_are_the_references(layer):
    x = torch.tensor(np.asarray(inputs()), requires_grad=True)
    expected = their_run(layer, x)
    ours = whole(layer)
    largest = float(expected.detach().abs().max())
    assert float(np.abs(ours - expected.detach().numpy()).max()) <= 2e-5 * largest

    weight = np.random.default_rng(3).normal(0, 1, expected.shape).astype(np.float32)
    attention = theirs(layer)
    attention.zero_grad()
    (expected * torch.tensor(weight)).sum().backward()
    tokens = seen(T)[0]
    grads, dx = jax.jit(jax.grad(lambda m, x: (m(x, tokens, DEFAULT)[0] * weight).sum(), (0, 1)))(
        module(layer), inputs()
    )
    assert relative(dx, x.grad.numpy()) <= 1e-4
    found = published(grads)
    for name, p in attention.named_parameters():
        if name.startswith("compressor.indexer"):
            # The choice of entries has no gradient.
            assert p.grad is None or not p.grad.abs().max()
            assert not np.abs(found[name]).max()
        else:
            assert relative(found[name], p.grad.numpy()) <= 1e-4, name


def test_chosen_entries_are_the_references():
    attention, choices = theirs(1), []
    hook = attention.compressor.indexer.register_forward_hook(lambda m, args, out: choices.append(out))
    with torch.no_grad():
        their_run(1, torch.tensor(np.asarray(inputs())))
    hook.remove()

    @jax.jit
    def ours(m, x):
        tokens = seen(T)[0]
        q = m.q_norm(jnp.einsum("BTD,DQ->BTQ", x, m.q_a.get_value()))
        seeking, parts = m.indexer(x, q, DEFAULT)
        seeking = replace(seeking, q_BTHI=m._rotated(seeking.q_BTHI, tokens))
        E = T // 4
        index = m._entries(m.indexer.compressor, parts[:, : 4 * E], None, jnp.broadcast_to(jnp.arange(E), (B, E)))
        visible = jnp.arange(E) < (jnp.arange(T)[:, None] + 1) // 4
        visible = jnp.broadcast_to(visible, (B, T, E))
        return chosen_keys(seeking, index, visible), jnp.where(visible, index_scores(seeking, index), -jnp.inf)

    found, score = map(np.asarray, ours(module(1), inputs()))
    top, flipped, left_out = ATTENTION.indexer.index_top_k, 0, 0
    for b in range(B):
        for t in range(T):
            there = (t + 1) // 4
            mine = {int(e) for e in found[b, t] if e < there}
            reference_choice = {int(e) for e in choices[0][b, t] if e >= 0}
            left_out += there > top
            if mine != reference_choice:
                ordered = -np.sort(-score[b, t])
                assert ordered[top - 1] - ordered[top] < NEAR_TIE
                flipped += 1
    print(f"{flipped} of {B * T} choices differ at near-ties")
    assert left_out > B * T / 2
    assert flipped <= B * T / 1000


def test_outputs_with_the_references_choice_replayed_are_the_references(monkeypatch):
    indexer, given = theirs(1).compressor.indexer, []
    hook = indexer.register_forward_hook(lambda m, args, out: given.append(jnp.asarray(out.numpy())))
    with torch.no_grad():
        expected = their_run(1, torch.tensor(np.asarray(inputs()))).numpy()
    hook.remove()
    # One block of queries after the other; where there are fewer entries than are chosen the reference says -1.
    replayed = iter([given[0][:, first : first + MIN_BLOCK] for first in range(0, T, MIN_BLOCK)])
    monkeypatch.setattr(compressed, "chosen_keys", lambda *_: next(replayed))
    ours = jax.jit(lambda m, x: m(x, seen(T)[0], DEFAULT)[0])(module(1), inputs())
    assert next(replayed, None) is None
    assert float(np.abs(ours - expected).max()) <= 2e-5 * np.abs(expected).max()


def empty_cache(layer: int, rewind: int):
    """Of one layer."""
    held = module(layer).held(1, B, 128, rewind, jnp.float32, DEFAULT)
    return make_cache([held], B, 128, rewind, DEFAULT)


@cache
def cached(layer: int):
    @jax.jit
    def run(m, x, segments, cache):
        tokens, cache = seen(x.shape[1], segments, cache)
        y, held, _ = m(x, tokens, DEFAULT, cache.held[0])
        return y, replace(cache, held=(held,))

    return run


@pytest.mark.parametrize("layer", range(3), ids=KINDS)
def test_a_cache_gives_what_whole_rows_give_at_every_offset(layer):
    """Chunks that end anywhere, rows of different lengths, rests between tokens, and tokens taken back that were
    others: the length alone says what is held."""
    rng, x, expected, rewind = np.random.default_rng(layer), np.asarray(inputs()), np.asarray(whole(layer)), 3
    cache, at, worst, offsets = empty_cache(layer, rewind), np.zeros(B, int), 0.0, set()
    for step, width in enumerate([4] * 8 + [24, 4] * 4 + [4] * 12):
        real = rng.random((B, width)) < 0.7
        for b in range(B):
            if at[b] + real[b].sum() > T:
                real[b] = False
        # After more tokens than a ring holds as many are taken back as may be.
        back = rng.integers(0, rewind + 1, B) * (step % 2) if width == 4 else np.full(B, rewind)
        back = np.minimum(back, real.sum(1))
        fed = rng.normal(0, 1, (B, width, CFG.dim)).astype(np.float32)
        for b in range(B):
            fed[b, real[b]] = x[b, at[b] : at[b] + real[b].sum()]
            if back[b]:
                fed[b, np.flatnonzero(real[b])[-back[b] :]] *= -1.5
        y, cache = cached(layer)(module(layer), jnp.asarray(fed), jnp.asarray(real, jnp.int32), cache)
        for b in range(B):
            good = real[b].sum() - back[b]
            rows = np.asarray(y)[b, np.flatnonzero(real[b])[:good]]
            if good:
                worst = max(worst, np.abs(rows - expected[b, at[b] : at[b] + good]).max())
            at[b] += good
            offsets.add(int(at[b]) % 8)
        cache = cache.rewind(back)
    assert offsets == set(range(8))
    assert at.min() > 60
    assert worst <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("layer", range(3), ids=KINDS)
def test_packed_rows_are_separate_ones_and_padding_in_front_is_exact(layer):
    """Which the reference's is not: its windows begin where a row does, padding or not."""
    x, expected = inputs(), np.asarray(whole(layer))
    first, second = 37, 50
    packed = jnp.concatenate([x[:1, :first], x[1:, :second], x[:1, :13]], axis=1)
    left = jnp.concatenate([x[:1, -30:], x[1:, : T - 30]], axis=1)
    segments = np.stack([[1] * first + [2] * second + [0] * 13, [0] * 30 + [1] * (T - 30)])
    run = jax.jit(lambda m, x, s: m(x, seen(T, s)[0], DEFAULT)[0])
    y = np.asarray(run(module(layer), jnp.concatenate([packed, left]), jnp.asarray(segments)))
    bound = 2e-5 * np.abs(expected).max()
    for ours, theirs in (
        (y[0, :first], expected[0, :first]),
        (y[0, first : first + second], expected[1, :second]),
        (y[1, 30:], expected[1, : T - 30]),
    ):
        assert np.abs(ours - theirs).max() <= bound
    assert not y[0, first + second :].any()
    assert not y[1, :30].any()


def test_as_many_entries_as_there_are_leave_nothing_out_bit_for_bit():
    """Wherever the choice is made, and not at all where it could leave nothing out."""
    held, x = named(module(1)), inputs()

    def of(top_k: int):
        cfg = replace(ATTENTION, indexer=replace(ATTENTION.indexer, index_top_k=top_k))
        made = compressed.Compressed(cfg.at(1), CFG.dim, jnp.float32, CFG.norm_eps)
        made = map_variables(lambda path, v: v.replace(held[".".join(map(str, path))]), made)
        return jax.jit(lambda m, x: m(x, seen(T)[0], DEFAULT)[0])(made, x)

    np.testing.assert_array_equal(of(T // 4), of(10 * T))
    assert relative(of(T // 4), whole(1)) > 1e-2


def test_the_indexer_learns_by_its_divergence_alone():
    m, x, tokens = module(1), inputs(), seen(T)[0]

    def kl(m, x):
        return m(x, tokens, DEFAULT, report=("index_kl",))[2]["index_kl"].sum()

    value, (grads, dx) = jax.jit(jax.value_and_grad(kl, (0, 1)))(m, x)
    assert float(value) > 0
    assert not np.abs(dx).max()
    for name, gradient in named(grads).items():
        assert name.startswith("indexer.") == bool(np.abs(gradient).max()), name


REFUSED = {
    "positions are given": {"positions": np.zeros((1, 8), np.int32)},
    "a segment stands in several runs": {"segments": np.asarray([[1, 1, 0, 1, 1, 0, 0, 0]])},
    'no kernel is built for the compressed attention of tiny; choose "auto"': {
        "ctx": dsj.Context(attention="kernel"),
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_windows_cannot_do_is_refused(message):
    model = random_model(CFG)
    with pytest.raises(ValueError, match=message):
        model(np.zeros((1, 8), np.int32), **REFUSED[message])


def test_a_cache_holds_one_segment_a_row():
    model = random_model(CFG)
    with pytest.raises(ValueError, match="segments go up to 2, but in a cache tiny holds entries of one segment a row"):
        model(np.zeros((1, 4), np.int32), segments=np.asarray([[1, 1, 2, 2]]), cache=model.init_cache(1, 8))


@pytest.mark.parametrize(
    ("release", "published"), [("deepseek-v4-flash", (3453, 3517)), ("deepseek-v4-pro", (4944, 5036))]
)
def test_a_million_tokens_take_the_bytes_of_the_release(release, published):
    """Entries, the indexer's keys and the window's, FP8 and FP4; V3.2's beside them."""
    length, ctx = 1 << 20, dsj.Context(cache="served", dtype=jnp.bfloat16)
    made = lambda name: jax.eval_shape(lambda: abstract(dsj.zoo(name)).init_cache(1, length, ctx=ctx)).held  # noqa: E731
    nbytes = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) / length  # noqa: E731
    held = made(release)
    # What the last tokens leave for entries to come, of no length, in the compute dtype.
    parts = nbytes([h.parts for h in held])
    assert parts < 10
    assert published[0] <= round(nbytes(held) - parts) <= published[1]
    assert nbytes(made("deepseek-v3.2")) == 48068
