"""Rows of a source without end, for any lengths of documents: the epochs' streams, and only those, whole."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.fim import Fim
from deepseek_jax.data.rows import SourceRows
from deepseek_jax.data.shuffle import mixed
from deepseek_jax.data.tokens import RECORD

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=12)
FIM = Fim(0.4, 1_000_000, 1_000_001, 1_000_002)


def rows_of(lengths, held_out, **options):
    """Rows over documents whose tokens count up from 1 through the whole file, so that each is known by its id."""
    documents_D = np.zeros(len(lengths), RECORD)
    documents_D["end"] = np.cumsum(lengths)
    documents_D["key"] = mixed(np.arange(len(lengths), dtype=np.uint64), 7)
    documents_D["held_out"] = held_out
    ids_n = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
    tokens = SimpleNamespace(documents_D=documents_D, read=lambda start, stop: ids_n[start:stop])
    return SourceRows(tokens, seed=3, label="a", **options), ids_n


def epochs_of(rows, count):
    """The rows of each of the first epochs."""
    rows.locate(0)
    found = []
    for epoch in range(count):
        rows.locate(rows._first[epoch + 1] if epoch + 1 < len(rows._first) else rows._first[-1])
        found.append([rows[i] for i in range(rows._first[epoch], rows._first[epoch + 1])])
    return found


@settings(max_examples=60)
@given(LENGTHS, st.integers(2, 40), st.sampled_from([Fim(), FIM]))
def test_without_masks_no_token_is_left_out_or_repeated(lengths, length, fim):
    size = sum(lengths)
    if size < length:
        return
    rows, ids_n = rows_of(lengths, False, length=length, fim=fim)
    epochs = epochs_of(rows, 4)
    stream = np.concatenate([row["tokens"] for epoch in epochs for row in epoch])
    assert all(row.keys() == {"tokens"} and len(row["tokens"]) == length for epoch in epochs for row in epoch)
    # Rows are shuffled in an epoch, so whole epochs are counted: four, and the beginning of a fifth.
    found, counts = np.unique(stream[stream < FIM.begin], return_counts=True)
    assert np.array_equal(found, ids_n)
    assert counts.min() >= 4
    assert counts.max() <= 5
    assert (counts == 5).sum() < length
    sentinels = [int((stream == i).sum()) for i in (FIM.begin, FIM.hole, FIM.end)]
    assert max(sentinels) - min(sentinels) <= 1
    assert bool(fim.rate) or sentinels == [0, 0, 0]


@settings(max_examples=60)
@given(LENGTHS, st.integers(2, 40), st.sampled_from([Fim(), FIM]))
def test_with_masks_every_epoch_has_every_token_once_in_its_own_segment(lengths, length, fim):
    if sum(lengths) < length:
        return
    rows, ids_n = rows_of(lengths, False, length=length, fim=fim, sample_masks=True)
    owner_n = np.repeat(np.arange(len(lengths)), lengths)
    for epoch in epochs_of(rows, 3):
        stream = np.concatenate([row["tokens"] for row in epoch])
        assert np.array_equal(np.sort(stream[(stream > 0) & (stream < FIM.begin)]), ids_n)
        for row in epoch:
            real = row["segments"] > 0
            assert np.array_equal(real, row["tokens"] > 0)
            assert not np.any(np.diff(real.astype(int)) > 0)
            for segment in range(1, row["segments"].max() + 1):
                ids = row["tokens"][row["segments"] == segment]
                assert len(ids)
                assert len(set(owner_n[ids[ids < FIM.begin] - 1].tolist())) <= 1


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(2, 30), st.booleans()), min_size=2, max_size=12), st.booleans())
def test_held_out_documents_are_in_no_row(documents, masks):
    lengths, held_out = zip(*documents, strict=True)
    kept = sum(size for size, out in documents if not out)
    if kept < 4:
        return
    rows, ids_n = rows_of(lengths, held_out, length=4, sample_masks=masks)
    seen = set(np.concatenate([row["tokens"] for epoch in epochs_of(rows, 2) for row in epoch]).tolist()) - {0}
    assert seen == set(ids_n[~np.repeat(held_out, lengths)].tolist())


def test_rows_can_be_made_in_any_order():
    rows, _ = rows_of([5, 9, 30, 2, 14], False, length=7, fim=FIM)
    forward = [rows[i]["tokens"].tolist() for i in range(60)]
    other, _ = rows_of([5, 9, 30, 2, 14], False, length=7, fim=FIM)
    assert [other[i]["tokens"].tolist() for i in range(59, -1, -1)] == forward[::-1]
    assert len({tuple(row) for row in forward}) > 20
    assert other.epochs(0) == 0
    assert other.epochs(other._first[2]) == 2
