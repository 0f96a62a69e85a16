"""Packing, FIM and mixtures by their defining properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.fim import ADDED, Fim
from deepseek_jax.data.mixture import Mixture
from deepseek_jax.data.packing import best_fit, cut
from deepseek_jax.data.shuffle import mixed, shuffled, text_key

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)
KEYS = st.integers(0, 2**64 - 1)
FIM = Fim(0.3, 101, 102, 103)


@given(LENGTHS, st.integers(2, 16), st.integers(0, 60))
def test_cut_rows_are_the_stream(lengths, length, skip):
    stream = [(document, at) for document, size in enumerate(lengths) for at in range(size)]
    layout = cut(np.asarray(lengths), length, skip)
    rows = [[(d, at) for d, a, b in layout.row(r) for at in range(a, b)] for r in range(layout.rows)]
    assert rows == [stream[at : at + length] for at in range(skip, len(stream) - length + 1, length)]


@given(LENGTHS, st.integers(2, 16))
def test_best_fit_holds_every_token_once_and_cuts_only_what_is_too_long(lengths, length):
    layout = best_fit(np.asarray(lengths), length)
    rows = [layout.row(r) for r in range(layout.rows)]
    placed = [(d, at) for row in rows for d, a, b in row for at in range(a, b)]
    assert sorted(placed) == [(document, at) for document, size in enumerate(lengths) for at in range(size)]
    assert all(0 < sum(b - a for _, a, b in row) <= length for row in rows)
    pieces = [piece for row in rows for piece in row]
    assert all(b - a == length or b == lengths[d] for d, a, b in pieces)
    assert all(a % length == 0 for _, a, _ in pieces)


@given(LENGTHS, st.integers(2, 16))
def test_best_fit_chooses_the_least_room_that_holds(lengths, length):
    # The same rule, by looking at every row.
    rooms: list[int] = []
    for size in lengths:
        rooms += [0] * ((size - 1) // length)
        rest = (size - 1) % length + 1
        fitting = [room for room in rooms if room >= rest]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - rest)
        else:
            rooms.append(length - rest)
    layout = best_fit(np.asarray(lengths), length)
    filled = [sum(b - a for _, a, b in layout.row(r)) for r in range(layout.rows)]
    assert sorted(length - size for size in filled) == sorted(rooms)


def test_best_fit_by_hand():
    layout = best_fit(np.asarray([5, 12, 3, 4, 2, 8]), 8)
    assert [layout.row(r) for r in range(layout.rows)] == [
        [(0, 0, 5), (2, 0, 3)],
        [(1, 0, 8)],
        [(1, 8, 12), (3, 0, 4)],
        [(4, 0, 2)],
        [(5, 0, 8)],
    ]


@given(st.integers(2, 50), KEYS, st.integers(0, 2**32), st.integers(0, 5))
def test_the_parts_of_a_turned_document_restore_it(size, key, seed, epoch):
    stored = list(range(size))
    begin, sentinel_0, prefix, sentinel_1, suffix, sentinel_2, middle, end = FIM.spans(size, key, seed, epoch)
    assert [sentinel_0, sentinel_1, sentinel_2] == [(-1, 101), (-1, 102), (-1, 103)]
    restored = [at for low, high in (begin, prefix, middle, suffix, end) for at in range(low, high)]
    assert restored == stored
    assert begin == (0, 1)
    assert end == (size - 1, size)


def test_fim_depends_on_document_seed_and_epoch_alone():
    keys_D = mixed(np.arange(20_000, dtype=np.uint64), 5)
    chosen_D = FIM.chosen(keys_D, seed=1, epoch=0)
    assert abs(chosen_D.mean() - 0.3) < 0.01
    assert np.array_equal(FIM.chosen(keys_D[::-1], seed=1, epoch=0), chosen_D[::-1])
    for seed, epoch in ((1, 1), (2, 0)):
        other_D = FIM.chosen(keys_D, seed, epoch)
        assert abs((other_D == chosen_D).mean() - (0.3**2 + 0.7**2)) < 0.02
    assert not Fim(0.0).chosen(keys_D, 1, 0).any()
    assert Fim(1.0).chosen(keys_D, 1, 0).all()
    assert sum(low < 0 for low, _ in FIM.spans(10, 3, 1, 0)) == ADDED


def test_cuts_are_spread_over_the_whole_document():
    cuts = np.array([FIM.spans(12, key, 0, 0)[6] for key in mixed(np.arange(6000, dtype=np.uint64), 1).tolist()])
    counts = np.bincount(cuts.ravel(), minlength=12)[1:12]
    assert cuts.min() == 1
    assert cuts.max() == 11
    assert np.all(abs(counts / 12_000 - 1 / 11) < 0.015)


@settings(max_examples=50)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 200))
def test_draws_are_counted_as_they_are_made(weights, draws):
    mixture = Mixture(weights)
    made = [mixture.locate(i) for i in range(draws)]
    counts = [[i for source, i in made if source == s] for s in range(len(weights))]
    assert counts == [list(range(count)) for count in mixture.counts(draws)]
    exact = np.asarray(weights) / sum(weights) * draws
    assert np.all(abs(np.asarray(mixture.counts(draws)) - exact) <= max(1, len(weights) - 1) + 1e-9)


def test_weights_are_met_over_many_draws():
    assert Mixture([3, 1, 6]).counts(10**15) == [3 * 10**14, 10**14, 6 * 10**14]
    assert [Mixture([2, 1]).locate(i)[0] for i in range(6)] in ([0, 0, 1] * 2, [0, 1, 0] * 2, [1, 0, 0] * 2)
    for bad in ([], [1, 0], [1, -1], [1, float("inf")], [float("nan")]):
        with pytest.raises(ValueError, match="weights above 0"):
            Mixture(bad)


def test_hashes_are_fixed():
    # Another hash would move documents between the splits, and change the order of runs that are compared.
    assert text_key("argparse.py") == 0xC93FA5724C1B9BF2
    # The first outputs of SplitMix64 seeded with 0 are those of its counter's multiples.
    golden = np.uint64(0x9E3779B97F4A7C15)
    assert mixed(np.array([0, golden], np.uint64), 0).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert (
        shuffled(np.arange(6, dtype=np.uint64), 0).tolist()
        == np.argsort(mixed(np.arange(6, dtype=np.uint64), 0)).tolist()
    )
