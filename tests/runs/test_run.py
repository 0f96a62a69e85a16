"""Whole runs on a little text: files, figures, resuming bit for bit, damage, guards, interruption."""

import json
import math
import os
import shutil
import signal
import threading
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

import deepseek_jax as dsj
from deepseek_jax.cli.main import main
from deepseek_jax.convert.layers import RECORD
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.training import read_leaves, read_record, write_record
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.core.params import named
from deepseek_jax.data.config import DataConfig
from deepseek_jax.runs import reading
from deepseek_jax.runs import run as run_module
from deepseek_jax.runs.checkpoint import Checkpoints
from deepseek_jax.runs.guards import FEWEST, Skips, Spikes, TrainingStopped, fault
from deepseek_jax.runs.journal import Progress, progress_damage
from deepseek_jax.runs.metrics import JsonLines, Reporters, TextLog
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import check_fit
from deepseek_jax.runs.pretrain import train
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.runs.signals import StopSignals
from deepseek_jax.runs.trainer import Journal, Throughput, Trainer
from deepseek_jax.train.begin import fresh
from deepseek_jax.train.recipe import LearningRate, Optimizer, Recipe
from deepseek_jax.train.weights import LossWeights

CFG = tiny_config()
# Batches of 2, then of 4 rows: 6 steps, of which the last 3 take two micro-batches.
RECIPE = Recipe(
    model="tiny",
    tokens=576,
    length=32,
    batch_rows=4,
    first_rows=2,
    micro_rows=2,
    ramp_tokens=150,
    init_std=0.03,
    fim_rate=0.3,
    dtype="float32",
    rate=LearningRate(peak=6e-3, warmup_steps=2, decay_from=None, drops=()),
    optimizer=Optimizer(),
    mtp_change=None,
    bias_until=None,
    ema_decay=0.9,
    evaluate_every=4,
    log_every=1,
)
OPTIONS = Options(save_every=2, keep_last=9)
VOCABULARY = 280
SHOWN = {
    *("loss", "main", "mtp", "balance", "targets", "grad_norm", "gradient_norms", "activation_norm"),
    *("load", "max_violation", "routing_entropy", "bias", "bias_min", "bias_max", "dropped", "skipped"),
    *("lr", "bias_speed", "mtp_weight", "batch_rows"),
}
TIMES = ("minutes", "tokens_per_second", "mfu", "data_wait")


class Lines:
    """A reporter that calls back."""

    def __init__(self, on_step=lambda step: None):
        self.on_step = on_step

    def record(self, record) -> None:
        if record["kind"] == "step":
            self.on_step(record["step"])

    def say(self, line) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "def", "(x)", "+ 1"]
    for i in range(12):
        lines = [" ".join(rng.choice(words, 8)) for _ in range(40)]
        (folder / f"part{i}.txt").write_text("\n".join(lines))
    return DataConfig(data=(str(folder),), held_out_share=0.2)


def go(text, folder, **changes):
    return train(CFG, RECIPE, text, VOCABULARY, folder, **{"options": OPTIONS, **changes})


@pytest.fixture(scope="module", autouse=True)
def step():
    """The step of all runs here: tracing it again for each is most of their time."""
    made, begin = [], reading.begin

    def shared(*args):
        state, step = begin(*args)
        made.append(step)
        return state, made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "begin", shared)
        yield lambda: made[0]


@pytest.fixture(scope="module")
def run(text, tmp_path_factory, step):
    """A run that was never stopped, and how often its step was compiled."""
    folder = tmp_path_factory.mktemp("run") / "first"
    result = go(text, folder)
    return result, folder, step()._cache_size()


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in r.items() if k not in TIMES} for r in map(json.loads, lines) if r["kind"] == kind]


def final_state(folder):
    """Every array of a run's last checkpoint, with what the host counted."""
    step = Checkpoints(folder / "checkpoints").steps()[-1]
    record = json.loads((folder / "checkpoints" / str(step) / "deepseek_jax.json").read_text())
    shapes = {n: jax.ShapeDtypeStruct(s, np.dtype(d)) for n, (d, s) in record["leaves"].items()}
    leaves = read_leaves(folder / "checkpoints" / str(step), shapes)
    extra = {k: v for k, v in record["extra"].items() if k not in ("minutes", "crossed_at")}
    return {n: np.asarray(a).tobytes() for n, a in leaves.items()}, extra, record["data_state"]


def assert_same_run(folder, reference):
    for kind in ("run", "step", "evaluation"):
        assert records(folder, kind) == records(reference, kind), kind
    (arrays, extra, data), (arrays_, extra_, data_) = final_state(folder), final_state(reference)
    assert [name for name in arrays_ if arrays.get(name) != arrays_[name]] == []
    assert (sorted(arrays), extra, data) == (sorted(arrays_), extra_, data_)


def test_a_run_says_what_it_did(run):
    result, folder, _ = run
    described = json.loads((folder / "run.json").read_text())
    assert {"commit", "date", "machine", "host", "recipe"} <= described.keys()
    log = (folder / "train.log").read_text()
    assert '"host": ' in log
    assert f"recipe {json.dumps(described['recipe'])}" in log
    assert described["deepseek_jax"] == dsj.__version__
    assert described["model"]["vocab_size"] == VOCABULARY
    assert records(folder, "run")[0]["deepseek_jax"] == dsj.__version__
    steps = records(folder, "step")
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["batch_rows"] for r in steps] == [2, 2, 2, 4, 4, 4]
    assert [r["tokens"] for r in steps] == [64, 128, 192, 320, 448, 576]
    assert steps[0].keys() >= SHOWN
    assert described["data"]["fim_rate"] == RECIPE.fim_rate
    evaluations = records(folder, "evaluation")
    assert [r["step"] for r in evaluations] == [4, 6]
    saved = [read_record(folder / "checkpoints" / n)["metric"] for n in "246"]
    assert saved == [None, *(e["bits_per_byte"] for e in evaluations)]
    assert (result.steps, result.tokens, result.interrupted) == (6, 576, None)
    assert (result.model_bits, result.ema_bits) == tuple(
        evaluations[-1][name] for name in ("bits_per_byte", "ema_bits_per_byte")
    )
    assert "exported" in (folder / "train.log").read_text()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_the_step_compiles_once_whatever_the_batch(run):
    assert run[2] == 1


def test_the_export_is_the_model_that_was_measured(run):
    result = run[0]
    model = dsj.load_pretrained(result.checkpoint, dtype=np.float32)
    assert model.cfg.vocab_size == dsj.load_tokenizer(result.checkpoint).vocab_size == VOCABULARY
    # Stored as it is computed in; a leaf written to the wrong place would move it by much.
    assert abs(result.stored_bits - result.model_bits) < 0.01 * result.model_bits
    config = json.loads((result.checkpoint / "config.json").read_text())
    assert (config["torch_dtype"], "quantization_config" in config) == (RECIPE.dtype, False)


def test_a_checkpoint_is_a_model_with_its_tokenizer(run):
    folder = run[1] / "checkpoints" / "6"
    assert dsj.load_tokenizer(folder).vocab_size == VOCABULARY
    stored = dsj.load_pretrained(run[0].checkpoint, dtype=np.float32)
    for a, b in zip(jax.tree.leaves(dsj.load_pretrained(folder, dtype=None)), jax.tree.leaves(stored), strict=True):
        np.testing.assert_allclose(a, b, atol=0.07 * float(jnp.abs(a).max()))


def test_a_checkpoint_is_written_in_the_published_layout(run, tmp_path, capsys):
    """`convert RUN/checkpoints/STEP`: the weights themselves with their tokenizer, in any dtype."""
    step = run[1] / "checkpoints" / "6"
    assert main(["convert", str(step), str(tmp_path / "a")]) == 0
    ours, theirs = (jax.tree.leaves(dsj.load_pretrained(folder, dtype=None)) for folder in (tmp_path / "a", step))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert dsj.load_tokenizer(tmp_path / "a").vocab_size == VOCABULARY
    assert main(["convert", str(step), str(tmp_path / "b"), "--dtype", "fp8", "--json", str(tmp_path / "r")]) == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert json.loads((tmp_path / "r").read_text())["conversion"]["layout"] == "published"
    capsys.readouterr()
    assert main(["convert", str(step), "--dry-run"]) == 2
    assert "a run's checkpoint is neither" in capsys.readouterr().err


def test_a_run_that_is_stopped_again_and_again_ends_bit_equal(run, text, tmp_path, monkeypatch, step):
    """Before its first step, by Ctrl-C, which exports, and by SIGTERM, which only saves."""
    folder = tmp_path / "run"

    class Early(StopSignals):
        def __enter__(self):
            super().__enter__().asked = "SIGINT"
            return self

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "StopSignals", Early)
        result = go(text, folder)
    assert (result.steps, result.interrupted, result.checkpoint) == (0, "SIGINT", None)
    (folder / "metrics.jsonl").write_text('{"kind": "ru')  # as a kill may leave it
    fresh = dsj.load_pretrained(folder / "checkpoints" / "0", dtype=None)
    assert float(fresh.stacks[1].ffn.gate_up.get_value().std()) == pytest.approx(RECIPE.init_std, rel=0.05)

    def press(number, at):
        return Lines(lambda step: os.kill(os.getpid(), number) if step == at else None)

    result = go(text, folder, view=press(signal.SIGINT, 1), resume=True)
    assert (result.steps, result.interrupted) == (1, "SIGINT")
    assert dsj.load_pretrained(result.checkpoint).cfg.n_layers == CFG.n_layers
    result = go(text, folder, view=press(signal.SIGTERM, 5), resume=True)
    assert (result.steps, result.interrupted, result.checkpoint) == (5, "SIGTERM", None)
    result = go(text, folder, resume=True)
    assert (result.steps, result.interrupted) == (6, None)
    assert result.stored_bits == run[0].stored_bits
    assert_same_run(folder, run[1])
    assert [r["event"] for r in records(folder, "event")].count("resumed") == 3
    assert go(text, folder, resume=True).model_bits == run[0].model_bits  # one that has ended ends again
    assert_same_run(folder, run[1])
    assert step()._cache_size() == 1  # what is restored runs the same program


def test_a_run_falls_back_over_a_damaged_checkpoint(run, text, tmp_path):
    """What the steps after the older one had recorded is not there twice."""
    folder = tmp_path / "run"
    view = Lines(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None)
    go(text, folder, view=view)
    part = next((folder / "checkpoints" / "5" / "state" / "d").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    record = read_record(folder / "checkpoints" / "4")
    (folder / "checkpoints" / "4" / RECORD).unlink()
    write_record(folder / "checkpoints" / "4", {**record, "data_state": {**record["data_state"], "rows": None}})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    go(text, folder, resume=True, options=replace(OPTIONS, tensorboard=True))
    assert list((folder / "tensorboard").iterdir())
    assert_same_run(folder, run[1])
    events = [r["message"] for r in records(folder, "event") if r["event"] == "damaged"]
    assert part.name in events[0]
    assert "checkpoints/4 is damaged: rows is None" in events[1]
    assert (folder / "checkpoints" / "damaged" / "5").is_dir()


def test_a_run_is_extended(run, text, tmp_path):
    """Where its schedule is the same up to there it ends as one that was begun with the longer recipe."""
    folder = tmp_path / "run"
    short = replace(RECIPE, tokens=320)
    train(CFG, short, text, VOCABULARY, folder, options=OPTIONS)
    go(text, folder, resume=True)
    assert_same_run(folder, run[1])
    described = json.loads((folder / "run.json").read_text())
    assert described["extended"] == [["recipe.tokens", 320, 576]]
    with pytest.raises(ValueError, match=r"begun with recipe\.tokens = 576, not 320"):
        train(CFG, short, text, VOCABULARY, folder, options=OPTIONS, resume=True)


def test_a_run_whose_folder_vanishes_says_so(text, tmp_path):
    folder = tmp_path / "run"
    view = Lines(lambda step: shutil.rmtree(folder) if step == 1 else None)
    with pytest.raises(OSError, match=r"the run's folder .*/run is gone"):
        go(text, folder, view=view)
    assert not folder.exists()


def test_what_a_checkpoint_counts_is_checked():
    whole = json.loads(json.dumps(asdict(Progress(step=3, data_state={"rows": 6}, recent_losses=[1.5]))))
    assert progress_damage(whole, 3) is None
    assert "of step 3" in progress_damage(whole, 4)
    for name in whole:
        assert name in progress_damage({k: v for k, v in whole.items() if k != name}, 3)
        assert name in progress_damage({**whole, name: "text"}, 3)
    assert "unknown more" in progress_damage({**whole, "more": 1}, 3)
    assert progress_damage({**whole, "recent_losses": [None]}, 3)
    assert progress_damage({**whole, "evaluation": {}}, 3)
    assert progress_damage(None, 3)


def test_a_runs_folder_is_not_a_model(run):
    with pytest.raises(CheckpointError, match=r"is a training run: its model is in .*/checkpoint, "):
        dsj.load_pretrained(run[1])


def test_what_differs_from_the_run_is_named(run, text):
    folder, before = run[1], (run[1] / "metrics.jsonl").read_bytes()
    other = replace(RECIPE, rate=replace(RECIPE.rate, peak=0.1))
    with pytest.raises(ValueError, match=r"begun with recipe\.rate\.peak = 0\.006, not 0\.1"):
        train(CFG, other, text, VOCABULARY, folder, resume=True)
    with pytest.raises(ValueError, match=r"begun with text\.held_out_share = 0\.2, not 0\.05"):
        train(CFG, RECIPE, replace(text, held_out_share=0.05), VOCABULARY, folder, resume=True)
    with pytest.raises(ValueError, match=r"model\.n_layers = 3, not 4"):
        train(replace(CFG, n_layers=4), RECIPE, text, VOCABULARY, folder, resume=True)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        go(text, folder / "checkpoints", resume=True)
    with pytest.raises(FileExistsError, match="--resume"):
        go(text, folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_one_process_at_a_time(run):
    settings = json.loads((run[1] / "run.json").read_text())["settings"]
    with (
        RunFolder.opened(run[1], settings, {}, resume=True),
        pytest.raises(ValueError, match="in use by another process"),
        RunFolder.opened(run[1], settings, {}, resume=True),
    ):
        pass


def test_steps_that_are_not_finite_stop_the_run(text, tmp_path, monkeypatch):
    """The last good checkpoint is named and is the state before them."""
    begin = reading.begin

    def broken(*args):
        state, step = begin(*args)

        def bad(state, batch, knobs):
            if int(state.step) >= 2:
                knobs = replace(knobs, mtp_weight=np.float32(np.nan))
            return step(state, batch, knobs)

        return state, bad

    monkeypatch.setattr(reading, "begin", broken)
    recipe = replace(RECIPE, max_skipped=3)
    with pytest.raises(TrainingStopped, match=r"3 steps in a row.*step 5, the loss is nan\..*checkpoints/4"):
        train(CFG, recipe, text, VOCABULARY, tmp_path / "run", options=OPTIONS)
    skipped = [r for r in records(tmp_path / "run", "event") if r["event"] == "skipped"]
    assert [(r["step"], r["message"]) for r in skipped] == [
        (2 + i, f"the loss is nan; {i} of 3 in a row") for i in (1, 2, 3)
    ]
    two, four = (dsj.load_pretrained(tmp_path / "run" / "checkpoints" / n, dtype=None) for n in "24")
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(*map(jax.tree.leaves, (two, four)), strict=True))


def test_a_skipped_steps_cause_is_named_and_the_advice_fits_it():
    names = {"gradient": ["embed", "layers.0.attn.o"], "update": ["embed", "layers.0.attn.o"]}

    def cause(nats=2.0, norm=1.0, **at):
        at = {"loss": False, "gradient": -1, "update": -1, **at}
        return fault({"loss": nats, "grad_norm": norm, "skipped": 1, "fault": at}, lambda: names)

    # What comes first in a step is what the rest follows from.
    loss = cause(float("inf"), float("nan"), loss=True, gradient=0, update=0)
    assert (loss.what, "the text" in loss.advice) == ("the loss is inf", True)
    assert "the gradient of layers.0.attn.o is not finite" in cause(norm=float("nan"), gradient=1, update=0).what
    assert "the gradient's norm is not finite" in cause(norm=float("inf")).what
    update = cause(update=1)
    assert "the update of layers.0.attn.o is not finite" in update.what
    assert "the text is not the cause" in update.advice


def test_spikes_and_skips():
    spikes = Spikes()
    rng = np.random.default_rng(0)
    losses = 3 + 0.1 * rng.normal(size=FEWEST)
    assert [spikes.see(x) for x in (9.0, *losses[1:])] == [None] * FEWEST  # too few to judge the first by
    spikes = Spikes(losses)
    assert spikes.see(float(losses.mean() + 4.9 * losses.std())) is None
    spikes = Spikes(losses)
    assert f"the last {FEWEST} steps" in spikes.see(float(losses.mean() + 5.1 * losses.std()))
    assert spikes.see(float("nan")) is None
    assert len(spikes.recent) == FEWEST + 1
    skips = Skips(2)
    assert [skips.see(x) for x in (True, False, True, True)] == [False, False, False, True]
    assert (skips.in_a_row, skips.total) == (2, 3)


def test_figures_that_are_not_finite_stop_no_save(tmp_path):
    found = {"bits_per_byte": math.nan, "ema_bits_per_byte": math.inf, "trigram_bits_per_byte": 3.0}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    trainer = Trainer(
        {"a": jnp.ones(2)},
        None,
        None,
        lambda state, progress: found,
        "bits_per_byte",
        recipe=RECIPE,
        options=Options(export="ema"),
        checkpoints=checkpoints,
        journal=Journal(Reporters([JsonLines(tmp_path / "metrics.jsonl"), TextLog(tmp_path / "log")]), 0.0),
        throughput=Throughput(1.0, None),
        progress=Progress(step=4, data_state={}),
    )
    trainer.evaluate()
    trainer.save()
    checkpoints.close()
    record = read_record(tmp_path / "checkpoints/4")
    assert record["metric"] is None
    assert record["extra"]["evaluation"]["bits_per_byte"] == "nan"
    assert trainer.progress.crossed_at is None


def test_a_second_interrupt_is_raised():
    # A shell starts its background processes with SIGINT ignored: what was there before is what comes back.
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as stop:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        stop.hold()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_full_disk_ends_a_run_with_its_last_good_checkpoint(run, text, tmp_path, monkeypatch):
    folder, write = tmp_path / "run", Checkpoints._seal

    def full(self):
        if self._pending[0] == 4:
            raise OSError(28, "No space left on device")
        write(self)

    monkeypatch.setattr(Checkpoints, "_seal", full)
    with pytest.raises(OSError, match=r"step 4 could not be written.*No space left.*last good one is .*checkpoints/2"):
        go(text, folder)
    monkeypatch.undo()
    go(text, folder, resume=True)
    assert_same_run(folder, run[1])


def test_the_embedding_begins_at_its_own_size():
    """Ten times the other draw, and nothing else: the tree, the router biases and every other number are the same."""
    plain, large = (fresh(CFG, replace(RECIPE, embed_std=std), DEFAULT) for std in (None, 0.3))
    np.testing.assert_allclose(large.embed.get_value(), 10 * plain.embed.get_value(), rtol=1e-6)
    same = jax.tree.map(np.array_equal, named(large), named(plain))
    assert [name for name, equal in same.items() if not equal] == ["embed"]
    with pytest.raises(ValueError, match=r"embed_std=0\.3 would set the head's size as well"):
        check_fit(replace(CFG, tie_embeddings=True), replace(RECIPE, embed_std=0.3), Options())


def test_bad_settings_leave_nothing(text, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="full"):
        go(text, tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "kept"
    bad = {
        "max_length": replace(RECIPE, length=512),
        "devices=3 does not do": replace(RECIPE, weights=LossWeights(device_balance=0.1, devices=3)),
        "too few for one batch": replace(RECIPE, batch_rows=10_000, first_rows=None, micro_rows=None),
    }
    for message, recipe in bad.items():
        with pytest.raises(ValueError, match=message):
            train(CFG, recipe, text, VOCABULARY, tmp_path / "run")
    with pytest.raises(ValueError, match="no average to export"):
        train(CFG, replace(RECIPE, ema_decay=0.0), text, VOCABULARY, tmp_path / "run", options=Options(export="ema"))
    assert not (tmp_path / "run").exists()
    assert [t.name for t in threading.enumerate() if t.name == "feed"] == []
