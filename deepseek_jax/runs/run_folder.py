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

from deepseek_jax.runs.signals import undoing
from deepseek_jax.small_files import LARGE, read_json
from deepseek_jax.version import __version__

# Settings that a resumed run may have more of: it is extended.
GROWING = ("recipe.tokens", "epochs", "rl.steps")
# What a process that was killed before it had written run.json leaves.
LEFT_OVERS = frozenset({".lock", ".run.json.part"})


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
        could be saved in vanishes after an error. A resumed run may have more of what `GROWING` names: run.json then
        keeps the numbers under "extended", each with the one before it.

        Raises FileExistsError when a new run's folder is not empty, FileNotFoundError when there is no run to
        resume, ValueError when it has other settings or is in use.
        """
        settings = json.loads(json.dumps(settings))
        record = path / "run.json"
        made = not path.exists()
        if not resume:
            if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - LEFT_OVERS):
                hint = "; add --resume to go on with the run in it" if record.is_file() else ""
                raise FileExistsError(f"{path} exists and is not an empty folder{hint}; choose another destination.")
            path.mkdir(parents=True, exist_ok=True)
        elif not record.is_file():
            raise FileNotFoundError(f"{path} holds no run to resume: there is no {record.name} in it.")
        with _alone(path):
            if resume:
                found = read_run(path)
                begun = found.get("settings", {})
                grown = _grown(begun, settings)
                check_same(path, _changed(begun, {name: now for name, _, now in grown}), settings)
                if grown:
                    found["settings"] = settings
                    found["extended"] = [*found.get("extended", []), *map(list, grown)]
            else:
                found = {"deepseek_jax": __version__, **about, "settings": settings}
            run = cls(path, found, not resume)

            def vanish() -> None:
                if run.fresh and path.is_dir() and not run.metrics.exists():
                    for entry in (path,) if made else tuple(path.iterdir()):
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

            with undoing(vanish):
                run.describe()
                yield run

    def begun(self, name: str, now):
        """What a setting of `GROWING` was when the run was begun; ``now`` where it has not grown."""
        return next((was for grew, was, _ in self.about.get("extended", []) if grew == name), now)

    def check(self) -> None:
        """Raises OSError when the folder is gone, or is no longer this run's."""
        if self.writes and not (self.path / "run.json").is_file():
            raise OSError(
                f"the run's folder {self.path} is gone, or its run.json is: the run cannot be saved there. Put it back "
                "and go on with --resume, or begin anew."
            )

    def describe(self, **more) -> None:
        """Adds to run.json."""
        self.about |= json.loads(json.dumps(more))
        if self.writes:
            write_whole(self.path / "run.json", json.dumps(self.about, indent=2) + "\n")

    def write_config(self, config: Mapping) -> None:
        """Writes config.json."""
        if self.writes:
            write_whole(self.config, json.dumps(config, indent=2) + "\n")

    def truncate_metrics(self, step: int) -> bool:
        """Removes from metrics.jsonl what was recorded after ``step``, a result, and a line that is not whole; whether
        what is left has the run's own record.

        Before the first step an evaluation goes too, for it is made again.
        """
        if not self.writes or not self.metrics.exists():
            return False
        kept, known = [], False
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            again = record["kind"] == "result" or (record["kind"] == "evaluation" and not step)
            if not again and record.get("step", 0) <= step:
                known |= record["kind"] == "run"
                kept.append(line + "\n")
        write_whole(self.metrics, "".join(kept))
        return known

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


def unfinished(path: Path) -> Path:
    """Where `write_whole` has a file until it is whole; a process killed meanwhile leaves it there."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = unfinished(path)
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def extended(run: Mapping, name: str):
    """What a setting of `GROWING` has become in a run.json; None where it is what the run was begun with."""
    return next((now for grew, _, now in reversed(run.get("extended", [])) if grew == name), None)


def _grown(begun: Mapping, now: Mapping) -> list[tuple[str, float, float]]:
    """Of each setting of `GROWING` that is larger now: its name, what it was and what it is."""
    return [
        (name, was, is_now)
        for name, was, is_now in _differences(begun, now)
        if name in GROWING and all(type(n) in (int, float) for n in (was, is_now)) and is_now > was
    ]


def _changed(settings: Mapping, values: Mapping) -> dict:
    """Settings with others under dotted names."""
    found = json.loads(json.dumps(settings))
    for name, value in values.items():
        *parents, last = name.split(".")
        at = found
        for parent in parents:
            at = at[parent]
        at[last] = value
    return found


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
