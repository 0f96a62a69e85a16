"""A run's checkpoints: written in the background, whole or not at all, the newest and the best kept.

A checkpoint is a folder named by its step that holds any pytree of arrays (`convert.training` says what else). Orbax
writes it beside its place and renames it when all files and their hashes stand, so that a process killed at any
moment leaves whole checkpoints only. There is no random state to hold: a step draws nothing, and the order of the text
follows from the seed and the iterator's place, which is saved.
"""

import contextlib
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deepseek_jax.convert.arrays import disk_errors
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.training import (
    STATE,
    check_files,
    check_leaves,
    leaf_names,
    leaf_specs,
    read_leaves,
    read_record,
    write_record,
)
from deepseek_jax.parallel.processes import from_first, is_first

DAMAGED = "damaged"
TEMPORARY = "orbax-checkpoint-tmp"


@dataclass(frozen=True)
class Restored:
    """A checkpoint's step, the state, the data iterator's state and the host's counters; and for each newer
    checkpoint that could not be read, what is wrong with it and where it lies now."""

    step: int
    state: Any
    data_state: dict
    extra: dict
    damaged: tuple[str, ...]


@dataclass
class _Kept:
    """Orbax's preservation policy: the last ``last``, and the ``best`` with the lowest measure.

    The measures come from the records: Orbax's own copy of them would be read before damage is looked for.
    """

    last: int
    best: int
    metrics: dict[int, float] = field(default_factory=dict)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = sorted(c.step for c in checkpoints)
        measured = sorted((self.metrics[s], s) for s in steps if s in self.metrics)
        kept = {*steps[-self.last :], *(s for _, s in measured[: self.best])}
        return [c.step in kept for c in checkpoints]


class Checkpoints:
    """The checkpoints of one run, in ``folder``, which several processes share; these make the same calls.

    ``keep_last``, ``keep_best``: how many of the newest, and of those with the lowest measure (held-out bits per
    byte), stay; others are removed when a newer one is whole. ``files``: copied into every checkpoint under these
    names (config.json, the tokenizer), so that it can be used by itself. ``check``: raises OSError where nothing should
    be saved any more.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        keep_best: int = 1,
        files: Mapping[str, Path] | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last must be at least 1 and keep_best 0, not {keep_last} and {keep_best}.")
        self.folder, self.files, self.check = Path(folder).resolve(), dict(files or {}), check
        self.kept = _Kept(keep_last, keep_best)
        self._manager: ocp.CheckpointManager | None = None
        self._pending: tuple[int, dict] | None = None

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

    def newest(self) -> Path | None:
        steps = self.steps()
        return self.folder / str(steps[-1]) if steps else None

    def save(self, step: int, state, data_state: dict, extra: dict, metric: float | None = None) -> None:
        """Begins to save; returns when the state has been copied, so that its buffers may be donated.

        ``data_state``, ``extra``: for JSON; they come back as they are. ``metric``: lower is better; None or NaN
        when nothing was measured. Waits for the save before.

        Raises OSError, naming the last good checkpoint, when this save or the one before could not be written.
        """
        self.wait()
        self.check()
        names, leaves = leaf_names(state), jax.tree.leaves(state)
        if metric is not None and math.isfinite(metric):
            self.kept.metrics[step] = metric
        record = {
            "step": step,
            "metric": self.kept.metrics.get(step),
            "data_state": data_state,
            "extra": extra,
            "leaves": leaf_specs(names, leaves),
        }
        with self._failures(step):
            manager = self._open()
            self._pending = (step, record)
            state = ocp.args.PyTreeSave(dict(zip(names, leaves, strict=True)))
            manager.save(step, args=ocp.args.Composite(**{STATE: state}), force=True)

    def wait(self) -> None:
        """Until the save under way is whole. Raises OSError as `save` does."""
        if self._pending is not None:
            with self._failures(self._pending[0]):
                self._manager.wait_until_finished()
            self._pending = None

    def restore(self, abstract_state, damage: Callable[[dict], str | None] = lambda record: None) -> Restored | None:
        """The newest checkpoint whose files are all as they were saved; None when there is none at all.

        ``abstract_state``: a pytree with shapes, dtypes and, under a mesh, shardings. A damaged checkpoint is moved
        into the folder ``damaged``, and the one before it is tried. ``damage``: what else is wrong with a record, whose
        hash may fit what was damaged before it was written; None where nothing is.

        Raises CheckpointError when all are damaged, and for one that holds another tree than ``abstract_state``.
        """
        if self._manager is not None:
            raise ValueError("restore comes before the first save.")
        names, leaves = leaf_names(abstract_state), jax.tree.leaves(abstract_state)
        found = from_first(
            lambda: self._newest_whole(names, leaves, damage), f"looking for a checkpoint in {self.folder}"
        )
        if found is None:
            return None
        folder, record = self.folder / str(found["step"]), found["record"]
        values = read_leaves(folder, dict(zip(names, leaves, strict=True)))
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [values[name] for name in names])
        return Restored(found["step"], state, record["data_state"], record["extra"], tuple(found["damaged"]))

    def _newest_whole(self, names: list[str], leaves: list, damage: Callable) -> dict | None:
        """The step and record of the newest checkpoint that is not damaged, and what is wrong with newer ones."""
        self._remove_unfinished()
        damaged = []
        for step in reversed(self.steps()):
            folder = self.folder / str(step)
            try:
                record = read_record(folder)
                check_files(folder, record)
                if record["step"] != step:
                    raise CheckpointError(f"{folder} is damaged: its record is of step {record['step']}.")
                if wrong := damage(record):
                    raise CheckpointError(f"{folder} is damaged: {wrong}.")
            except CheckpointError as error:
                damaged.append(f"{error} The checkpoint was moved to {self._set_aside(folder)}.")
                continue
            check_leaves(folder, record, names, leaves)
            return {"step": step, "record": record, "damaged": damaged}
        if damaged:
            raise CheckpointError(
                f"{self.folder} has no checkpoint that can be read: {' '.join(damaged)} "
                "Put one back, or resume again to begin anew."
            )
        return None

    def close(self) -> None:
        """Waits for the save under way. Raises OSError as `save` does."""
        try:
            self.wait()
        finally:
            self._shut()

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            for step in self.steps():
                with contextlib.suppress(CheckpointError):  # damage of old checkpoints is for `restore` to find
                    metric = read_record(self.folder / str(step))["metric"]
                    if metric is not None:
                        self.kept.metrics[step] = metric
            self.folder.mkdir(parents=True, exist_ok=True)
            _quiet_late_writes()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self.kept,
                save_root_metadata=False,
                lightweight_initialize=True,
                # The folder is made before the writes begin: made on a thread, it may come after an error was cleared
                # away, and a thread of Orbax waits minutes for a folder that could not be made.
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._seal, create_directories_asynchronously=False
                ),
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _seal(self) -> None:
        """Called by Orbax on the first process when all arrays are written, before the folder takes its name."""
        step, record = self._pending
        (folder,) = self._unfinished(step)
        for name, file in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
        write_record(folder, record)

    def _unfinished(self, step: int | None = None) -> list[Path]:
        name = "*" if step is None else str(step)
        return sorted(self.folder.glob(f"{name}.{TEMPORARY}*"))

    def _remove_unfinished(self) -> None:
        for folder in self._unfinished():
            shutil.rmtree(folder, ignore_errors=True)

    def _set_aside(self, folder: Path) -> Path:
        parent = self.folder / DAMAGED
        parent.mkdir(exist_ok=True)
        names = (folder.name, *(f"{folder.name}-{n}" for n in range(2, 1000)))
        place = next(parent / name for name in names if not (parent / name).exists())
        return folder.replace(place)

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """One OSError for whatever a full disk or a closed folder makes Orbax raise; what was begun is removed."""
        log = logging.getLogger("absl")
        level = log.level
        log.setLevel(logging.CRITICAL)  # Orbax prints the traceback of what it then raises
        try:
            with disk_errors(self.folder):
                yield
        except OSError as error:
            self._pending = None
            self._shut()
            if is_first():
                self._remove_unfinished()
            good = self.newest()
            last = "there is no earlier one" if good is None else f"the last good one is {good}"
            raise OSError(
                error.errno,
                f"the checkpoint of step {step} could not be written ({error.strerror or error}); {last}",
                str(self.folder),
            ) from error
        finally:
            log.setLevel(level)

    def _shut(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # its errors have been raised by `wait`
                manager.close()


def _quiet_late_writes() -> None:
    """Keeps libraries from printing a traceback for each write that fails beside the first one.

    At the first error Orbax closes the event loop that waits for all of them. Those that failed by then are tasks, and
    gatherings of tasks, that nobody asks for their error, and those under way are destroyed: asyncio logs both. The
    others find the loop closed, on threads of TensorStore, which hands what it cannot raise anywhere to
    `sys.unraisablehook`. The first error is raised by `Checkpoints.wait`.
    """
    logging.getLogger("asyncio").addFilter(_is_no_late_write)
    before = sys.unraisablehook
    if getattr(before, "quiets_late_writes", False):
        return

    def hook(found) -> None:
        # No object: nobody's destructor or callback in Python.
        late = found.exc_type is RuntimeError and "Event loop is closed" in str(found.exc_value)
        if not late or found.object is not None:
            before(found)

    hook.quiets_late_writes = True
    sys.unraisablehook = hook


def _is_no_late_write(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    first_line = text.partition("\n")[0]
    forgotten = "exception was never retrieved" in first_line or "was destroyed but it is pending" in first_line
    return not (forgotten and "orbax" in text)
