"""The held-out stream in windows, and bits per byte from its tokens' nats, over all and by domain.

Legend: n tokens of the stream, W windows, T tokens a window, V vocabulary; X1 stands for X - 1.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A held-out stream in windows that score each of its tokens but the first exactly once.

    Each window begins with the last token of the one before, so W windows of T tokens have W (T - 1)
    predictions, and the last window is filled up with padding.

    With ``masks`` a window's documents do not see each other, and a document's first token is not scored: it has no
    bytes, and a model trained with sample masks is never asked for it.

    Attributes:
        stream_n: int32 [n].
        windows_WT: int32 [W, T]; padding is id 0 where ``segments_WT`` is 0.
        segments_WT: int32 [W, T], 0 at padding, else 1; with masks 1, 2, ... for the documents of each window.
        bytes_WT1: int32 [W, T - 1], UTF-8 bytes of the token that each prediction is scored on; BOS, EOS and
            padding have none. Bits per byte of any choice of windows: their nats / ln 2 / their bytes.
        domains: names of the domains, none where the stream is of one.
        domain_n: int32 [n], each token's domain, an index of ``domains``.
    """

    stream_n: np.ndarray
    windows_WT: np.ndarray
    segments_WT: np.ndarray
    bytes_WT1: np.ndarray
    domains: tuple[str, ...] = ()
    domain_n: np.ndarray | None = None

    @classmethod
    def cut(
        cls,
        stream_n: np.ndarray,
        bytes_V: np.ndarray,
        *,
        length: int,
        starts_D: np.ndarray | None = None,
        domains: tuple[str, ...] = (),
        domain_n: np.ndarray | None = None,
    ) -> "HeldOut":
        """Cuts ``stream_n`` into windows of ``length``; ``bytes_V`` is ``Tokenizer.token_bytes()``.

        ``starts_D``, where the documents begin in the stream, masks them from each other.

        Raises:
            ValueError: a length below 2, a stream of fewer than 2 tokens, or ids that the tokenizer does not have.
        """
        if length < 2 or len(stream_n) < 2:
            raise ValueError(
                f"Windows and the held-out stream need 2 tokens or more; got {length} and {len(stream_n)}."
            )
        count = -(-(len(stream_n) - 1) // (length - 1))
        at_WT = np.arange(count)[:, None] * (length - 1) + np.arange(length)
        real_WT = at_WT < len(stream_n)
        at_WT = np.minimum(at_WT, len(stream_n) - 1)
        windows_WT = np.where(real_WT, stream_n[at_WT], 0).astype(np.int32)
        bytes_WT1 = np.where(real_WT, bytes_V[windows_WT], 0)[:, 1:]
        segments_WT = real_WT.astype(np.int32)
        if starts_D is not None:
            document_n = np.searchsorted(starts_D, np.arange(len(stream_n)), side="right")
            document_WT = document_n[at_WT]
            segments_WT = np.where(real_WT, 1 + document_WT - document_WT[:, :1], 0).astype(np.int32)
        return cls(stream_n, windows_WT, segments_WT, bytes_WT1, domains, domain_n)

    def scores(self, nats_WT1: np.ndarray) -> np.ndarray:
        """Nats of each token but the first in stream order, [n - 1], from those of the windows' predictions.

        ``nats_WT1`` is [W, T - 1]; its entry (w, t) belongs to the token ``windows_WT[w, t + 1]``. What stands at
        padding is dropped.
        """
        expected = (self.windows_WT.shape[0], self.windows_WT.shape[1] - 1)
        if nats_WT1.shape != expected:
            raise ValueError(f"One score for each prediction is needed, {expected}; got shape {nats_WT1.shape}.")
        return np.asarray(nats_WT1)[self.segments_WT[:, 1:] != 0]

    @property
    def domain_WT(self) -> np.ndarray:
        """int32 [W, T]: the domain of each window's tokens; 0 where the stream is of one, and at padding."""
        if self.domain_n is None:
            return np.zeros(self.windows_WT.shape, np.int32)
        count, length = self.windows_WT.shape
        at_WT = np.arange(count)[:, None] * (length - 1) + np.arange(length)
        domain_WT = self.domain_n[np.minimum(at_WT, len(self.stream_n) - 1)]
        return np.where(self.segments_WT != 0, domain_WT, 0).astype(np.int32)

    @property
    def scored_n1(self) -> np.ndarray:
        """Whether each token but the first is scored, bool [n - 1]: all but, with masks, documents' first tokens."""
        segments_WT = self.segments_WT
        return (segments_WT[:, 1:] == segments_WT[:, :-1])[segments_WT[:, 1:] != 0]

    def bits_per_byte(self, nats_n1: np.ndarray) -> float:
        """Bits per byte of the text, from the nats of every token but the first in stream order, [n - 1]."""
        self._check(nats_n1)
        return float(
            np.sum(nats_n1, where=self.scored_n1, dtype=np.float64)
            / math.log(2)
            / np.sum(self.bytes_WT1, dtype=np.int64)
        )

    def bits_by_domain(self, nats_n1: np.ndarray) -> dict[str, float]:
        """Bits per byte of each domain, from the nats of every token but the first in stream order, [n - 1]."""
        self._check(nats_n1)
        if not self.domains:
            return {}
        count, domain_n1 = len(self.domains), self.domain_n[1:]
        nats = np.bincount(domain_n1, np.where(self.scored_n1, nats_n1, 0.0), count)
        sizes = np.bincount(domain_n1, self.bytes_WT1[self.segments_WT[:, 1:] != 0], count)
        return {
            name: float(nat / math.log(2) / size)
            for name, nat, size in zip(self.domains, nats, sizes, strict=True)
            if size
        }

    def _check(self, nats_n1: np.ndarray) -> None:
        if nats_n1.shape != (len(self.stream_n) - 1,):
            raise ValueError(f"{len(self.stream_n) - 1} scores are needed, got shape {nats_n1.shape}.")
