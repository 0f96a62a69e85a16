"""The batches of a run's steps, made ready on a thread while the device works. Loads no JAX.

Suffixes: A micro-batches, B rows, T tokens.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.schedule import Setting, setting

AHEAD = 2


@dataclass(frozen=True)
class Fed:
    """What one step takes. ``batch``: each entry [A, B, T], where micro-batches beyond those that the step uses are
    zeros. ``data_state``: of the iterator when this batch had been drawn. ``waited``: seconds it was waited for."""

    setting: Setting
    batch: dict[str, np.ndarray]
    data_state: dict
    waited: float


class Feed:
    """The rest of a run, step by step: its schedule's numbers, and a batch from ``batches``, micro-batches with
    ``get_state``. As a context manager it ends its thread."""

    def __init__(self, batches, recipe: Recipe, step: int, tokens: int):
        self.batches, self.recipe, self.step, self.tokens = batches, recipe, step, tokens
        self._ready: queue.Queue = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)

    def __enter__(self) -> Iterator[Fed]:
        self._thread.start()
        return self._taken()

    def __exit__(self, *error) -> None:
        self._closed.set()
        self._thread.join()

    def _taken(self) -> Iterator[Fed]:
        while True:
            began = time.monotonic()
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield Fed(*item, waited=time.monotonic() - began)

    def _fill(self) -> None:
        try:
            step, tokens = self.step, self.tokens
            while tokens < self.recipe.tokens:
                now = setting(self.recipe, tokens, step)
                micro = [next(self.batches) for _ in range(now.micro_batches)]
                if not self._put((now, _stacked(micro, self.recipe.micro_batches), self.batches.get_state())):
                    return
                step, tokens = step + 1, tokens + now.rows * self.recipe.length
            self._put(None)
        except BaseException as error:  # raised where the batch is taken
            self._put(error)

    def _put(self, item) -> bool:
        """Whether somebody still wants it."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _stacked(micro: list[dict[str, np.ndarray]], most: int) -> dict[str, np.ndarray]:
    """Micro-batches [B, T] as one batch [A, B, T], filled up with zeros."""
    batch = {}
    for name, first in micro[0].items():
        batch[name] = np.zeros((most, *first.shape), first.dtype)
        for index, part in enumerate(micro):
            batch[name][index] = part[name]
    return batch
