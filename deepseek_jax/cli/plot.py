"""``deepseek-jax plot``: runs' metrics as PNG images, several runs beside each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.files import check_destination, check_folder, write_json


@dataclass(frozen=True)
class Plot:
    """Draw a run's metrics: loss, schedule, balance, load of the experts, router bias, norms, throughput.

    It reads RUN/metrics.jsonl and may be used while the run goes on. Images that exist are drawn anew.

    Of several runs it draws one image, compare.png, a line a run, labelled by what differs in their model and recipe,
    and prints the differing settings beside their final and best figures.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs, as `deepseek-jax train` writes them."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for the images, made where it does not exist; by default RUN/plots, of several runs the folder plots
    beside the first."""
    by: Literal["tokens", "step", "minutes"] = "tokens"
    """What runs along the horizontal axis: tokens trained on, optimizer steps, or minutes of the run."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write each run's final and best figures and the settings that differ to this file; "-" is the standard
    output."""

    def run(self) -> int:
        from deepseek_jax.analysis.compare import compare, draw, table
        from deepseek_jax.analysis.run_plots import draw_run

        if not self.runs:
            raise ValueError("RUN is missing: name the folder of a run, or of several.")
        check_destination(self.json)
        several = len(self.runs) > 1
        out = self.out or (self.runs[0].resolve().parent if several else self.runs[0]) / "plots"
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: this is a file; give a folder.")
        if self.out is not None:
            check_folder(out, "--out")
        compared = compare(self.runs)
        for one in compared:
            if one.run.damaged:
                lines = ", ".join(map(str, one.run.damaged[:5])) + (", ..." if len(one.run.damaged) > 5 else "")
                where = f"{one.name}: " if several else ""
                print(f"{where}left out, not records ({len(one.run.damaged)}): lines {lines} of metrics.jsonl")
        if several:
            print(table(compared))
            print(draw(compared, out, self.by))
        else:
            for path in draw_run(compared[0].run, out, compared[0].name, self.by):
                print(path)
        if self.json is not None:
            rows = [
                {"run": str(folder), "settings": one.differing, "figures": one.figures}
                for folder, one in zip(self.runs, compared, strict=True)
            ]
            write_json(self.json, {"runs": rows})
        return 0
