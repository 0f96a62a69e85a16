"""Requests that come and go give what each gives alone, and nothing is compiled on their way."""

from collections import defaultdict
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from generation.rigged import agreeing_model, config, forward_of, generated, random_prompts
from generation.test_engine import V4
from generation.test_slots import CHUNK, DEPTH, LENGTH, NEW, ROOM, SLOTS
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.generation.batcher import Batcher
from deepseek_jax.generation.request import QueueFull, Request
from deepseek_jax.generation.sampling import packed
from deepseek_jax.generation.score import score

# As the slots of `test_slots`, so that their programs are these.
SIZES = {"slots": SLOTS, "length": LENGTH, "chunk": CHUNK, "steps": ROOM, "routing": True, "use_mtp": True}


@pytest.fixture(scope="module")
def model():
    return agreeing_model(config(DEPTH), mixing=0.3)


@pytest.fixture(scope="module")
def prompts(model):
    return random_prompts(model.cfg, (19, 5, 33, 1, 9, 12))


def stepped(batcher, found):
    for delta in batcher.step():
        found[delta.request, delta.choice].append(delta)


def finished(batcher, wanted=None, found=None):
    """Steps until nothing is under way, or the wanted requests have ended: the deltas of each (request, choice)."""
    found = defaultdict(list) if found is None else found
    while (stats := batcher.stats()).running + stats.waiting:
        stepped(batcher, found)
        if wanted is not None and all(found[one] and found[one][-1].finish for one in wanted):
            break
    return found


def joined(deltas, name):
    return [value for delta in deltas for value in getattr(delta, name)]


def alone(model, request):
    """`generate`'s tokens and `Info` of a request's choices, and of others."""
    seeds = np.random.SeedSequence(request.seed).generate_state(request.n)
    names = ("top_k", "top_p", "min_p", "use_mtp", "stop_ids")
    return generated(
        model,
        request.prompt,
        request.max_new_tokens,
        request.temperature,
        [request.seed, *seeds[1:]],
        **{name: getattr(request, name) for name in names},
    )


@contextmanager
def compilations():
    """How many programs are compiled inside, one entry each."""
    found = []

    def heard(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def check_text(model, request, number, found):
    texts, info = alone(model, request)
    for choice, tokens in enumerate(texts[: request.n]):
        deltas = found[number, choice]
        last = deltas[-1]
        assert joined(deltas, "tokens") == tokens
        np.testing.assert_allclose(joined(deltas, "logprobs"), info.logprobs[choice], atol=2e-5)
        np.testing.assert_allclose(joined(deltas, "behaviour"), info.behaviour_logprobs[choice], atol=2e-5)
        assert [d.finish for d in deltas] == [*[None] * (len(deltas) - 1), info.finish_reason[choice]]
        assert (last.drafted, last.accepted) == (info.drafted[choice], info.accepted[choice])
        assert min(last.waited, last.prefilled) >= 0
        if request.routing:
            routing = np.concatenate([d.routing for d in deltas])
            experts = forward_of(model, request.prompt + tokens)[1]
            np.testing.assert_array_equal(routing, experts[:-1])
        else:
            assert last.routing is None


def test_a_mixed_workload_gives_generates_texts_and_compiles_nothing(model, prompts):
    batcher = Batcher(model, prefixes=False, **SIZES)
    sampled = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": NEW}
    requests = [
        Request(prompts[0], NEW),
        Request(prompts[1], 20, use_mtp=True, routing=True),
        Request(prompts[2], **sampled, seed=3, n=2, use_mtp=True),
        Request(prompts[3], **sampled, seed=4, top_logprobs=3),
        Request(prompts[4], NEW, stop_ids=range(0, 250, 32), use_mtp=True),
        Request(prompts[5], **sampled, seed=5, top_k=9, min_p=0.01, n=SLOTS, use_mtp=True, routing=True),
    ]
    with compilations() as compiled:
        ids = [batcher.submit(request) for request in requests[:4]]
        found = finished(batcher, [(ids[0], 0)])
        ids += [batcher.submit(request) for request in requests[4:]]
        finished(batcher, found=found)
    assert compiled == []
    for number, request in zip(ids, requests, strict=True):
        check_text(model, request, number, found)
    top = joined(found[ids[3], 0], "top")
    tokens = joined(found[ids[3], 0], "tokens")
    logprobs = forward_of(model, prompts[3] + tokens)[0][:-1]
    for alternatives, row in zip(top, logprobs, strict=True):
        order = np.argsort(-row)[:3]
        assert [i for i, _ in alternatives] == order.tolist()
        np.testing.assert_allclose([value for _, value in alternatives], row[order], atol=2e-5)
    assert joined(found[ids[0], 0], "top") == []
    stats = batcher.stats()
    assert (stats.running, stats.waiting, stats.held) == (0, 0, 0)
    assert stats.generated == sum(len(joined(deltas, "tokens")) for deltas in found.values())
    assert stats.prompt == sum(len(request.prompt) for request in requests)
    assert (stats.queried, stats.cached) == (0, 0)
    assert sum(stats.finished.values()) == sum(request.n for request in requests)
    assert (len(stats.accepted_at), sum(stats.accepted_at)) == (DEPTH, stats.accepted)
    assert stats.drafting_steps >= stats.accepted_at[0] >= stats.accepted_at[1] > 0
    assert stats.drafting_steps == stats.drafted // DEPTH > stats.accepted // DEPTH > 0


def test_compilations_are_counted():
    with compilations() as compiled:
        jax.jit(lambda x: x + 41)(1)
    assert len(compiled) == 1


def test_nobody_waits_for_more_than_a_chunk_of_anothers_prompt(model, prompts):
    batcher = Batcher(model, **SIZES)
    first = batcher.submit(Request(prompts[3], 40))
    assert [d.request for d in batcher.step()] == [first]
    second = batcher.submit(Request(prompts[2], 2))
    heard = [[d.request for d in batcher.step()] for _ in range(4)]
    # 32 of its 33 tokens are fed, 8 a step.
    assert heard == [[first], [first], [first], [first, second]]


@pytest.fixture(scope="module")
def talk(model):
    return Batcher(model, queue=2, **SIZES)


def one(batcher, request, choice=0):
    number = batcher.submit(request)
    deltas = finished(batcher)[number, choice]
    return joined(deltas, "tokens"), deltas


def test_only_what_differs_of_a_prompt_is_fed(model, prompts, talk):
    """After the turn before, and beside one that is still under way; the text is that of the whole prompt."""
    again, settings = 2 * DEPTH, {"use_mtp": True, "routing": True, "max_new_tokens": NEW}
    said, deltas = one(talk, Request(prompts[0], **settings))
    assert deltas[-1].cached == 0
    turn = Request(prompts[0] + said + prompts[1], **settings)
    number = talk.submit(turn)
    found = finished(talk)
    assert found[number, 0][-1].cached == len(prompts[0] + said) - 1 - again
    check_text(model, turn, number, found)

    first = talk.submit(Request(prompts[2], 30))
    found = defaultdict(list)
    while talk.stats().held < len(prompts[2]):
        stepped(talk, found)
    second = talk.submit(Request(prompts[2][:25] + prompts[1], NEW))
    finished(talk, found=found)
    assert found[second, 0][-1].cached == 25 - again
    check_text(model, Request(prompts[2], 30), first, found)
    check_text(model, Request(prompts[2][:25] + prompts[1], NEW), second, found)
    # Of two that come at once one is fed what both begin with.
    numbers = [talk.submit(Request(prompts[0][::-1] + tail, NEW)) for tail in (prompts[1], prompts[4])]
    finished(talk, found=found)
    assert [found[number, 0][-1].cached for number in numbers] == [0, len(prompts[0]) - again]
    check_text(model, Request(prompts[0][::-1] + prompts[4], NEW), numbers[1], found)
    stats = talk.stats()
    assert stats.cached == len(prompts[0] + said) - 1 - again + 25 - again + len(prompts[0]) - again
    assert stats.queried == stats.prompt


@pytest.mark.parametrize("new", [0, 1, 5])
def test_a_prompts_own_tokens_have_log_probabilities(model, prompts, talk, new):
    """Also where another has brought the whole of the prompt, and beside one that has none."""
    one(talk, Request(prompts[2], 4))
    with compilations() as compiled:
        request = Request(prompts[2], new, n=2, temperature=1.0, top_logprobs=2, stop_ids=(), prompt_logprobs=True)
        numbers = [talk.submit(request), talk.submit(Request(prompts[3], 3, stop_ids=(), prompt_logprobs=True))]
        found = finished(talk)
    assert compiled == []
    rows = forward_of(model, prompts[2])[0][:-1]
    wanted = score(model, prompts[2])
    for choice in range(2):
        first, *rest = found[numbers[0], choice]
        np.testing.assert_allclose(first.prompt_logprobs, wanted, atol=2e-5)
        best = np.argsort(-rows, axis=-1)[:, :2]
        assert [[i for i, _ in top] for top in first.prompt_top] == best.tolist()
        np.testing.assert_allclose(
            [[value for _, value in top] for top in first.prompt_top], np.take_along_axis(rows, best, -1), atol=2e-5
        )
        assert all(delta.prompt_logprobs == () for delta in rest)
        assert len(joined([first, *rest], "tokens")) == new
        assert [delta.finish for delta in (first, *rest)][-1] == "length"
        assert first.cached == 0
    # One token alone has nothing before it.
    assert (found[numbers[1], 0][0].prompt_logprobs, len(joined(found[numbers[1], 0], "tokens"))) == ((), 3)
    assert one(talk, Request(prompts[2], 1))[1][0].cached > 0


def test_who_leaves_is_forgotten_at_once(model, prompts, talk):
    """Under way, as its prompt is fed, among twins, and in the queue; what others get does not change."""
    requests = [Request(prompts[0], 30, temperature=0.7, seed=5, stop_ids=()), Request(prompts[4], 30, stop_ids=())]
    stays = [talk.submit(request) for request in requests]
    leaves = talk.submit(Request(prompts[1], 40))
    found = defaultdict(list)
    for _ in range(5):
        stepped(talk, found)
    queued = talk.submit(Request(prompts[5], 3))
    before = dict(talk.stats().finished)
    talk.cancel(leaves)
    talk.cancel(queued)
    assert (talk.stats().running, talk.stats().waiting) == (2, 0)
    feeding = talk.submit(Request(prompts[2], 3))
    stepped(talk, found)
    assert talk.stats().running == 3
    talk.cancel(feeding)
    talk.cancel(feeding)
    talk.cancel(123456)
    assert talk.stats().running == 2
    finished(talk, found=found)
    assert {number for number, _ in found} == {*stays, leaves}
    assert found.pop((leaves, 0))[-1].finish is None
    for number, request in zip(stays, requests, strict=True):
        assert joined(found[number, 0], "tokens") == alone(model, request)[0][0]
    after = talk.stats().finished
    assert after["cancelled"] - before.get("cancelled", 0) == 3
    twins = talk.submit(Request(prompts[2], 3, n=SLOTS, temperature=1.0))
    talk.step()
    talk.cancel(twins)
    assert talk.stats().running == 0
    assert one(talk, Request(prompts[2], NEW))[0] == alone(model, Request(prompts[2], NEW))[0][0]


def test_a_full_queue_says_so(prompts, talk):
    """As many as there are slots and places to wait."""
    for _ in range(SLOTS + 2):
        talk.submit(Request(prompts[3], 1))
    with pytest.raises(QueueFull, match=f"{SLOTS + 2} requests are waiting"):
        talk.submit(Request(prompts[3], 1))
    talk.step()
    assert talk.stats().waiting == 2
    talk.submit(Request(prompts[3], 1))
    finished(talk)


def test_a_first_token_comes_after_a_single_step(prompts, talk):
    counts = [len(delta.tokens) for delta in one(talk, Request(prompts[0], 12))[1] if delta.tokens]
    assert counts == [1, 4, 4, 3]


class Counting:
    """Ids from ``first`` on, one after the other, the first of them once ``opens`` has come; then nothing."""

    def __init__(self, vocab, first, count, opens=None):
        self.vocab, self.next, self.end, self.opens, self.heard = vocab, first, first + count, opens, []

    def mask(self):
        if self.opens is not None:
            return None
        bits = np.zeros((1, 1, self.vocab), bool)
        bits[..., [i for i in (self.next,) if i < self.end]] = True
        return np.asarray(packed(bits))[0, 0].view(np.int32)

    def accept(self, ids):
        assert len(ids) == 1
        self.heard += ids
        if self.opens is None:
            self.next += 1
        elif ids[0] == self.opens:
            self.opens = None


class Broken(Counting):
    def mask(self):
        if len(self.heard) == 2:
            raise RuntimeError("no such rule")
        return super().mask()


def test_a_grammar_binds_its_choice_alone(model, prompts, talk):
    vocab, free = model.cfg.vocab_size, Request(prompts[0], NEW)
    plain = alone(model, free)[0][0]
    made = [Counting(vocab, 40, 5), Counting(vocab, 60, 3, opens=plain[4]), Broken(vocab, 80, 9)]
    bound = [Request(prompts[0], NEW, use_mtp=True, grammar=lambda one=one: one) for one in made]
    numbers = [talk.submit(request) for request in (*bound, free)]
    found = finished(talk)
    texts = [joined(found[number, 0], "tokens") for number in numbers]
    opened = plain[: plain.index(plain[4]) + 1]
    assert texts == [[40, 41, 42, 43, 44], [*opened, 60, 61, 62], [80, 81], plain]
    assert [found[number, 0][-1].finish for number in numbers] == ["stop", "stop", "error", "length"]
    assert found[numbers[2], 0][-1].error == "the grammar failed: no such rule"
    assert [one.heard for one in made] == texts[:3]
    assert found[numbers[0], 0][-1].drafted == 0


def test_a_bias_moves_greedy_choices(prompts, talk):
    tokens, deltas = one(talk, Request(prompts[0], 4, logit_bias={7: 100.0, 8: 99}, stop_ids=(8,)))
    assert tokens == [7] * 4
    assert max(joined(deltas, "logprobs")) < -1
    assert one(talk, Request(prompts[0], 4, logit_bias={7: 99, 8: 100}, stop_ids=(8,)))[1][-1].finish == "stop"


def test_new_weights_share_nothing_with_the_old(model, prompts, talk):
    request, other = Request(prompts[2], NEW), agreeing_model(config(DEPTH), 0.3, seed=1)
    number = talk.submit(request)
    talk.step()
    with pytest.raises(ValueError, match="under way"):
        talk.update(other)
    talk.cancel(number)
    with pytest.raises(ValueError, match="not of tiny"):
        talk.update(random_model(config(0)))
    talk.update(other)
    tokens, deltas = one(talk, request)
    assert deltas[-1].cached == 0
    assert tokens == alone(other, request)[0][0] != alone(model, request)[0][0]
    talk.update(jax.tree.map(lambda a: a * np.nan if a.dtype == np.float32 else a, model))
    talk.submit(request)
    with pytest.raises(ValueError, match="not finite"):
        finished(talk)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": "text"}, "not a list of token ids"),
        ({"prompt": [256]}, "id 256, outside the vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": -1, "prompt_logprobs": True}, "max_new_tokens=-1"),
        ({"max_new_tokens": 63}, "make 65, beyond the 64 that a slot takes"),
        ({"n": 4}, "n=4: there are 3 slots"),
        ({"temperature": -1}, "temperature=-1"),
        ({"seed": 2**32}, "seed="),
        ({"stop_ids": range(17)}, "17 ids; a slot takes 16"),
        ({"stop_ids": [256]}, "stop_ids holds id 256"),
        ({"top_logprobs": 21}, "0 to 20"),
        ({"top_logprobs": True}, "0 to 20"),
        ({"logit_bias": {256: 1}}, "logit_bias holds id 256"),
        ({"logit_bias": {1: float("nan")}}, "must be a finite number"),
        ({"grammar": 5}, "must be a function"),
    ],
)
def test_a_bad_request_is_one_clear_error(talk, changes, message):
    with pytest.raises(ValueError, match=message):
        talk.check(Request(**{"prompt": [1, 2], "max_new_tokens": 2} | changes))


def test_what_a_batcher_has_not_is_not_given(model):
    """Before anything is compiled."""
    plain = random_model(config(0, n_dense_layers=2, moe=None))
    for changes, message in (
        ({"slots": 0}, "slots=0"),
        ({"length": 257}, "beyond the 256"),
        ({"use_mtp": True}, "no MTP modules"),
        ({"routing": True}, "has no experts"),
    ):
        with pytest.raises(ValueError, match=message):
            Batcher(plain, **{"length": 8} | changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-v3.2", "tiny-distill-qwen"])
def test_other_architectures_give_generates_texts(name):
    cfg = zoo(name)
    model = random_model(cfg)
    drafts = bool(cfg.mtp_depth)
    batcher = Batcher(model, slots=2, length=64, chunk=16, steps=4, use_mtp=drafts)
    prompts = random_prompts(cfg, (21, 40, 3))
    requests = [Request(p, 16, 0.7, seed=i, use_mtp=drafts, stop_ids=()) for i, p in enumerate(prompts)]
    numbers = [batcher.submit(request) for request in requests]
    found = finished(batcher)
    seeds = [request.seed for request in requests]
    tokens, info = dsj.generate(model, prompts, 16, 0.7, seed=seeds, use_mtp=drafts, stop_ids=())
    for number, wanted, logprobs in zip(numbers, tokens, info.logprobs, strict=True):
        assert joined(found[number, 0], "tokens") == wanted
        np.testing.assert_allclose(joined(found[number, 0], "logprobs"), logprobs, atol=2e-5)


@pytest.mark.slow
def test_a_cache_of_last_tokens_shares_no_prefix_and_is_forked_whole(prompts):
    """V4's. Choices of one prompt go on from its rings and compressors as they are."""
    model = agreeing_model(config(DEPTH, **V4), mixing=0.3, reading=0.3)
    batcher = Batcher(model, **SIZES)
    assert not batcher.reuses
    settings = {"temperature": 0.8, "use_mtp": True, "routing": True, "max_new_tokens": NEW}
    requests = [Request(prompts[2], **settings, n=2), Request(prompts[0], **settings, n=3, seed=4)]
    requests += [Request(prompts[2], **settings, seed=5)]
    numbers = [batcher.submit(request) for request in requests]
    found = finished(batcher)
    for request, number in zip(requests, numbers, strict=True):
        assert found[number, 0][-1].cached == 0
        check_text(model, request, number, found)
