"""``deepseek-jax score``: log-probabilities of a given text."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from deepseek_jax.cli.devices import Devices
from deepseek_jax.cli.files import check_destination, read, write_json
from deepseek_jax.cli.generate import DTYPE, load_model, open_tokenizer


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a given text: total, per token, bits per byte.

    A text longer than the model is scored in windows that begin half a model's length apart. Without a BOS
    token the first token has no probability and is left out.
    """

    ckpt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Checkpoint folder: config.json, weights and, for text, tokenizer.json."""
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """UTF-8 text to score, in which a control token's name is that token, "-" for the standard input; with --ids, token
    ids."""
    ids: bool = False
    """FILE holds token ids separated by spaces or lines, for a checkpoint without tokenizer.json."""
    tokens: bool = False
    """Also print each token and its log-probability (nats)."""
    adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Low-rank adapters for the checkpoint, in PEFT's format (adapter_config.json, adapter_model.safetensors)."""
    dtype: DTYPE = "bfloat16"
    """Precision of the weights; "stored" keeps FP8 quantised. On a CPU float32 is the fastest."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write the figures and every token's log-probability (nats) to this file; "-" is the standard output."""
    devices: Annotated[Devices, tyro.conf.arg(name="")] = field(default_factory=Devices)
    """Where it runs."""

    def run(self) -> int:
        check_destination(self.json)
        ctx = self.devices.context()
        tokenizer = open_tokenizer(self.ckpt, needed=None if self.ids else "--ids")
        text = read(self.file)
        ids = _parse_ids(self.file, text) if self.ids else tokenizer.encode(text)
        if len(ids) < 2:
            raise ValueError(f"{self.file}: {len(ids)} tokens are too few to score; give at least two.")
        n_bytes = None if self.ids else _scored_bytes(tokenizer, text, ids)

        from deepseek_jax.generation.score import score
        from deepseek_jax.parallel.processes import is_first

        logprobs = score(load_model(self.ckpt, self.dtype, ctx, self.adapter), ids, ctx)
        if not is_first():
            return 0
        if self.tokens:
            for i, value in zip(ids[1:], logprobs, strict=True):
                shown = "" if tokenizer is None else f"  {tokenizer.decode([i])!r}"
                print(f"{value:10.4f}  {i:>7}{shown}")
        total = math.fsum(logprobs)
        mean = total / len(logprobs)
        figures = {
            "tokens": len(logprobs),
            "bytes": n_bytes,
            "total_nats": total,
            "nats_per_token": mean,
            "bits_per_token": -mean / math.log(2),
            "bits_per_byte": None if not n_bytes else -total / math.log(2) / n_bytes,
        }
        print(f"tokens scored    {len(logprobs)}" + ("" if n_bytes is None else f" ({n_bytes} bytes)"))
        print(f"log-probability  {total:.4f} nats; {mean:.4f} a token (perplexity {_exp(-mean):.4g})")
        if n_bytes:
            print(f"bits per byte    {figures['bits_per_byte']:.4f}")
        if self.json is not None:
            record = {"checkpoint": str(self.ckpt), "file": str(self.file), "dtype": self.dtype}
            record["adapter"] = self.adapter and str(self.adapter)
            write_json(self.json, {**record, **figures, "ids": ids, "logprobs": logprobs})
        return 0


def _parse_ids(file: Path, text: str) -> list[int]:
    words = text.split()
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"{file} holds {word!r}: with --ids it must hold token ids.")
    return [int(word) for word in words]


def _scored_bytes(tokenizer, text: str, ids: list[int]) -> int:
    """UTF-8 bytes of the scored tokens: all of the text where a BOS stands first."""
    whole = len(text.encode())
    return whole if tokenizer.add_bos else whole - int(tokenizer.token_bytes()[ids[0]])


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
