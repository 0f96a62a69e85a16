"""What the runs that are there say of each claim, and the rows of the ledger. Loads no JAX."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_jax.lab.records import LABELS, MEASURES
from deepseek_jax.lab.rules import MECHANISM, OPEN, Verdict
from deepseek_jax.lab.study import TUNING_SEED, Claim, Study

Found = Mapping[tuple[str, int], dict]


@dataclass(frozen=True)
class Judged:
    """A claim, its verdict, how many of the runs that the verdict needs are there, and those themselves."""

    claim: Claim
    verdict: Verdict
    there: int
    needed: int
    runs: tuple[dict, ...]


def best(study: Study, found: Found) -> dict[str, str]:
    """Side -> its variant of the fewest bits per byte on `study.TUNING_SEED`, for those sides whose runs are there."""
    bits, tuned = MEASURES["bits_per_byte"], {}
    for side, names in study.tuned.items():
        if all((name, TUNING_SEED) in found for name in names):
            tuned[side] = min(names, key=lambda name: bits(found[name, TUNING_SEED]))
    return tuned


def judge(study: Study, found: Found) -> list[Judged]:
    """Every claim of a study by its rule, as soon as all the runs are there that the rule needs.

    ``found``: as `Runs.of` gives it. Of a side that is tuned the runs are needed that tune it, and then those of its
    `best`. A claim of `Claim.mechanism_only` gets that word whatever the rule finds, with what it finds beside it.
    """
    judged, settled = [], best(study, found)
    for claim in study.claims:
        sides = study.sides if claim.rule.pooled else claim.rule.variants
        tuned = [side for side in sides if side in study.tuned]
        names = {side: settled.get(side, side) for side in sides}
        pairs = [(name, TUNING_SEED) for side in tuned for name in study.tuned[side]]
        pairs += [(name, seed) for name in names.values() for seed in study.seeds]
        there = [found[pair] for pair in pairs if pair in found]
        if len(there) < len(pairs):
            verdict = Verdict(OPEN, f"{len(there)} of {len(pairs)} runs are there")
        else:
            columns = {side: _column(study, found, name, claim.rule.measure) for side, name in names.items()}
            verdict = claim.rule.judge(columns)
            for side in reversed(tuned):
                verdict = Verdict(verdict.word, f"{side} is {names[side]}; {verdict.why}")
        if claim.mechanism_only is not None:
            verdict = Verdict(MECHANISM, verdict.why)
        judged.append(Judged(claim, verdict, len(there), len(pairs), tuple(there)))
    return judged


def table(study: Study, found: Found) -> list[list[str]]:
    """A row a variant: its name, its runs, and of each measure that a claim asks for mean and SD over the seeds; where
    something is tuned, the bits per byte by which it is."""
    measures, bits = measures_of(study), MEASURES["bits_per_byte"]
    rows = [["variant", "runs", *(LABELS[name] for name in measures)]]
    for variant in study.variants:
        runs = [found[variant, seed] for seed in study.seeds if (variant, seed) in found]
        rows.append([variant, str(len(runs)), *(spread([MEASURES[name](run) for run in runs]) for name in measures)])
    if study.tuned:
        tuning = [[bits(found[pair])] if (pair := (v, TUNING_SEED)) in found else [] for v in study.variants]
        for row, cell in zip(rows, [f"bits per byte, seed {TUNING_SEED}", *map(spread, tuning)], strict=True):
            row.append(cell)
    return rows


def measures_of(study: Study) -> list[str]:
    """The measures of a study's claims that are one number a run, in their order."""
    return list(dict.fromkeys(claim.rule.measure for claim in study.claims if claim.rule.measure != "curve"))


def spread(values: list[float]) -> str:
    """Mean and standard deviation of values in words; those of runs that have none are left out."""
    values = [value for value in values if not np.isnan(value)]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{np.mean(values):.4g} (SD {np.std(values, ddof=1):.2g})"


def ledger(studies: Iterable[tuple[Study, Found]]) -> list[list[str]]:
    """A row a claim: stem, claim, what it says and where, verdict, what that rests on. Beside each study its runs."""
    rows = []
    for study, found in studies:
        for judged in judge(study, found):
            claim = judged.claim
            rows.append(
                [
                    f"`{study.stem}`",
                    claim.id,
                    f"{claim.says} ({claim.source})",
                    f"**{judged.verdict.word}**: {judged.verdict.why}",
                    f"{judged.there} of {judged.needed} runs{_origin(judged.runs)}",
                ]
            )
    return rows


def _origin(runs: Sequence[dict]) -> str:
    if not runs:
        return ""
    minutes = sum(run["cpu_minutes"] if "cpu_minutes" in run else run["cpu_seconds"] / 60 for run in runs)
    return f", {minutes:.0f} CPU minutes, {min(run['date'] for run in runs)} to {max(run['date'] for run in runs)}"


def _column(study: Study, found: Found, variant: str, measure: str) -> np.ndarray | list:
    values = [MEASURES[measure](found[variant, seed]) for seed in study.seeds]
    return values if measure == "curve" else np.asarray(values)
