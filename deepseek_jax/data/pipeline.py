"""From a `DataConfig` to training batches and held-out windows: `load_data`, once a run.

Legend: D held-out documents, n tokens of a stream.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deepseek_jax.data.batches import Batches, Shard
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.damage import Damage
from deepseek_jax.data.fim import Fim
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.data.readers import open_source, read_documents
from deepseek_jax.data.rows import SourceRows
from deepseek_jax.data.split import find_split
from deepseek_jax.data.tokens import TokenFile, token_file
from deepseek_jax.text.tokenizer import Tokenizer

TOKENIZER_BYTES = 200_000_000  # of training text that a tokenizer is learned from, in all sources together
LEAST_DOMAIN = 20_000  # bytes of measured text below which a part of a source is counted with the others
OTHER = "other"


def training_texts(config: DataConfig) -> Iterator[str]:
    """The text of the training documents, never a held-out one: what a tokenizer may be learned from.

    Each source gives its share of 200 MB at most, from its beginning.

    Raises:
        ValueError, OSError: as `load_data`.
    """
    sources = [open_source(spec, config.text_field) for spec in config.sources()]
    for source in sources:
        held_out_D, left = find_split(source, config.held_out_share).held_out_D, TOKENIZER_BYTES // len(sources)
        damage = Damage()
        for document, held_out in zip(read_documents(source, damage), held_out_D, strict=False):
            if not held_out:
                yield document.text
                left -= len(document.text.encode())
                if left <= 0:
                    break
        else:
            # Said now rather than after a tokenizer has been learned from what is left.
            damage.check(source.title, config.damaged_share)


def load_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    report: Callable[[str], None] = lambda line: None,
) -> "Data":
    """The tokens of every source, read or made in ``config.token_folder``, or in ``folder`` where that is None.

    ``report`` is given the progress and the damage report in lines.

    Raises:
        ValueError: too much damage, token files of other text, too little text, FIM without its tokens in the
            tokenizer, or a file format whose package is not installed.
        OSError: a path does not exist or cannot be read; the folder cannot be written.
    """
    fim = Fim.of(tokenizer, config.fim_rate)
    specs = config.sources()
    sources = [open_source(spec, config.text_field) for spec in specs]
    home = folder if config.token_folder is None else config.token_folder
    files = []
    for source in sources:
        files.append(
            token_file(
                source,
                tokenizer,
                home / source.label,
                held_out_share=config.held_out_share,
                damaged_share=config.damaged_share,
                report=report,
            )
        )
        for line in Damage(**files[-1].manifest["damage"]).lines(source.label):
            report(line)
    weights = [
        float(file.manifest["train"]["tokens"]) if spec.weight is None else spec.weight
        for spec, file in zip(specs, files, strict=True)
    ]
    return Data(config, tuple(spec.label for spec in specs), tuple(files), tuple(weights), fim, tokenizer.token_bytes())


@dataclass(frozen=True, eq=False)
class Data:
    """A run's text, tokenised. ``weights``: of the sources' rows, relative to one another."""

    config: DataConfig
    labels: tuple[str, ...]
    files: tuple[TokenFile, ...]
    weights: tuple[float, ...]
    fim: Fim
    bytes_V: np.ndarray

    def of(self, labels: tuple[str, ...]) -> "Data":
        """Those of its sources alone; of none, all of them."""
        kept = [i for i, label in enumerate(self.labels) if not labels or label in labels]
        parts = {name: tuple(getattr(self, name)[i] for i in kept) for name in ("labels", "files", "weights")}
        return replace(self, **parts)

    def batches(self, *, length: int, rows: int, seed: int, shard: Shard = (0, 1)) -> "Batches":
        """Micro-batches of ``rows`` rows of ``length`` tokens over all hosts, without end.

        ``shard`` is (index, count): this host gets rows index * rows / count and on of each, or with a tuple of
        indices these groups of rows, in that order. The hosts' groups in order are the batch of a single host.

        Raises:
            ValueError: rows that do not divide by the hosts, or less text than one batch.
        """
        if self.train_tokens < rows * length:
            raise ValueError(
                f"The training text has {self.train_tokens} tokens, too few for one batch of {rows} x {length}: give "
                "more text, or shorter or fewer rows."
            )
        fim, masks = self.fim, self.config.sample_masks
        sources = {
            label: SourceRows(file, length=length, seed=seed, label=label, fim=fim, sample_masks=masks)
            for label, file in zip(self.labels, self.files, strict=True)
        }
        settings = {"length": length, "seed": seed, "fim_rate": fim.rate, "sample_masks": masks}
        identities = [[weight, file.identity] for file, weight in zip(self.files, self.weights, strict=True)]
        settings["sources"] = dict(zip(self.labels, identities, strict=True))
        return Batches(sources, self.weights, settings, rows=rows, workers=self.config.workers, shard=shard)

    def held_out(self, length: int) -> HeldOut:
        """The held-out documents in windows of ``length``, with their domains: the sources' labels, or the top-level
        packages of the standard library where it is the only source, those under 20 kB together as "other".

        Of a source with more held-out text than ``held_out_bytes`` the documents with the lowest hashes are taken.
        """
        pieces, starts, names, at = [], [], [], 0
        for label, file in zip(self.labels, self.files, strict=True):
            picked_D = _measured(file, self.config.held_out_bytes)
            parts = _parts(file, picked_D) if len(self.files) == 1 else [""] * len(picked_D)
            for document, part in zip(picked_D.tolist(), parts, strict=True):
                start = int(file.documents_D["end"][document - 1]) if document else 0
                pieces.append(file.read(start, int(file.documents_D["end"][document])).astype(np.int32))
                starts.append(at)
                at += len(pieces[-1])
                names.append(part or label)
        domains = sorted(set(names), key=lambda name: (name == OTHER, name))
        of_document = [domains.index(name) for name in names]
        return HeldOut.cut(
            np.concatenate(pieces),
            self.bytes_V,
            length=length,
            starts_D=np.asarray(starts) if self.config.sample_masks else None,
            domains=tuple(domains),
            domain_n=np.repeat(of_document, [len(piece) for piece in pieces]),
        )

    def record(self) -> dict:
        """What identifies the text and how it is used, for a run's records; plain values for JSON."""
        return {
            "fim_rate": self.fim.rate,
            "sample_masks": self.config.sample_masks,
            "sources": {
                label: {"weight": weight, **file.record()}
                for label, file, weight in zip(self.labels, self.files, self.weights, strict=True)
            },
        }

    @property
    def train_tokens(self) -> int:
        """Tokens of an epoch of all sources, before FIM."""
        return sum(file.manifest["train"]["tokens"] for file in self.files)


def _measured(file: TokenFile, most_bytes: int) -> np.ndarray:
    """The held-out documents to measure, in the source's order: those of the lowest keys up to so many bytes."""
    held_out_D = np.flatnonzero(file.documents_D["held_out"])
    ranked_D = held_out_D[np.argsort(file.documents_D["key"][held_out_D], kind="stable")]
    before_D = np.cumsum(file.documents_D["bytes"][ranked_D]) - file.documents_D["bytes"][ranked_D]
    return np.sort(ranked_D[before_D < most_bytes])


def _parts(file: TokenFile, picked_D: np.ndarray) -> list[str]:
    """The part of each document; of parts with little text, "other"."""
    parts_D = np.asarray(file.documents_D["part"][picked_D], np.int64)
    names = file.manifest["parts"]
    sizes = np.bincount(parts_D, np.asarray(file.documents_D["bytes"][picked_D], np.float64), len(names))
    return [names[part] if sizes[part] >= LEAST_DOMAIN or not names[part] else OTHER for part in parts_D]
