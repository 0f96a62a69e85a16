"""``deepseek-jax generate``: continue prompts with a checkpoint."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.devices import Devices
from deepseek_jax.cli.files import STANDARD, check_destination, read, write_json
from deepseek_jax.cli.interrupts import EXIT_CODES
from deepseek_jax.runs.signals import StopSignals

DTYPE = Literal["bfloat16", "float32", "stored"]


@dataclass(frozen=True)
class Generate:
    """Continue prompts with a checkpoint; text streams as it comes, Ctrl-C keeps what was made."""

    ckpt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Checkpoint folder: config.json, weights and, for text, tokenizer.json."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]")] = ()
    """Text to continue, in which a control token's name, such as <｜User｜>, is that token; several texts make a
    batch. "-" is the standard input, without its last line end."""
    prompt_file: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    """UTF-8 files, each a text to continue, without its last line end; after the texts of --prompt."""
    prompt_ids: Annotated[tuple[int, ...], tyro.conf.arg(metavar="ID [ID ...]")] = ()
    """Token ids to continue instead of text, for a checkpoint without tokenizer.json; nothing is added."""
    image: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    """Pictures that a Janus is shown with every prompt, a user's message then, in the places of <image_placeholder> in
    it, or before it. Without pictures its language model goes on with the text, as any other."""
    chat: bool = False
    """Take each prompt as a user's message, and render it by the checkpoint's own chat template."""
    preset: Literal["r1", "r1-zero"] | None = None
    """Ask as R1's README advises: each prompt as a user's message without a system prompt, an answer that begins with
    <think>, temperature 0.6, top-p 0.95; or so in R1-Zero's template. Options that are given come first."""
    max_new_tokens: int = 64
    """Tokens to generate at most; a stop token of the checkpoint ends a text earlier."""
    temperature: Annotated[float | None, tyro.conf.arg(metavar="NUMBER")] = None
    """0: the likeliest token each time; 1: the model's own distribution. By default 0, or the preset's."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0: all."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    """Sample from the smallest set of tokens with this much probability, in (0, 1]. By default 1, or the preset's."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one's probability, in [0, 1]."""
    seed: int = 0
    """Seed of the random numbers; text i of a batch has its own."""
    use_mtp: bool = False
    """Let the multi-token-prediction modules draft tokens; the distribution stays the same."""
    adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Low-rank adapters for the checkpoint, in PEFT's format (adapter_config.json, adapter_model.safetensors)."""
    dtype: DTYPE = "bfloat16"
    """Precision of the weights; "stored" keeps FP8 quantised. On a CPU float32 is the fastest."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write tokens, text, log-probabilities (nats) and settings to this file; "-" is the standard output."""
    devices: Annotated[Devices, tyro.conf.arg(name="")] = field(default_factory=Devices)
    """Where it runs."""

    def run(self) -> int:
        if bool(self.prompt or self.prompt_file) == bool(self.prompt_ids):
            raise ValueError(
                "give either --prompt TEXT or --prompt-ids ID [ID ...]; texts may also come from --prompt-file FILE."
            )
        if self.chat and self.prompt_ids:
            raise ValueError("--chat renders text: give --prompt, not --prompt-ids.")
        if self.preset and (self.chat or self.prompt_ids or self.image):
            raise ValueError(
                f"--preset {self.preset} says how prompts are put: leave out --chat, --prompt-ids, --image."
            )
        if self.prompt.count("-") > 1:
            raise ValueError("--prompt - -: the standard input can be read once only.")
        check_destination(self.json)
        texts = [_prompt(STANDARD) if text == "-" else text for text in self.prompt]
        texts += [_prompt(file) for file in self.prompt_file]
        ctx = self.devices.context()

        from jax import process_count

        from deepseek_jax.multimodal.checkpoint import holds_janus
        from deepseek_jax.parallel.processes import is_first

        if self.image and not holds_janus(self.ckpt):
            raise ValueError(f"--image: {self.ckpt} holds no Janus, and no other model here is shown pictures.")
        tokenizer = open_tokenizer(self.ckpt, needed=None if self.prompt_ids else "--prompt-ids")
        if tokenizer is None and is_first():
            print(f"{self.ckpt} has no tokenizer.json: token ids are printed, not text.", file=sys.stderr)
        settings = {name: getattr(self, name) for name in ("max_new_tokens", "top_k", "min_p", "seed", "use_mtp")}
        preset = self._preset
        settings["temperature"] = self.temperature if self.temperature is not None else preset.temperature
        settings["top_p"] = self.top_p if self.top_p is not None else preset.top_p
        if self.image:
            from deepseek_jax.cli.generate_janus import begin

            prompts, run = begin(self, tokenizer, texts, ctx, settings)
        else:
            from deepseek_jax.generation.engine import stream

            prompts = [list(self.prompt_ids)] if self.prompt_ids else [self._encode(tokenizer, t) for t in texts]
            run = stream(load_model(self.ckpt, self.dtype, ctx, self.adapter), prompts, ctx=ctx, **settings)
        if not is_first():
            for _ in run:
                pass
            return 0
        labels = texts if len(prompts) > 1 else ()
        printer, times, counts = Printer(len(prompts), tokenizer, labels), [time.perf_counter()], []
        # Once there is text, a signal ends it after the call under way. Several processes would wait for each other.
        with StopSignals() as stop:
            for new in run:
                if process_count() == 1:
                    stop.hold()
                times.append(time.perf_counter())
                counts.append(sum(map(len, new)))
                printer.push(new, [reason != "interrupted" for reason in run.result()[1].finish_reason])
                if stop.asked:
                    break
            tokens, info = run.result()
            printer.finish()
            print(report(counts, times, info), file=sys.stderr)
            if tokenizer is not None and (missing := {i for row in tokens for i in row if not tokenizer.has(i)}):
                print(f"{len(missing)} of the ids have no token in the tokenizer and show as \ufffd.", file=sys.stderr)
            if self.json is not None:
                rows = [
                    {
                        "prompt_ids": prompt,
                        "ids": new,
                        "text": None if tokenizer is None else tokenizer.decode(new, skip_special_tokens=True),
                        **{name: values[row] for name, values in vars(info).items() if values is not None},
                    }
                    for row, (prompt, new) in enumerate(zip(prompts, tokens, strict=True))
                ]
                used = {"adapter": self.adapter and str(self.adapter), "dtype": self.dtype}
                if self.image:
                    used["image"] = [str(file) for file in self.image]
                write_json(self.json, {"checkpoint": str(self.ckpt), **used, **settings, "rows": rows})
        return EXIT_CODES[stop.asked]

    @property
    def _preset(self):
        from deepseek_jax.text.presets import PRESETS, Preset

        return PRESETS[self.preset] if self.preset else Preset(temperature=0.0, top_p=1.0, chat=False)

    def _encode(self, tokenizer, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        if self.preset:
            return self._preset.ids(tokenizer, messages)
        return tokenizer.chat(messages) if self.chat else tokenizer.encode(text)


def _prompt(file: Path) -> str:
    """A file's text. The line end that every text file has is not meant to be continued after."""
    text = read(file)
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


class Printer:
    """Prints texts one after another while all of them grow: the first unfinished one streams."""

    def __init__(self, rows: int, tokenizer, labels: Sequence[str] = ()):
        from deepseek_jax.text.stream import Stream

        self._streams = None if tokenizer is None else [Stream(tokenizer) for _ in range(rows)]
        self._waiting, self._row, self._labels = [""] * rows, 0, labels
        self._label()

    def push(self, new: list[list[int]], done: list[bool]) -> None:
        """Takes in the rows' new ids and which rows are complete."""
        for row, ids in enumerate(new):
            if self._streams is None:
                self._waiting[row] += "".join(f"{i} " for i in ids)
            else:
                self._waiting[row] += self._streams[row].push(ids)
        while self._row < len(done) and done[self._row]:
            self._write(last=True)
        if self._row < len(done) and self._waiting[self._row]:
            self._write(last=False)

    def finish(self) -> None:
        """Prints what is left of all rows, complete or not."""
        while self._row < len(self._waiting):
            self._write(last=True)

    def _write(self, last: bool) -> None:
        text, self._waiting[self._row] = self._waiting[self._row], ""
        if last and self._streams is not None:
            text += self._streams[self._row].finish()
        print(text, end="\n" if last else "", flush=True)
        if last:
            self._row += 1
            self._label()

    def _label(self) -> None:
        if self._row < len(self._labels):
            print(f"[{self._row + 1}] {self._labels[self._row]!r}")


def report(counts: list[int], times: list[float], info) -> str:
    """One line: tokens, seconds, speed after the first call (which compiles), drafts, reasons."""
    parts = [f"{sum(counts)} tokens in {times[-1] - times[0]:.1f} s, compilation included"]
    if len(counts) > 1:
        parts.append(f"{sum(counts[1:]) / (times[-1] - times[1]):.1f} tokens/s after the first {counts[0]}")
    drafted, accepted = sum(info.drafted), sum(info.accepted)
    if drafted:
        parts.append(f"{accepted} of {drafted} drafts accepted ({accepted / drafted:.0%})")
    return "; ".join([*parts, f"ended by: {', '.join(info.finish_reason)}"])


def open_tokenizer(ckpt: Path, needed: str | None):
    """The checkpoint's tokenizer, None where it has none; a ValueError where text was given instead of the option
    ``needed``, and the tokenizer is missing or has ids beyond the model's vocabulary."""
    from deepseek_jax.convert.config_file import read_config
    from deepseek_jax.convert.folders import why_no_checkpoint
    from deepseek_jax.multimodal.checkpoint import holds_janus
    from deepseek_jax.multimodal.checkpoint import read_config as read_janus
    from deepseek_jax.text.files import has_tokenizer
    from deepseek_jax.text.tokenizer import load_tokenizer

    if (why := why_no_checkpoint(ckpt)) is not None:
        raise ValueError(why)
    if has_tokenizer(ckpt):
        tokenizer = load_tokenizer(ckpt)
        if needed:
            language = read_janus(ckpt).language if holds_janus(ckpt) else read_config(ckpt)
            tokenizer.check_fits(language.vocab_size)
        return tokenizer
    if needed:
        raise ValueError(f"{ckpt} has no tokenizer.json, so it takes no text: give token ids with {needed}.")
    return None


def load_model(ckpt: Path, dtype: DTYPE, ctx=None, adapter: Path | None = None):
    """The language model of a checkpoint, a Janus's among them, with adapters where there are any."""
    from deepseek_jax.convert.adapter import load_adapter
    from deepseek_jax.multimodal.public import language_model, load_pretrained

    if adapter is not None and ctx is not None and ctx.mesh is not None:
        raise ValueError(
            f"--adapter with --mesh: adapters are applied on one device. Merge them first: deepseek-jax convert {ckpt} "
            f"DST --adapter {adapter}."
        )
    model = language_model(load_pretrained(ckpt, dtype=None if dtype == "stored" else dtype, ctx=ctx))
    return model if adapter is None else load_adapter(model, adapter)
