"""The tables of ``deepseek-jax report``, made for 80 columns."""

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek_jax.analysis.published.figure import Absent, Outcome
from deepseek_jax.cli.tables import Output, show

# How the figures of a verdict are counted.
VERBS = {"equal": "are equal", "rounds to it": "round to what is published", "differs": "differ"}


def print_numbers(
    sections: dict[str, list[Outcome]], absent: tuple[Absent, ...], console: Console | None = None
) -> None:
    """Prints a table a section, then what differs and why, what was assumed, what is not stated here, and the sums."""
    console = console or Output(highlight=False)
    outcomes = [found for section in sections.values() for found in section]
    tables = [_section(name, section) for name, section in sections.items()]
    for table in [*tables, _differing(outcomes), _assumed(outcomes), _absent(absent)]:
        show(console, table)
        console.print()
    tally = Counter(found.verdict for found in outcomes)
    console.print(
        f"{len(outcomes)} figures: {', '.join(f'{tally[verdict]} {verb}' for verdict, verb in VERBS.items())}. "
        f"Besides: {len(absent)} measured by the authors."
    )


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=justify == "right")
    return table


def _section(title: str, outcomes: list[Outcome]) -> Table:
    columns = ("figure", "left"), ("published", "right"), ("ours", "right"), ("verdict", "left"), ("source", "left")
    table = _table(title, *columns)
    for found in outcomes:
        figure = found.figure
        style = "bold" if found.verdict == "differs" else None
        table.add_row(figure.name, figure.published_text, found.text, found.verdict, figure.source, style=style)
    return table


def _differing(outcomes: list[Outcome]) -> Table:
    columns = ("figure", "left"), ("published", "right"), ("ours", "right"), ("why", "left")
    table = _table("What differs", *columns)
    for found in outcomes:
        if found.verdict == "differs":
            table.add_row(found.figure.name, found.figure.published_text, found.text, found.figure.note)
    return table


def _assumed(outcomes: list[Outcome]) -> Table:
    table = _table("What the others take for granted", ("figure", "left"), ("published", "right"), ("note", "left"))
    for found in outcomes:
        if found.verdict != "differs" and found.figure.note:
            table.add_row(found.figure.name, found.figure.published_text, found.figure.note)
    return table


def _absent(absent: tuple[Absent, ...]) -> Table:
    columns = ("figure", "left"), ("published", "right"), ("on", "left"), ("source", "left")
    table = _table("Measured by the authors", *columns)
    for one in absent:
        table.add_row(one.name, one.published, one.on, one.source)
    return table
