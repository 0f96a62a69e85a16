"""A source's rows without end: every epoch a new order of documents, new FIM, new packing, a new order of rows.

Without sample masks the epochs follow one another in one stream that is cut into rows, so that every token comes
exactly once an epoch and none is left out; an epoch's last row ends with the next epoch's first documents. With
sample masks an epoch's documents are packed by themselves (`packing.best_fit`).

A row depends on the seed, the text and its own number alone: any worker or host can make any row.

Legend: D documents, R rows, T tokens a row.
"""

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deepseek_jax.data.fim import ADDED, NO_FIM, Fim
from deepseek_jax.data.packing import Layout, best_fit, cut
from deepseek_jax.data.shuffle import ORDER, ROWS, seed_key, shuffled
from deepseek_jax.data.tokens import TokenFile

KEPT = 3  # epochs whose orders are held: 8 bytes a document for each, and 32 a piece


@dataclass(frozen=True, eq=False)
class _Documents:
    """An epoch's documents in its order: their numbers, whether they are turned by FIM, their lengths with it."""

    order_D: np.ndarray
    turned_D: np.ndarray
    lengths_D: np.ndarray


class Epochs(ABC):
    """Rows numbered through epoch after epoch, each with as many rows as ``_begin`` finds it to have."""

    def __init__(self):
        self._lock = threading.RLock()
        self._first = [0]  # the first row of each epoch begun, and of the one to begin next

    @abstractmethod
    def _begin(self, epoch: int) -> None:
        """Appends to ``_first`` where the epoch after this one begins."""

    def locate(self, index: int) -> tuple[int, int]:
        """The epoch that row ``index`` belongs to, from 0, and its number there."""
        with self._lock:
            while index >= self._first[-1]:
                self._begin(len(self._first) - 1)
            epoch = bisect_right(self._first, index) - 1
            return epoch, index - self._first[epoch]

    def epochs(self, rows: int) -> float:
        """How often the first ``rows`` rows pass over the source."""
        epoch, row = self.locate(rows)
        return epoch + row / (self._first[epoch + 1] - self._first[epoch])

    def first_epoch(self, rows: int) -> range:
        """The indices of the first ``rows`` rows, as far as the first epoch reaches: no row of them repeats text."""
        self.locate(0)
        return range(min(rows, self._first[1]))


class SourceRows(Epochs):
    """Rows of ``length`` tokens from the training documents of a token file; index them by any int from 0.

    ``rows[i]`` is ``{"tokens": int32 [T]}``, with ``sample_masks`` also ``{"segments": int32 [T]}``: 1, 2, ... for the
    row's documents, 0 for padding, whose token is id 0.

    Raises:
        ValueError: a length below 2, or fewer tokens than one row.
    """

    def __init__(
        self,
        tokens: TokenFile,
        *,
        length: int,
        seed: int,
        label: str,
        fim: Fim = NO_FIM,
        sample_masks: bool = False,
    ):
        if length < 2:
            raise ValueError(f"Rows need 2 tokens or more, not {length}.")
        ends_A = np.asarray(tokens.documents_D["end"], np.int64)
        train_A = ~np.asarray(tokens.documents_D["held_out"])
        starts_A = np.concatenate([np.zeros(1, np.int64), ends_A[:-1]])
        self.tokens, self.length, self.fim, self.sample_masks = tokens, length, fim, sample_masks
        self.seed = seed_key(seed, label)
        self._starts_D, self._lengths_D = starts_A[train_A], (ends_A - starts_A)[train_A]
        self._keys_D = np.asarray(tokens.documents_D["key"])[train_A]
        self.size = int(self._lengths_D.sum())
        if self.size < length:
            raise ValueError(
                f"The training text of {label} has {self.size} tokens, too few for one row of {length}: give more text "
                "or shorter rows."
            )
        super().__init__()
        self._documents = _Kept(self._find_documents)
        self._layouts = _Kept(self._find_layout)
        self._skip = [0]  # of each epoch begun: tokens that the row before it took

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, row = self.locate(index)
        layout, order_R = self._get(self._layouts, epoch)
        tokens_T = np.zeros(self.length, np.int32)
        segments_T = np.zeros(self.length, np.int32)
        at, ordered = 0, self._get(self._documents, epoch)
        for segment, (document, start, stop) in enumerate(layout.row(order_R[row]), start=1):
            of, owner = ordered, epoch
            if document >= len(of.order_D):
                of, owner, document = self._get(self._documents, epoch + 1), epoch + 1, document - len(of.order_D)
            end = at + stop - start
            self._fill(tokens_T[at:end], of.order_D[document], of.turned_D[document], owner, start)
            segments_T[at:end] = segment
            at = end
        return {"tokens": tokens_T, "segments": segments_T} if self.sample_masks else {"tokens": tokens_T}

    def _get(self, kept: "_Kept", epoch: int):
        with self._lock:
            return kept[epoch]

    def _begin(self, epoch: int) -> None:
        if self.sample_masks:
            self._first.append(self._first[-1] + self._layouts[epoch][0].rows)
            return
        turned = int(self.fim.chosen(self._keys_D, self.seed, epoch).sum())
        left = self.size + ADDED * turned - self._skip[epoch]
        rows = -(-left // self.length)
        self._first.append(self._first[-1] + rows)
        self._skip.append(rows * self.length - left)

    def _find_documents(self, epoch: int) -> _Documents:
        order_D = shuffled(self._keys_D, seed_key(self.seed, epoch, ORDER))
        turned_D = self.fim.chosen(self._keys_D, self.seed, epoch)[order_D]
        return _Documents(order_D, turned_D, self._lengths_D[order_D] + ADDED * turned_D)

    def _find_layout(self, epoch: int) -> tuple[Layout, np.ndarray]:
        lengths_D = self._documents[epoch].lengths_D
        if self.sample_masks:
            layout = best_fit(lengths_D, self.length)
        else:
            following_D = self._documents[epoch + 1].lengths_D
            needed = 1 + np.searchsorted(np.cumsum(following_D), self._skip[epoch + 1])
            layout = cut(np.concatenate([lengths_D, following_D[:needed]]), self.length, self._skip[epoch])
            rows = self._first[epoch + 1] - self._first[epoch]
            pieces = layout.first_R1[rows]
            layout = Layout(
                layout.document_P[:pieces], layout.start_P[:pieces], layout.stop_P[:pieces], layout.first_R1[: rows + 1]
            )
        order_R = shuffled(np.arange(layout.rows, dtype=np.uint64), seed_key(self.seed, epoch, ROWS))
        return layout, order_R

    def _fill(self, out_n: np.ndarray, document: int, turned: bool, epoch: int, start: int) -> None:
        """Writes the tokens of a document from ``start`` on, as the epoch has them, as many as there is room for."""
        base, size = int(self._starts_D[document]), int(self._lengths_D[document])
        if not turned:
            out_n[:] = self.tokens.read(base + start, base + start + len(out_n))
            return
        at = -start
        for low, high in self.fim.spans(size, int(self._keys_D[document]), self.seed, epoch):
            count = 1 if low < 0 else high - low
            begin, end = max(at, 0), min(at + count, len(out_n))
            if begin < end:
                skipped = begin - at
                out_n[begin:end] = (
                    high if low < 0 else self.tokens.read(base + low + skipped, base + low + skipped + end - begin)
                )
            at += count


class _Kept:
    """The values of a function at the last few epochs asked for."""

    def __init__(self, find: Callable):
        self._find, self._found = find, {}

    def __getitem__(self, epoch: int):
        value = self._found.pop(epoch) if epoch in self._found else self._find(epoch)
        self._found[epoch] = value
        if len(self._found) > KEPT:
            del self._found[next(iter(self._found))]
        return value
