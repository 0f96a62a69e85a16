"""The figures of README and its relatives are those of the committed results, each with the commit it belongs to."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def module():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "experiments" / "figures.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


FIGURES = module()


@pytest.mark.parametrize("name", FIGURES.TEXTS)
def test_figures_are_current(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert FIGURES.BLOCK.search(text), f"{name} has no block of figures"
    assert FIGURES.renewed(text) == text, "python experiments/figures.py writes them anew"


def test_every_block_is_used_and_known():
    found = {m[2] for name in FIGURES.TEXTS for m in FIGURES.BLOCK.finditer((ROOT / name).read_text(encoding="utf-8"))}
    assert found == set(FIGURES.BLOCKS)
    marked = [p for p in ROOT.rglob("*.md") if "<!-- figures:" in p.read_text(encoding="utf-8")]
    assert {p.relative_to(ROOT).as_posix() for p in marked} == set(FIGURES.TEXTS)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/results.json")), ids=lambda p: p.parent.name)
def test_every_result_has_a_commit_and_a_date(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert "None" not in FIGURES.origin(path.parent.name, {"cores": 2, **record})


def test_what_a_result_says_of_itself_comes_first():
    record = {"commit": "abc1234", "date": "2027-01-02", "machine": {"processor": "X", "cores": 4}}
    assert FIGURES.origin("bench_cpu", record) == "commit abc1234, 2027-01-02, X, 4 cores"
