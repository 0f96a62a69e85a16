"""``deepseek-jax compile``: a full-size model compiled for a TPU slice, with no TPU: memory, traffic, time."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.devices import Pairs, fields, pairs
from deepseek_jax.cli.files import check_destination, write_json

# Columns where the output is no terminal, so that nothing is cut off in a file.
WIDE = 160


@dataclass(frozen=True)
class Compile:
    """Compiles a model's program for a TPU slice, with no TPU, and says what memory and time it takes."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A release such as deepseek-v3, a config.json, or a checkpoint folder."""
    topology: str = "v5p:8x8x8"
    """Chip and shape of the slice: v5p:8x8x8, v6e:16x16, v5e:8x8, ..."""
    mesh: str = "fsdp=-1"
    """Sizes of the mesh's axes data, fsdp, expert, tensor, context, such as fsdp=64,expert=8; -1 for what is left."""
    layout: str | None = None
    """Where arrays lie on the mesh, by name; by default the one that uses all axes."""
    program: Literal["train", "prefill", "decode"] = "train"
    """A training step (AdamW, float32 weights and moments), prefill, or a decoding step of one token a row. Of a Janus:
    a step on as many rows about a picture each as rows to draw, prefill of the former, one code of pictures drawn."""
    rows: int = 1
    """Sequences a chip; of a Janus that draws, pictures, of two rows each."""
    length: int = 4096
    """Tokens of a sequence, in training and prefill."""
    context: int = 4096
    """Tokens of a row that the cache holds, in decoding."""
    weights: Literal["bfloat16", "int8", "fp8"] = "bfloat16"
    """How weights are kept in prefill and decoding."""
    mtp: bool = True
    """Train the MTP modules too."""
    remat: str = "full"
    """What the backward pass keeps of a layer: none, full, attention, sublayers, ..."""
    loss_chunk: int | None = 512
    """Tokens of a sequence whose logits the loss has in memory at once."""
    expert_buffer: float = 1.25
    """Rows that a chip takes in from others at once, as a multiple of the mean."""
    set: Pairs = ()
    """Another field of deepseek_jax.Context, such as drop=True; may be repeated."""
    xla: Pairs = ()
    """A compiler option, which replaces the chip's usual one of that name; may be repeated."""
    quick: bool = False
    """Stop once memory is assigned and the schedule stands, before code is generated: a tenth of the time."""
    largest: int = 25
    """Buffers to list, of those that live when memory is fullest."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write all figures to this file; "-" is the standard output."""
    dump: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Keep the compiler's scheduled program in this file."""

    def run(self) -> int:
        from rich.console import Console

        from deepseek_jax.aot.report import report
        from deepseek_jax.cli.compile_tables import print_report
        from deepseek_jax.cli.tables import Output

        check_destination(self.json)
        check_destination(self.dump, "--dump")
        console = Output(highlight=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Output(highlight=False, width=WIDE)
        with Console(stderr=True).status("lowering") as status:
            found = report(self.job(), self.quick, status.update, self.dump)
        print_report(found, self.largest, console)
        if self.json is not None:
            write_json(self.json, found.as_dict(self.largest))
        if found.out_of_memory:
            raise ValueError(found.out_of_memory)
        return 0

    def job(self):
        """What is compiled, with everything checked that needs no compiler."""
        from deepseek_jax.aot.child import Job
        from deepseek_jax.aot.programs import Program
        from deepseek_jax.aot.topology import check_compiler, check_mesh, topology
        from deepseek_jax.cli.summary import find_any
        from deepseek_jax.parallel.mesh import mesh_sizes

        for name in ("rows", "length", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be positive.")
        wanted, cfg, sizes = topology(self.topology), find_any(self.model), mesh_sizes(self.mesh)
        check_mesh(sizes, wanted)
        check_compiler()
        options = {"remat": self.remat, "loss_chunk": self.loss_chunk, "expert_buffer": self.expert_buffer}
        options |= fields(self.set)
        program = Program(self.program, self.rows, self.length, self.context, self.weights, self.mtp, options)
        return Job(cfg, wanted, sizes, self.layout, program, dict(wanted.chip.flags) | pairs("--xla", self.xla))
