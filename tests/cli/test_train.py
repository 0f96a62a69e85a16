"""The train command: recipes scaled and overridden, signals, resuming after any kill, errors in one line."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_config

from deepseek_jax.cli.main import main
from deepseek_jax.cli.train import HELD, Train
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.convert.training import read_record
from deepseek_jax.runs.checkpoint import Checkpoints
from deepseek_jax.train.recipes import recipe
from deepseek_jax.train.scaling import scaled

# What is compiled is what tests/runs/test_run.py compiles.
SIZES = [
    *("--length", "32", "--batch-rows", "4", "--first-rows", "2", "--micro-rows", "2", "--ramp-tokens", "150"),
    *("--optimizer.no-muon", "--optimizer.moments", "bfloat16"),
    *("--ema-decay", "0.9", "--log-every", "1", "--save-every", "3", "--vocab-size", "280", "--held-out-share", "0.2"),
]
TIMES = ("minutes", "tokens_per_second", "mfu", "data_wait")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "config.json").write_text(json.dumps(config_to_json(tiny_config())))
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "def", "(x)", "+ 1"]
    for i in range(12):
        lines = [" ".join(rng.choice(words, 8)) for _ in range(40)]
        (folder / "text" / f"part{i}.txt").write_text("\n".join(lines))
    return ["--model", str(folder / "config.json"), "--data", str(folder / "text"), *SIZES]


def parsed(*words):
    import tyro

    def parse(words, **default):
        return tyro.cli(Train, args=words, **default)

    return parse(list(words), default=Train.defaults(list(words), parse))


def test_a_recipe_is_scaled_and_then_overridden():
    assert parsed().recipe == recipe("tiny")
    v3 = recipe("deepseek-v3")
    assert parsed("--recipe", "deepseek-v3").recipe == v3
    small = parsed("--recipe=deepseek-v3", "--tokens", "1000000", "--length=512", "--rate.peak", "0.5").recipe
    expected = scaled(v3, 1_000_000, length=512)
    assert small.rate.peak == 0.5
    assert (small.tokens, small.length, small.batch_rows) == (1_000_000, 512, expected.batch_rows)
    assert (small.bias_until, small.rate.decay_from) == (expected.bias_until, expected.rate.decay_from)
    # Every spelling that the parser takes is one that scales.
    assert parsed("--tokens", "1_000_000", "--batch_rows=8").recipe == scaled(recipe("tiny"), 1_000_000, batch_rows=8)
    assert parsed("--fim-rate", "0.5", "--data", "a=x@2", "--data", "b=y@1").text.data == ("a=x@2", "b=y@1")


def test_help_shows_the_recipes_numbers(capsys):
    assert main(["train", "--recipe", "deepseek-v3", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("--rate.peak", "0.00022", "15360", "--optimizer.muon", "--weights.balance", "--export {weights,ema}"):
        assert words in shown
    assert shown.count("--fim-rate") == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--recipe", "v9"], "there is no recipe 'v9'; choose one of tiny"),
        (["--resume"], "--resume needs the folder of the run"),
        (["nowhere", "--resume"], "nowhere holds no run to resume"),
        (["out", "--data", "nowhere"], "nowhere"),
        (["out", "--model", "no-such-model"], "no-such-model"),
        (["out", "--from", "no-such-checkpoint"], "no-such-checkpoint"),
        (["out", "--from", "no-such-checkpoint", "--model", "tiny-v3"], "--model does not go with --from"),
        (["out", "--from=no-such-checkpoint", "--tokenizer=words"], "--tokenizer does not go with --from"),
        (["out", "--from", "no-such-checkpoint", "--vocab_size", "2048"], "--vocab-size does not go with --from"),
        (["out", "--recipe", "loss-free-1b"], "--model takes the recipe loss-free-1b to another"),
        (["out", "--keep-last", "0"], "keep_last must be at least 1"),
        (["out", "--length", "0"], "length must be at least 3 tokens, not 0"),
        (["/dev/null/out"], "/dev/null/out"),
        (["out", "--json", "missing/result.json"], "missing"),
        (["out", "--mesh", "fsdp=3"], "fsdp=3 x expert=1 x tensor=1 x context=1 does not make up 1 devices"),
        (["out", "--mesh", "rows=2"], "'rows=2' is not AXIS=SIZE"),
        (["out", "--mesh", "fsdp=-1", "--layout", "fast"], "there is no layout 'fast'"),
        (["out", "--layout", "fsdp"], "--layout lays a model out on a mesh"),
        (["out", "--coordinator", "auto"], "the processes do not find each other"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) in (1, 2)
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_resumed_by_another_recipe(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"arguments": [str(tmp_path), "--tokens", "100000"]}))
    assert main(["train", str(tmp_path), "--resume", "--recipe", "deepseek-v3"]) == 1
    assert "was begun with the recipe tiny, not deepseek-v3" in capsys.readouterr().err


def test_a_resumed_run_has_its_own_options_and_what_extended_it(tmp_path, capsys):
    begun = {"arguments": [str(tmp_path), "--tokens", "100000", "--from", "ckpt"]}
    (tmp_path / "run.json").write_text(json.dumps(begun))
    assert parsed(str(tmp_path), "--resume").recipe == scaled(recipe("tiny"), 100_000)
    longer = parsed(str(tmp_path), "--resume", "--tokens", "200000").recipe
    assert longer == replace(scaled(recipe("tiny"), 100_000), tokens=200_000)  # the schedule stays where it was
    extended = [["recipe.tokens", 100_000, 150_000], ["recipe.tokens", 150_000, 200_000], ["epochs", 1, 2.5]]
    (tmp_path / "run.json").write_text(json.dumps({**begun, "extended": extended}))
    resumed = parsed(str(tmp_path), "--resume")
    assert (resumed.recipe, resumed.epochs) == (longer, 2.5)
    assert main(["train", str(tmp_path), "--resume", "--model", "tiny-v3"]) == 1
    assert "--model does not go with --from" in capsys.readouterr().err


def started(folder, *words):
    command = [sys.executable, "-m", "deepseek_jax.cli.main", "train", str(folder), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def records(folder, kind):
    path, found = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # being written
            continue
        if record["kind"] == kind:
            found.append({k: v for k, v in record.items() if k not in TIMES})
    return found


def until_step(process, folder, step) -> None:
    """Waits for a step's record; the process may end before."""
    while process.poll() is None and not any(r["step"] >= step for r in records(folder, "step")):
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_saves_and_resume_takes_the_runs_own_options(arguments, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    process = started(folder, "--tokens", "4000", *arguments, "--evaluate-every", "40")
    until_step(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert (process.returncode, error) == (143, f"deepseek-jax train: {HELD}\n")
    (event,) = [r for r in records(folder, "event") if r["event"] == "interrupted"]
    assert "SIGTERM" in event["message"]
    stopped_at = int(Checkpoints(folder / "checkpoints").newest().name)
    assert 2 <= stopped_at == records(folder, "step")[-1]["step"]

    assert main(["train", str(folder), "--resume", "--rate.peak", "1"]) == 1
    assert "begun with recipe.rate.peak = 0.006, not 1.0" in capsys.readouterr().err
    assert main(["train", str(folder), *arguments]) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(["train", str(folder), "--resume", "--json", str(tmp_path / "result.json")]) == 0
    assert f"{folder}: " in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["tokens"] >= 4000
    assert [r["step"] for r in records(folder, "step")] == list(range(1, result["steps"] + 1))
    assert (folder / "checkpoint" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_run_killed_at_random_steps_ends_bit_equal(arguments, tmp_path):
    """SIGKILL, many times, also before the first checkpoint and while one is written."""
    words = ["--tokens", "4500", *arguments, "--evaluate-every", "12", "--keep-last", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = started(whole, *words)
    assert process.communicate()[1] == ""
    steps = records(whole, "step")[-1]["step"]
    rng, reached, kills = random.Random(0), 0, 0
    while True:
        process = started(killed, *(words if not (killed / "run.json").exists() else ["--resume"]))
        if kills < 2:  # before anything is recorded
            while process.poll() is None and not (killed / ("metrics.jsonl" if kills else "run.json")).exists():
                time.sleep(0.001)
        else:
            until_step(process, killed, reached + rng.randrange(1, 12))
            time.sleep(rng.random() * 0.1)
        process.kill()
        assert process.communicate()[1] == ""
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        reached = max((r["step"] for r in records(killed, "step")), default=0)
    assert kills >= 5
    assert reached <= steps
    for kind in ("run", "step", "evaluation"):
        assert records(killed, kind) == records(whole, kind)
    assert last_arrays(killed) == last_arrays(whole)


def last_arrays(folder):
    """Every array and counter of the last checkpoint; files differ, for Orbax names them anew."""
    from deepseek_jax.convert.training import read_leaves

    step = Checkpoints(folder / "checkpoints").newest()
    record = read_record(step)
    shapes = {name: jax_shape(*spec) for name, spec in record["leaves"].items()}
    arrays = {name: np.asarray(a).tobytes() for name, a in read_leaves(step, shapes).items()}
    extra = {k: v for k, v in record["extra"].items() if k not in ("minutes", "crossed_at")}
    return step.name, arrays, record["data_state"], extra


def jax_shape(dtype, shape):
    import jax
    import jax.numpy as jnp

    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def test_any_field_of_the_architecture_is_an_option(capsys):
    """In the project's own names, with the values of --model as defaults."""
    changed = parsed("--model", "tiny-v3", "--cfg.moe.top-k", "2", "--cfg.attention.rope.theta", "5e4").cfg
    base = zoo("tiny-v3")
    rope = replace(base.attention.rope, theta=5e4)
    assert changed == replace(base, moe=replace(base.moe, top_k=2), attention=replace(base.attention, rope=rope))
    assert parsed().cfg == base
    # A model without YaRN gets one by its fields.
    yarn = parsed("--model", "moonlight-16b", "--cfg.attention.rope.yarn.factor", "8").cfg.attention.rope.yarn
    assert (yarn.factor, yarn.original_length) == (8.0, 8192)
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("--cfg.moe.top-k INT (default: 4)", "--cfg.attention.rope.yarn.factor", "--cfg.n-dense-layers"):
        assert words in shown


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--cfg.moe.topk", "2"], "Unrecognized options: --cfg.moe.topk"),
        (["--cfg.moe.topk", "2"], "Perhaps you meant --cfg.moe.top-k"),
        (["--cfg.moe.top-k", "2.5"], "--cfg.moe.top-k: invalid literal for int"),
        (["--cfg.moe.top-k", "200"], "top_k=200 exceeds the 8 experts that top_groups=2 of n_groups=4 offer"),
        (["--cfg.vocab-size", "300"], "--cfg.vocab-size: a model has its tokenizer's vocabulary"),
        (["--cfg.init-std", "1"], "--cfg.init-std: fresh weights have the recipe's deviation; give --init-std"),
        (["--model", "nowhere", "--cfg.dim", "1"], "there is no model 'nowhere'"),
    ],
)
def test_a_field_that_is_none_is_one_line(tmp_path, monkeypatch, capsys, words, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "out", *words]) in (1, 2)
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ablations_of_a_run_and_of_a_checkpoint(arguments, tmp_path, capsys):
    """--cfg trains another architecture, which run.json has; with --from the weights that fit are kept."""
    words = ["--tokens", "600", *arguments]
    assert main(["train", str(tmp_path / "a"), *words, "--cfg.moe.top-k", "1"]) == 0
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (about["model"]["moe"]["top_k"], about["settings"]["model"]["moe"]["top_k"]) == (1, 1)
    assert main(["train", str(tmp_path / "a"), "--resume", "--cfg.moe.top-k", "2"]) == 1
    assert "begun with model.moe.top_k = 1, not 2" in capsys.readouterr().err
    # Neither the vocabulary nor the model is named again: they are the checkpoint's.
    model, size = arguments.index("--model"), arguments.index("--vocab-size")
    rest = [w for i, w in enumerate(arguments) if i not in (model, model + 1, size, size + 1)]
    source = ["--from", str(tmp_path / "a" / "checkpoint"), "--tokens", "600", *rest]
    assert main(["train", str(tmp_path / "b"), *source, "--cfg.n-layers", "4", "--cfg.mtp-depth", "0"]) == 0
    said = capsys.readouterr().err
    assert "note: checkpoint under another config: left out mtp.0." in said
    assert "drawn anew layers.3." in said
    exported = json.loads((tmp_path / "b" / "checkpoint" / "config.json").read_text())
    assert (exported["num_hidden_layers"], exported["num_experts_per_tok"]) == (4, 1)
