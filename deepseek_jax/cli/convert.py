"""``deepseek-jax convert``: published checkpoint layout to Orbax, or back, without loading the model."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Convert:
    """Convert a published checkpoint to Orbax, or a converted one back, byte for byte.

    SRC decides the direction. Stored bytes are moved, never dequantised; every tensor is checked. Memory stays
    at a layer's largest matrices. Interrupted, the same command goes on where it stopped.
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A folder with config.json and safetensors files, or one that this command has written."""
    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = None
    """The folder to write; it must not exist, or be empty. Not needed with --dry-run."""
    dry_run: bool = False
    """Only check names, shapes and dtypes, and compare with the release that SRC is; fails where they differ."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write the figures to this file."""

    def run(self) -> int:
        from deepseek_jax.convert.manifest import inspect

        report = inspect(self.src)
        print(report.text())
        if self.json is not None:
            self.json.write_text(report.json())
        if self.dry_run:
            return 0 if report.agrees else 1
        if self.dst is None:
            raise ValueError("DST is missing: name the folder to write, or give --dry-run.")
        self._convert(report.nbytes)
        return 0

    def _convert(self, nbytes: int) -> None:
        import time

        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        from deepseek_jax.convert.stream import convert

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        start = time.monotonic()
        with Progress(*columns, disable=not sys.stderr.isatty(), transient=True) as bar:
            task = bar.add_task("convert", total=nbytes)
            kind = convert(self.src, self.dst, lambda n: bar.advance(task, n))
        seconds = time.monotonic() - start
        layout = "Orbax, a checkpoint a layer" if kind == "layers" else "published layout"
        speed = nbytes / 1e9 / max(seconds, 1e-9)
        print(f"Wrote {self.dst} ({layout}): {nbytes / 1e9:.2f} GB in {seconds:.1f} s, {speed:.2f} GB/s.")
