"""Fine-tuning runs from a published folder to a published folder: chats, adapters, a part of the model."""

import json
import os
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from safetensors.numpy import load_file
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.cli.main import main
from deepseek_jax.cli.train import Train
from deepseek_jax.convert.adapter import load_adapter, merge
from deepseek_jax.convert.safetensors import CheckpointError, Writer, read_header
from deepseek_jax.convert.training import leaf_names, read_leaves, read_record
from deepseek_jax.core.quant import FP8, dequantize_matrix
from deepseek_jax.data.chat_rows import ChatConfig
from deepseek_jax.data.config import DataConfig
from deepseek_jax.model.transformer import abstract
from deepseek_jax.notes import CheckpointWarning
from deepseek_jax.runs import pretrain
from deepseek_jax.runs.export import export_model
from deepseek_jax.runs.finetune import fine_tune
from deepseek_jax.runs.metrics import Reporter
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.tuned import thawed
from deepseek_jax.text import bpe
from deepseek_jax.train.lora import adapt
from deepseek_jax.train.patterns import select
from deepseek_jax.train.tuning import LoRA, fine_tuning, of_epochs

LENGTH = 48
RECIPE = replace(
    fine_tuning("sft-tiny").recipe,
    length=LENGTH,
    batch_rows=2,
    micro_rows=2,
    evaluate_every=3,
    log_every=1,
    weights=replace(fine_tuning("sft-tiny").recipe.weights, mtp=0),
)
ANSWER = "As you wish."
HALF = ChatConfig(held_out_share=0.2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An FP8 checkpoint with a tokenizer and its template."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = bpe.train_tokenizer([f"say {ANSWER} {i}" for i in range(50)], 280)
    (folder / "words").mkdir()
    bpe.save_tokenizer(tokenizer, folder / "words", version="0")
    cfg = tiny_config(vocab_size=dsj.load_tokenizer(folder / "words").vocab_size, mtp_depth=0, n_layers=3)
    dsj.save_pretrained(random_model(cfg), folder / "base", quantize="fp8")
    shutil.copytree(folder / "words", folder / "base", dirs_exist_ok=True)
    return folder / "base"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    talks = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": ANSWER}] * (1 + i % 2)
        for i in range(20)
    ]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return file


def records(folder, kind):
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def stored(folder) -> dict[str, bytes]:
    return {name: entry.read().tobytes() for name, entry in read_header(folder / "model.safetensors")[0].items()}


class Stop(Reporter):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def record(self, record: dict) -> None:
        if record["kind"] == "step" and record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


def test_chats_are_learned_and_the_export_answers(source, chats, tmp_path, capsys):
    result = fine_tune(source, RECIPE, chats, tmp_path / "run", epochs=6, chats=HALF)
    before, after = (
        e["bits_per_byte"]
        for e in (records(tmp_path / "run", "evaluation")[0], records(tmp_path / "run", "evaluation")[-1])
    )
    assert after < 0.7 * before
    first, last = records(tmp_path / "run", "step")[0], records(tmp_path / "run", "step")[-1]
    assert last["main"] < 0.5 * first["main"]
    # Some of each row's tokens are targets: the assistant's.
    assert 0 < first["targets"] < 2 * LENGTH / 2
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["data"]["chats"] == 16
    assert records(tmp_path / "run", "evaluation")[0]["step"] == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert "16 chats to learn" in log
    assert log.index("measuring what is held out, before the first step") < log.index("compiling the step")
    events = [(r["event"], r["message"]) for r in records(tmp_path / "run", "event")]
    assert ("repeated", "chats has text for one pass; this run passes it 6 times") in events
    assert [message for event, message in events if event == "pass"][-1].startswith("chats has been passed 6 times")
    assert run["recipe"]["tokens"] == result.tokens
    before, after = stored(source), stored(result.checkpoint)
    assert before.keys() == after.keys()
    assert dsj.load_tokenizer(result.checkpoint).has_template
    assert main(["generate", str(result.checkpoint), "--prompt", "say 3", "--chat", "--max-new-tokens", "8"]) == 0
    assert "As you" in capsys.readouterr().out


@pytest.fixture(scope="module")
def adapters(source, chats, tmp_path_factory):
    """A run of adapters alone, never stopped."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    lora = LoRA(rank=2, targets=("stacks.*.attn.*", "layers.1.ffn.*"), merge=False)
    # At a speed that would show in a model's bias whatever the dtype it is stored in.
    recipe = replace(RECIPE, tokens=6 * 2 * LENGTH, bias_speed=0.5)
    return fine_tune(source, recipe, chats, folder, chats=HALF, lora=lora), folder, recipe, lora


@pytest.mark.slow
def test_adapters_go_on_from_a_stop_bit_for_bit(source, chats, adapters, tmp_path):
    whole, _, recipe, lora = adapters
    arguments = {"chats": HALF, "lora": lora}
    begun = fine_tune(source, recipe, chats, tmp_path / "run", view=Stop(2), **arguments)
    assert begun.interrupted == "SIGINT"
    assert begun.steps < 6
    with pytest.raises(ValueError, match=r"lora\.rank"):
        fine_tune(source, recipe, chats, tmp_path / "run", chats=HALF, lora=replace(lora, rank=3), resume=True)
    resumed = fine_tune(source, recipe, chats, tmp_path / "run", resume=True, **arguments)
    ours, theirs = (load_file(r.checkpoint / "adapter_model.safetensors") for r in (whole, resumed))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name
    assert any(value.any() for name, value in ours.items() if "lora_B" in name)
    assert not any(".layers.2.mlp" in name for name in ours)


@pytest.mark.slow
def test_the_state_of_adapters_is_no_model(adapters):
    state = adapters[1] / "checkpoints" / "6"
    with pytest.raises(CheckpointError, match="no model by itself: end the run"):
        dsj.load_pretrained(state)
    names = read_record(state)["leaves"]
    assert sum(name.startswith("opt_state.") and ".attn.q_a.a" in name for name in names) == 4
    assert not any(name.startswith("opt_state.") and "embed" in name for name in names)


@pytest.mark.slow
def test_the_base_keeps_its_bytes(source, adapters):
    """All that is not an adapter, in the last state of the run: FP8 values, scales, router biases."""
    _, folder, _, lora = adapters
    _, rest = dsj.partition(adapt(dsj.load_pretrained(source, dtype=None), lora))
    expected = dict(zip(leaf_names({"rest": rest}), jax.tree.leaves(rest), strict=True))
    wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in expected.items()}
    assert {a.dtype.name for a in expected.values()} == {"float8_e4m3fn", "float32", "bfloat16"}
    for name, value in read_leaves(folder / "checkpoints" / "6", wanted).items():
        assert np.asarray(value).tobytes() == np.asarray(expected[name]).tobytes(), name


@pytest.mark.slow
def test_adapters_alone_are_the_run_s_result_on_the_same_base(source, adapters, tmp_path):
    result = adapters[0]
    tuned = load_adapter(dsj.load_pretrained(source, dtype=None), result.checkpoint)
    # The record of a measurement has six digits.
    assert result.stored_bits == pytest.approx(result.model_bits, rel=1e-5)
    config = json.loads((result.checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source)
    # Merged into the same layout: what has no adapter keeps its bytes.
    dsj.save_pretrained(merge(tuned), tmp_path / "merged", like=source)
    before, after = stored(source), stored(tmp_path / "merged")
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all(".self_attn." in name or ".layers.1.mlp." in name for name in changed)


@pytest.mark.slow
def test_a_part_of_the_model_is_trained_and_the_rest_keeps_its_bytes(source, chats, tmp_path):
    """A router bias is chosen like a parameter; the load balance then moves it."""
    recipe = replace(RECIPE, tokens=6 * 2 * LENGTH, bias_speed=0.5)
    patterns = ["layers.2.*", "stacks.1.ffn.router.weight"]
    result = fine_tune(source, recipe, chats, tmp_path / "run", chats=HALF, patterns=patterns)
    before, after = stored(source), stored(result.checkpoint)
    changed = {name for name in before if before[name] != after[name]}
    assert "model.layers.1.mlp.gate.weight" in changed
    assert all(".layers.2." in name or name == "model.layers.1.mlp.gate.weight" for name in changed)
    assert {n for n in changed if "correction_bias" in n} == {"model.layers.2.mlp.gate.e_score_correction_bias"}


def dense(folder, into, *names):
    """A copy in which some FP8 tensors are not quantised."""
    shutil.copytree(folder, into)
    tensors = {name: entry.read() for name, entry in read_header(into / "model.safetensors")[0].items()}
    for name in names:
        values = dequantize_matrix(tensors[name], tensors.pop(name + "_scale_inv"), (128, 128))
        tensors[name] = values.astype(jnp.bfloat16)
    with Writer(into / "model.safetensors", {n: (a.dtype, a.shape) for n, a in tensors.items()}) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return into


@pytest.fixture(scope="module")
def mixed(source, tmp_path_factory):
    """One layer's o_proj and one expert are not quantised."""
    names = ("model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight")
    return dense(source, tmp_path_factory.mktemp("mixed") / "base", *names)


def test_what_is_trained_of_mixed_leaves_is_exported_as_it_was_stored(mixed, tmp_path):
    """Nothing has moved: parts made float32, and adapters of zero merged, come back byte for byte."""
    with pytest.warns(CheckpointWarning, match=r"2 tensors are stored in another dtype.*layers\.2\.mlp\.experts\.3"):
        model = dsj.load_pretrained(mixed, dtype=None)
    assert model.stacks[1].attn.o.get_value().values.dtype == jnp.bfloat16
    parts = thawed(model, select(abstract(model.cfg), ["layers.1-2.attn.o", "stacks.1.ffn.gate_up"]))
    adapters = merge(adapt(model, LoRA(rank=2, targets=("layers.1-2.attn.o",))))
    for name, trained in (("parts", parts), ("adapters", adapters)):
        assert trained.stacks[1].attn.o.get_value().dtype == jnp.float32
        export_model(trained, tmp_path / name, Options(), mixed, "float32")
        assert stored(tmp_path / name) == stored(mixed)
    # Without a folder to be like, what was made float32 is float32, the rest as it was stored.
    dsj.save_pretrained(parts, tmp_path / "plain")
    dtypes = {n: e.dtype.name for n, e in read_header(tmp_path / "plain" / "model.safetensors")[0].items()}
    assert {dtypes[f"model.layers.{i}.self_attn.o_proj.weight"] for i in (1, 2)} == {"float32"}
    assert dtypes["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"] == "float8_e4m3fn"


@pytest.mark.slow
def test_mixed_leaves_are_trained_on(mixed, chats, tmp_path):
    """LoRA and parts, by the command; their exports keep all other bytes, and the stored model generates."""
    before = stored(mixed)
    for name, words, changes in (
        ("lora", ["--lora.rank", "2", "--lora.targets", "layers.1.attn.*"], ".layers.1.self_attn"),
        ("part", ["--train", "layers.2.ffn.gate_up"], ".layers.2.mlp.experts."),
    ):
        run = tmp_path / name
        size = ["--tokens", str(4 * 2 * LENGTH), "--batch-rows", "2", "--length", str(LENGTH)]
        assert main(["train", str(run), "--from", str(mixed), "--sft", str(chats), *size, *words]) == 0
        with pytest.warns(CheckpointWarning):
            dsj.load_pretrained(run / "checkpoint", dtype=None)
        after = stored(run / "checkpoint")
        assert before.keys() == after.keys()
        changed = {n for n in before if before[n] != after[n]}
        assert changed
        assert all(changes in n for n in changed)
    assert main(["generate", str(mixed), "--prompt", "say", "--dtype", "stored", "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize("asked", ["source", "bfloat16", "fp8"])
def test_exports_in_the_dtype_that_is_asked_for(source, tmp_path, asked):
    model = dsj.load_pretrained(source, dtype=jnp.float32)
    export_model(model, tmp_path / "out", Options(export_dtype=asked), source, "float32")
    entries = read_header(tmp_path / "out" / "model.safetensors")[0]
    assert entries["model.layers.1.self_attn.o_proj.weight"].dtype == (jnp.bfloat16 if asked == "bfloat16" else FP8)
    assert dsj.load_tokenizer(tmp_path / "out").has_template


def test_settings_that_do_not_fit_are_refused(source, chats, tmp_path):
    for match, arguments in (
        ("exclude each other", {"patterns": ["head"], "lora": LoRA()}),
        ("matches no parameter", {"patterns": ["heda"]}),
        ("bias_speed is 0", {"patterns": ["head", "*.router.bias"]}),
        # Before the data is looked at.
        ("matches no parameter", {"patterns": ["heda"], "data": tmp_path / "nowhere.jsonl"}),
        ("matches no parameter", {"lora": LoRA(targets=("heda",)), "data": tmp_path / "nowhere.jsonl"}),
        ("ema_decay is 0", {"options": Options(export="ema")}),
        ("exceed the model's max_length", {"recipe": replace(RECIPE, length=4096)}),
        ("epochs count passes", {"data": DataConfig(), "epochs": 1}),
        ("epochs must be positive", {"epochs": 0}),
        ("No file of chats", {"data": tmp_path / "nowhere.jsonl"}),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            fine_tune(**{"source": source, "recipe": RECIPE, "data": chats, "folder": tmp_path / "run", **arguments})
        assert not (tmp_path / "run").exists(), match


@pytest.fixture
def beyond(source, tmp_path):
    """The source with a token that the model has no row for."""
    folder = shutil.copytree(source, tmp_path / "beyond")
    described = json.loads((folder / "tokenizer.json").read_text())
    described["added_tokens"].append({**described["added_tokens"][0], "id": 280, "content": "<tool>", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


def test_a_tokenizer_with_ids_beyond_the_model_is_refused_by_name(beyond, chats, tmp_path, capsys):
    said = "token '<tool>' has the id 280, beyond the model's vocab_size of 280"
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=said):
        fine_tune(beyond, RECIPE, chats, out)
    for words in (
        ["train", str(out), "--from", str(beyond), "--sft", str(chats)],
        ["train", str(out), "--from", str(beyond), "--data", f"t={beyond}", "--tokens", "4096", "--length", "64"],
        ["generate", str(beyond), "--prompt", "x"],
        ["generate", str(beyond), "--prompt", "x", "--chat"],
        ["score", str(beyond), str(chats)],
    ):
        assert main(words) != 0
        assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_model_with_rows_for_more_ids_than_its_tokenizer_is_trained_further(source, tmp_path, monkeypatch):
    """As V3: 129,280 rows and 128,815 tokens."""
    cfg = replace(dsj.load_pretrained(source).cfg, vocab_size=300)
    dsj.save_pretrained(random_model(cfg), tmp_path / "rows")
    shutil.copytree(source.parent / "words", tmp_path / "rows", dirs_exist_ok=True)
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"say {ANSWER} {i} " * 20)
    text = DataConfig(data=(f"t={tmp_path / 'text'}",), workers=0)

    def first(run, work, **more):
        batches = work.source.data.batches(length=RECIPE.length, rows=RECIPE.pass_rows, seed=0)
        return work.make().cfg, next(batches)["tokens"]

    monkeypatch.setattr(pretrain, "carry_out", first)
    for folder in (tmp_path / "rows", source.parent / "words"):
        run = tmp_path / f"run-{folder.name}"
        found, tokens = pretrain.train(cfg, RECIPE, text, folder, run, source=tmp_path / "rows")
        assert found.vocab_size == 300
        assert tokens.max() < 280


def test_recipes_follow_the_data():
    found = fine_tuning("sft-deepseek-v3")
    recipe = of_epochs(found.recipe, found.epochs, rows=1000)
    assert (recipe.tokens, recipe.batch_rows, recipe.micro_rows) == (2000 * 4096, 128, 16)
    assert (recipe.rate.peak, recipe.rate.decay_from, recipe.rate.decay_until, recipe.rate.decay_to) == (
        5e-6,
        0,
        recipe.tokens,
        1e-6,
    )
    assert (recipe.bias_speed, recipe.sample_masks, recipe.fim_rate) == (0, True, 0)
    with pytest.raises(ValueError, match="sft-deepseek-v3"):
        fine_tuning("sft-deepseek-v9")


def test_the_command_scales_recipes_and_refuses_what_does_not_fit(source, chats, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def parsed(*words):
        def parse(words, **default):
            return tyro.cli(Train, args=words, **default)

        return parse(list(words), default=Train.defaults(list(words), parse))

    default = parsed("--from", "x", "--sft", "y")
    assert (default.recipe_name, default.epochs, default.lora.rank) == ("sft-tiny", 10, 0)
    sized = parsed("--sft", "y", "--recipe", "sft-deepseek-v3", "--batch-rows", "6", "--length", "64")
    assert (sized.epochs, sized.recipe.batch_rows, sized.recipe.micro_rows, sized.recipe.length) == (2, 6, 6, 64)
    counted = parsed("--sft", "y", "--recipe", "sft-lora", "--tokens", "1000000", "--lora.rank", "4")
    assert (counted.epochs, counted.recipe.tokens, counted.recipe.rate.decay_until) == (None, 1000000, 1000000)
    assert (counted.lora.rank, counted.recipe.micro_rows) == (4, 2)
    assert parsed("--sft", "y", "--recipe", "sft-lora").lora == LoRA()
    for words, match in (
        (["--sft", str(chats)], "--from"),
        (["--train", "head"], "--from"),
        (["--recipe", "sft-tiny"], "--from"),
        (["--from", str(source), "--epochs", "2"], "--tokens"),
        (["--from", str(source), "--sft", str(chats), "--lora.targets", "head"], "--lora.rank"),
        (["--from", str(source), "--train", "head", "--tokenizer", "x"], "own tokenizer"),
        (["--from", str(source), "--sft", str(chats), "--train", "head", "--lora.rank", "2"], "exclude each other"),
        (["--from", str(source), "--sft", str(chats), "--train", "heda", "--length", "64"], "near names are head"),
        (["--from", str(source), "--sft", "nowhere.jsonl", "--length", "64"], "nowhere.jsonl"),
    ):
        assert main(["train", *words]) == 1
        assert match in capsys.readouterr().err
