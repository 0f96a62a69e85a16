"""Training batches from the rows of sources: an endless iterator whose place is one number.

Batches are a function of the text, the seed and their number. Grain makes them ahead of the step in threads; where an
iterator stands is one number, so that a run may go on with other workers, hosts or micro-batches than it began with.

Legend: B rows a batch on all hosts, b on this one, T tokens a row, R rows.
"""

import json
import sys
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from deepseek_jax.data.mixture import Mixture
from deepseek_jax.data.rows import Epochs

AHEAD = 4  # batches kept ready for each worker

Shard = tuple[int | tuple[int, ...], int]  # which of so many groups of a batch's rows a host gets


class Batches:
    """An endless, resumable iterator over micro-batches ``{"tokens": int32 [b, T]}``, with sample masks also
    ``"segments"``; made by `Data.batches`.

    ``sources``: rows by label, as `SourceRows` gives them, drawn by ``weights``. ``settings``: what the rows follow
    from, plain values for JSON, "length" and "seed" among them; a saved state goes on only where they are the same.
    """

    def __init__(
        self,
        sources: Mapping[str, Epochs],
        weights: Sequence[float],
        settings: dict,
        *,
        rows: int,
        workers: int,
        shard: Shard,
    ):
        index, count = shard
        groups = index if isinstance(index, tuple) else (index,)
        if rows < 1 or not groups or not all(0 <= group < count for group in groups) or rows % count:
            raise ValueError(f"A batch of {rows} rows cannot be dealt to host {index} of {count}.")
        self.rows, self.length, self.labels, self.workers = rows, settings["length"], tuple(sources), workers
        size = rows // count
        self._own = [row for group in groups for row in range(group * size, (group + 1) * size)]
        self._mixture = Mixture(weights)
        self._sources = list(sources.values())
        self._settings = settings
        self._iterator, self._first_row, self._taken = None, 0, 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            options = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=AHEAD * self.workers)
            numbers = grain.MapDataset.range(sys.maxsize // self.rows)
            self._iterator = iter(numbers.map(self._make).to_iter_dataset(options))
        batch = next(self._iterator)
        self._taken += 1
        return batch

    def close(self) -> None:
        """Ends the threads that read ahead; the next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
        self._first_row, self._taken, self._iterator = self.rows_taken, 0, None

    @property
    def rows_taken(self) -> int:
        """Rows drawn so far on all hosts together."""
        return self._first_row + self._taken * self.rows

    def get_state(self) -> dict:
        """Where the iterator stands, and of what; for JSON. The same on every host."""
        return {"rows": self.rows_taken, **json.loads(json.dumps(self._settings))}

    def set_state(self, state: dict) -> None:
        """Goes on from a state of `get_state`: the next batch is the one that came next there.

        Raises:
            ValueError: the state is of other text or settings, which the message names.
        """
        different = [
            f"{name} was {state.get(name)} and is {value}"
            for name, value in self.get_state().items()
            if name != "rows" and state.get(name) != value
        ]
        if found := "; ".join(different) or self.damage(state):
            raise ValueError(f"The data cannot go on from the saved state: {found}.")
        self.close()
        self._first_row = state["rows"]

    def damage(self, state) -> str | None:
        """What a state lacks that every state of these batches has; None where it is whole, be it of other text."""
        if not isinstance(state, dict):
            return f"the data's state is {state!r}"
        missing = [name for name in self.get_state() if name not in state]
        if missing:
            return f"the data's state has no {', '.join(missing)}"
        rows = state["rows"]
        return None if type(rows) is int and rows >= 0 else f"rows is {rows!r}"

    def passes(self, rows: int) -> dict[str, float]:
        """Of each source: how often the first ``rows`` rows on all hosts pass over its text, by the first pass's
        rows."""
        counts = self._mixture.counts(rows)
        return {
            label: count / max(len(source.first_epoch(sys.maxsize)), 1)
            for label, source, count in zip(self.labels, self._sources, counts, strict=True)
        }

    def drawn(self) -> dict[str, dict[str, float]]:
        """Of each source: rows and tokens drawn so far on all hosts, and passes over its text."""
        found = {}
        counts = self._mixture.counts(self.rows_taken)
        for label, source, rows in zip(self.labels, self._sources, counts, strict=True):
            found[label] = {"rows": rows, "tokens": rows * self.length, "epochs": source.epochs(rows)}
        return found

    def rows_seen(self) -> np.ndarray:
        """The different rows drawn so far on all hosts, int32 [R, T], each source's as far as its first epoch: what a
        model has been trained on, and so what an n-gram baseline may count. Padding is id 0."""
        counts = self._mixture.counts(self.rows_taken)
        return np.array(
            [s[i]["tokens"] for s, count in zip(self._sources, counts, strict=True) for i in s.first_epoch(count)],
            np.int32,
        ).reshape(-1, self.length)

    def _make(self, number: int) -> dict[str, np.ndarray]:
        first = self._first_row + number * self.rows
        made = []
        for row in self._own:
            source, index = self._mixture.locate(first + row)
            made.append(self._sources[source][index])
        return {name: np.stack([row[name] for row in made]) for name in made[0]}
