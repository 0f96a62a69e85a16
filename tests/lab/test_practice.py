"""Studies of reinforcement learning: what their rules say of runs, and the same code at toy size."""

import json
import sys

import pytest

from deepseek_jax.lab.figure import draw
from deepseek_jax.lab.practice import main, runs, told
from deepseek_jax.lab.study import defined
from deepseek_jax.lab.verdicts import judge

STEMS = ("r1_distill", "r1_rft", "r1_v32_parts", "r1_variants")


def drill(root, stem):
    return defined(root / "experiments" / stem / "run.py", "DRILL")


def test_verdicts_follow_from_the_runs_of_one_rule(root, tmp_path):
    """Made-up figures: what the paper found, with a run of another rule beside them, which counts nothing."""
    study = drill(root, "r1_rft")
    figures = {"start": (0.3, 0.8, 0.4), "offline": (0.4, 0.8, 0.5), "online": (0.6, 0.8, 0.7), "grpo": (0.7, 0.8, 0.8)}

    def write(name: str, seed: int, rule: str, by: float = 0.0) -> None:
        after = dict(
            zip(("pass_at_1", "pass_at_k", "maj_at_k"), (f + 0.01 * seed + by for f in figures[name]), strict=True)
        )
        record = {"variant": name, "seed": seed, "rule": rule, "after": after, "steps": []}
        (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(record))

    for name in study.variants:
        for seed in study.seeds:
            write(name, seed, study.rule_hash)
    words = [line.split(": ")[2] for line in told(study, runs(study, tmp_path))[len(study.variants) :]]
    assert words == ["reproduced"] * 4
    for seed in study.seeds:
        write("online", seed, study.rule_hash, by=-0.3)
    write("grpo", 0, "another")
    said = told(study, runs(study, tmp_path))
    assert [line.split(": ")[2] for line in said[len(study.variants) :]] == ["open"] * 4
    assert "11 of 12 runs are there" in said[-1]


@pytest.mark.parametrize("stem", STEMS)
def test_a_study_draws_its_committed_runs(root, tmp_path, stem):
    study = drill(root, stem)
    found = runs(study, root / "experiments" / stem / "results")
    assert {name for name, _ in found} == set(study.variants)
    assert draw(study, found, judge(study, found), tmp_path / "figure.png").stat().st_size > 1000


def test_rules_are_of_all_that_decides(root):
    """Of four studies, each its own; a variant's part, the start and the seeds are in it, words are not."""
    hashes = {stem: drill(root, stem).rule_hash for stem in STEMS}
    assert hashes == {
        "r1_distill": "53561c02781d",
        "r1_rft": "d135fae20e79",
        "r1_v32_parts": "bf9cea7be6be",
        "r1_variants": "eb1e0a9691b4",
    }
    assert all(len(drill(root, stem).seeds) == 3 for stem in STEMS)


@pytest.mark.slow
def test_every_study_runs(root, tmp_path, monkeypatch, capsys):
    """All at toy size, from one start, by their command."""
    asked = {"r1_rft": ("online",), "r1_v32_parts": ("whole",), "r1_variants": ("v3-4",), "r1_distill": ("reverse-kl",)}
    assert set(asked) == set(STEMS)
    results = tmp_path / "results"
    for stem, variants in asked.items():
        study = drill(root, stem)
        monkeypatch.setattr(sys, "argv", ["run.py", "--smoke", "--work", str(tmp_path), "--variants", *variants])
        main(study, str(root / "experiments" / stem / "run.py"), "")
        made = [json.loads((results / f"{name}-0.json").read_text()) for name in variants]
        for run in made:
            assert run["before"]["pass_at_1"] >= 0.5
            assert 0 <= run["after"]["pass_at_1"] <= run["after"]["pass_at_k"] <= 1
        assert ": open: " in capsys.readouterr().out
    assert made[0]["teacher"]["pass_at_1"] >= 0
