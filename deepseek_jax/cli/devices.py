"""Options of commands that run on a mesh and in several processes. Loads no JAX."""

import ast
from dataclasses import dataclass
from typing import Annotated

import tyro

from deepseek_jax.cli.files import native_output_off

Pairs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE"), tyro.conf.UseAppendAction]
# Fields of `Context` that a command's own options decide, and `fp8`, which no text says.
NOT_SET = ("mesh", "layout", "balanced", "folded", "dtype", "fp8")


@dataclass(frozen=True)
class Devices:
    """The devices of a command; by default one."""

    mesh: Annotated[str | None, tyro.conf.arg(metavar="AXIS=SIZE,...")] = None
    """Mesh of all devices, such as fsdp=4,expert=2; axes data, fsdp, expert, tensor, context, one of them with -1 for
    what the others leave; "none" for one device. By default none, or fsdp=-1 with several processes."""
    layout: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """What lies where on the mesh: all (the default), data, fsdp, tensor, fsdp_tp, fsdp_ep, ep_tp, context or serve."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Where the first of several processes listens; "auto" for the cluster that JAX detects, "none" for a process
    alone. By default JAX_COORDINATOR_ADDRESS, else "auto" under Slurm or Open MPI with several tasks and on TPU
    machines."""
    processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many processes there are; by default JAX_NUM_PROCESSES, else as detected."""
    process_index: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    """Which of them this is, from 0; by default JAX_PROCESS_ID, else as detected."""
    set: Pairs = ()
    """How it runs: a field of deepseek_jax.Context, such as remat=full, loss_chunk=512 or expert_chunks=4; may be
    repeated."""
    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/deepseek-jax, or where XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR say, and
    find them there; at most 2 GB."""

    def context(self):
        """Joins the other processes and returns the `Context`; before anything else touches a device.

        Raises LayoutError for a mesh or layout that does not exist, ProcessError where the others are not found.
        """
        from deepseek_jax.cli.programs import keep_programs
        from deepseek_jax.parallel.mesh import make_mesh, mesh_sizes
        from deepseek_jax.parallel.processes import join

        keep_programs(self.compilation_cache)
        sizes = None if self.mesh in (None, "none") else mesh_sizes(self.mesh)
        join(self.coordinator, self.processes, self.process_index)
        import jax

        from deepseek_jax.parallel.context import Context

        if jax.process_count() > 1:
            native_output_off()
        if self.mesh is None and jax.process_count() > 1:
            sizes = {"fsdp": -1}
        if self.mesh is None and sizes is None and self.layout is not None:
            raise ValueError("--layout lays a model out on a mesh: give one with --mesh.")
        how = fields(self.set)
        return Context(**how) if sizes is None else Context(mesh=make_mesh(**sizes), layout=self.layout, **how)


def fields(texts: tuple[str, ...]) -> dict:
    """The fields of `Context` that ``--set`` names; raises ValueError for others."""
    from deepseek_jax.core.context import Context

    offered = sorted(set(Context.__dataclass_fields__) - set(NOT_SET))
    found = {name: _value(text) for name, text in pairs("--set", texts).items()}
    for name in found:
        if name not in offered:
            raise ValueError(f"--set {name}: choose among {', '.join(offered)}.")
    return found


def pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE texts as a dict; raises ValueError for other texts."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"{option} {text!r}: give NAME=VALUE.")
        pairs[name] = value
    return pairs


def _value(text: str):
    """A number, True, False or None where the text is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
