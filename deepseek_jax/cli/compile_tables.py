"""The tables of ``deepseek-jax compile``."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek_jax.aot.report import Report, merged
from deepseek_jax.aot.roofline import HBM_RATE, MATRIX_RATE
from deepseek_jax.cli.tables import show

GB = 1e9
# Smaller collectives cost no more than the way to the neighbours.
SMALL = 1e6


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
    show(console, _memory(report))
    if largest:
        show(console, _largest(report, largest))
    show(console, _time(report))
    show(console, _traffic(report))
    if report.estimate.kernels:
        show(console, _kernels(report))
    if largest:
        show(console, _operations(report, largest))
    show(console, _rates(report))
    for line in _remarks(report):
        console.print(Text(line))


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns:
        # Names, shapes and paths may be cut into lines anywhere, figures nowhere.
        table.add_column(name, justify=justify, no_wrap=justify == "right", overflow="fold")
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
    table.add_row("temporaries live at once", f"{memory.live / GB:.3f}", f"{memory.live / available:.1%}")
    stacks = report.job.language.stacks
    for name, size in memory.live_by_kind({len(stack.numbers) for stack in stacks}).items():
        table.add_row(f"  {name}", f"{size / GB:.3f}", f"{size / available:.1%}")
    table.add_row("available", f"{available / GB:.3f}", "")
    if memory.host:
        table.add_row("on the host", f"{memory.host / GB:.3f}", "")
    return table


def _largest(report: Report, most: int) -> Table:
    title = "Largest temporaries when memory is fullest (p: of a parameter's shape)"
    table = _table(title, ("GB", "right"), ("", "left"), ("shape", "left"), ("from", "left"))
    for buffer in report.memory.largest[:most]:
        source = buffer.source or buffer.name
        table.add_row(
            f"{buffer.nbytes / GB:.3f}", "p" if buffer.like_parameter else "", Text(buffer.shape), Text(short(source))
        )
    return table


def _time(report: Report) -> Table:
    found = report.estimate
    table = _table("Time of a step, estimated from the schedule", ("what", "left"), ("seconds", "right"), ("", "right"))
    kernels = sum(call.seconds * runs for call, runs in found.kernels)
    rows = [("grouped matmul and attention, at measured rates", kernels)]
    rows += [(f"other matrix products, at {MATRIX_RATE:.0%} of the peak", found.matrix - kernels)]
    rows += [(f"more for HBM at {HBM_RATE:.0%} of its bandwidth", found.hbm)]
    rows += [(f"exposed {name}", seconds) for name, seconds in sorted(found.exposed.items(), key=lambda e: -e[1])]
    rows += [("exposed copies to and from the host", found.host)]
    for name, seconds in rows:
        if seconds:
            table.add_row(name, f"{seconds:.4g}", f"{seconds / found.seconds:.1%}")
    table.add_section()
    table.add_row("step", f"{found.seconds:.4g}", "", style="bold")
    table.add_row("links busy", f"{found.links:.4g}", f"{found.links / found.seconds:.1%}")
    if optimal := (report.compiler or {}).get("optimal_seconds"):
        table.add_row("the compiler's optimal_seconds: loops once, no links", f"{optimal:.4g}", "")
    return table


def _traffic(report: Report) -> Table:
    found = report.estimate
    table = _table("What a chip does in a step, loops multiplied out", ("what", "left"), ("amount", "right"))
    table.add_row("matrix FLOPs done", f"{found.flops / 1e12:,.1f} T")
    table.add_row("HBM", f"{found.hbm_bytes / GB:,.1f} GB")
    for name, size in sorted(found.sent.items(), key=lambda e: -e[1]):
        table.add_row(name, f"{size / GB:,.3f} GB")
    if found.host_bytes:
        table.add_row("to and from the host", f"{found.host_bytes / GB:,.1f} GB")
    return table


def _kernels(report: Report) -> Table:
    title = "Kernels priced by measurements (deepseek_jax/aot/measured)"
    table = _table(title, ("seconds", "right"), ("runs", "right"), ("TFLOP/s", "right"), ("kernel", "left"))
    for line in sorted(merged(report.estimate), key=lambda line: -line["seconds"] * line["runs"]):
        shape = ", ".join(f"{name} {size}" for name, size in line["shape"].items())
        by = "" if line["measured"] == line["kernel"] else f" (as {line['measured']})"
        table.add_row(
            f"{line['seconds'] * line['runs']:.4g}",
            str(line["runs"]),
            f"{line['flops'] / line['seconds'] / 1e12:.0f}",
            Text(f"{line['kernel']}{by} {line['product']}: {shape}"),
        )
    return table


def _operations(report: Report, most: int) -> Table:
    table = _table("What takes longest", ("seconds", "right"), ("name", "left"), ("from", "left"))
    for seconds, name, source in report.estimate.operations[:most]:
        table.add_row(f"{seconds:.4g}", Text(name[:44]), Text(short(source)))
    return table


def _rates(report: Report) -> Table:
    table = _table("Rate", ("what", "left"), ("", "right"), ("MFU", "right"))
    table.add_row("tokens a second and chip", f"{report.rates.tokens:,.1f}", "")
    if report.rates.cache is not None:
        table.add_row("bytes that a token holds in the cache", f"{report.rates.cache:,.0f}", "")
    for name, (flops, share) in report.rates.useful.items():
        table.add_row(f"useful GFLOPs a token, {name}", f"{flops / 1e9:.4g}", f"{share:.1%}")
    return table


def _remarks(report: Report) -> list[str]:
    found = report.estimate
    lines = [f"What binds: {found.binds}."]
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all"):
        alone = [(t, n) for t, n in found.synchronous if t.kind == kind and t.nbytes >= SMALL]
        if alone or kind == "all-gather":
            names = ", ".join(f"{t.name} ({t.nbytes / 1e6:.0f} MB x {n})" for t, n in alone[:8])
            lines.append(f"Synchronous {kind}s of at least {SMALL / 1e6:.0f} MB: {len(alone)}. {names}")
    if found.loops:
        lines.append(f"Loops that balanced routing does not need, not counted: {', '.join(map(short, found.loops))}.")
    if found.unknown:
        lines.append(f"Kernels of unknown cost, counted by their bytes: {', '.join(found.unknown)}.")
    return lines


def short(source: str) -> str:
    """A JAX operation's path without what every one has in it."""
    for word in ("jit(train_step)/", "while/body/", "closed_call/", "checkpoint/", "shard_map/"):
        source = source.replace(word, "")
    return source
