"""The folder of a run: what it is, what belongs into it, and how it is found again. Loads no JAX.

::

    run.json            model, recipe, text and tokenizer of the run, and the command that began it
    train.log, metrics.jsonl, tensorboard/
    config.json, tokenizer/, tokens/
    checkpoints/STEP/   to go on from
    checkpoint/         the exported model, when the run has ended
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from deepseek_jax.small_files import LARGE, read_json
from deepseek_jax.train.signals import undoing
from deepseek_jax.version import __version__


class RunFolder:
    """Paths of a run; made by `opened`. ``writes``: False in all but the first of several processes, which share the
    folder: there nothing is written."""

    def __init__(self, path: Path, about: dict, fresh: bool, writes: bool = True):
        self.path, self.about, self.fresh, self.writes = path, about, fresh, writes
        self.log, self.metrics = path / "train.log", path / "metrics.jsonl"
        self.tokenizer, self.tokens, self.config = path / "tokenizer", path / "tokens", path / "config.json"
        self.checkpoints, self.export = path / "checkpoints", path / "checkpoint"

    @classmethod
    @contextmanager
    def opened(cls, path: Path, settings: Mapping, about: Mapping, resume: bool) -> Iterator["RunFolder"]:
        """A new run's folder, or with ``resume`` that of a run with the same ``settings``; one process at a time.

        ``settings``: what decides what is trained; ``about``: other entries of run.json. A new folder that nothing
        could be saved in vanishes after an error.

        Raises FileExistsError when a new run's folder is not empty, FileNotFoundError when there is no run to
        resume, ValueError when it has other settings or is in use.
        """
        settings = json.loads(json.dumps(settings))
        record = path / "run.json"
        made = not path.exists()
        if not resume:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                hint = "; add --resume to go on with the run in it" if record.is_file() else ""
                raise FileExistsError(f"{path} exists and is not an empty folder{hint}; choose another destination.")
            path.mkdir(parents=True, exist_ok=True)
        elif not record.is_file():
            raise FileNotFoundError(f"{path} holds no run to resume: there is no {record.name} in it.")
        with _alone(path):
            if resume:
                found = read_run(path)
                check_same(path, found.get("settings", {}), settings)
            else:
                found = {"deepseek_jax": __version__, **about, "settings": settings}
            run = cls(path, found, not resume)

            def vanish() -> None:
                if run.fresh and not run.metrics.exists():
                    for entry in (path,) if made else tuple(path.iterdir()):
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

            with undoing(vanish):
                run.describe()
                yield run

    def describe(self, **more) -> None:
        """Adds to run.json."""
        self.about |= json.loads(json.dumps(more))
        if self.writes:
            write_whole(self.path / "run.json", json.dumps(self.about, indent=2) + "\n")

    def write_config(self, config: Mapping) -> None:
        """Writes config.json."""
        if self.writes:
            write_whole(self.config, json.dumps(config, indent=2) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Removes from metrics.jsonl what was recorded after ``step``, a result, and a line that is not whole."""
        if not self.writes or not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["kind"] != "result" and record.get("step", 0) <= step:
                kept.append(line + "\n")
        write_whole(self.metrics, "".join(kept))

    @contextmanager
    def exporting(self) -> Iterator[Path]:
        """A path for the exported model; what is written there takes the place of an earlier export."""
        if not self.writes:
            yield self.export
            return
        new, old = (self.export.with_name(f".{self.export.name}.{word}") for word in ("new", "old"))
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        yield new
        if self.export.exists():
            self.export.replace(old)
        new.replace(self.export)
        shutil.rmtree(old, ignore_errors=True)


def read_run(path: Path) -> dict:
    """A run's run.json. Raises ValueError when it is damaged."""
    return read_json(path / "run.json", LARGE)


def check_same(path: Path, begun: Mapping, now: Mapping) -> None:
    """Raises ValueError that names the first setting in which a run differs from the one that was begun."""
    for name, was, is_now in _differences(begun, now):
        raise ValueError(
            f"{path} was begun with {name} = {json.dumps(was)}, not {json.dumps(is_now)}: resume it as it was begun, "
            "or choose another folder."
        )


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _differences(a, b, name: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*b, *(k for k in a if k not in b)]:
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, a, b


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes out of a run; the lock ends with the process, however it ends."""
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is in use by another process.") from None
        yield
