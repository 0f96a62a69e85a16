"""No figure is lost in a narrow terminal: tables keep their columns whole or become blocks of lines."""

import io
import re

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from deepseek_jax.analysis.counts import counts
from deepseek_jax.cli import compile_tables, demo, verify
from deepseek_jax.cli.summary_tables import print_summary
from deepseek_jax.cli.tables import Output, show
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.convert.ladder import Gradients, Routing, Row


def printed(width: int, draw) -> str:
    console = Output(file=io.StringIO(), width=width, highlight=False)
    draw(console)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    return text


def summary(console: Console) -> None:
    cfg = zoo("deepseek-v3")
    print_summary(cfg, counts(cfg), console)


def comparisons(console: Console) -> None:
    rows = [
        Row(3, "attn", 1.25e-6, 1.9e-7),
        Routing(3, "experts", 6144, 3, 1.1e-6, 9.8e-6),
        Row(None, "cached decoding", 4.5, 0.333),
        Gradients(None, "gradients", 90, 2, "model.layers.0.input_layernorm.weight", 2.5e-6, 3.1e-7),
    ]
    show(console, verify.table(rows))


def routing(console: Console) -> None:
    class Words:
        def decode(self, ids):
            return f"word{ids[0]}"

    show(console, demo.routing_table(Words(), [100, 200], np.arange(32).reshape(4, 2, 4) + 100))


def paths(console: Console) -> None:
    table = compile_tables._table("What takes longest", ("seconds", "right"), ("name", "left"), ("from", "left"))
    table.add_row("0.01234", "fusion.123456789.remat", "transpose(jvp(Transformer))/attention/bhts,bshd->bthd/dot")
    table.add_row("0.00012", "all-gather.17", "x")
    show(console, table)


@pytest.mark.parametrize("draw", [summary, comparisons, routing, paths])
def test_every_figure_is_whole_at_every_width(draw):
    def figures(text: str) -> set[str]:
        # A figure may end a sentence.
        return set(re.findall(r"[$]?\d(?:[\d,./e+-]*\d)?%?", text))

    wide = figures(printed(200, draw))
    assert len(wide) >= 4
    for width in (80, 60, 40):
        lost = wide - figures(printed(width, draw))
        assert not {figure for figure in lost if not figure.startswith(("123456789", "17"))}, width


def test_columns_are_kept_where_they_fit():
    table = Table("name", "count", title="T")
    table.columns[1].no_wrap = True
    table.add_row("some words that may be broken anywhere", "1,234 of 5,678")
    text = printed(40, lambda console: show(console, table))
    assert "1,234 of 5,678 ┃" in text or "1,234 of 5,678 │" in text
    text = printed(20, lambda console: show(console, table))
    assert "count 1,234 of" in text


def test_a_reader_that_leaves_is_an_error_that_the_command_line_knows():
    class Left(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Output(file=Left()).print("x")
