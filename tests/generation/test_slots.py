"""Rows that come and go in one cache give what each gives alone, to the last bit."""

from itertools import chain

import jax
import numpy as np
import pytest
from generation.rigged import agreeing_model, config, forward_of, generated, random_prompts
from generation.test_engine import V4
from tiny import tiny_config

from deepseek_jax.configs.zoo import zoo
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.generation import slots as device
from deepseek_jax.generation.running import prepared
from deepseek_jax.generation.sampling import Sampling, packed
from deepseek_jax.model.transformer import abstract

DEPTH, SLOTS, LENGTH, CHUNK, ROOM, TOP, NEW, SEED = 2, 3, 64, 8, 4, 20, 12, 7


class Bench:
    """Slots of one model, driven by hand."""

    def __init__(self, cfg):
        self.plain = agreeing_model(cfg, mixing=0.3, reading=0.3)
        self.model, self.cfg = prepared(self.plain, DEFAULT), cfg
        self.static = {"depth": cfg.mtp_depth, "ctx": DEFAULT}
        self.prompts = random_prompts(cfg, (19, 5, 33, 1))

    def empty(self):
        return device.make_slots(self.model, SLOTS, LENGTH, self.cfg.mtp_depth, TOP, True, DEFAULT)

    def row(self, prompt, new=NEW, temperature=0.0, top_p=1.0, seed=SEED, drafts=0, bias=()):
        tokens, biases = np.zeros(LENGTH + self.cfg.mtp_depth, np.int32), np.zeros(self.cfg.vocab_size, np.float32)
        tokens[: len(prompt)] = prompt
        for i, value in dict(bias).items():
            biases[i] = value
        settings = (np.float32(temperature), np.int32(0), np.float32(top_p), np.float32(0), np.uint32(seed))
        counts = (np.int32(len(prompt)), np.int32(len(prompt) + new), np.int32(drafts))
        return device.Row(tokens, *counts, np.full(device.STOPS, -1, np.int32), biases, Sampling(*settings))

    def entered(self, slots, slot, prompt, between=(), **settings):
        """A prompt in a slot, while those of ``between`` decode."""
        slots = device.admit(slots, np.int32(slot), self.row(prompt, **settings), np.int32(0))
        for start in range(0, len(prompt) - 1, CHUNK):
            slots = self.fed(slots, slot, start)
            slots, _ = self.decoded(slots, between, 1)
        return slots

    def fed(self, slots, slot, start):
        where = (np.int32(slot), np.int32(start), np.bool_(False))
        return device.prefill(self.model, slots, *where, chunk=CHUNK, **self.static)

    def decoded(self, slots, running, steps, allowed=None):
        running = np.isin(np.arange(SLOTS), list(running))
        allowed = np.ones((SLOTS, 1, self.cfg.vocab_size), bool) if allowed is None else allowed
        bits = np.asarray(packed(allowed))[:, 0]
        steps = np.int32(steps)
        return device.decode(self.model, slots, running, bits, steps, room=ROOM, top=True, **self.static)

    def finished(self, slots, slot, others=(), allowed=None):
        """Steps until a slot is done: what came of it, a list a field, then its counts of drafts; and what these were
        drawn from, now and then."""
        found, drawn = [], []
        while True:
            slots, news = self.decoded(slots, (slot, *others), ROOM - 1, allowed)
            news = jax.device_get(news)
            fields = (news.tokens, news.logprob, news.behaviour, news.top["top_id"], news.top["top_logprob"])
            found.append([field[slot, : news.count[slot]].tolist() for field in fields])
            if news.done[slot]:
                counts = (int(news.drafted[slot]), int(news.accepted[slot]))
                return slots, ([list(chain(*column)) for column in zip(*found, strict=True)], counts, drawn)
            drawn.append(np.asarray(slots.state.q[slot]).tolist())


@pytest.fixture(scope="module")
def bench():
    return Bench(config(DEPTH))


def crowded(bench, slot):
    """Others in the slots beside one, some steps on."""
    others = [o for o in range(SLOTS) if o != slot]
    slots = bench.empty()
    for other in others:
        prompt = bench.prompts[1 + other]
        slots = bench.entered(slots, other, prompt, new=60 - len(prompt), temperature=other, seed=other, drafts=DEPTH)
    return bench.decoded(slots, others, 2)[0], others


def check_alone_and_beside(bench, drafts, temperature):
    settings = {"drafts": drafts, "temperature": temperature, "top_p": 0.9}
    prompt, alone = bench.prompts[0], []
    for slot in range(SLOTS):
        alone.append(bench.finished(bench.entered(bench.empty(), slot, prompt, **settings), slot)[1])
    assert alone[1:] == alone[:1] * (SLOTS - 1)
    for slot in (0, SLOTS - 1):
        slots, others = crowded(bench, slot)
        slots = bench.entered(slots, slot, prompt, between=others, **settings)
        assert bench.finished(slots, slot, others)[1] == alone[0]
    new, info = generated(bench.plain, prompt, NEW, temperature, [SEED], drafts > 0, top_p=0.9)
    (tokens, logprobs, behaviour, *_), counts, _ = alone[0]
    assert tokens == new[0]
    np.testing.assert_allclose(logprobs, info.logprobs[0], atol=2e-5)
    np.testing.assert_allclose(behaviour, info.behaviour_logprobs[0], atol=2e-5)
    assert counts == (info.drafted[0], info.accepted[0])
    assert (counts[1] > 0) == (drafts > 0)


@pytest.mark.parametrize("drafts", [0, DEPTH])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_is_the_same_in_any_slot_and_beside_any(bench, drafts, temperature):
    """Its neighbours decode while its prompt is fed: what the MTP modules keep of it is not lost."""
    check_alone_and_beside(bench, drafts, temperature)


@pytest.mark.slow
def test_so_it_is_where_attention_keeps_last_tokens_only():
    bench = Bench(config(DEPTH, **V4))
    for drafts in (0, DEPTH):
        check_alone_and_beside(bench, drafts, 0.8)


def test_a_fork_goes_on_with_random_numbers_of_its_own(bench):
    prompt, settings = bench.prompts[2], {"temperature": 0.9, "drafts": DEPTH}
    seeds = np.random.SeedSequence(3).generate_state(2)
    new, _ = generated(bench.plain, prompt, NEW, 0.9, seeds, True)
    slots = bench.entered(bench.empty(), 1, prompt, seed=seeds[0], **settings)
    slots = device.fork(slots, np.int32(1), np.int32(0), seeds[1])
    slots, first = bench.finished(slots, 1)
    slots, second = bench.finished(slots, 0)
    assert [first[0][0], second[0][0]] == new[:2]
    assert new[0] != new[1]


def test_what_is_kept_of_a_former_row_is_not_fed_again(bench):
    former, prompt = bench.prompts[2], bench.prompts[2][:20] + bench.prompts[0]
    slots, _ = bench.finished(bench.entered(bench.empty(), 2, former, drafts=DEPTH), 2)
    kept = 20 - 2 * DEPTH
    slots = device.admit(slots, np.int32(2), bench.row(prompt, drafts=DEPTH), np.int32(kept))
    assert np.asarray(slots.state.cache.length).tolist() == [0, 0, kept]
    for start in range(kept, len(prompt) - 1, CHUNK):
        slots = bench.fed(slots, 2, start)
    _, (found, counts, _) = bench.finished(slots, 2)
    _, (fresh, fresh_counts, _) = bench.finished(bench.entered(bench.empty(), 2, prompt, drafts=DEPTH), 2)
    assert found[0] == fresh[0]
    np.testing.assert_allclose(found[1], fresh[1], atol=2e-5)
    assert counts == fresh_counts


def test_biases_and_grammars_bind_what_is_drawn_and_no_log_probability(bench):
    """Of two tokens that alone may come, a bias takes one; log-probabilities and alternatives are the model's."""
    (prompt,) = bench.prompts[:1]
    allowed = np.zeros((SLOTS, 1, bench.cfg.vocab_size), bool)
    allowed[1, 0, [5, 6]] = True
    slots = bench.entered(bench.empty(), 1, prompt, new=3, bias={5: -100})
    slots, ((tokens, logprobs, behaviour, top_id, top_logprob), *_) = bench.finished(slots, 1, allowed=allowed)
    assert tokens == [6, 6, 6]
    assert behaviour == [0, 0, 0]
    rows = forward_of(bench.plain, prompt + tokens)[0][len(prompt) - 1 : -1]
    np.testing.assert_allclose(logprobs, rows[:, 6], atol=2e-5)
    order = np.argsort(-rows, axis=-1)[:, :TOP]
    assert top_id == order.tolist()
    np.testing.assert_allclose(top_logprob, np.take_along_axis(rows, order, -1), atol=2e-5)


def test_the_experts_of_every_token_that_was_fed_are_there(bench):
    prompt = bench.prompts[0]
    slots, ((tokens, *_), *_) = bench.finished(bench.entered(bench.empty(), 1, prompt, drafts=DEPTH), 1)
    fed = len(prompt) + NEW - 1
    routing = device.routing_of(slots, np.int32(1))[:fed]
    np.testing.assert_array_equal(routing, forward_of(bench.plain, prompt + tokens)[1][:fed])


def test_a_row_can_be_taken_back_where_nothing_but_tokens_is_held():
    families = ("tiny-llm", "tiny-moe", "tiny-v2", "tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-distill-qwen")
    found = {name: device.truncates(abstract(zoo(name)), 64, DEFAULT) for name in families}
    assert found == {name: name != "tiny-v4" for name in families}
    assert device.truncates(abstract(tiny_config()), 64, DEFAULT)
