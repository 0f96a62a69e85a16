"""Tables that lose no figure, however narrow the terminal is: where a table does not fit, each row is a block."""

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A text that may be folded anywhere, such as an operation's path, is not folded narrower than this.
FOLDED = 12


class Output(Console):
    """A `Console` for a command's output, whose reader may leave: `cli.main` ends the command then."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show(console: Console, table: Table) -> None:
    """Prints a table, each column at least as wide as its longest word, or where it is ``no_wrap`` as its longest cell;
    where that is wider than the terminal, a block of lines for each row instead."""
    cells = [[_text(console, cell) for cell in (column.header, *column.cells)] for column in table.columns]
    lengths = [[cell_len(cell.plain) for cell in column] for column in cells]
    natural = [max(column) for column in lengths]
    least = [
        most if column.no_wrap else _longest_word(own, column.overflow == "fold")
        for column, own, most in zip(table.columns, cells, natural, strict=True)
    ]
    room = console.width - _frame(table)
    if sum(least) > room:
        _blocks(console, table, cells)
        return
    widths = list(natural)
    while sum(widths) > room:
        # The column that can best spare it.
        widest = max(range(len(widths)), key=lambda i: widths[i] - least[i])
        widths[widest] -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    console.print(table)


def _text(console: Console, cell) -> Text:
    return console.render_str(cell) if isinstance(cell, str) else cell


def _longest_word(cells: list[Text], foldable: bool) -> int:
    longest = max((cell_len(word) for cell in cells for word in cell.plain.split()), default=0)
    return min(longest, FOLDED) if foldable else longest


def _frame(table: Table) -> int:
    """What stands between and around the columns."""
    _, right, _, left = table.padding
    n = len(table.columns)
    # As Rich counts, which takes the outer padding for granted.
    return n * (left + right) + (0 if table.box is None else n - 1 + 2 * table.show_edge)


def _blocks(console: Console, table: Table, cells: list[list[Text]]) -> None:
    """Each row: its first cell, then the others, each after its header, on lines of their own where they are long."""
    if table.title:
        console.print(Text(str(table.title), style="bold"))
    headers = [column[0].plain for column in cells]
    for row in zip(*(column[1:] for column in cells), strict=True):
        first, *others = ((header, cell) for header, cell in zip(headers, row, strict=True) if cell.plain)
        console.print(first[1], overflow="fold")
        for header, cell in others:
            label = Text(f"  {header} " if header else "  ", style="dim")
            console.print(label + cell, overflow="fold")
    if table.caption:
        console.print(Text(str(table.caption), style="italic"))
