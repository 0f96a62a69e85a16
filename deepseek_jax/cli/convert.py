"""``deepseek-jax convert``: published checkpoint layout to Orbax, or back, without loading the model."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.files import check_destination, check_folder, write_json
from deepseek_jax.cli.interrupts import remarks
from deepseek_jax.cli.main import UsageError


@dataclass(frozen=True)
class Convert:
    """Convert a published checkpoint to Orbax, or a converted one back, byte for byte; export a run's checkpoint.

    SRC decides the direction. Stored bytes are moved, never dequantised; every tensor is checked. A few chunks of
    16 MB are in memory at a time. Interrupted, the same command goes on where it stopped.

    With --adapter the adapters are added to SRC's weights; DST is a published folder in SRC's dtypes and file split.

    A training run's RUN/checkpoints/STEP becomes the published layout with its tokenizer, as float32 unless --dtype
    names another. With --dtype a published folder is written in that dtype, in the published layout. Of a Janus this is
    all that there is, whatever its files are (safetensors, pytorch_model*.bin).
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A folder with config.json and safetensors files, one that this command has written, or RUN/checkpoints/STEP."""
    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = None
    """The folder to write; it must not exist, or be empty. Not needed with --dry-run."""
    dry_run: bool = False
    """Only check names, shapes and dtypes, and compare with the release that SRC is; fails where they differ."""
    adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Low-rank adapters to merge into SRC, a published folder: adapter_config.json and adapter_model.safetensors, as
    PEFT or `train --lora.no-merge` writes them."""
    dtype: Literal["stored", "float32", "bfloat16", "float16", "fp8"] = "stored"
    """Write a published folder or a run's checkpoint in this dtype; fp8: the linear maps in FP8 blocks, the rest
    bfloat16, or as a published SRC has it. Router biases keep their dtype."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write the figures, and bytes and seconds of the conversion, to this file; "-" is the standard output."""

    def run(self) -> int:
        if self.dst is None and not self.dry_run:
            raise UsageError("DST is missing: name the folder to write, or give --dry-run.")
        check_destination(self.json)
        if not self.dry_run:
            check_folder(self.dst, "DST")

        if self.adapter is not None and self.dtype != "stored":
            raise UsageError("--adapter keeps the dtypes of SRC: convert the merged folder with --dtype afterwards.")
        if self.adapter is not None:
            return self._merge(self.adapter)
        from deepseek_jax.convert.manifest import inspect
        from deepseek_jax.convert.training import is_training
        from deepseek_jax.multimodal.checkpoint import holds_janus

        if holds_janus(self.src) and (self.dry_run or self.dtype in ("stored", "fp8")):
            raise UsageError(
                f"{self.src} holds a Janus, which is neither kept in Orbax nor in FP8 here, and has no manifest: give "
                "--dtype float32, bfloat16 or float16, which writes its safetensors files in its own layout."
            )
        trained = is_training(self.src)
        if trained or self.dtype != "stored":
            if self.dry_run:
                raise UsageError(
                    "--dry-run compares published and converted folders; a run's checkpoint is neither."
                    if trained
                    else "--dry-run writes nothing in any dtype: leave --dtype out."
                )
            record = {"conversion": self._export()}
            if self.json is not None:
                write_json(self.json, record)
            return 0
        report = inspect(self.src)
        print(report.text())
        record = report.record()
        if not self.dry_run:
            record["conversion"] = self._convert(report.nbytes)
        if self.json is not None:
            write_json(self.json, record)
        return 0 if report.agrees or not self.dry_run else 1

    def _merge(self, adapter: Path) -> int:
        if self.dry_run:
            raise UsageError("--dry-run with --adapter: merging has no dry run; leave one of them out.")
        if not any(self.src.glob("*.safetensors")):
            raise ValueError(f"{self.src} has no safetensors files: adapters are merged into a published folder.")

        from deepseek_jax.convert.adapter import load_adapter, merge
        from deepseek_jax.convert.files import check_free
        from deepseek_jax.convert.load import load_pretrained
        from deepseek_jax.convert.save import save_pretrained

        check_free(self.dst)
        model = merge(load_adapter(load_pretrained(self.src, dtype=None), adapter))
        save_pretrained(model, self.dst, like=self.src)
        print(f"Wrote {self.dst}: {self.src} with the adapters of {adapter} added to its weights.")
        if self.json is not None:
            write_json(self.json, {"source": str(self.src), "adapter": str(adapter), "destination": str(self.dst)})
        return 0

    def _export(self) -> dict:
        """Writes the published layout in --dtype, and returns what was written and how long it took."""
        import time

        from deepseek_jax.convert.export import export
        from deepseek_jax.multimodal.checkpoint import holds_janus, load_pretrained, save_pretrained

        start = time.monotonic()
        if holds_janus(self.src):
            save_pretrained(load_pretrained(self.src, dtype=None), self.dst, like=self.src, dtype=self.dtype)
        else:
            export(self.src, self.dst, None if self.dtype == "stored" else self.dtype)
        seconds, nbytes = time.monotonic() - start, sum(f.stat().st_size for f in self.dst.glob("*.safetensors"))
        print(f"Wrote {self.dst} (published layout, {self.dtype}): {nbytes / 1e9:.2f} GB in {seconds:.1f} s.")
        return {"destination": str(self.dst), "layout": "published", "bytes": nbytes, "seconds": seconds}

    def _convert(self, nbytes: int) -> dict:
        """Converts, and returns what was written and how long it took."""
        import logging
        import time

        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        from deepseek_jax.convert.stream import convert

        # Orbax logs, with a traceback, errors that it raises as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        remarks(ended=lambda: "The same command goes on where it stopped.")
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        start = time.monotonic()
        with Progress(*columns, disable=not sys.stderr.isatty(), transient=True) as bar:
            task = bar.add_task("convert", total=nbytes)
            kind = convert(self.src, self.dst, lambda n: bar.advance(task, n))
        remarks()
        seconds = time.monotonic() - start
        layout = "Orbax, a checkpoint a layer" if kind == "layers" else "published layout"
        speed = nbytes / 1e9 / max(seconds, 1e-9)
        print(f"Wrote {self.dst} ({layout}): {nbytes / 1e9:.2f} GB in {seconds:.1f} s, {speed:.2f} GB/s.")
        return {"destination": str(self.dst), "layout": kind, "bytes": nbytes, "seconds": seconds}
