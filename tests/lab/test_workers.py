"""Whole runs in processes of their own: one thread each, Ctrl-C loses no more than the run under way."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from deepseek_jax.lab.workers import Task, View, carry_out_all
from deepseek_jax.runs.run_folder import unfinished

ROOT = Path(__file__).parents[2]
STUDY = """
    from pathlib import Path
    from deepseek_jax.configs.schema import MLA, ModelConfig, MoE
    from deepseek_jax.data.config import DataConfig
    from deepseek_jax.lab.rules import Separation
    from deepseek_jax.lab.study import Claim, Scale, Setup, Study
    from deepseek_jax.train.recipe import LearningRate, Optimizer, Recipe
    from deepseek_jax.train.weights import LossWeights

    MODEL = ModelConfig(
        name="toy", vocab_size=300, dim=32, n_layers=2, n_dense_layers=1, ffn_dim=32, max_length=32, init_std=0.02,
        attention=MLA(n_heads=2, q_rank=None, kv_rank=8, nope_dim=8, rope_dim=8, v_dim=8),
        moe=MoE(n_experts=4, top_k=2, expert_dim=16),
    )
    RECIPE = Recipe(
        model="", tokens=STEPS * 4 * 32, length=32, batch_rows=4, first_rows=None, ramp_tokens=0, micro_rows=None,
        fim_rate=0.0, dtype="float32", rate=LearningRate(1e-3, 2, None, drops=()), ema_decay=0.0, mtp_change=None,
        optimizer=Optimizer(moments="float32"), weights=LossWeights(mtp=0.0, balance=0.0), bias_until=None,
    )
    TEXT = DataConfig(data=("toy=" + str(Path(__file__).parent / "text"),), held_out_share=0.3)
    STUDY = Study(
        stem="toy", question="?", minutes=1, seeds=(0, 1),
        scales={"cpu": Scale(
            Setup(MODEL, RECIPE, TEXT), {"base": {}, "none": {"recipe.bias_speed": 0.0, "probes": ("knock_outs",)}}
        )},
        claims=(Claim("C1", "s", "s", "e", Separation("max_violation_global", low="base", high="none")),),
    )
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of experiments with one in it, on text of its own."""
    stem = tmp_path / "experiments" / "toy"
    (stem / "text").mkdir(parents=True)
    for number in range(40):
        words = " ".join(f"word{(number * 7 + at * at) % 97}" for at in range(60))
        (stem / "text" / f"{number}.txt").write_text(words)
    return stem.parent


def begin(folder: Path, steps: int, *more: str) -> subprocess.Popen:
    source = textwrap.dedent(STUDY).replace("STEPS", str(steps))
    (folder / "toy" / "run.py").write_text(source)
    command = ["-m", "deepseek_jax.cli.main", "experiment", "toy", "--folder", str(folder), *more]
    environment = {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *command, "--runs", str(folder / "runs")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs").iterdir()) if (folder / "runs").exists() else []


def ended(folder: Path) -> list[str]:
    return [name for name in files(folder) if name.endswith(".json")]


@pytest.mark.slow
def test_ctrl_c_keeps_what_had_ended_and_the_command_goes_on(folder):
    process = begin(folder, 60, "--processes", "1")
    deadline = time.monotonic() + 240
    while not ended(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "What had ended is kept, and the same command goes on." in err
    assert "Traceback" not in err
    kept = files(folder)
    assert 1 <= len(kept) < 4
    assert all(name.endswith(".json") and not name.startswith(".") for name in kept)
    stamps = {name: (folder / "runs" / name).stat().st_mtime_ns for name in kept}
    # Nobody of the interrupted command still works.
    time.sleep(2)
    assert files(folder) == kept
    # Two at a time now, each on a core of its own where there are two.
    process = begin(folder, 60)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    runs = ended(folder)
    assert len(runs) == 4
    assert {name: (folder / "runs" / name).stat().st_mtime_ns for name in kept} == stamps
    found = [json.loads((folder / "runs" / name).read_text()) for name in runs]
    for run in found:
        assert (run["steps"], run["tokens"], len(run["curve"]), len(run["evaluations"])) == (60, 60 * 128, 20, 5)
        assert run["cores"] == (1 if hasattr(os, "sched_setaffinity") else os.cpu_count())
        # One thread cannot use more than one core.
        assert run["cpu_seconds"] < 1.05 * run["wall_seconds"] + 5
        assert run["dead_experts"] == [row.count(0) for row in run["load"]]
        assert sum(run["load"][0]) % 2 == 0 < run["held_out_tokens"] < sum(run["load"][0]) / 2
        assert run["asked"]["study"] == "toy"
        probed = run["asked"]["variant"] == "none"
        assert set(run["probes"]) == ({"knock_outs"} if probed else set())
        if probed:
            assert [len(row) for row in run["probes"]["knock_outs"]["routed"]] == [4]
    assert len({run["corpus"]["hash"] for run in found}) == 1
    assert "C1" in out


def sleep_in_writing(task, home, core, pinned, cache, told):
    """A child that is killed while its file is not whole."""
    unfinished(task.path).write_text("half of")
    told.send((1, 2))
    time.sleep(600)


def test_a_run_killed_in_writing_leaves_nothing(tmp_path, monkeypatch):
    class Interrupt(View):
        def step(self, task, number, steps):
            assert unfinished(task.path).exists()
            raise KeyboardInterrupt

    monkeypatch.setattr("deepseek_jax.lab.workers._work", sleep_in_writing)
    tasks = [Task(None, seed, tmp_path / f"{seed}.json", "x") for seed in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        carry_out_all(tasks, tmp_path, processes=1, pinned=False, view=Interrupt())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_cannot_be_made_is_named(folder):
    (folder / "toy" / "text" / "0.txt").unlink()
    for number in range(1, 39):
        (folder / "toy" / "text" / f"{number}.txt").unlink()
    (folder / "toy" / "text" / "40.txt").write_text("other words of another kind " * 5)
    process = begin(folder, 4)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("deepseek-jax experiment: ")
    assert "Traceback" not in err
    assert files(folder) == []
