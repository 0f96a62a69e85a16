"""The report prints every figure with its verdict, fits its terminal, and fails on bad input only."""

import json

import pytest

from deepseek_jax.analysis.published.absent import ABSENT
from deepseek_jax.analysis.published.figure import outcome
from deepseek_jax.analysis.published.table import FIGURES
from deepseek_jax.cli.main import main


@pytest.mark.parametrize("columns", [60, 240])
def test_every_figure_is_printed(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["report", "numbers"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns
    words = " ".join(text.split())
    for figure in FIGURES.values():
        assert figure.published_text in words, figure.id
        assert outcome(figure).text in words, figure.id
        assert columns == 60 or figure.note in words, figure.id
    for absent in ABSENT:
        assert absent.published in words, absent.id
    assert f"{len(FIGURES)} figures: " in words
    assert f"Besides: {len(ABSENT)} measured by the authors." in words


def test_json(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    assert main(["report", "numbers", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    figures = {figure["id"]: figure for figure in record["figures"]}
    assert list(figures) == list(FIGURES)
    v3 = figures["v3-parameters"]
    assert (v3["published_value"], v3["ours_value"]) == (671_000_000_000, 671_026_404_352)
    assert (v3["published"], v3["ours"], v3["verdict"]) == ("671B", "671.03B", "rounds to it")
    assert figures["llama-405b-cache-ratio"]["verdict"] == "differs"
    assert figures["llama-405b-cache-ratio"]["note"]
    assert [absent["id"] for absent in record["absent"]] == [absent.id for absent in ABSENT]


@pytest.mark.parametrize(("arguments", "code"), [(["figures"], 2), ([], 2), (["numbers", "--json", "none/a.json"], 1)])
def test_bad_input_is_one_line(arguments, code, capsys):
    assert main(["report", *arguments]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
