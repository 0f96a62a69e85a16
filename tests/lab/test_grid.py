"""``deepseek-jax sweep``: a grid over fields, what it refuses, and what it shows of runs that are there."""

import json
from pathlib import Path

import pytest

from deepseek_jax.cli.main import main
from deepseek_jax.cli.sweep import Sweep
from deepseek_jax.lab.grid import grid
from deepseek_jax.lab.records import Runs, spec, text
from deepseek_jax.lab.study import load

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BASE = load(EXPERIMENTS, "v3_balance").base


def test_a_grid_has_every_combination():
    points = grid(BASE, ["recipe.rate.peak=1e-3,2e-3", "model.moe.score=sigmoid,softmax", "recipe.embed_std=None,1"])
    assert len(points) == 8
    first, *_, last = points.items()
    assert first[0] == "recipe.rate.peak=0.001, model.moe.score=sigmoid, recipe.embed_std=None"
    assert (last[1].recipe.rate.peak, last[1].model.moe.score, last[1].recipe.embed_std) == (2e-3, "softmax", 1)
    # The point that is the base is the base's run.
    assert spec(grid(BASE, ["recipe.rate.peak=2e-3"])["recipe.rate.peak=0.002"], 0) == spec(BASE, 0)
    # A whole number is one where the field holds a fraction.
    one, other = (grid(BASE, [f"model.moe.scale={n}"]).popitem()[1] for n in ("1", "1.0"))
    assert spec(one, 0) == spec(other, 0) == spec(BASE, 0)
    assert grid(BASE, ["recipe.rate.drops=((5,1e-4),),()"]).popitem()[1].recipe.rate.drops == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((), "FIELD=a,b,c is missing"),
        (("recipe.rate.peak",), "'recipe.rate.peak' names no values: write FIELD=a,b,c"),
        (("recipe.rate.peek=1",), "'peek' is no field there; the fields are peak"),
        (("model.moe.top_k=2", "model.moe.top_k=4"), "model.moe.top_k is given twice"),
        (("model.moe.top_k=2,2",), "a value is given twice"),
        (("model.moe.top_k=two",), "top_k"),
        (("model.moe.top_k=99",), "top_k=99"),
        (("model.vocab_size=512",), "must learn from the same tokens"),
        (("text.held_out_bytes=5",), "must learn from the same tokens"),
        (("recipe.bias_speed=0", "--seeds", "0"), "--seeds 0"),
        (("recipe.bias_speed=0", "--variant", "nun"), "v3_balance has no variant 'nun'"),
    ],
)
def test_what_cannot_be_swept_is_one_line(fields, message, tmp_path, capsys, monkeypatch):
    # Whatever is not refused would train for minutes.
    monkeypatch.setattr("deepseek_jax.cli.running.make", None)
    arguments = ["--folder", str(EXPERIMENTS), "--runs", str(tmp_path / "runs")]
    assert main(["sweep", "v3_balance", *fields, *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_it_shows_every_point_and_counts_those_that_diverged(tmp_path, capsys):
    points, runs = grid(BASE, ["recipe.rate.peak=1e-3,9"]), Runs(tmp_path)
    for setup, diverged in zip(points.values(), (None, 5), strict=True):
        evaluation = {"bits_per_byte": 1.5, "max_violation_global": [0.2]}
        record = {"diverged": diverged, "evaluations": [evaluation], "load": [[1]], "dead_experts": [0], "curve": []}
        runs.path(setup, 100, "aaaa").write_text(text({**record, "max_violation_batch": [0.3]}))
    command = Sweep("v3_balance", ("recipe.rate.peak=1e-3,9",), json=tmp_path / "out.json")
    command._show(points, range(100, 101), runs, "aaaa")
    assert "recipe.rate.peak=9.0" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "out.json").read_text())["points"]
    assert first == {
        "setting": "recipe.rate.peak=0.001",
        "bits_per_byte": "1.5",
        "max_violation_global": "0.2",
        "max_violation_batch": "0.3",
        "dead_experts": "0",
        "diverged": 0,
    }
    assert (second["bits_per_byte"], second["diverged"]) == ("", 1)
