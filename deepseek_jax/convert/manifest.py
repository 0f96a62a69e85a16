"""What a checkpoint holds: the number of tensors, bytes and dtypes, and what its release is known to hold."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.configs.zoo import language_models, zoo
from deepseek_jax.convert.check import check_tensors
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.files import nbytes
from deepseek_jax.convert.formats import Stored, scale_shape
from deepseek_jax.convert.layers import RECORD
from deepseek_jax.convert.load import open_checkpoint
from deepseek_jax.convert.names import Tensor, layout
from deepseek_jax.convert.safetensors import DTYPES, NAMES
from deepseek_jax.core import quant
from deepseek_jax.core.quant import BLOCK

# The 91,991 tensors of DeepSeek-R1's files; V3's have the same config. The rest follows from configs alone; of V4-Flash
# and V3.2 the names and shapes were seen too, their norms' dtypes were not.
CONFIRMED = ("deepseek-v3", "deepseek-r1")
# Releases with FP8 matrices.
FP8 = ("deepseek-v3", "deepseek-r1", "deepseek-v3.1", "deepseek-v3.2", "kimi-k2")
# Those whose routed experts are in FP4, the other matrices in FP8, and all scales powers of two.
FP4 = ("deepseek-v4-flash", "deepseek-v4-pro")
# Those whose norms are float32.
WIDE_NORMS = ("deepseek-v3.2",)


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

    Those of ``FP8``: FP8 blocks with float32 scales, a float32 router bias, bfloat16 for the rest, or float32 for the
    norms of ``WIDE_NORMS``. Those of ``FP4``: experts in FP4, two values a byte, the other matrices in FP8, scales in
    e8m0, and what is float32 or an integer in every model. Others: all bfloat16 but a router bias. ``CONFIRMED`` lists
    those whose real headers were seen.
    """
    cfg = zoo(name)
    specs = {}
    for tensor in layout(cfg)[0]:
        form = form_of(name, tensor)
        specs[tensor.name] = form.spec(tensor.shape)
        if form.scale is not None:
            specs[tensor.scale] = (form.scale, scale_shape(tensor, form.block(BLOCK)))
    return of_specs(name, specs)


def form_of(release: str, tensor: Tensor) -> Stored:
    """How a release stores a tensor."""
    if tensor.fixed is not None:
        return Stored(DTYPES["I64" if tensor.fixed.kind == "i" else "F32"])
    if tensor.fp8 and release in FP4:
        return Stored(np.dtype(quant.FP4 if ".experts." in tensor.name else quant.FP8), DTYPES["F8_E8M0"])
    if tensor.fp8 and release in FP8:
        return Stored(DTYPES["F8_E4M3"], DTYPES["F32"])
    return Stored(DTYPES["F32" if release in WIDE_NORMS and len(tensor.shape) == 1 else "BF16"])


def releases_of(cfg: ModelConfig) -> tuple[str, ...]:
    """The zoo's models with this architecture; names, lengths, stop tokens and initialisation apart."""
    neutral = {"name": "", "init_std": 1.0, "max_length": 1, "bos_id": None, "eos_ids": ()}
    return tuple(name for name in language_models() if replace(zoo(name), **neutral) == replace(cfg, **neutral))


@dataclass(frozen=True)
class Report:
    """What a folder holds beside what its release should hold (None: no release has this architecture).

    ``releases``: all that have the architecture. Their files hold the same, so no folder tells which one it is.
    """

    folder: str
    layout: str
    found: Manifest
    expected: Manifest | None
    releases: tuple[str, ...]

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
            return f"{found}\nThis is what {' and '.join(self.releases)} should hold."
        seen = " and ".join(name for name in self.releases if name in CONFIRMED)
        known = f" (seen in the files of {seen})" if seen else ""
        return f"{found}\n{' and '.join(self.releases)} should, by config, hold{known} {_line(self.expected)}"

    def record(self) -> dict:
        return {**asdict(self), "agrees": self.agrees}


def _line(manifest: Manifest) -> str:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in manifest.dtypes.items())
    return f"{manifest.tensors:,} tensors, {manifest.bytes:,} bytes ({dtypes})."


def inspect(folder: str | Path) -> Report:
    """Reads a folder's headers, checks them against its config, and compares with the release.

    Raises CheckpointError and ConfigError as `load_pretrained` does; tensors' values are not read.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    converted = (folder / RECORD).exists()
    checkpoint = open_checkpoint(folder, cfg)
    check_tensors(checkpoint, cfg, layout(cfg)[0])
    releases = tuple(name for name in releases_of(cfg) if not name.startswith("tiny"))
    specs = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.entries.items()}
    expected = of_release(releases[0]) if releases else None
    kind = "Orbax" if converted else "published"
    return Report(str(folder), kind, of_specs(folder.name, specs), expected, releases)
