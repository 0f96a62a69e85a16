"""Reference logits of a checkpoint, computed by PyTorch transformers from the same files.

    python checkpoints/make_reference.py checkpoints/tiny-v3

writes into the folder's own folder ``reference``

- ``reference.safetensors``: ``tokens`` int32 [1, T]; ``logits`` float32 [1, P, V] and ``mtp_logits`` float32
  [1, P, V] of the first MTP module (the token two ahead), at the first P tokens; ``expert_index`` int32
  [L_moe, 1, T, K], ascending; ``expert_margin`` float32 [L_moe, 1, T], how far apart the scores of chosen and
  unchosen experts lay. All computed in float32 on the CPU, FP8 weights times their scales. The tokens end before
  the first whose experts float32 cannot decide (margin under 1e-5), so the experts are beyond dispute.
- ``reference.json``: this script's name, the prompt, versions, and a SHA-256 of each file that was read.

Needs the extra ``deepseek-jax[verify]``.
"""

import argparse
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from tokenizers import Tokenizer

import deepseek_jax as dsj
from deepseek_jax.configs.hf import config_from_json
from deepseek_jax.convert.ladder import TIE, choose
from deepseek_jax.convert.verify import reference_model

PROMPT = '''"""Reading configuration files.

A file holds sections; a section holds names with values. Later files override earlier ones.
"""

import os
import re
from collections import OrderedDict


class ParseError(ValueError):
    """Raised when a line is neither a section, a comment nor a value."""

    def __init__(self, filename, lineno, line):
        super().__init__(f"{filename}:{lineno}: cannot parse {line!r}")
        self.filename = filename
        self.lineno = lineno


def read(path, encoding="utf-8"):
    """Return the sections of a file as a dictionary of dictionaries."""
    sections = OrderedDict()
    current = sections.setdefault("default", OrderedDict())
    with open(path, encoding=encoding) as stream:
        for number, line in enumerate(stream, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = re.match(r"\\[(?P<name>[^]]+)\\]$", line)
            if match is not None:
                current = sections.setdefault(match.group("name"), OrderedDict())
            elif "=" in line:
                name, _, value = line.partition("=")
                current[name.strip()] = os.path.expandvars(value.strip())
            else:
                raise ParseError(path, number, line)
    return sections
'''
MAX_TOKENS = 256
MIN_TOKENS = 32
MAX_LOGITS = 360_000  # numbers, 1.44 MB
READ = ("config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkpoint in the published layout, with tokenizer.json")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT, add_special_tokens=True).ids
    reference = reference_model(folder)
    cfg = config_from_json(json.loads((folder / "config.json").read_text()))
    tokens = np.asarray([ids[: min(MAX_TOKENS, cfg.max_length)]], np.int32)
    with torch.no_grad():
        seen = reference.run(tokens)

    index, margin = choose(torch.stack(seen.biased).numpy(), cfg.moe)
    chosen = np.sort(torch.stack(seen.index).numpy(), -1)
    decided = first(margin.min((0, 1)) < TIE)
    if not np.array_equal(index[:, :, :decided], chosen[:, :, :decided]):
        raise SystemExit(f"{folder}: the reference's experts are not those its scores select; nothing was written.")
    if decided < MIN_TOKENS:
        raise SystemExit(f"{folder}: token {decided} of the prompt lies at a near-tie; nothing was written.")
    with_logits = min(decided, MAX_LOGITS // cfg.vocab_size // 2)
    arrays = {
        "tokens": tokens[:, :decided],
        "logits": seen.logits.numpy()[:, :with_logits],
        "expert_index": chosen[:, :, :decided].astype(np.int32),
        "expert_margin": margin[:, :, :decided].astype(np.float32),
    }
    if cfg.mtp_depth:
        mtp_margin = choose(seen.mtp_biased[0].numpy(), cfg.moe)[1]
        known = min(with_logits, decided - 1, first(mtp_margin.min(0) < TIE))
        arrays["mtp_logits"] = seen.mtp_logits[0].numpy()[:, :known]
    record = {
        "script": "checkpoints/make_reference.py",
        "versions": {
            "torch": version("torch"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
            "deepseek_jax": dsj.__version__,
        },
        "files": {file.name: sha256(file) for pattern in READ for file in sorted(folder.glob(pattern))},
        "prompt": PROMPT,
    }
    (folder / "reference").mkdir(exist_ok=True)
    packed = save({name: np.ascontiguousarray(a) for name, a in arrays.items()})
    (folder / "reference" / "reference.safetensors").write_bytes(packed)
    (folder / "reference" / "reference.json").write_text(json.dumps(record, indent=2) + "\n")
    closest = arrays["expert_margin"].min()
    print(f"{decided} tokens, {with_logits} of them with logits; the closest experts lie {closest:.1e} apart")


def first(mask: np.ndarray) -> int:
    """The index of the first True, or the length."""
    return int(mask.argmax()) if mask.any() else len(mask)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
