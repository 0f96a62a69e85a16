"""``deepseek-jax plot``: a run's metrics as PNG images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.files import check_folder


@dataclass(frozen=True)
class Plot:
    """Draw a run's metrics: loss, schedule, balance, load of the experts, router bias, norms, throughput.

    It reads RUN/metrics.jsonl and may be used while the run goes on. Images that exist are drawn anew.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, as `deepseek-jax train` writes it."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for the images; RUN/plots by default. It is made where it does not exist."""
    by: Literal["tokens", "step", "minutes"] = "tokens"
    """What runs along the horizontal axis: tokens trained on, optimizer steps, or minutes of the run."""

    def run(self) -> int:
        from deepseek_jax.analysis.run_plots import draw_run
        from deepseek_jax.analysis.run_records import read_run

        out = self.out or self.run_folder / "plots"
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: this is a file; give a folder.")
        if self.out is not None:
            check_folder(out, "--out")
        run = read_run(self.run_folder)
        if not run:
            raise ValueError(f"{self.run_folder}: no step and no evaluation is on record yet.")
        if run.damaged:
            lines = ", ".join(map(str, run.damaged[:5])) + (", ..." if len(run.damaged) > 5 else "")
            print(f"left out, not records ({len(run.damaged)}): lines {lines} of metrics.jsonl")
        for path in draw_run(run, out, self.run_folder.resolve().name, self.by):
            print(path)
        return 0
