"""The tables of ``deepseek-jax summary`` for a Janus: its parts, then its language model's own."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek_jax.analysis.counts import JanusCounts
from deepseek_jax.analysis.published.table import of_release, release_of
from deepseek_jax.cli.summary_tables import new_table, print_summary, published_table
from deepseek_jax.cli.tables import Output, show
from deepseek_jax.configs.multimodal import JanusConfig


def print_janus(cfg: JanusConfig, c: JanusCounts, console: Console | None = None) -> None:
    """Prints every table of a Janus to ``console`` (default: standard output)."""
    console = console or Output(highlight=False)
    vision, side = cfg.vision, cfg.vision.image_size
    title = (
        f"{cfg.name}: pictures of {side} x {side}, shown as {c.shown} tokens ({vision.n_layers} layers of width "
        f"{vision.dim}, {vision.n_heads} heads), drawn as {c.drawn} of {cfg.vq.n_codes:,} codes"
    )
    console.print(Text(title, style="bold"))
    tables = [_parts(c)]
    if figures := of_release(release_of(cfg)):
        tables.append(published_table(figures))
    for table in tables:
        console.print()
        show(console, table)
    console.print()
    print_summary(cfg.language, c.language, console)


def _parts(c: JanusCounts) -> Table:
    table = new_table("Parameters", ("component", "left"), ("count", "right"))
    for name, count in c.components.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    table.add_row("language model", f"{c.language.total:,}")
    table.add_section()
    table.add_row("total", f"{c.total:,}", style="bold")
    return table
