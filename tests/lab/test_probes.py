"""Probes on a tiny model of random weights, beside models that were changed by hand."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import forward
from tiny import random_model, tiny_config

from deepseek_jax.configs.fp8 import Fp8
from deepseek_jax.configs.schema import Indexer, Rope, Yarn
from deepseek_jax.convert.other_config import with_config
from deepseek_jax.core.params import RouterBias, map_variables
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.lab import probes
from deepseek_jax.lab.bases import MICRO
from deepseek_jax.lab.probes import (
    EVERY,
    WINDOWS,
    chosen,
    drafts,
    indexers,
    knock_outs,
    lengths,
    passkeys,
    thinned,
    without_shared,
)
from deepseek_jax.lab.records import PASSKEYS, spec
from deepseek_jax.lab.study import changed
from deepseek_jax.model.transformer import init
from deepseek_jax.runs.evaluate import evaluate
from deepseek_jax.train.loss import loss
from deepseek_jax.train.weights import LossWeights

CFG = tiny_config(mtp_depth=0, moe=replace(tiny_config().moe, n_groups=1, top_groups=1))
DEAD = (1, 5)  # a layer's expert that no token chooses


def held_out(windows: int, length: int = 16) -> HeldOut:
    rng = np.random.default_rng(0)
    bytes_V = rng.integers(1, 6, CFG.vocab_size).astype(np.int32)
    stream_n = rng.integers(0, CFG.vocab_size, (length - 1) * windows + 1).astype(np.int32)
    return HeldOut.cut(stream_n, bytes_V, length=length)


TEXT = held_out(5 * EVERY - 2)


def made(cfg=CFG):
    """Random weights, the same for every ``top_k``, with the dead expert."""

    def starve(path, variable):
        if not isinstance(variable, RouterBias):
            return variable
        value = np.array(variable.get_value())
        value[DEAD] = -1e9
        return variable.replace(value)

    return map_variables(starve, random_model(cfg))


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def found(model):
    return knock_outs(model, TEXT)


def silenced(model, layers: list[int]):
    """The shared experts of MoE layers set to 0 in the array itself, for both are one stack."""
    model = map_variables(lambda path, variable: variable, model)
    down = model.stacks[1].ffn.shared.down
    value = np.array(down.get_value())
    assert value.shape[0] == 2
    value[layers] = 0
    model.stacks[1].ffn.shared.down = down.replace(value)
    return model


def test_every_nth_window_is_a_text_of_its_own(model):
    some = thinned(TEXT, EVERY)
    np.testing.assert_array_equal(some.windows_WT, TEXT.windows_WT[[0, 8, 16, 24, 32]])
    alone = [HeldOut.cut(window_T, np.ones(CFG.vocab_size, np.int32), length=16) for window_T in some.windows_WT]
    nats = sum(evaluate(model, one).bits_per_byte * one.bytes_WT1.sum() for one in alone)
    assert evaluate(model, some).bits_per_byte == pytest.approx(nats / some.bytes_WT1.sum(), rel=1e-5)


def test_knock_outs_are_those_of_single_experts(model, found):
    assert found["whole"] == pytest.approx(evaluate(model, thinned(TEXT, EVERY)).bits_per_byte, rel=1e-6)
    routed_LE = np.array(found["routed"])
    assert routed_LE.shape == (2, 8)
    # Without the expert that no token chooses nothing changes, and without any other something does.
    np.testing.assert_array_equal(np.abs(routed_LE - found["whole"]) < 1e-6, np.arange(16).reshape(2, 8) == 13)
    assert set(found["top"]) == {"1/8", "1/4"}
    assert len({found["whole"], *found["top"].values()}) == 3


def test_shared_experts_are_knocked_out_by_layer_in_all_and_with_a_routed_one_instead(model, found):
    text = thinned(TEXT, EVERY)
    by_hand = [evaluate(silenced(model, layers), text).bits_per_byte for layers in ([0], [1], [0, 1])]
    assert [*found["shared"], found["no_shared"]] == pytest.approx(by_hand, rel=1e-6)
    assert len({found["whole"], *by_hand}) == 4
    more = made(replace(CFG, moe=replace(CFG.moe, top_k=CFG.moe.top_k + 1)))
    assert found["replaced"] == pytest.approx(evaluate(silenced(more, [0, 1]), text).bits_per_byte, rel=1e-6)
    assert abs(found["replaced"] - found["no_shared"]) > 1e-3
    # The model itself is as it was.
    assert evaluate(without_shared(model, set()), text).bits_per_byte == pytest.approx(found["whole"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": ("nun",)}, "there is no probe 'nun'; choose one of knock_outs"),
        ({"model.n_dense_layers": 4, "model.moe": None}, "has no experts"),
        ({"model.moe.n_experts": 4}, "leaves a layer 3 of 4 experts, fewer than the top_k=4"),
        ({"model.moe.n_hash": 1}, "has hash layers"),
    ],
)
def test_a_probe_that_cannot_be_is_refused_before_anything_is_trained(changes, message):
    with pytest.raises(ValueError, match=message):
        chosen(changed(MICRO, {"probes": ("knock_outs",)} | changes))


def test_a_run_with_a_probe_is_another_run():
    assert chosen(MICRO) == {}
    assert list(chosen(changed(MICRO, {"probes": ("knock_outs",)}))) == ["knock_outs"]
    assert spec(changed(MICRO, {"probes": ("knock_outs",)}), 0) != spec(MICRO, 0)


INDEXED = tiny_config(
    mtp_depth=0,
    attention=replace(tiny_config().attention, indexer=Indexer(index_heads=4, index_dim=16, index_top_k=4)),
    model_type="deepseek_v32",
)


def test_indexers_are_measured_beside_drawn_ones(monkeypatch):
    monkeypatch.setattr(probes, "FEWER", 4)
    model = init(INDEXED, jax.random.key(0))

    def other(path, variable):
        return variable.replace(-variable.get_value()) if path[-2:] == ("indexer", "weight") else variable

    found, changed_found = indexers(model, TEXT), indexers(map_variables(other, model), TEXT)
    # Its own indexers are those that are drawn; what is changed of them changes nothing else.
    assert found["divergence"] == found["drawn_divergence"] == changed_found["drawn_divergence"]
    assert found["sparse"] == found["drawn"] != found["bits"] == changed_found["bits"]
    assert len(found["divergence"]) == INDEXED.n_layers
    assert found["bits"] == pytest.approx(evaluate(model, thinned(TEXT, EVERY)).bits_per_byte, rel=0.1)
    windows = jnp.asarray(TEXT.windows_WT[::EVERY][:WINDOWS])
    whole = replace(INDEXED, attention=replace(INDEXED.attention, indexer=Indexer(4, 16, windows.shape[1])))
    _, out = jax.jit(partial(loss, weights=LossWeights(index=1.0)))(with_config(model, whole), {"tokens": windows})
    assert sum(found["divergence"]) == pytest.approx(float(out.losses["index"]), rel=1e-4)
    assert np.abs(np.divide(changed_found["divergence"], found["divergence"]) - 1).min() > 0.01


def test_text_is_measured_at_several_lengths_as_it_is_and_with_yarn(monkeypatch):
    monkeypatch.setattr(probes, "LENGTHS", (8, 16))
    cut = {length: held_out(2 * EVERY, length) for length in (8, 16)}
    cfg = replace(CFG, attention=replace(CFG.attention, rope=Rope(100.0)))
    yarn = replace(cfg, attention=replace(cfg.attention, rope=Rope(100.0, Yarn(factor=2.0, original_length=8))))
    model = random_model(cfg)
    found, extended = lengths(model, cut.get), lengths(with_config(model, yarn), cut.get)
    for length in (8, 16):
        assert found["as it is"][str(length)] == evaluate(model, thinned(cut[length], EVERY)).bits_per_byte
    assert extended == {"as it is": found["yarn"]}
    assert found["yarn"]["16"] != found["as it is"]["16"]


def test_drafts_are_measured_by_domain_beside_a_constant_one():
    model = random_model(replace(CFG, mtp_depth=1))
    domain_n = np.arange(len(TEXT.stream_n)) % 3 // 2
    text = replace(TEXT, domains=("code", "prose"), domain_n=domain_n)
    found, seen = drafts(model, text), evaluate(model, text)
    assert {name: one["greedy"] for name, one in found.items()} == seen.domain_agreement
    assert {name: one["sampled"] for name, one in found.items()} == seen.domain_acceptance
    assert {name: one["bits"] for name, one in found.items()} == seen.domains
    best_n = np.argmax(np.asarray(forward(model, jnp.asarray(TEXT.windows_WT)).logits), -1)[:, :-1].reshape(-1)
    for at, one in enumerate(found.values()):
        # Every position but the last of a window says the token behind it.
        tokens = best_n[domain_n[1:] == at].tolist()
        assert one["constant"] == max(map(tokens.count, tokens)) / len(tokens)
        assert one["share"] == len(tokens) / len(best_n)


def test_passkeys_are_asked_for_in_short_and_in_long_rows(monkeypatch):
    def scored(model, task, tokenizer, items):
        """Half of them are right with YaRN, a quarter without, and a tenth less in longer texts."""
        yarn = model.cfg.attention.rope.yarn
        assert (tokenizer, items, yarn is None or yarn.original_length) == ("tokenizer", PASSKEYS, yarn is None or 144)
        right = {None: 0.25, 4.0: 0.5}[yarn and yarn.factor] - {430: 0, 2050: 0.1}[task.length]
        return SimpleNamespace(exact=right)

    monkeypatch.setattr(probes, "score_answers", scored)
    model = random_model(replace(CFG, max_length=576, attention=replace(CFG.attention, rope=Rope(100.0))))
    found = passkeys(model, "tokenizer")
    assert found == {"as it is": {"short": 0.25, "long": 0.15}, "yarn": {"short": 0.5, "long": 0.4}}
    rope = Rope(100.0, Yarn(factor=4.0, original_length=144))
    extended = with_config(model, replace(model.cfg, attention=replace(CFG.attention, rope=rope)))
    assert passkeys(extended, "tokenizer") == {"as it is": {"short": 0.5, "long": 0.4}}


REFUSED = [("streams", "one residual stream"), ("indexers", "micro has none"), ("lengths", "max_length of less than")]
REFUSED += [("drafts", "no MTP module"), ("passkeys", "max_length of less than 524")]


@pytest.mark.parametrize(("probe", "message"), REFUSED)
def test_probes_of_parts_that_a_model_has_not_are_refused(probe, message):
    with pytest.raises(ValueError, match=message):
        chosen(changed(MICRO, {"probes": (probe,)}))


def test_probes_of_a_model_in_fp8_are_refused():
    with pytest.raises(ValueError, match="probe knock_outs: it measures without FP8, and micro is emulated in it"):
        chosen(changed(MICRO, {"probes": ("knock_outs",), "fp8": Fp8()}))
