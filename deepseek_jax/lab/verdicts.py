"""What the runs that are there say of each claim, and the rows of the ledger. Loads no JAX."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deepseek_jax.lab.records import LABELS, MEASURES, Runs
from deepseek_jax.lab.rules import MECHANISM, OPEN, Verdict
from deepseek_jax.lab.study import Claim, Study

Found = Mapping[tuple[str, int], dict]


@dataclass(frozen=True)
class Judged:
    """A claim, its verdict, and how many of the runs that the verdict needs are there."""

    claim: Claim
    verdict: Verdict
    there: int
    needed: int


def judge(study: Study, found: Found) -> list[Judged]:
    """Every claim of a study by its rule, as soon as all the runs are there that the rule needs.

    ``found``: as `Runs.of` gives it. A claim of `Claim.mechanism_only` gets that word whatever the rule finds, with
    what it finds beside it.
    """
    judged = []
    for claim in study.claims:
        needed = tuple(study.variants) if claim.rule.pooled else claim.rule.variants
        there = sum((variant, seed) in found for variant in needed for seed in study.seeds)
        wanted = len(needed) * len(study.seeds)
        if there < wanted:
            word = OPEN if claim.mechanism_only is None else MECHANISM
            verdict = Verdict(word, f"{there} of {wanted} runs are there")
        else:
            verdict = claim.rule.judge({name: _column(study, found, name, claim.rule.measure) for name in needed})
            if claim.mechanism_only is not None:
                verdict = Verdict(MECHANISM, verdict.why)
        judged.append(Judged(claim, verdict, there, wanted))
    return judged


def table(study: Study, found: Found) -> list[list[str]]:
    """A row a variant: its name, its runs, and of each measure that a claim asks for mean and SD over the seeds."""
    measures = measures_of(study)
    rows = [["variant", "runs", *(LABELS[name] for name in measures)]]
    for variant in study.variants:
        runs = [found[variant, seed] for seed in study.seeds if (variant, seed) in found]
        rows.append([variant, str(len(runs)), *(spread([MEASURES[name](run) for run in runs]) for name in measures)])
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


def ledger(studies: list[Study], runs: Runs) -> list[list[str]]:
    """A row a claim: stem, claim, what it says and where, verdict, what that rests on."""
    rows = []
    for study in studies:
        found = runs.of(study)
        for judged in judge(study, found):
            claim = judged.claim
            rows.append(
                [
                    f"`{study.stem}`",
                    claim.id,
                    f"{claim.says} ({claim.source})",
                    f"**{judged.verdict.word}**: {judged.verdict.why}",
                    f"{judged.there} of {judged.needed} runs{_origin(study, found, judged)}",
                ]
            )
    return rows


def _origin(study: Study, found: Found, judged: Judged) -> str:
    needed = study.variants if judged.claim.rule.pooled else judged.claim.rule.variants
    runs = [run for (variant, _), run in found.items() if variant in needed]
    if not runs:
        return ""
    minutes = sum(run["cpu_seconds"] for run in runs) / 60
    return f", {minutes:.0f} CPU minutes, {min(run['date'] for run in runs)} to {max(run['date'] for run in runs)}"


def _column(study: Study, found: Found, variant: str, measure: str) -> np.ndarray | list:
    values = [MEASURES[measure](found[variant, seed]) for seed in study.seeds]
    return values if measure == "curve" else np.asarray(values)
