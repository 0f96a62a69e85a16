"""``deepseek-jax sweep``: a grid over any field of an experiment's base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.files import check_destination, check_folder, write_json
from deepseek_jax.cli.interrupts import remarks


@dataclass(frozen=True)
class Sweep:
    """Train every combination of the values named, on an experiment's base, and show what each came to.

    deepseek-jax sweep v3_balance recipe.rate.peak=1e-3,2e-3,4e-3 model.moe.top_k=2,4

    A sweep is for finding settings, not for verdicts: its seeds are others than those of experiments, and its runs lie
    in a folder of their own. Runs that are there are not made again, so that a grid may grow, and the same command goes
    on where one was interrupted.
    """

    stem: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STEM")]
    """The experiment whose base is changed."""
    fields: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FIELD=a,b,c ...")]
    """Fields by their path, each with its values: recipe.* (as `deepseek-jax train --help` lists them), model.* (a
    config's fields) or text.*."""
    variant: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Change this variant of the experiment instead of its base."""
    seeds: int = 1
    """Seeds of each point."""
    first_seed: int = 100
    """The first of them."""
    scale: Literal["cpu", "gpu"] = "cpu"
    """The base's size: minutes on a core, or a larger one for an accelerator."""
    processes: int | None = None
    """Runs at a time; by default 2 where there are as many cores."""
    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("experiments")
    """The folder of experiments."""
    runs: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/sweeps")
    """Keep runs in this folder."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write each point's figures to this file; "-" is the standard output."""

    def run(self) -> int:
        from deepseek_jax.cli.running import make
        from deepseek_jax.lab.grid import grid
        from deepseek_jax.lab.records import Runs
        from deepseek_jax.lab.study import load

        check_destination(self.json)
        if self.seeds < 1 or self.first_seed < 0:
            raise ValueError(f"--seeds {self.seeds} and --first-seed {self.first_seed}: at least 1, and not negative.")
        if not self.fields:
            raise ValueError("FIELD=a,b,c is missing: name a field and its values, such as recipe.rate.peak=1e-3,2e-3.")
        study, runs = load(self.folder, self.stem).at(self.scale), Runs(self.runs)
        base = study.base if self.variant is None else study.setup(self.variant)
        points = grid(base, self.fields)
        study.check_text([base, *points.values()])
        check_folder(runs.folder, "--runs")
        remarks(ended=lambda: "What had ended is kept, and the same command goes on.")
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        wanted = [(label, seed, setup) for seed in seeds for label, setup in points.items()]
        about = {"study": f"sweep {self.stem}"}
        corpus = make(self.stem, wanted, runs, about, scale=self.scale, processes=self.processes)
        self._show(points, seeds, runs, corpus)
        return 0

    def _show(self, points: dict, seeds: range, runs, corpus: str) -> None:
        from rich.table import Table

        from deepseek_jax.cli.tables import Output, show
        from deepseek_jax.lab.records import LABELS, OF_TRAINING
        from deepseek_jax.lab.verdicts import spread
        from deepseek_jax.small_files import read_json

        there = {label: [read_json(runs.path(setup, s, corpus)) for s in seeds] for label, setup in points.items()}
        # Of a model without experts there is no balance to show.
        some = [run for found in there.values() for run in found if run["diverged"] is None]
        measures = [name for name in OF_TRAINING if name == "bits_per_byte" or (name != "curve" and _has_experts(some))]
        shown, rows = Table("setting", *(LABELS[name] for name in measures), "diverged"), []
        for label, found in there.items():
            kept = [run for run in found if run["diverged"] is None]
            figures = [spread([OF_TRAINING[name](run) for run in kept]) for name in measures]
            shown.add_row(label, *figures, str(len(found) - len(kept)))
            rows.append(
                {"setting": label, **dict(zip(measures, figures, strict=True)), "diverged": len(found) - len(kept)}
            )
        show(Output(highlight=False), shown)
        if self.json is not None:
            write_json(self.json, {"sweep": self.stem, "seeds": list(seeds), "points": rows})


def _has_experts(runs: list[dict]) -> bool:
    return bool(runs) and all(run["load"] is not None for run in runs)
