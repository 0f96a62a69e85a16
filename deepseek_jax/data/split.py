"""Which documents are held out: by a hash of what they say, families of near-duplicates on one side.

Names and places of files are nothing to it, and neither are other sources. A family is held out where the hash of its
lowest key is small enough. Two sizes are exceptions, which the split's record counts:

- a family of more than half of the held-out share is trained on, and the share drawn from the others instead, up to a
  half of them, so that no single family is most of what is measured;
- where all but one family are less than the held-out share, that family is the form of the text (generated tasks, one
  template), and its documents are split one by one.

Legend: D documents, F families.
"""

from dataclasses import dataclass

import numpy as np

from deepseek_jax.data.damage import Damage
from deepseek_jax.data.families import HASHES, RUN, SIMILAR, families, sketch
from deepseek_jax.data.readers import Source, read_documents
from deepseek_jax.data.shuffle import SPLIT, mixed, text_key

NAMED = 20  # families that the record names, the largest ones


@dataclass(frozen=True, eq=False)
class Split:
    """Of each of a source's documents in their order.

    Attributes:
        texts_D: uint64 [D], `text_key`.
        keys_D: uint64 [D], what its place in every order follows from: its text, and how many of the same came before.
        families_D: int64 [D], its family's number.
        held_out_D: bool [D].
        record: how it was made, for the manifest.
    """

    texts_D: np.ndarray
    keys_D: np.ndarray
    families_D: np.ndarray
    held_out_D: np.ndarray
    record: dict

    def line(self) -> str:
        """The record in words."""
        found = f"{int(self.held_out_D.sum()):,} of {len(self.held_out_D):,} documents are held out"
        if self.record["families"]:
            found += (
                f"; {self.record['in_families']:,} are in {self.record['families']:,} families of near-duplicates, "
                f"{self.record['trained_for_size']:,} of these too large to be held out"
            )
        if self.record["one_by_one"]:
            found += (
                f"; {self.record['one_by_one']:,} are near-duplicates of one another, nearly all there is, and split "
                "one by one: held-out text is like what is trained on"
            )
        return found


def find_split(source: Source, share: float) -> Split:
    """Reads ``source`` once and splits it; both sides have a document.

    Raises:
        ValueError: there are fewer than two documents of different text.
        OSError: as `read_documents`.
    """
    damage, texts, sketches, names = Damage(), [], bytearray(), []
    for document in read_documents(source, damage):
        texts.append(text_key(document.text))
        sketches += sketch(document.text).tobytes()
        names.append(document.name)
    texts_D = np.array(texts, np.uint64)
    if len(set(texts)) < 2:
        way_out = "give a file of several lines and more than 16 KiB, or a folder with at least two text files"
        if damage.damaged:
            way_out = "mend its records, or name their text with --text-field"
        raise ValueError(
            f"{source.title} gives {len(texts)} document(s) of {len(set(texts))} different text(s); training and "
            f"held-out text need one each: {way_out}.{damage.summary()}"
        )
    families_D = families(np.frombuffer(sketches, np.uint16).reshape(-1, HASHES), texts_D)
    sizes_F = np.bincount(families_D)
    unit_D, singly = families_D, 0
    if len(texts) - sizes_F.max() < max(1, share * len(texts)):
        # This family's documents by their text, beside the other families.
        _, text_D = np.unique(texts_D, return_inverse=True)
        most_D = families_D == sizes_F.argmax()
        singly = int(most_D.sum())
        unit_D = np.unique(np.where(most_D, len(sizes_F) + text_D, families_D), return_inverse=True)[1]
    held_out_U, large_U = _held_out(unit_D, texts_D, share)
    related_F = np.flatnonzero(sizes_F > 1)
    ranked_F = related_F[np.argsort(-sizes_F[related_F], kind="stable")][:NAMED]
    first_F = np.unique(families_D, return_index=True)[1]
    record = {
        "by": "a hash of the text",
        "near_duplicates": f"Jaccard similarity of {RUN}-byte runs of {SIMILAR} or more",
        "families": len(related_F),
        "in_families": int(sizes_F[related_F].sum()),
        "trained_for_size": int(large_U.sum()),
        "one_by_one": singly,
        "largest": [{"documents": int(sizes_F[f]), "first": names[first_F[f]]} for f in ranked_F],
    }
    return Split(texts_D, texts_D + _earlier(texts_D), families_D, held_out_U[unit_D], record)


def _held_out(unit_D: np.ndarray, texts_D: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit that stays on one side: whether it is held out, and whether it is too large for that."""
    sizes_U = np.bincount(unit_D)
    lowest_U = np.full(len(sizes_U), np.iinfo(np.uint64).max)
    np.minimum.at(lowest_U, unit_D, texts_D)
    fractions_U = mixed(lowest_U, SPLIT) / 2.0**64
    large_U = sizes_U > max(1, share * len(unit_D) / 2)
    left = sizes_U[~large_U].sum()
    held_out_U = (fractions_U * left < min(share * len(unit_D), max(share, 0.5) * left)) & ~large_U
    if not held_out_U.any():
        # The lowest of the smallest: one document where there is a single one.
        held_out_U[np.lexsort((fractions_U, sizes_U))[0] if large_U.all() else np.argmin(fractions_U + large_U)] = True
    if held_out_U.all():
        held_out_U[np.argmax(fractions_U)] = False
    return held_out_U, large_U & ~held_out_U


def _earlier(keys_D: np.ndarray) -> np.ndarray:
    """How many of the same key stand before each, uint64 [D]."""
    order_D = np.argsort(keys_D, kind="stable")
    sorted_D = keys_D[order_D]
    found = np.empty(len(keys_D), np.uint64)
    found[order_D] = np.arange(len(keys_D)) - np.searchsorted(sorted_D, sorted_D)
    return found
