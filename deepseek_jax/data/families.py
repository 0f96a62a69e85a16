"""Families of near-duplicates among documents, by MinHash and locality-sensitive hashing (Broder 1997; Indyk and
Motwani 1998; one permutation with densification: Li et al. 2012, Shrivastava and Li 2014).

Two documents are near-duplicates when the sets of their runs of `RUN` bytes have a Jaccard similarity of `SIMILAR` or
more: of two texts of one size, a quarter of each is in the other. A family is what is joined by such pairs. Nothing but
the texts decides it, in whatever order they come. A document costs 512 bytes of memory, whatever its size, and time in
proportion to its length; documents are compared only where `ROWS` of their hashes agree, and then with `NEAR` others.

Legend: n bytes of a text, H hashes of a sketch, D documents, P pairs.
"""

import numpy as np

from deepseek_jax.data.shuffle import mixed

RUN = 16  # bytes of UTF-8, white space of any length counting as one space
SIMILAR = 0.15
HASHES, ROWS = 256, 2  # two documents as similar as SIMILAR agree in one of the 128 pairs of hashes with 95 %
NEAR = 8
PIECE, PAIRS_AT_ONCE = 1 << 14, 1 << 16
MULTIPLIER = 0xD1342543DE82EF95  # of a linear congruential generator of full period


def sketch(text: str) -> np.ndarray:
    """A text's MinHash sketch, uint16 [H]: the share of places at which two sketches agree estimates the similarity,
    with a standard deviation of 0.022 at `SIMILAR`."""
    raw = " ".join(text.split()).encode().ljust(RUN, b"\0")
    least_H = np.full(HASHES, np.iinfo(np.uint64).max)
    for start in range(0, len(raw) - RUN + 1, PIECE):  # arrays that stay in a processor's cache
        hashes_n = _hashes(np.frombuffer(raw[start : start + PIECE + RUN - 1], np.uint8))
        np.minimum.at(least_H, (hashes_n % HASHES).astype(np.intp), hashes_n)
    filled = np.flatnonzero(least_H != np.iinfo(np.uint64).max)
    # A place that no run fell into takes the value of the next one that has any, and how far it lies.
    places = np.arange(HASHES)
    next_H = filled[np.searchsorted(filled, places) % len(filled)]
    return (mixed(least_H[next_H], RUN + 1) + ((next_H - places) % HASHES).astype(np.uint64)).astype(np.uint16)


def _hashes(bytes_n: np.ndarray) -> np.ndarray:
    """Of every run of `RUN` bytes a hash, uint64 [n - RUN + 1]."""
    runs_n, width = bytes_n.astype(np.uint64), 1
    while width < RUN:  # from runs of `width` bytes those of twice as many
        runs_n, width = runs_n[:-width] * np.uint64(MULTIPLIER**width % 2**64) + runs_n[width:], 2 * width
    return mixed(runs_n, RUN)


def families(sketches_DH: np.ndarray, keys_D: np.ndarray) -> np.ndarray:
    """The family of each document, int64 [D], numbered from 0 by their first members.

    ``keys_D``: uint64 [D], a hash of each text. Documents with the same key are the same text.
    """
    keys_U, which_U, text_D = np.unique(keys_D, return_index=True, return_inverse=True)
    sketches_UH = sketches_DH[which_U]
    parent = list(range(len(keys_U)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = at = parent[parent[at]]
        return at

    for low in range(0, HASHES, ROWS):
        band_U = np.zeros(len(keys_U), np.uint64)
        for row in range(low, low + ROWS):
            band_U = mixed(band_U ^ sketches_UH[:, row], 0)
        order_U = np.argsort(band_U, kind="stable")  # among equal ones by key, so that the source's order is nothing
        sorted_U = band_U[order_U]
        first_U = np.searchsorted(sorted_U, sorted_U)
        for back in range(1, NEAR + 1):
            # With the `back`-th before it in its band; at last with the first there.
            later_P = np.flatnonzero(np.arange(len(sorted_U)) - first_U >= back)
            earlier_P = later_P - back if back < NEAR else first_U[later_P]
            for at in range(0, len(later_P), PAIRS_AT_ONCE):
                here = slice(at, at + PAIRS_AT_ONCE)
                a_P, b_P = order_U[earlier_P[here]], order_U[later_P[here]]
                alike_P = (sketches_UH[a_P] == sketches_UH[b_P]).mean(1) >= SIMILAR
                for a, b in zip(a_P[alike_P].tolist(), b_P[alike_P].tolist(), strict=True):
                    parent[root(a)] = root(b)
    of_D = np.fromiter(map(root, range(len(parent))), np.int64, len(parent))[text_D]
    _, first_F, family_D = np.unique(of_D, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_F))[family_D]
