"""Runs of reinforcement learning: a format that is learned, what is logged, resuming bit for bit, what is refused."""

import json
import os
import shutil
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from architectures import ARCHITECTURES
from rl.tagged import TASK, tagged
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.analysis.rl_panels import policy_picture, rewards_picture
from deepseek_jax.analysis.run_records import read_run
from deepseek_jax.cli.main import main
from deepseek_jax.convert.training import read_leaves, read_record
from deepseek_jax.rl.recipe import Rewards, RlRecipe
from deepseek_jax.rl.trainer import improve
from deepseek_jax.rl.variants import MATH, V32
from deepseek_jax.train.tuning import LoRA

RECIPE = RlRecipe(steps=16, form="text", max_new_tokens=6, lr=2e-3, held_out=16, evaluate_every=8)
FORM = replace(MATH, beta=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tagged(tmp_path_factory.mktemp("base"))


def records(folder, kind):
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


class Stop:
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def record(self, record: dict) -> None:
        if record["kind"] == "step" and record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def learned(base, tmp_path_factory):
    """Rung 0, by the command: sixteen steps."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    options = f"--steps 16 --form text --max-new-tokens 6 --lr 2e-3 --held-out 16 --evaluate-every 8 --from {base}"
    begun = ["rl", str(folder), *options.split(), "--task", "tags,documents=1280"]
    assert main([*begun, "--variant", "deepseek-math", "--grpo.beta", "0"]) == 0
    return folder


def test_a_format_is_learned(learned, capsys):
    """From a base that rarely keeps the form to one that does."""
    steps, (first, _, last) = records(learned, "step"), records(learned, "evaluation")
    assert [s["step"] for s in steps] == list(range(1, 17))
    assert first["step"] == 0
    assert first["format"] < 0.3
    assert last["format"] > 0.9
    assert steps[0]["rewards"]["format"] < 0.3
    assert last["pass_at_1"] == last["format"] == pytest.approx(1 - last["wrong"])
    assert last["pass_at_k"] >= last["maj_at_k"] >= 0.9
    assert {"reward", "silent", "clipped_low", "clipped_high", "kl", "entropy", "truncated", "masked"} <= set(steps[0])
    exported = {path.name for path in (learned / "checkpoint").iterdir()}
    assert {"model.safetensors", "tokenizer.json"} <= exported
    run = read_run(learned)
    assert [len(draw(run, "step").axes) for draw in (rewards_picture, policy_picture)] == [4, 4]
    # Of other settings it is another run; with one more step it is extended.
    assert main(["rl", str(learned), "--resume", "--group", "8"]) == 1
    assert "begun with rl.group = 16, not 8" in capsys.readouterr().err
    assert main(["rl", str(learned), "--resume", "--steps", "17"]) == 0
    assert records(learned, "step")[-1]["step"] == 17
    assert "pass@1" in capsys.readouterr().out


def test_an_update_drops_what_older_weights_have_computed(learned):
    """Every rollout is of the weights that it teaches, prompts included: no cache of one before is used again."""
    steps = records(learned, "step")
    assert all(s["grad_norm"] > 0 for s in steps[1:8])
    assert all(abs(s["mismatch"]) < 1e-6 for s in steps)


def test_rollout_and_training_are_of_one_mode(learned):
    """Nothing is dropped or drawn in either forward pass: ratios are 1 before an update."""
    assert all(abs(s["ratio"] - 1) < 1e-5 for s in records(learned, "step"))


def test_router_biases_stay(learned):
    steps = records(learned, "step")
    assert all(s["bias_speed"] == 0 and s["bias"] == steps[0]["bias"] for s in steps)


def test_a_resumed_run_is_bit_equal_with_its_rollouts(base, tmp_path):
    """With two updates a rollout, which weights of a step before have written."""
    recipe = replace(RECIPE, steps=4, inner=2, stale=1, evaluate_every=4)
    for name, view in (("whole", None), ("parts", Stop(2))):
        result = improve(base, TASK, tmp_path / name, recipe=recipe, grpo=FORM, view=view)
    assert (result.interrupted, result.steps) == ("SIGINT", 2)
    improve(base, TASK, tmp_path / "parts", recipe=recipe, grpo=FORM, resume=True)
    found = []
    for name in ("whole", "parts"):
        folder = tmp_path / name / "checkpoints" / "4"
        leaves = read_record(folder)["leaves"]
        assert any(leaf.startswith("old.0.") for leaf in leaves)
        shapes = {name: jax.ShapeDtypeStruct(*spec[::-1]) for name, spec in leaves.items()}
        found.append(read_leaves(folder, shapes))
    jax.tree.map(np.testing.assert_array_equal, *found)
    whole, parts = (records(tmp_path / name, "step") for name in ("whole", "parts"))
    timed = {"minutes", "tokens_per_second", "data_wait"}
    assert [{k: v for k, v in s.items() if k not in timed} for s in whole] == [
        {k: v for k, v in s.items() if k not in timed} for s in parts
    ]
    # Off-policy: the first rollout's second update, and every later one.
    assert all(s["mismatch"] > 1e-6 for s in whole)


def test_what_does_not_fit_is_refused_before_anything_is_written(base, tmp_path, capsys):
    def refused(*arguments) -> str:
        assert main(["rl", *arguments]) == 1
        return capsys.readouterr().err

    out = str(tmp_path / "run")
    assert "name it with --from" in refused(out)
    assert "no variant 'r2'" in refused(out, "--variant", "r2")
    assert "no task" in refused(out, "--from", str(base), "--task", "chess")
    assert "whole groups of 16" in refused(out, "--from", str(base), "--micro-rows", "24")
    assert "in no language" in refused(out, "--from", str(base), "--rewards.language", "1")
    assert "exceed the model's max_length" in refused(out, "--from", str(base), "--max-new-tokens", "300")
    assert "leave OUT, --resume and --pipeline out" in refused(out, "--traces", str(tmp_path / "t"))
    assert "needs a folder" in refused("--pipeline", "--from", str(base))
    assert "belong to --pipeline" in refused(out, "--from", str(base), "--stages.sft-epochs", "2")
    led = (out, "--pipeline", "--from", str(base))
    assert "ask in chats, not as 'text'" in refused(*led, "--form", "text")
    assert "put as r1-zero" in refused(*led, "--task", "tags")
    assert "adapters must be merged" in refused(*led, "--lora.rank", "2", "--lora.no-merge")
    assert not any(tmp_path.iterdir())
    for wrong, said in (
        ({"temperature": 0.0}, "greedy"),
        ({"steps": 0}, "at least 1"),
        ({"form": "poem"}, "must be one of chat, text"),
        ({"rewards": Rewards(0, 0, 1), "stale": -1}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            RlRecipe(**wrong)
    with pytest.raises(ValueError, match="all rewards weigh 0"):
        Rewards(0, 0, 0)


@pytest.mark.slow
def test_adapters_learn_by_v32s_form(base, tmp_path):
    """With all its parts, from older weights: experts and kept sets replayed, a KL to the checkpoint, whose weights
    keep their bytes."""
    recipe = replace(RECIPE, steps=3, prompts=4, top_p=0.9, stale=1, evaluate_every=3)
    lora, form = LoRA(rank=2, merge=False), replace(V32, beta=0.1, truncated="mask")
    result = improve(base, TASK, tmp_path / "run", recipe=recipe, grpo=form, lora=lora)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in result.checkpoint.iterdir()}
    first, second, third = records(tmp_path / "run", "step")
    assert abs(first["mismatch"]) < 1e-6
    assert abs(first["kl"]) < 1e-6
    assert "load" not in first
    # The second rollout was written by the first weights too.
    assert min(second["mismatch"], third["mismatch"], second["kl"]) > 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill-qwen", "v3.2"])
def test_other_architectures_learn(base, tmp_path, name):
    """Dense, and with an indexer."""
    words = dsj.load_tokenizer(base)
    cfg = replace(ARCHITECTURES[name], vocab_size=words.vocab_size)
    dsj.save_pretrained(random_model(cfg), tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, tmp_path / "base")
    recipe = replace(RECIPE, steps=2, prompts=2, group=4, held_out=2, attempts=4)
    improve(tmp_path / "base", TASK, tmp_path / "run", recipe=recipe, grpo=replace(MATH, beta=0.0))
    assert all(abs(s["mismatch"]) < 1e-5 for s in records(tmp_path / "run", "step"))


@pytest.mark.slow
def test_a_student_learns_from_a_teacher(base, learned, tmp_path, capsys):
    """By its distribution on what the student writes, and by the answers of its own that are right."""
    options = (
        f"--form text --max-new-tokens 6 --held-out 16 --evaluate-every 12 --task tags,documents=1280 --from {base}"
    )
    begun = [*options.split(), "--teacher", str(learned / "checkpoint")]
    run = str(tmp_path / "kl")
    assert main(["distill", run, *begun, "--how", "reverse-kl", "--steps", "12", "--lr", "2e-3"]) == 0
    first, last = records(tmp_path / "kl", "evaluation")
    assert first["format"] < 0.3
    assert last["format"] > 0.9
    steps = records(tmp_path / "kl", "step")
    assert steps[-1]["reverse_kl"] < 0.2 * steps[0]["reverse_kl"]
    assert main(["distill", run, "--resume", "--how", "grpo"]) == 1
    assert "begun with --how reverse-kl" in capsys.readouterr().err
    words = dsj.load_tokenizer(base)
    assert words.has_template
    sft = ["distill", str(tmp_path / "sft"), *begun, "--how", "sft", "--steps", "4", "--lr", "3e-3", "--epochs", "2"]
    assert main(sft) == 0
    kept = [json.loads(line) for line in (tmp_path / "sft-traces/traces.jsonl").read_text().splitlines()]
    assert len(kept) > 20
    assert {chat["messages"][1]["content"] for chat in kept} == {"<think></think><answer></answer>"}
    # By rewards alone, for comparison: no teacher is needed.
    alone = ["distill", str(tmp_path / "grpo"), *options.split(), "--how", "grpo", "--steps", "4", "--lr", "2e-3"]
    assert main(alone) == 0
    rewarded = records(tmp_path / "grpo", "step")
    assert "reverse_kl" not in rewarded[0]
    assert rewarded[-1]["rewards"]["format"] > rewarded[0]["rewards"]["format"]
    own = ["rl", "--traces", str(tmp_path / "own"), "--steps", "2", "--keep", "2", *options.split()]
    assert main([*own, "--from", str(learned / "checkpoint")]) == 0
    assert "problems of tags" in capsys.readouterr().out
    before, *_, after = records(tmp_path / "sft", "evaluation")
    assert after["bits_per_byte"] < 0.5 * before["bits_per_byte"]
