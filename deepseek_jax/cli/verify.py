"""``deepseek-jax verify``: a checkpoint layer by layer against PyTorch transformers."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from deepseek_jax.cli.files import check_destination, write_json
from deepseek_jax.cli.programs import keep_programs

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from deepseek_jax.convert.gradients import Gradients
    from deepseek_jax.convert.ladder import Routing, Row


@dataclass(frozen=True)
class Verify:
    """Compare a checkpoint layer by layer with PyTorch transformers, both in float32.

    PyTorch reads the files by itself. Both models have to fit in memory, one after the other: 4 bytes a
    parameter, with --gradients 12; --layers takes a part of a larger model. Exits with 1 when any comparison lies
    beyond its bound.
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Checkpoint folder in the published layout (config.json and safetensors files), or, with --against, one that
    `convert` has written."""
    against: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Published folder of the same model that PyTorch reads instead of SRC; a converted SRC needs it."""
    layers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Compare a cut: the first N layers, with the embedding, the final norm and the head, without MTP modules. Only
    the files that hold these have to be there. 4 layers of V3 take 60 GB."""
    gradients: bool = False
    """Also compare the gradients of every parameter with those of torch autograd."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Text to compare on, by the checkpoint's tokenizer.json; default: random tokens."""
    tokens: Annotated[tuple[int, ...], tyro.conf.arg(metavar="ID [ID ...]")] = ()
    """Token ids to compare on, instead of a text."""
    length: int = 96
    """Number of random tokens, those of a Janus's picture apart; beyond the original context, YaRN's change of position
    shows most."""
    steps: int = 8
    """Tokens to decode with the caches, from the first half of the tokens on."""
    seed: int = 0
    """Seed of the random tokens."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write every comparison to this file; "-" is the standard output."""
    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/deepseek-jax, or where XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR say, and
    find them there; at most 2 GB."""

    def run(self) -> int:
        from rich.console import Console

        from deepseek_jax.cli.tables import Output, show
        from deepseek_jax.convert.gradients import GRADIENT_BOUND
        from deepseek_jax.convert.ladder import BOUND, ladder
        from deepseek_jax.multimodal.checkpoint import holds_janus
        from deepseek_jax.multimodal.verify import janus_ladder

        check_destination(self.json)
        janus = holds_janus(self.src)
        if janus:
            self._check_janus()
        else:
            self._check()
        keep_programs(self.compilation_cache)
        tokens = None if janus else self._tokens()
        with Console(stderr=True).status("transformers runs first, then deepseek_jax"):
            if janus:
                rows = list(janus_ladder(self.src, self.length, self.steps, self.seed, self.against))
            else:
                rows = list(ladder(self.src, tokens, self.steps, self.against, self.layers, self.gradients))
        wrong = [row for row in rows if not row.ok]
        show(Output(), table(rows))
        if self.gradients:
            row = rows[-1]
            print(
                f"\nGradients of {row.tensors} tensors, of which {row.zero} are zero on both sides; "
                f"the worst is that of {row.worst}."
            )
        if self.layers is not None:
            print(f"\nA cut: the first {self.layers} layers only, and no MTP modules; nothing is said of the others.")
        if wrong:
            print(f"\nFirst divergence: {_name(wrong[0])}; {len(wrong)} of {len(rows)} comparisons fail.")
        else:
            slopes = f", of gradients {GRADIENT_BOUND:g}" if self.gradients else ""
            print(f"\nAll {len(rows)} comparisons hold (relative error at most {BOUND:g}{slopes}).")
        if self.json is not None:
            write_json(self.json, self._record(rows, tokens))
        return 1 if wrong else 0

    def _check(self) -> None:
        """What PyTorch reads is a published folder. Raises CheckpointError, ValueError."""
        from deepseek_jax.convert.config_file import read_config
        from deepseek_jax.convert.training import is_training

        for path in filter(None, (self.src, self.against)):
            read_config(path)
        read = self.against or self.src
        if is_training(read):
            raise ValueError(
                f"{read} is a checkpoint of a training run, which PyTorch does not read: verify the model that the run "
                f"exported, or what `deepseek-jax convert {read} FOLDER` makes of this one."
            )

    def _check_janus(self) -> None:
        """Raises ValueError for options that are of language models alone."""
        given = ("layers", "gradients", "prompt", "tokens")
        if wrong := [f"--{option}" for option in given if getattr(self, option)]:
            raise ValueError(
                f"{', '.join(wrong)}: {self.src} holds a Janus, which is compared whole, on a random picture among "
                "--length random tokens; leave them out."
            )

    def _tokens(self) -> "np.ndarray":
        """int [1, T]."""
        import numpy as np

        from deepseek_jax.convert.config_file import read_config
        from deepseek_jax.text.tokenizer import load_tokenizer

        if self.prompt is not None and self.tokens:
            raise ValueError("give --prompt or --tokens, not both.")
        # Both sides read the config: what it must not say is said here, before the reference meets it.
        vocabulary = read_config(self.src).vocab_size
        if self.tokens:
            return np.asarray([self.tokens])
        if self.prompt is not None:
            tokenizer = load_tokenizer(self.src)
            tokenizer.check_fits(vocabulary)
            return np.asarray([tokenizer.encode(self.prompt)])
        return np.random.default_rng(self.seed).integers(0, vocabulary, (1, self.length))

    def _record(self, rows: "list[Row | Routing | Gradients]", tokens: "np.ndarray | None") -> dict:
        return {
            **{name: version(name) for name in ("jax", "torch", "transformers")},
            "checkpoint": str(self.src),
            "against": None if self.against is None else str(self.against),
            "layers": self.layers,
            "tokens": None if tokens is None else tokens.tolist(),
            "ok": all(row.ok for row in rows),
            "comparisons": [{**asdict(row), "ok": row.ok} for row in rows],
        }


def _name(row: "Row | Routing | Gradients") -> str:
    return row.what if row.layer is None else f"layer {row.layer} {row.what}"


def table(rows: "list[Row | Routing | Gradients]") -> "Table":
    from rich.table import Table

    table = Table("", "max error", "relative", "experts agree", "margin", "")
    for column in table.columns[:3]:
        column.no_wrap = True
    first = True
    for row in rows:
        mark = "ok"
        if not row.ok:
            mark, first = ("DIVERGES HERE" if first else "beyond bound"), False
        if hasattr(row, "relative"):
            cells = (f"{row.error:.2e}", f"{row.relative:.2e}", "", "")
        else:
            flips = f" (flips up to {row.widest:.1e})" if row.flipped else ""
            cells = ("", "", f"{row.tokens - row.flipped}/{row.tokens}{flips}", f"{row.closest:.1e}")
        table.add_row(_name(row), *cells, mark, style=None if row.ok else "bold red")
    return table
