"""``deepseek-jax experiment``: a paper's claim, put to the test: missing runs, verdicts, a figure; the ledger."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.files import check_destination, check_folder, write_json
from deepseek_jax.cli.interrupts import remarks


@dataclass(frozen=True)
class Experiment:
    """Make the runs of an experiment that are not there yet, judge its claims by the rules that it was registered with,
    and draw its figure.

    An experiment is a file, FOLDER/STEM/run.py. Its runs are files that all experiments share, each written whole at
    the run's end, so that the same command goes on where one was interrupted. Two run at a time, each on one core with
    one thread. Claims are judged by all runs that are there, at every seed that was registered; until then they are
    open.
    """

    stem: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="STEM")] = None
    """The experiment."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the ledger instead: every claim, its verdict, and what that rests on."""
    seeds: int | None = None
    """Make the runs of so many of its seeds; 0 makes none and judges what is there. By default all."""
    variants: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Make the runs of these variants, or of a side of a comparison that is tuned, whose best is known once the runs
    that tune it are there; by default all."""
    scale: Literal["cpu", "gpu"] = "cpu"
    """The size: minutes on a core, or 100 to 300M parameters for an accelerator, where runs come one after the other,
    and only once all claims have their verdicts at cpu. The ledger and the figure are of cpu."""
    processes: int | None = None
    """Runs at a time; by default 2 where there are as many cores."""
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("experiments")
    """The folder of experiments."""
    runs: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Keep runs and figure in this folder, to try something out; by default runs are kept in FOLDER/runs, for which the
    experiment's file has to be committed first, and the figure beside that file."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write claims, verdicts and each variant's figures to this file; "-" is the standard output."""

    def run(self) -> int:
        from deepseek_jax.lab.records import Runs
        from deepseek_jax.lab.study import load, stems

        check_destination(self.json)
        runs = Runs(self.runs or self.folder / "runs")
        if self.list:
            if self.stem is not None:
                raise ValueError(f"--list shows all experiments: leave {self.stem} out.")
            return self._ledger([load(self.folder, stem) for stem in stems(self.folder)], runs)
        if self.stem is None:
            raise ValueError(
                f"STEM is missing; there are {', '.join(stems(self.folder)) or 'none'}. --list shows them."
            )
        study = load(self.folder, self.stem).at(self.scale)
        check_folder(runs.folder, "--runs")
        remarks(ended=lambda: "What had ended is kept, and the same command goes on.")
        self._make(study, runs)
        self._show(study, Runs(runs.folder))
        return 0

    def _make(self, study, runs) -> None:
        from deepseek_jax.cli.running import make
        from deepseek_jax.lab.asked import asked, check_corpus, check_gate, rule
        from deepseek_jax.lab.records import Runs

        before = []
        # Runs that tune a side say which come next.
        while (wanted := asked(study, self.variants, self.seeds, runs.of(study))) != before:
            check_gate(study, Runs(self.folder / "runs"), runs)
            about = rule(study, self.folder, trial=self.runs is not None) | {"scale": self.scale}
            same = partial(check_corpus, study, runs)
            make(study.stem, wanted, runs, about, scale=self.scale, processes=self.processes, check=same)
            before, runs = wanted, Runs(runs.folder)

    def _show(self, study, runs) -> None:
        from rich.table import Table

        from deepseek_jax.cli.tables import Output, show
        from deepseek_jax.lab.figure import draw
        from deepseek_jax.lab.verdicts import judge, table

        found = runs.of(study)
        judged, (header, *rows), console = judge(study, found), table(study, found), Output(highlight=False)
        figures, claims = Table(*header, title=study.stem), Table("claim", "verdict", "why")
        for row in rows:
            figures.add_row(*row)
        for one in judged:
            claims.add_row(f"{one.claim.id}: {one.claim.says}", one.verdict.word, one.verdict.why)
        show(console, figures)
        show(console, claims)
        if found and self.scale == "cpu":
            print(draw(study, found, judged, (self.runs or self.folder / study.stem) / "figure.png"))
        if self.json is not None:
            verdicts = {one.claim.id: {"verdict": one.verdict.word, "why": one.verdict.why} for one in judged}
            variants = [dict(zip(header, row, strict=True)) for row in rows]
            write_json(self.json, {"experiment": study.stem, "claims": verdicts, "variants": variants})

    def _ledger(self, studies, runs) -> int:
        from rich.table import Table

        from deepseek_jax.cli.tables import Output, show
        from deepseek_jax.lab.verdicts import ledger

        columns = ("experiment", "claim", "what it says", "verdict", "rests on")
        rows, shown = ledger((study, runs.of(study)) for study in studies), Table(*columns)
        for row in rows:
            shown.add_row(*(cell.replace("`", "").replace("**", "") for cell in row))
        show(Output(highlight=False), shown)
        if self.json is not None:
            write_json(self.json, {"ledger": [dict(zip(columns, row, strict=True)) for row in rows]})
        return 0
