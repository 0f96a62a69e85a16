"""``deepseek-jax draw``: pictures of a text, by a Janus."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from deepseek_jax.cli.devices import Devices
from deepseek_jax.cli.files import check_destination, write_json
from deepseek_jax.cli.generate import DTYPE, open_tokenizer


@dataclass(frozen=True)
class Draw:
    """Pictures of a text, by a Janus: codes by classifier-free guidance, which its decoder makes a PNG of."""

    ckpt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Checkpoint folder of a Janus: config.json, weights and tokenizer.json."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.png")]
    """The picture's file; of several, OUT-1.png, OUT-2.png, ... A file that is there is replaced."""
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What is to be drawn."""
    count: int = 1
    """Pictures of the text, drawn at once."""
    weight: float = 5.0
    """Weight of the guidance: 1 draws by the text alone, 0 without it; above 1 away from what is drawn without it."""
    temperature: float = 1.0
    """0: the likeliest code each time; 1: the model's own distribution, guided."""
    seed: int = 0
    """Seed of the random numbers; each picture has its own, which --json tells."""
    dtype: DTYPE = "bfloat16"
    """Precision of the weights; "stored" keeps each as it is stored. On a CPU float32 is the fastest."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write codes, seeds and settings to this file; "-" is the standard output."""
    devices: Annotated[Devices, tyro.conf.arg(name="")] = field(default_factory=Devices)
    """Where it runs."""

    def run(self) -> int:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from deepseek_jax.multimodal.checkpoint import holds_janus, load_pretrained, read_config
        from deepseek_jax.multimodal.draw import draw_pictures
        from deepseek_jax.multimodal.pictures import pillow, write_png
        from deepseek_jax.multimodal.prompts import PromptWriter
        from deepseek_jax.parallel.processes import is_first

        if self.count < 1:
            raise ValueError(f"--count must be at least 1, not {self.count}.")
        if self.out.suffix.lower() != ".png":
            raise ValueError(f"{self.out}: pictures are written as PNG; give a name that ends in .png.")
        names = [self.out] if self.count == 1 else [self._numbered(i + 1) for i in range(self.count)]
        for file in names:
            check_destination(file, "OUT.png")
        check_destination(self.json)
        pillow()
        tokenizer = open_tokenizer(self.ckpt, needed=None)
        if not holds_janus(self.ckpt):
            raise ValueError(f"{self.ckpt} holds no Janus, and no other model here draws.")
        if tokenizer is None:
            raise ValueError(f"{self.ckpt} has no tokenizer.json, so it takes no text.")
        ctx, cfg = self.devices.context(), read_config(self.ckpt)
        writer = PromptWriter(tokenizer, cfg)
        prompt = writer.to_draw(self.prompt)
        model = load_pretrained(self.ckpt, None if self.dtype == "stored" else self.dtype, ctx)
        settings = {name: getattr(self, name) for name in ("weight", "temperature", "seed")}
        began = time.monotonic()
        columns = (TextColumn("codes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not sys.stderr.isatty(), transient=True) as bar:
            task = bar.add_task("codes", total=cfg.n_codes)
            drawn = draw_pictures(
                model,
                [prompt] * self.count,
                writer.pad_id,
                progress=lambda codes: bar.update(task, completed=codes),
                ctx=ctx,
                **settings,
            )
        if not is_first():
            return 0
        for file, image in zip(names, drawn.images, strict=True):
            write_png(file, image)
            print(file)
        seconds, codes = time.monotonic() - began, self.count * cfg.n_codes
        print(f"{codes} codes in {seconds:.1f} s, compilation included", file=sys.stderr)
        if self.json is not None:
            rows = [
                {"file": str(file), "seed": seed, "codes": codes.tolist()}
                for file, seed, codes in zip(names, drawn.seed, drawn.codes, strict=True)
            ]
            about = {"checkpoint": str(self.ckpt), "prompt": self.prompt, "prompt_ids": prompt, "dtype": self.dtype}
            write_json(self.json, {**about, **settings, "pictures": rows})
        return 0

    def _numbered(self, number: int) -> Path:
        return self.out.with_name(f"{self.out.stem}-{number}{self.out.suffix}")
