"""Held-out figures of a model against the same figures computed by hand from its logits and choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, tiny_config

from deepseek_jax.data.held_out import HeldOut
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

    nats, sizes, agreed, loads = np.zeros(2), np.zeros(2), [], 0
    for w, (tokens_T, segments_T) in enumerate(zip(held_out.windows_WT, held_out.segments_WT, strict=True)):
        log_p, draft, index = plain(jnp.asarray(tokens_T[None]), jnp.asarray(segments_T[None]))
        log_p_TV, draft_TV = np.asarray(log_p[0], np.float64), np.asarray(draft[0])
        loads = loads + np.stack([np.bincount(i[i >= 0], minlength=CFG.moe.n_experts) for i in np.asarray(index)])
        for t in range(1, 16):
            if segments_T[t] == 0:
                continue
            at = w * 15 + t
            assert tokens_T[t] == stream_n[at]
            sizes[domain_n[at]] += bytes_V[tokens_T[t]]
            if not masks or at not in starts_D:
                nats[domain_n[at]] -= log_p_TV[t - 1, tokens_T[t]]
            if t >= 2 and segments_T[t - 2] == segments_T[t]:
                agreed.append(draft_TV[t - 2].argmax() == log_p_TV[t - 1].argmax())
    assert found.bits_per_byte == pytest.approx(nats.sum() / np.log(2) / sizes.sum(), rel=1e-5)
    assert found.domains == pytest.approx(dict(zip("ab", nats / np.log(2) / sizes, strict=True)), rel=1e-5)
    assert found.draft_agreement == pytest.approx(np.mean(agreed))
    assert found.max_violation_global == pytest.approx((loads.max(-1) / loads.mean(-1) - 1).tolist(), rel=1e-5)
