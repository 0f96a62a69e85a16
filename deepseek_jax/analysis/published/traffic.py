"""Published memory traffic of a residual of several streams: elements that a token's sublayer reads and writes, its own
left out (mHC 2512.24880, table 2 and §4.3.1)."""

from collections.abc import Iterable
from fractions import Fraction

from deepseek_jax.analysis.published.figure import Figure
from deepseek_jax.configs.zoo import zoo

_MHC = "2512.24880"
# The arrays that each operation reads and writes. "pre", "post" and "res" are mHC's maps, H_pre, H_post and H_res.
OPERATIONS = {
    "maps": ({"streams"}, {"pre", "post", "res"}),
    "read": ({"streams", "pre"}, {"input"}),
    "write": ({"output", "post"}, {"written"}),
    "mix": ({"streams", "res"}, {"mixed"}),
    "add": ({"written", "mixed"}, {"next"}),
}
# A kernel's operations, several where they are fused.
Kernel = tuple[str, ...]
APART: tuple[Kernel, ...] = tuple((operation,) for operation in OPERATIONS)
BACK: Kernel = ("write", "mix", "add")
PLAIN: Kernel = ("add",)


def traffic(kernels: Iterable[Kernel], n: int, width: int) -> tuple[int, int]:
    """Elements read and written with ``n`` streams. A kernel reads an array once, and what one of its operations hands
    to another is neither read nor written."""
    size = {"input": width, "output": width, "pre": n, "post": n, "res": n * n}
    size |= dict.fromkeys(("streams", "written", "mixed", "next"), n * width)
    read = written = 0
    for kernel in kernels:
        taken, made = (set().union(*(OPERATIONS[operation][side] for operation in kernel)) for side in (0, 1))
        read += sum(size[array] for array in taken - made)
        written += sum(size[array] for array in made - taken)
    return read, written


def _of_v4() -> tuple[int, int]:
    cfg = zoo("deepseek-v4-flash")
    return traffic(APART, cfg.residual.n_streams, cfg.dim)


def _widths(kernels: Iterable[Kernel], side: int, n: int = 4) -> Fraction:
    width = zoo("deepseek-v4-flash").dim
    return Fraction(traffic(kernels, n, width)[side], width)


_AT = "of V4-Flash's 4 streams of 4096"
_MAPS = "in widths of 4 streams; 20 elements of the maps, which the paper leaves out, are 0.005 of a width"
FIGURES = (
    Figure("residual-reads", "one stream, reads in widths", f"{_MHC} table 2", "2", "",
           lambda: _widths([PLAIN], 0, n=1)),
    Figure("residual-writes", "one stream, writes in widths", f"{_MHC} table 2", "1", "",
           lambda: _widths([PLAIN], 1, n=1)),
    Figure("streams-reads", "several streams, reads: (5n + 1) C + n^2 + 2n", f"{_MHC} table 2, from", "86,040", "",
           lambda: _of_v4()[0], _AT),
    Figure("streams-writes", "several streams, writes: (3n + 1) C + n^2 + 2n", f"{_MHC} table 2, from", "53,272", "",
           lambda: _of_v4()[1], _AT),
    Figure("streams-back-reads", "output back to the streams, reads: (3n + 1) C", f"{_MHC} §4.3.1, from", "13", "",
           lambda: _widths([(operation,) for operation in BACK], 0), _MAPS),
    Figure("streams-back-writes", "output back to the streams, writes: 3n C", f"{_MHC} §4.3.1, from", "12", "",
           lambda: _widths([(operation,) for operation in BACK], 1)),
    Figure("streams-fused-reads", "the same in one kernel, reads: (n + 1) C", f"{_MHC} §4.3.1, from", "5", "",
           lambda: _widths([BACK], 0), _MAPS),
    Figure("streams-fused-writes", "the same in one kernel, writes: n C", f"{_MHC} §4.3.1, from", "4", "",
           lambda: _widths([BACK], 1)),
)  # fmt: skip
