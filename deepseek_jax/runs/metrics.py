"""Where a run's records go: `metrics.jsonl`, a text log, TensorBoard. Loads no JAX.

A record is a dict with "kind" ("run", "step", "evaluation", "event", "result"), "minutes" into the run and, where they
apply, "step" and "tokens" seen; its values are numbers, text, arrays, or lists and dicts of these. "phase" records are
for views only: what goes on that is no step.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Record = Mapping[str, Any]
DIGITS = 6


class Reporter(Protocol):
    """What training reports to. After `close`, which may be called twice, nothing more is reported."""

    def record(self, record: Record) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


class Reporters:
    """Hands everything to each of several reporters, in their order; as a context manager it closes them.

    An error of one (a full disk) is raised at once; closing reaches all of them first.
    """

    def __init__(self, reporters: Sequence[Reporter]):
        self.reporters = tuple(reporters)

    def record(self, record: Record) -> None:
        record = plain(record)
        for reporter in self.reporters:
            reporter.record(record)

    def say(self, line: str) -> None:
        for reporter in self.reporters:
            reporter.say(line)

    def close(self) -> None:
        errors = []
        for reporter in self.reporters:
            try:
                reporter.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> "Reporters":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class _Lines:
    """A file that lines are appended to, each by one write, so that a reader or a crash never sees two of them mixed.

    A line that an earlier process left unfinished is ended first, and so spoils no other.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self.file).st_size
        if size and os.pread(self.file, 1, size - 1) != b"\n":
            self._write(b"\n")

    def append(self, line: str) -> None:
        self._write(line.replace("\n", " ").encode() + b"\n")

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self.file, data)
        except OSError as error:
            # A write to a descriptor does not know the file's name.
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if written != len(data):
            raise OSError(f"{self.path}: only a part of a line could be written; the disk may be full.")

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class JsonLines:
    """``metrics.jsonl``: one JSON object a line, appended. Floats keep 6 digits; NaN and infinities, which JSON does
    not have, are the texts "nan", "inf" and "-inf", which ``float`` reads.

    Raises OSError when the file cannot be opened or written.
    """

    def __init__(self, path: str | Path):
        self.lines = _Lines(path)

    def record(self, record: Record) -> None:
        if record["kind"] != "phase":
            self.lines.append(json.dumps(plain(record), allow_nan=False, ensure_ascii=False))

    def say(self, line: str) -> None:
        """Text has its own file."""

    def close(self) -> None:
        self.lines.close()


class TextLog:
    """``train.log``: what was said, and a line for each record, after the minutes into the run."""

    def __init__(self, path: str | Path, began: float | None = None):
        """``began``: `time.monotonic()` at which the run counts as begun."""
        self.lines = _Lines(path)
        self.began = time.monotonic() if began is None else began

    def record(self, record: Record) -> None:
        line = describe(record)
        if line:
            self.say(line)

    def say(self, line: str) -> None:
        self.lines.append(f"{(time.monotonic() - self.began) / 60:8.2f} min  {line}")

    def close(self) -> None:
        self.lines.close()


class TensorBoard:
    """Event files for TensorBoard: scalars under ``train/`` and ``held_out/``, a value a layer under its statistic's
    name, the load as an image, the router biases as a histogram. What is not finite is left out: TensorBoard cannot
    draw it, and `metrics.jsonl` holds it.

    Raises ValueError when tensorboardX is not installed, OSError when the folder cannot be written.
    """

    def __init__(self, folder: str | Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "TensorBoard events need the package tensorboardX: pip install 'deepseek-jax[tensorboard]'."
            ) from error
        self.writer = SummaryWriter(str(folder))

    def record(self, record: Record) -> None:
        kind, step = record["kind"], record.get("step")
        if step is None:
            return
        if kind == "event":
            self.writer.add_text("events", describe(record), step)
            return
        group = {"step": "train", "evaluation": "held_out"}.get(kind, kind)
        for name, value in record.items():
            if name in ("kind", "step", "load", "bias") or value is None or isinstance(value, str):
                continue
            for tag, number in _scalars(f"{group}/{name}", value):
                if math.isfinite(number):
                    self.writer.add_scalar(tag, number, step)
        if record.get("load"):
            self.writer.add_image("load/times_the_mean_0_to_3", _load_image(record["load"]), step)
        for layer, bias in enumerate(record.get("bias") or ()):
            self.writer.add_histogram(f"bias/layer.{layer}", np.asarray(bias, np.float32), step)

    def say(self, line: str) -> None:
        """Text is in the run's own log."""

    def close(self) -> None:
        self.writer.close()


def plain(value: Any) -> Any:
    """A record of plain Python values that JSON can hold; plain records stay as they are.

    Raises TypeError for a value that is none of numbers, text, arrays, paths, lists and dicts.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(float(value))
    if hasattr(value, "dtype"):
        array = np.asarray(value)
        # bfloat16 has no Python number of its own.
        array = array if array.dtype.kind in "biuU" else array.astype(np.float64)
        return plain(array.tolist())
    raise TypeError(f"a record cannot hold a {type(value).__name__}: {value!r}.")


def describe(record: Record) -> str:
    """A record in one line; empty for kinds that have nothing to say."""
    kind, step = record["kind"], record.get("step")
    if kind == "event":
        at = "" if step is None else f"step {step:,}: "
        return f"{at}{record['event']}: {record['message']}"
    if kind not in ("step", "evaluation"):
        return ""
    parts = [
        f"{label} {form(value)}"
        for name, label, form in _LABELS[kind]
        if (value := number(record.get(name))) is not None
    ]
    return f"step {step:,}: {', '.join(parts)}"


def short(value: float) -> str:
    """A count in at most five characters: 950, 12.3k, 1.25M, 14.8T."""
    if not math.isfinite(value):
        return str(value)
    for power, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g}{unit}"
    return f"{value:.3g}"


_LABELS = {
    "step": (
        ("loss", "loss", "{:.4f}".format),
        ("main", "main", "{:.4f}".format),
        ("mtp", "MTP", "{:.4f}".format),
        ("reward", "reward", "{:.3f}".format),
        ("length", "length", "{:.1f}".format),
        ("silent", "silent groups", "{:.0%}".format),
        ("mismatch", "mismatch", "{:.2g}".format),
        ("max_violation", "MaxVio", "{:.2f}".format),
        ("grad_norm", "gradient", "{:.3g}".format),
        ("lr", "rate", "{:.2e}".format),
        ("tokens_per_second", "tokens a second", short),
        ("mfu", "MFU", "{:.1%}".format),
    ),
    "evaluation": (
        ("pass_at_1", "held-out pass@1", "{:.1%}".format),
        ("pass_at_k", "pass@k", "{:.1%}".format),
        ("maj_at_k", "maj@k", "{:.1%}".format),
        ("length", "length", "{:.1f}".format),
        ("bits_per_byte", "held-out bits per byte", "{:.4f}".format),
        ("ema_bits_per_byte", "of the average", "{:.4f}".format),
        ("trigram_bits_per_byte", "trigram on the same tokens", "{:.4f}".format),
        ("draft_agreement", "drafts agree", "{:.1%}".format),
        ("max_violation_global", "global MaxVio", "{:.2f}".format),
    ),
}


def number(value: Any) -> float | None:
    """A record's value as one number, also one that is not finite and so a text; lists, a value a layer, by their
    mean."""
    if value is None or value == []:
        return None
    return float(np.mean([float(v) for v in value])) if isinstance(value, list) else float(value)


def _scalars(tag: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [(f"{tag}/{name}", float(v)) for name, v in value.items() if v is not None]
    if isinstance(value, list):
        return [(f"{tag}/layer.{layer}", float(v)) for layer, v in enumerate(value)]
    return [(tag, float(value))]


def _load_image(load_LE: list[list[int]]) -> np.ndarray:
    """uint8 [3, rows, columns]: white without load, blue at the mean's three-fold; cells of 8 by 8."""
    load = np.asarray(load_LE, np.float64)
    share = np.clip(load / np.maximum(load.mean(-1, keepdims=True), 1e-9) / 3, 0, 1)
    blue, white = np.array([8, 48, 107]), np.array([255, 255, 255])
    image = (white + (blue - white) * share[..., None]).astype(np.uint8)
    return image.repeat(8, 0).repeat(8, 1).transpose(2, 0, 1)
