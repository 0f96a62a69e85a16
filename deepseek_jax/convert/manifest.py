"""What a checkpoint holds: the number of tensors, bytes and dtypes, and what its release is known to hold."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.convert.layers import RECORD, Layers
from deepseek_jax.convert.load import check_tensors, read_config, scale_shape
from deepseek_jax.convert.names import BLOCK, SCALE, layout
from deepseek_jax.convert.safetensors import DTYPES, NAMES, Checkpoint
from deepseek_jax.convert.save import nbytes
from deepseek_jax.version import __version__

# The 91,991 tensors of DeepSeek-R1's files; V3's have the same config. The rest follows from configs alone.
CONFIRMED = ("deepseek-v3", "deepseek-r1")


@dataclass(frozen=True)
class Manifest:
    """``dtypes``: safetensors dtype -> number of tensors."""

    release: str
    tensors: int
    bytes: int
    dtypes: dict[str, int]


def of_specs(release: str, specs: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> Manifest:
    """The manifest of tensors given as name -> (dtype, shape)."""
    dtypes = Counter(NAMES[np.dtype(dtype)] for dtype, _ in specs.values())
    return Manifest(release, len(specs), sum(nbytes(spec) for spec in specs.values()), dict(sorted(dtypes.items())))


def of_release(name: str) -> Manifest:
    """What the published files of a zoo model hold, by the rules of its release.

    DeepSeek's and Kimi-K2's releases: FP8 blocks with float32 scales, a float32 router bias, bfloat16 for the
    rest. Moonlight's: all bfloat16 but the router bias. ``CONFIRMED`` lists those whose real headers were seen.
    """
    cfg = zoo(name)
    fp8 = name != "moonlight-16b"
    specs = {}
    for tensor in layout(cfg, BLOCK)[0]:
        bias = tensor.name.endswith("e_score_correction_bias")
        dtype = "F8_E4M3" if tensor.fp8 and fp8 else "F32" if bias else "BF16"
        specs[tensor.name] = (DTYPES[dtype], tensor.shape)
        if dtype == "F8_E4M3":
            specs[tensor.name + SCALE] = (DTYPES["F32"], scale_shape(tensor, BLOCK))
    return of_specs(name, specs)


def release_of(cfg: ModelConfig) -> str | None:
    """The full-size zoo model with this architecture; names, lengths, stop tokens and initialisation apart."""
    neutral = {"name": "", "init_std": 1.0, "max_length": 1, "bos_id": None, "eos_ids": ()}
    return next((name for name in zoo() if replace(zoo(name), **neutral) == replace(cfg, **neutral)), None)


@dataclass(frozen=True)
class Report:
    """What a folder holds beside what its release should hold (None: no release has this architecture)."""

    folder: str
    layout: str
    found: Manifest
    expected: Manifest | None

    @property
    def nbytes(self) -> int:
        return self.found.bytes

    @property
    def agrees(self) -> bool:
        return self.expected is None or replace(self.found, release=self.expected.release) == self.expected

    def text(self) -> str:
        found = f"{self.folder} ({self.layout}): {_line(self.found)}"
        if self.expected is None:
            return f"{found}\nNo known release has this architecture; names, shapes and dtypes agree with config.json."
        if self.agrees:
            return f"{found}\nThis is what {self.expected.release} holds."
        source = "as released holds" if self.expected.release in CONFIRMED else "should, by its config, hold"
        return f"{found}\n{self.expected.release} {source} {_line(self.expected)}"

    def json(self) -> str:
        return json.dumps({"deepseek_jax": __version__, **asdict(self), "agrees": self.agrees}, indent=2) + "\n"


def _line(manifest: Manifest) -> str:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in manifest.dtypes.items())
    return f"{manifest.tensors:,} tensors, {manifest.bytes:,} bytes ({dtypes})."


def inspect(folder: str | Path) -> Report:
    """Reads a folder's headers, checks them against its config, and compares with the release.

    Raises CheckpointError and ConfigError as `load_pretrained` does; tensors' values are not read.
    """
    folder = Path(folder)
    cfg, block = read_config(folder)
    converted = (folder / RECORD).exists()
    checkpoint = Layers(folder, cfg, block) if converted else Checkpoint(folder)
    check_tensors(checkpoint, cfg, layout(cfg, block)[0], block)
    release = release_of(cfg)
    specs = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.entries.items()}
    expected = of_release(release) if release and not release.startswith("tiny") else None
    return Report(str(folder), "Orbax" if converted else "published", of_specs(folder.name, specs), expected)
