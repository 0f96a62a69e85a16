"""Which runs a command has to make: those asked for that are not there. Loads no JAX."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from deepseek_jax.analysis.provenance import committed
from deepseek_jax.lab.records import Runs
from deepseek_jax.lab.study import TUNING_SEED, Setup, Study
from deepseek_jax.lab.verdicts import best, judge
from deepseek_jax.lab.workers import Task


def asked(
    study: Study,
    variants: Sequence[str],
    seeds: int | None,
    found: Mapping[tuple[str, int], dict] | None = None,
) -> list[tuple[str, int, Setup]]:
    """(variant, seed, setup) of the runs that are asked for, a seed's variants one after another, so that what is there
    early can be compared. ``variants``: none are all. ``seeds``: so many of the study's first; None: all.

    Of sides that are tuned first the runs that tune them; the others once these are among ``found``, what is there.

    Raises ValueError for a variant or a number of seeds that the study has not.
    """
    if seeds is not None and not 0 <= seeds <= len(study.seeds):
        raise ValueError(
            f"{study.stem} was registered with {len(study.seeds)} seeds, and --seeds {seeds} is not within 0 and that: "
            "more seeds are another study, declared before its results."
        )
    if seeds == 0:
        return []
    chosen, settled = list(dict.fromkeys(variants)) or list(study.sides), best(study, found or {})
    tuning = [(name, TUNING_SEED) for side in chosen for name in study.tuned.get(side, ())]
    names = [settled.get(name, name) for name in chosen if name in settled or name not in study.tuned]
    wanted = tuning + [(name, seed) for seed in study.seeds[:seeds] for name in names]
    return [(name, seed, study.setup(name)) for name, seed in wanted]


def tasks(wanted: Iterable[tuple[str, int, Setup]], runs: Runs, corpus: str, about: dict, stem: str) -> list[Task]:
    """The runs of ``wanted`` that are not there on this corpus. ``about``: what their files say of who asked."""
    found, seen = [], set()
    for variant, seed, setup in wanted:
        path = runs.path(setup, seed, corpus)
        if path.exists() or path in seen:
            continue
        seen.add(path)
        found.append(
            Task(setup, seed, path, f"{stem}, {variant}, seed {seed}", {"asked": about | {"variant": variant}})
        )
    return found


def check_gate(study: Study, *places: Runs) -> None:
    """Raises ValueError at a larger scale than "cpu" while in none of ``places`` all the runs are there that the
    study's claims need at "cpu"."""
    if study.scale == "cpu":
        return
    first = study.at("cpu")
    waiting = [[one.claim.id for one in judge(first, runs.of(first)) if one.there < one.needed] for runs in places]
    if fewest := min(waiting, key=len):
        raise ValueError(
            f"{study.stem} at scale {study.scale} comes after its verdicts at scale cpu, and without one there are "
            f"{', '.join(fewest)}: make their runs first, deepseek-jax experiment {study.stem}."
        )


def check_corpus(study: Study, runs: Runs, corpus: dict) -> None:
    """Raises ValueError where a study's runs that are there were made on another corpus than this machine's."""
    for run in runs.of(study).values():
        there = run["corpus"]
        if there["hash"] != corpus["hash"]:
            raise ValueError(
                f"the runs of {study.stem} in {runs.folder} were made on the corpus {there['hash']} of Python "
                f"{there['python']}, and the text here, of Python {corpus['python']}, is {corpus['hash']}: use that "
                "Python, or keep runs of your own with --runs FOLDER."
            )


def rule(study: Study, folder: Path, trial: bool) -> dict:
    """What a run's file says of the rule that it was made under. ``trial``: the runs are not for the ledger.

    Raises ValueError where the study's file is not committed as it stands and they are: a rule must be older than its
    results.
    """
    path = folder / study.stem / "run.py"
    commit = committed(path)
    if commit is None and not trial:
        raise ValueError(
            f"{path} is not committed as it stands: commit it before its first run, so that the rule is older than the "
            "result, or try it out with --runs FOLDER."
        )
    return {"study": study.stem, "rule": study.rule_hash, "rule_commit": commit}
