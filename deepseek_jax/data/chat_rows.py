"""A file of chats as training rows: whole chats packed with sample masks, and the loss on the assistant's tokens.

It offers what `pipeline.Data` offers, so that a run takes either.

Legend: C chats, n tokens of all chats, T tokens a row, V vocabulary.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepseek_jax.data.batches import Batches, Shard
from deepseek_jax.data.chat import Chat, UnsuitableTemplate, encode_chat
from deepseek_jax.data.damage import Damage
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.data.packing import Layout, best_fit
from deepseek_jax.data.records import json_objects
from deepseek_jax.data.rows import Epochs
from deepseek_jax.data.shuffle import ORDER, ROWS, seed_key, shuffled, text_key
from deepseek_jax.text.tokenizer import Tokenizer

TOO_LONG = ("cut", "drop")
FIELDS = ("tools", "documents")  # of a record beside its messages, handed to the template


@dataclass(frozen=True)
class ChatConfig:
    """The chats of a run."""

    too_long: str = "cut"
    """What becomes of a chat of more tokens than a row: cut keeps its beginning, drop leaves it out. Both are counted;
    a chat whose beginning has nothing of the assistant is left out either way."""
    held_out_share: float = 0.05
    """Share of the chats, by a hash of their text, that are measured and never trained on; at least one."""
    damaged_share: float = 0.01
    """Share of damaged records up to which a file is used without them; above it the run stops. Each one is counted
    and named."""
    workers: int = 1
    """Threads that prepare batches ahead of the step; 0: none. The batches are the same."""

    def __post_init__(self):
        if self.too_long not in TOO_LONG:
            raise ValueError(f"too_long must be one of {', '.join(TOO_LONG)}, not {self.too_long!r}.")
        if not 0 < self.held_out_share < 1 or not 0 <= self.damaged_share <= 1 or self.workers < 0:
            raise ValueError(
                f"held_out_share must lie inside 0 and 1, damaged_share between 0 and 1, and workers be 0 or more; got "
                f"{self.held_out_share}, {self.damaged_share}, {self.workers}."
            )


def load_chats(
    file: str | Path,
    tokenizer: Tokenizer,
    length: int,
    config: ChatConfig | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> "ChatData":
    """The chats of JSON lines ``{"messages": [{"role", "content"}, ...]}`` (.jsonl, .jsonl.zst) as tokens, in memory.

    A record may have ``tools`` and ``documents`` for the template. ``length``: tokens of the rows they will be packed
    into. ``report`` is given what was left out, cut or stripped, in lines.

    Raises:
        UnsuitableTemplate: the assistant's turns cannot be found in the template's text.
        DamagedSource: more records are damaged than ``config.damaged_share``.
        ValueError: fewer than two usable chats, or a tokenizer without a chat template.
        OSError: the file cannot be read.
    """
    file, config = Path(file), config or ChatConfig()
    if not file.is_file():
        raise FileNotFoundError(f"No file of chats at {file}.")
    if not tokenizer.has_template:
        raise ValueError(
            "Chats need the checkpoint's chat template, and this one has none (neither chat_template.jinja nor "
            "chat_template in tokenizer_config.json)."
        )
    damage, chats = Damage(source_bytes=file.stat().st_size), []
    counts = {"cut": 0, "dropped": 0, "stripped": 0}
    for found in json_objects(file, file.name, damage.source_bytes):
        chat, wrong = (None, found.damage) if found.value is None else _encoded(tokenizer, found.value, found.where)
        if chat is None:
            damage.add(found.where, wrong, lost_bytes=found.size)
            continue
        damage.records += 1
        counts["stripped"] += chat.stripped
        if len(chat.ids_n) > length:
            keep = config.too_long == "cut" and chat.mask_n[1:length].any()
            counts["cut" if keep else "dropped"] += 1
            if not keep:
                continue
            chat = Chat(chat.ids_n[:length], chat.mask_n[:length])
        chats.append(chat)
    damage.check(str(file), config.damaged_share)
    if len(chats) < 2:
        raise ValueError(
            f"{file} has {len(chats)} chats that fit rows of {length} tokens, out of {damage.records} records; at "
            "least two are needed, one of them to measure."
        )
    for line in damage.lines(str(file)):
        report(line)
    for name, said in (
        ("cut", f"chats longer than {length} tokens were cut"),
        ("dropped", f"chats longer than {length} tokens were left out"),
        ("stripped", "assistant messages have thoughts that the template leaves out"),
    ):
        if counts[name]:
            report(f"{file}: {counts[name]} {said}")
    return ChatData(config, file, tuple(chats), damage, counts, length, tokenizer.token_bytes())


def _encoded(tokenizer: Tokenizer, record: dict, where: str) -> tuple[Chat | None, str | None]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return None, "no list of messages under 'messages'"
    variables = {name: record[name] for name in FIELDS if record.get(name) is not None}
    try:
        return encode_chat(tokenizer, messages, **variables), None
    except UnsuitableTemplate as error:
        raise UnsuitableTemplate(f"{where}: {error}") from None
    except ValueError as error:
        return None, str(error)


@dataclass(frozen=True, eq=False)
class ChatData:
    """A file's chats, tokenised. ``counts``: chats "cut" and "dropped" for their length, messages "stripped"."""

    config: ChatConfig
    file: Path
    chats: tuple[Chat, ...] = field(repr=False)
    damage: Damage
    counts: dict[str, int]
    length: int
    bytes_V: np.ndarray = field(repr=False)
    label: str = "chats"

    def __post_init__(self):
        keys = np.asarray([text_key(chat.ids_n.tobytes().hex()) for chat in self.chats], np.uint64)
        # Of equal chats all are on one side, so that none of the measured ones is learned.
        ranked = np.unique(keys)
        held_out = ranked[: max(1, round(self.config.held_out_share * len(ranked)))]
        object.__setattr__(self, "_keys", keys)
        object.__setattr__(self, "_is_held_out", np.isin(keys, held_out))
        if self._is_held_out.all():
            raise ValueError(f"All chats of {self.file} are the same: one to learn and another to measure are needed.")

    @property
    def train(self) -> list[Chat]:
        return [chat for chat, held_out in zip(self.chats, self._is_held_out, strict=True) if not held_out]

    @property
    def train_tokens(self) -> int:
        """Tokens of an epoch, the users' included."""
        return sum(len(chat.ids_n) for chat in self.train)

    def rows(self, length: int, seed: int) -> "ChatRows":
        """The training chats as an endless sequence of rows."""
        if length < self.length:
            raise ValueError(f"The chats were cut for rows of {self.length} tokens, which do not fit rows of {length}.")
        return ChatRows(self.train, self._keys[~self._is_held_out], length=length, seed=seed)

    def batches(self, *, length: int, rows: int, seed: int, shard: Shard = (0, 1)) -> Batches:
        """Micro-batches of ``rows`` rows of ``length`` tokens over all hosts, without end, as `pipeline.Data.batches`:
        "tokens", "segments" and "loss_mask", each int32 [b, T]."""
        settings = {"length": length, "seed": seed, "chats": self.identity}
        sources = {self.label: self.rows(length, seed)}
        return Batches(sources, (1.0,), settings, rows=rows, workers=self.config.workers, shard=shard)

    def rows_an_epoch(self, length: int, seed: int = 0) -> int:
        """Rows of the first pass over the training chats; others differ by the packing."""
        return len(self.rows(length, seed).first_epoch(10**18))

    def held_out(self, length: int) -> "ChatHeldOut":
        """The held-out chats in windows of ``length``, apart from each other; what the assistant says is measured."""
        chats = [chat for chat, held_out in zip(self.chats, self._is_held_out, strict=True) if held_out]
        sizes = np.asarray([len(chat.ids_n) for chat in chats])
        stream_n, mask_n = (np.concatenate([getattr(c, name) for c in chats]) for name in ("ids_n", "mask_n"))
        plain = HeldOut.cut(stream_n, self.bytes_V, length=length, starts_D=np.cumsum(sizes) - sizes)
        said = ChatHeldOut(**{**vars(plain), "mask_n": mask_n})
        if not said.bytes_n1.any():
            raise ValueError(f"The held-out chats of {self.file} have no text of the assistant to measure.")
        return said

    @property
    def identity(self) -> str:
        """sha256 of the training chats' tokens and masks."""
        digest = hashlib.sha256()
        for chat in self.train:
            digest.update(len(chat.ids_n).to_bytes(8, "little") + chat.ids_n.tobytes() + chat.mask_n.tobytes())
        return digest.hexdigest()

    def line(self) -> str:
        """What there is, in words."""
        about = self.record()
        return (
            f"{self.file}: {about['chats']:,} chats to learn, of {about['tokens']:,} tokens, "
            f"{about['assistant_tokens']:,} of the assistant; {about['held_out_chats']:,} chats are held out"
        )

    def record(self) -> dict:
        """What identifies the chats, for a run's records; plain values for JSON."""
        return {
            "file": str(self.file),
            "chats": len(self.train),
            "held_out_chats": int(self._is_held_out.sum()),
            "records": self.damage.records,
            "damaged": self.damage.damaged,
            **self.counts,
            "tokens": self.train_tokens,
            "assistant_tokens": int(sum(chat.mask_n.sum() for chat in self.train)),
            "sha256": self.identity,
        }


@dataclass(frozen=True, eq=False)
class ChatHeldOut(HeldOut):
    """Held-out chats, of which only the assistant's tokens count. ``mask_n``: int32 [n], 1 at these."""

    mask_n: np.ndarray | None = None

    @property
    def bytes_n1(self) -> np.ndarray:
        """int [n - 1], UTF-8 bytes of each token but the first that the assistant says."""
        return self.bytes_WT1[self.segments_WT[:, 1:] != 0] * self.mask_n[1:]

    def bits_per_byte(self, nats_n1: np.ndarray) -> float:
        """Bits per byte of what the assistant says, from the nats of every token but the first, [n - 1]."""
        self._check(nats_n1)
        return float(np.sum(nats_n1 * self.mask_n[1:], dtype=np.float64) / np.log(2) / self.bytes_n1.sum())


class ChatRows(Epochs):
    """Rows without end: in every epoch the chats are packed anew, in a new order (`packing.best_fit`).

    ``rows[i]`` is ``{"tokens", "segments", "loss_mask"}``, each int32 [T]: segments 1, 2, ... for the row's chats, 0
    for padding, whose token is id 0; the mask is 1 where a token is to be predicted. A row depends on the seed, the
    chats and its own number alone.
    """

    def __init__(self, chats: list[Chat], keys_C: np.ndarray, *, length: int, seed: int):
        self._chats, self._keys_C, self.length, self._seed = chats, keys_C, length, seed_key(seed, "chats")
        self._lengths_C = np.asarray([len(chat.ids_n) for chat in chats])
        super().__init__()
        self._kept: dict[int, tuple[np.ndarray, Layout, np.ndarray]] = {}

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, row = self.locate(index)
        order_C, layout, order_R = self._epoch(epoch)
        found = {name: np.zeros(self.length, np.int32) for name in ("tokens", "segments", "loss_mask")}
        at = 0
        for segment, (number, _, size) in enumerate(layout.row(order_R[row]), start=1):
            chat, here = self._chats[order_C[number]], slice(at, at + size)
            found["tokens"][here], found["loss_mask"][here], found["segments"][here] = chat.ids_n, chat.mask_n, segment
            at += size
        return found

    def _begin(self, epoch: int) -> None:
        self._first.append(self._first[-1] + self._epoch(epoch)[1].rows)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, Layout, np.ndarray]:
        """The order of the chats, which row holds which, and the order of the rows; of the last few epochs."""
        with self._lock:
            if epoch not in self._kept:
                order_C = shuffled(self._keys_C, seed_key(self._seed, epoch, ORDER))
                layout = best_fit(self._lengths_C[order_C], self.length)
                order_R = shuffled(np.arange(layout.rows), seed_key(self._seed, epoch, ROWS))
                self._kept[epoch] = order_C, layout, order_R
                for old in sorted(set(self._kept) - {epoch})[:-2]:
                    del self._kept[old]
            return self._kept[epoch]
