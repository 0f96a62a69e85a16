"""Kneser-Ney against a dictionary implementation, its sums, and the baseline on real text."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from deepseek_jax.analysis.ngram import KneserNey
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.damage import Damage
from deepseek_jax.data.readers import open_source, read_documents
from deepseek_jax.data.shuffle import text_key
from deepseek_jax.text.bpe import train_tokenizer

V = 11


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return np.minimum(rng.geometric(0.3, (20, 15)) - 1, V - 2).astype(np.int32)  # id 10 never occurs


def by_dictionaries(rows, order, d):
    """p(w | context) written down from the formula, one n-gram at a time."""
    grams = {n: Counter() for n in range(1, order + 1)}
    for row in rows.tolist():
        for n in grams:
            grams[n].update(tuple(row[i : i + n]) for i in range(len(row) - n + 1))
    before = defaultdict(set)
    for n in range(2, order + 1):
        for gram in grams[n]:
            before[gram[1:]].add(gram[0])

    def count(gram):
        return grams[order][gram] if len(gram) == order else len(before[gram])

    def p(context, w):
        counts = [count((*context, x)) for x in range(V)]
        lower = p(context[1:], w) if context else 1 / V
        if sum(counts) == 0:
            return lower
        types = sum(c > 0 for c in counts)
        return max(counts[w] - d, 0) / sum(counts) + d * types / sum(counts) * lower

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("discount", [0.75, 0.4])
def test_equals_the_formula_by_dictionaries(rows, order, discount):
    model = KneserNey(V, order, discount).fit(rows)
    p = by_dictionaries(rows, order, discount)
    stream = np.concatenate([rows[3, :9], [10, 0, 10, 10, 1], rows[5, :9]])
    expected = []
    for i, w in enumerate(stream.tolist()):
        context = tuple(stream[max(i - order + 1, 0) : i].tolist())  # shorter where the stream begins
        expected.append(-np.log(p(context, w)))
    np.testing.assert_allclose(model.nats(stream), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one(rows, order):
    model = KneserNey(V, order).fit(rows)
    contexts = np.random.default_rng(1).integers(0, V, (300, 3))
    contexts = [*contexts, [10, 10, 10], [1, 10, 0], [0], []]
    for context in contexts:
        p_V = model.distribution(context)
        assert p_V.min() > 0
        assert abs(p_V.sum() - 1) < 1e-12


def test_a_stream_is_scored_by_those_distributions(rows):
    model = KneserNey(V).fit(rows)
    stream = rows[:4].reshape(-1)
    expected = [-np.log(model.distribution(stream[:i])[w]) for i, w in enumerate(stream)]
    np.testing.assert_allclose(model.nats(stream), expected, rtol=1e-13)
    assert model.nats(stream).dtype == np.float64


def test_no_ngram_crosses_the_end_of_a_row(rows):
    shuffled = rows[np.random.default_rng(2).permutation(len(rows))]
    stream = rows[:5].reshape(-1)
    np.testing.assert_array_equal(KneserNey(V).fit(rows).nats(stream), KneserNey(V).fit(shuffled).nats(stream))


def test_a_trigram_beats_a_bigram_beats_a_unigram_on_real_text():
    documents = list(read_documents(open_source(DataConfig().sources()[0]), Damage()))
    train = [d for d in documents if text_key(d.name) % 20][:120]
    held_out = [d for d in documents if not text_key(d.name) % 20][:12]
    tokenizer = train_tokenizer((d.text for d in train), 512)
    rows, stream = (
        np.concatenate([e.ids for e in tokenizer.encode_batch([d.text for d in documents])])
        for documents in (train, held_out)
    )
    rows = rows[: len(rows) // 256 * 256].reshape(-1, 256)
    one, two, three = (KneserNey(512, order).fit(rows).nats(stream).mean() for order in (1, 2, 3))
    assert three < 0.9 * two < 0.8 * one < 0.8 * np.log(512)


def test_bad_input_is_refused(rows):
    with pytest.raises(ValueError, match="discount between 0 and 1; got 3, 11 and 1"):
        KneserNey(V, 3, 1)
    with pytest.raises(ValueError, match="63 bits"):
        KneserNey(129280, 4)
    with pytest.raises(ValueError, match=r"0\.\.8; got 0\.\.9"):
        KneserNey(9).fit(rows)
    with pytest.raises(ValueError, match=r"got shape \(15,\)"):
        KneserNey(V).fit(rows[0])
    with pytest.raises(ValueError, match="no text yet"):
        KneserNey(V).nats(rows[0])
