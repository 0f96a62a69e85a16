"""``deepseek-jax report``: the figures that papers publish beside the ones stated here."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from deepseek_jax.cli.files import check_destination, write_json

if TYPE_CHECKING:
    from deepseek_jax.analysis.published.figure import Outcome


@dataclass(frozen=True)
class Report:
    """The papers' exact figures beside ours: parameters, cache, FLOPs, training, costs, serving, formulas.

    Nothing is trained. Ours is equal to what is printed, rounds to it, or differs, with the reason as far as it is
    known. A figure that differs is a finding and no failure. What is not stated here is listed at the end.
    """

    what: Annotated[Literal["numbers"], tyro.conf.Positional]
    """numbers: every published figure that follows from a model's config and a formula."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write the figures to this file, in base units; "-" is the standard output."""

    def run(self) -> int:
        from dataclasses import asdict

        from deepseek_jax.analysis.published.absent import ABSENT
        from deepseek_jax.analysis.published.figure import outcome
        from deepseek_jax.analysis.published.table import SECTIONS
        from deepseek_jax.cli.report_tables import print_numbers

        check_destination(self.json)
        sections = {name: [outcome(figure) for figure in figures] for name, figures in SECTIONS.items()}
        print_numbers(sections, ABSENT)
        if self.json is not None:
            figures = [{"section": name, **_record(found)} for name, outcomes in sections.items() for found in outcomes]
            write_json(self.json, {"figures": figures, "absent": [asdict(absent) for absent in ABSENT]})
        return 0


def _record(found: "Outcome") -> dict:
    figure = found.figure
    return {
        "id": figure.id,
        "name": figure.name,
        "source": figure.source,
        "published": figure.published_text,
        "published_value": _plain(figure.value),
        "ours": found.text,
        "ours_value": _plain(found.ours),
        "verdict": found.verdict,
        "note": figure.note,
    }


def _plain(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)
