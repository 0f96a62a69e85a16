"""Published figures of Janus-Pro."""

from deepseek_jax.analysis.counts import counts
from deepseek_jax.analysis.published.figure import Figure
from deepseek_jax.configs.zoo import zoo

_PAPER, _BOTH = "2501.17811", ("janus-pro-1b", "janus-pro-7b")


def _language(release: str) -> int:
    return counts(zoo(release)).language.total


FIGURES = (
    Figure("janus-pro-1b-parameters", "Janus-Pro-1B, parameters", _PAPER, "1", "B",
           lambda: counts(zoo("janus-pro-1b")).total,
           "by its name; the language model alone has 1.65B, the tower 0.30B", releases=("janus-pro-1b",)),
    Figure("janus-pro-1b-language", "Janus-Pro-1B, language model", f"{_PAPER} table 1", "1.5", "B",
           lambda: _language("janus-pro-1b"),
           "1.44B without the input embedding", releases=("janus-pro-1b",)),
    Figure("janus-pro-7b-parameters", "Janus-Pro-7B, parameters", _PAPER, "7", "B",
           lambda: counts(zoo("janus-pro-7b")).total, releases=("janus-pro-7b",)),
    Figure("janus-pro-7b-language", "Janus-Pro-7B, language model", f"{_PAPER} table 1", "7", "B",
           lambda: _language("janus-pro-7b"), releases=("janus-pro-7b",)),
    Figure("janus-pro-picture", "Janus-Pro, tokens of a picture", _PAPER, "576", "",
           lambda: counts(zoo("janus-pro-7b")).drawn, releases=_BOTH),
    Figure("janus-pro-codes", "Janus-Pro, codes of a picture", f"{_PAPER} §2.1", "16,384", "",
           lambda: zoo("janus-pro-7b").vq.n_codes, releases=_BOTH),
)  # fmt: skip
