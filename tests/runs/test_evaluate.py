"""Held-out figures of a model against the same figures computed by hand from its logits and choices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, tiny_config

from deepseek_jax.analysis.specialisation import load_divergence
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.model.router import KnockOut
from deepseek_jax.runs.evaluate import evaluate

CFG = tiny_config()


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module")
def plain(model):
    """Logits, MTP logits and choices of every window by itself; one compilation for all."""

    @jax.jit
    def run(tokens_BT, segments_BT):
        out = model(tokens_BT, segments=segments_BT, with_mtp=True)
        return jax.nn.log_softmax(out.logits), out.mtp_logits[0], out.aux.expert_index

    return run


@pytest.mark.parametrize("masks", [False, True])
def test_figures_are_those_of_the_logits(model, plain, masks):
    rng = np.random.default_rng(0)
    stream_n = rng.integers(0, CFG.vocab_size, 100).astype(np.int32)
    starts_D, domain_n = np.array([0, 20, 57]), np.repeat([0, 1, 0], [20, 37, 43])
    bytes_V = rng.integers(1, 6, CFG.vocab_size).astype(np.int32)
    held_out = HeldOut.cut(
        stream_n, bytes_V, length=16, starts_D=starts_D if masks else None, domains=("a", "b"), domain_n=domain_n
    )
    found = evaluate(model, held_out)

    nats, sizes, drafts, loads = np.zeros(2), np.zeros(2), [], np.zeros((2, 2, CFG.moe.n_experts), int)
    for w, (tokens_T, segments_T) in enumerate(zip(held_out.windows_WT, held_out.segments_WT, strict=True)):
        log_p, draft, index = plain(jnp.asarray(tokens_T[None]), jnp.asarray(segments_T[None]))
        log_p_TV, draft_TV = np.asarray(log_p[0], np.float64), np.asarray(draft[0], np.float64)
        for t in np.flatnonzero(segments_T):
            for layer, chosen in enumerate(np.asarray(index)[:, 0, t]):
                loads[domain_n[w * 15 + t], layer, chosen] += 1
        for t in range(1, 16):
            if segments_T[t] == 0:
                continue
            at = w * 15 + t
            assert tokens_T[t] == stream_n[at]
            sizes[domain_n[at]] += bytes_V[tokens_T[t]]
            if not masks or at not in starts_D:
                nats[domain_n[at]] -= log_p_TV[t - 1, tokens_T[t]]
            if t >= 2 and segments_T[t - 2] == segments_T[t]:
                q_V = np.exp(draft_TV[t - 2]) / np.exp(draft_TV[t - 2]).sum()
                accepted = np.minimum(np.exp(log_p_TV[t - 1]), q_V).sum()
                drafts.append((domain_n[at], draft_TV[t - 2].argmax() == log_p_TV[t - 1].argmax(), accepted))
    assert found.bits_per_byte == pytest.approx(nats.sum() / np.log(2) / sizes.sum(), rel=1e-5)
    assert found.domains == pytest.approx(dict(zip("ab", nats / np.log(2) / sizes, strict=True)), rel=1e-5)
    of, agreed, accepted = map(np.array, zip(*drafts, strict=True))
    assert found.draft_agreement == pytest.approx(agreed.mean())
    assert found.draft_acceptance == pytest.approx(accepted.mean(), rel=1e-5)
    assert 0.01 < found.draft_acceptance < 1
    for by_domain, values in ((found.domain_agreement, agreed), (found.domain_acceptance, accepted)):
        assert by_domain == pytest.approx({name: values[of == i].mean() for i, name in enumerate("ab")}, rel=1e-5)
    np.testing.assert_array_equal(found.load_DLE, loads)
    loads_LE = loads.sum(0)
    assert found.max_violation_global == pytest.approx((loads_LE.max(-1) / loads_LE.mean(-1) - 1).tolist(), rel=1e-5)
    record = found.record()
    assert record["load_divergence"] == pytest.approx(load_divergence(loads).tolist())
    assert "load_DLE" not in record
    assert json.loads(json.dumps(record)) == record


def test_experts_are_knocked_out_in_their_layers(model):
    stream_n = np.random.default_rng(1).integers(0, CFG.vocab_size, 60).astype(np.int32)
    held_out = HeldOut.cut(stream_n, np.ones(CFG.vocab_size, np.int32), length=16)
    none = np.zeros((2, 8), bool)
    whole = evaluate(model, held_out)
    assert evaluate(model, held_out, routing=KnockOut(none)).bits_per_byte == pytest.approx(whole.bits_per_byte)
    out = none.copy()
    out[0, 1] = out[1, [4, 7]] = True
    found = evaluate(model, held_out, routing=KnockOut(out))
    assert (whole.load_DLE[0] > 0).all()
    np.testing.assert_array_equal(found.load_DLE[0] == 0, out)
    assert abs(found.bits_per_byte - whole.bits_per_byte) > 1e-3
    with pytest.raises(ValueError, match="leaves a layer 1 of 8 experts"):
        evaluate(model, held_out, routing=KnockOut(none, top=7))
