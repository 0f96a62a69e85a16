"""The tables of ``deepseek-jax compile``."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek_jax.aot.report import Report

GB = 1e9


def print_report(report: Report, largest: int, console: Console) -> None:
    """Prints a program's tables; ``largest``: buffers to list."""
    job, seconds = report.job, report.seconds
    mesh = " x ".join(f"{name}={size}" for name, size in job.sizes.items() if size != 1)
    p = job.program
    console.print(
        Text(
            f"{job.cfg.name}, {p.kind}, {p.rows} rows a chip, on {job.topology.name} as {mesh or 'one device'}; "
            f"lowered in {seconds['lower']:.0f} s, compiled in {seconds['compile']:.0f} s",
            style="bold",
        )
    )
    console.print(_memory(report))
    if largest:
        console.print(_largest(report, largest))


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=justify == "right")
    return table


def _memory(report: Report) -> Table:
    memory, available = report.memory, report.job.topology.chip.hbm
    table = _table("HBM of a chip", ("what", "left"), ("GB", "right"), ("of it", "right"))
    rows = [*memory.arguments.items(), ("outputs, not donated", memory.outputs), ("temporaries", memory.temporaries)]
    for name, size in [*rows, ("constants", memory.constants)]:
        if size >= 5e5:
            table.add_row(name, f"{size / GB:.3f}", f"{size / available:.1%}")
    table.add_section()
    table.add_row("total", f"{memory.total / GB:.3f}", f"{memory.total / available:.1%}", style="bold")
    table.add_row("live at the peak", f"{memory.peak / GB:.3f}", f"{memory.peak / available:.1%}")
    table.add_row("available", f"{available / GB:.3f}", "")
    if memory.host:
        table.add_row("on the host", f"{memory.host / GB:.3f}", "")
    return table


def _largest(report: Report, most: int) -> Table:
    title = "Largest temporaries at the peak (p: of a parameter's shape)"
    table = _table(title, ("GB", "right"), ("", "left"), ("shape", "left"), ("from", "left"))
    for buffer in report.memory.largest[:most]:
        source = buffer.source or buffer.name
        table.add_row(
            f"{buffer.nbytes / GB:.3f}", "p" if buffer.like_parameter else "", Text(buffer.shape), Text(short(source))
        )
    return table


def short(source: str) -> str:
    """A JAX operation's path without what every one has in it."""
    for word in ("jit(train_step)/", "while/body/", "closed_call/", "checkpoint/", "shard_map/"):
        source = source.replace(word, "")
    return source
