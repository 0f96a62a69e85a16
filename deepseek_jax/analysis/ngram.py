"""Interpolated Kneser-Ney n-grams: the baseline that a trained language model has to beat.

Chen and Goodman (1998), section 2.7, with one absolute discount d for every order. For a context h of
n - 1 tokens and h' the same without its first:

    p_n(w | h) = max(c_n(h w) - d, 0) / c_n(h .) + d N_n(h .) / c_n(h .) p_{n-1}(w | h')

c is the count for the highest order and, below it, the number of different tokens seen before the n-gram
(its continuation count); N(h .) is the number of different tokens seen after h. Below the unigrams stands
the uniform distribution over the vocabulary, so every token has a probability. A context never seen gives
its whole weight to the lower order.

Legend: n rows, T tokens a row; G different n-grams and C different contexts of one order.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """One order's table; an n-gram's key is its tokens as digits to the base of the vocabulary's size."""

    keys_G: np.ndarray
    counts_G: np.ndarray
    contexts_C: np.ndarray
    totals_C: np.ndarray
    types_C: np.ndarray


class KneserNey:
    """An interpolated Kneser-Ney model of ``order`` tokens (3: a trigram) over ids 0..vocab_size - 1.

    Raises:
        ValueError: ``order`` below 1, ``discount`` outside (0, 1), or n-grams that do not fit 63 bits.
    """

    def __init__(self, vocab_size: int, order: int = 3, discount: float = 0.75):
        if order < 1 or vocab_size < 1 or not 0 < discount < 1:
            raise ValueError(
                "Kneser-Ney needs order >= 1, vocab_size >= 1 and a discount between 0 and 1; "
                f"got {order}, {vocab_size} and {discount}."
            )
        if vocab_size**order >= 2**63:
            raise ValueError(f"{order}-grams over {vocab_size} tokens do not fit into 63 bits; take a lower order.")
        self.vocab_size, self.order, self.discount = vocab_size, order, discount
        self._orders: list[_Order] = []

    def fit(self, rows_nT: np.ndarray) -> "KneserNey":
        """Counts the n-grams of ``rows_nT``, integer ids [n, T], and returns the model.

        No n-gram crosses the end of a row: rows that a model is trained on are cut from a stream and
        shuffled, so that neither learner is told what stood before a row.

        Raises:
            ValueError: rows of another rank, too short for the order, or ids outside the vocabulary.
        """
        rows_nT = np.asarray(rows_nT)
        if rows_nT.ndim != 2 or rows_nT.shape[0] == 0 or rows_nT.shape[1] < self.order:
            raise ValueError(f"Rows of at least {self.order} tokens are needed, [n, T]; got shape {rows_nT.shape}.")
        self._check_ids(rows_nT)
        above = None
        orders = []
        for n in range(self.order, 0, -1):
            keys_G, counts_G = np.unique(self._pack(rows_nT, n), return_counts=True)
            seen = keys_G
            if above is not None:
                # Dropping the first digit of each different (n + 1)-gram leaves each n-gram once for each
                # different token before it. Those that only ever begin a row have none.
                keys_G, counts_G = np.unique(above % self.vocab_size**n, return_counts=True)
            orders.append(self._table(keys_G, counts_G))
            above = seen
        self._orders = orders[::-1]
        return self

    def nats(self, stream_n: np.ndarray) -> np.ndarray:
        """-log p of each token of ``stream_n`` given those before it, float64 [n], in nats.

        A token's context is the true order - 1 tokens before it in the stream; the first tokens have
        shorter ones, and the very first is scored with none.
        """
        stream_n = np.asarray(stream_n)
        if stream_n.ndim != 1:
            raise ValueError(f"A stream of ids [n] is needed; got shape {stream_n.shape}.")
        self._check_ids(stream_n)
        p_n = np.full(len(stream_n), 1 / self.vocab_size)
        for n, table in enumerate(self._fitted(), start=1):
            if len(stream_n) < n:
                break
            p_n[n - 1 :] = self._mix(table, self._pack(stream_n[None], n), p_n[n - 1 :])
        return -np.log(p_n)

    def distribution(self, context) -> np.ndarray:
        """p(w | context) of every token w, float64 [V]; only the context's last order - 1 tokens count."""
        context = np.asarray(context, np.int64).reshape(-1)
        self._check_ids(context)
        p_V = np.full(self.vocab_size, 1 / self.vocab_size)
        for n, table in enumerate(self._fitted(), start=1):
            if len(context) < n - 1:
                break
            key = 0
            for token in context[len(context) - (n - 1) :]:
                key = key * self.vocab_size + int(token)
            p_V = self._mix(table, key * self.vocab_size + np.arange(self.vocab_size), p_V)
        return p_V

    def _mix(self, table: _Order, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        count = _look_up(table.keys_G, table.counts_G, keys)
        contexts = keys // self.vocab_size
        total = _look_up(table.contexts_C, table.totals_C, contexts)
        types = _look_up(table.contexts_C, table.types_C, contexts)
        known = total > 0
        total = np.where(known, total, 1)
        back_off = np.where(known, self.discount * types / total, 1.0)
        return np.maximum(count - self.discount, 0) / total + back_off * lower

    def _table(self, keys_G: np.ndarray, counts_G: np.ndarray) -> _Order:
        contexts_C, first, types_C = np.unique(keys_G // self.vocab_size, return_index=True, return_counts=True)
        return _Order(keys_G, counts_G, contexts_C, np.add.reduceat(counts_G, first), types_C)

    def _pack(self, rows_nT: np.ndarray, n: int) -> np.ndarray:
        """Keys of all n-grams inside the rows, row by row: int64 [n_rows * (T - n + 1)]."""
        last = rows_nT.shape[1] - n + 1
        keys = np.zeros((rows_nT.shape[0], last), np.int64)
        for offset in range(n):
            keys = keys * self.vocab_size + rows_nT[:, offset : offset + last]
        return keys.reshape(-1)

    def _fitted(self) -> list[_Order]:
        if not self._orders:
            raise ValueError("The n-gram model has counted no text yet; call fit(rows) first.")
        return self._orders

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise ValueError(f"Token ids must lie in 0..{self.vocab_size - 1}; got {int(ids.min())}..{int(ids.max())}.")


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value at each wanted key, 0 where it is missing; ``keys`` are sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
