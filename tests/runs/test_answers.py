"""Exact scores of generated tasks, by a model that is right but where it is told to be wrong."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, tiny_config

from deepseek_jax.data.tasks import Addition, Copy, Passkey
from deepseek_jax.model.outputs import Output
from deepseek_jax.runs.answers import score_answers
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.text.tokenizer import load_tokenizer

CFG = tiny_config(vocab_size=300)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Oracle:
    """Knows the next token, but takes ``wrong`` for another."""

    wrong: jax.Array
    cfg: object = field(default=CFG, metadata={"static": True})

    def __call__(self, tokens_BT, segments=None, ctx=None) -> Output:
        next_BT = jnp.roll(tokens_BT, -1, 1)
        next_BT = jnp.where(next_BT == self.wrong, 0, next_BT)
        return Output(hidden=jnp.zeros(()), logits=jax.nn.one_hot(next_BT, self.cfg.vocab_size))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    texts = [*Copy(documents=100).training(), *Passkey(documents=100, length=400).training()]
    save_tokenizer(train_tokenizer(texts, CFG.vocab_size), folder, version="0")
    return load_tokenizer(folder)


def test_right_is_what_the_model_would_have_said(words):
    task = Copy(symbols=6)
    whole = score_answers(Oracle(jnp.int32(-1)), task, words, items=40)
    assert (whole.right_IA.shape, whole.exact, whole.by_order) == ((40, 6), 1.0, [1.0] * 6)
    # The commonest token of the answers.
    rows = words.encode_batch([item.text for item in whole.items], add_bos=True, special_tokens=False)
    last = [row[-1] for row in rows]
    wrong = max(set(last), key=last.count)
    found = score_answers(Oracle(jnp.int32(wrong)), task, words, items=40)
    for item, right_A in zip(found.items, found.right_IA, strict=True):
        tokens = words.encode(item.text, add_bos=False, special_tokens=False)
        texts = [words.decode([token]) for token in tokens]
        starts = np.cumsum([0, *map(len, texts)])
        bad = {
            at
            for token, start, text in zip(tokens, starts, texts, strict=False)
            if token == wrong
            for at in range(start, start + len(text))
        }
        assert right_A.tolist() == [answer.start not in bad for answer in item.answers]
    assert found.exact == found.right_IA.all(-1).mean() < 1
    assert found.by_order == pytest.approx(found.right_IA.mean(0))


def test_passkeys_by_depth(words):
    found = score_answers(Oracle(jnp.int32(-1)), Passkey(length=400), words, items=30)
    depths = [item.answers[0].source / item.answers[0].start for item in found.items]
    counts = np.histogram(depths, 4, (0, 1))[0]
    assert found.by_depth(4) == [1.0 if count else None for count in counts]
    assert sum(counts > 0) > 1
    assert score_answers(Oracle(jnp.int32(-1)), Addition(), words, items=5).by_depth() == [None] * 10


def test_of_a_model_it_is_the_best_token_in_a_row_by_itself(words):
    model = random_model(CFG)
    found = score_answers(model, Addition(digits=2), words, items=20)
    forward = jax.jit(lambda tokens_BT: model(tokens_BT).logits.argmax(-1))
    for item, right_A in list(zip(found.items, found.right_IA, strict=True))[:3]:
        tokens = words.encode(item.text, add_bos=True, special_tokens=False)
        best = np.asarray(forward(jnp.asarray([tokens])))[0]
        ends = np.cumsum([len(words.decode([token])) for token in tokens[1:]])
        starts = np.array([0, *ends[:-1]])
        for answer, right in zip(item.answers, right_A, strict=True):
            own = np.flatnonzero((starts < answer.stop) & (ends > answer.start))
            assert right == all(best[t] == tokens[t + 1] for t in own)


def test_an_item_longer_than_the_model_is_refused(words):
    with pytest.raises(ValueError, match=r"An item of task:passkey,.* tokens, more than the max_length=256 of tiny"):
        score_answers(random_model(CFG), Passkey(length=20_000), words, items=2)
