"""What text a run learns from and how it becomes rows. Loads nothing heavy: the command line reads it."""

import re
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Fixed, UseAppendAction

from deepseek_jax.data.tasks import Task, parse_task

STDLIB, TASK = "stdlib", "task:"
SPELLING = re.compile(r"(?:(?P<label>[\w.-]+)=)?(?P<path>.+?)(?:@(?P<weight>\d+(?:\.\d*)?(?:e-?\d+)?))?", re.DOTALL)


@dataclass(frozen=True)
class SourceSpec:
    """One source of text: ``task``, or ``path``, which is None for the standard library; ``weight`` None: none was
    given."""

    label: str
    path: Path | None
    weight: float | None
    task: Task | None = None


@dataclass(frozen=True)
class DataConfig:
    """The text of a run; `pipeline.load_data` reads it. The defaults are V3's (section 4.1). On a command line the
    recipe sets what is `Fixed` here."""

    data: UseAppendAction[tuple[str, ...]] = ()
    """A source of text, PATH, LABEL=PATH or LABEL=PATH@WEIGHT: a text file, .jsonl, .jsonl.zst or .parquet, or a folder
    of such files; the word stdlib is the running Python's standard library, and the default; task:NAME is a generated
    task, passkey, recall, copy or addition, with settings as in task:addition,digits=4,steps=true,documents=50000,
    which deepseek_jax/data/tasks.py explains. Give it once for each source. The weight is the share of the rows drawn
    from it, relative to the others; without weights, sources are drawn by their size. The label names the domain that
    held-out text is measured under."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    fim_rate: Fixed[float] = 0.1
    """Share of documents, drawn anew each epoch, that are turned to prefix, suffix, middle (FIM)."""
    sample_masks: Fixed[bool] = False
    """Documents of a row do not see each other (V4); off: rows are cut from one stream without masks (V3)."""
    held_out_share: float = 0.05
    """Share of the documents, by a hash of their text, that are never trained on; near-duplicates stay together."""
    held_out_bytes: int = 2_000_000
    """Most UTF-8 bytes of held-out text that are measured in each source; the documents come by their hash."""
    damaged_share: float = 0.01
    """Share of damaged records, or of bytes in them, up to which a source is used without them; above it the run
    stops. Each one is counted and named."""
    workers: int = 1
    """Threads that prepare batches ahead of the step; 0: none, in the step's own time. The batches are the same."""
    token_folder: Path | None = None
    """Folder that keeps the tokenised text for other runs; by default it is kept in the run's own folder."""

    def __post_init__(self):
        # A resumed run's sources are its defaults, to which those of the command line are added.
        object.__setattr__(self, "data", tuple(dict.fromkeys(self.data)))
        for name, low, high in (("fim_rate", 0, 1), ("held_out_share", 0, 1), ("damaged_share", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, not {getattr(self, name)}.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share must lie inside 0 and 1, not be {self.held_out_share}.")
        if self.held_out_bytes < 1 or self.workers < 0:
            raise ValueError("held_out_bytes must be at least 1 and workers at least 0.")
        self.sources()

    def sources(self) -> tuple[SourceSpec, ...]:
        """The sources in the order given.

        Raises:
            ValueError: a spelling that cannot be read, a label given twice, or weights for some sources only.
        """
        found = tuple(parse_source(spelled) for spelled in self.data or (STDLIB,))
        labels = [source.label for source in found]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"Two sources are called {', '.join(twice)}: give each a label of its own, LABEL=PATH.")
        bare = [source.label for source in found if source.weight is None]
        if bare and len(bare) < len(found):
            raise ValueError(f"Give a weight to every source or to none; {', '.join(bare)} has none.")
        return found


def parse_source(spelled: str) -> SourceSpec:
    """Reads ``PATH``, ``LABEL=PATH`` or ``LABEL=PATH@WEIGHT``; what exists as a path is one, whatever its characters.

    Raises:
        ValueError: an empty path, a weight of 0, or a task that cannot be.
    """
    if spelled != STDLIB and spelled and Path(spelled).exists():
        return SourceSpec(_stem(Path(spelled)), Path(spelled), None)
    match = SPELLING.fullmatch(spelled)
    if match is None:
        raise ValueError(f"{spelled!r} names no source of text: write PATH, LABEL=PATH or LABEL=PATH@WEIGHT.")
    label, path, weight = match["label"], match["path"], match["weight"]
    if weight is not None and float(weight) <= 0:
        raise ValueError(f"The weight of {spelled!r} must be above 0: leave the source out to draw nothing from it.")
    if path.startswith(TASK):
        task = parse_task(path.removeprefix(TASK))
        return SourceSpec(label or task.name, None, None if weight is None else float(weight), task)
    found = None if path == STDLIB else Path(path)
    return SourceSpec(label or _stem(found), found, None if weight is None else float(weight))


def _stem(path: Path | None) -> str:
    if path is None:
        return STDLIB
    # A file's ending says how it is read, not what it holds.
    name = path.resolve().name
    return re.sub(r"[^\w.-]+", "-", name.split(".")[0] or name) if path.is_file() else re.sub(r"[^\w.-]+", "-", name)
