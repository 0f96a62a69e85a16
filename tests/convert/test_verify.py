"""The verification: its reader, its comparisons, what it finds and what it refuses."""

import hashlib
import json
import re
import runpy
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from folders import arrays, edit_json, fuse, write_arrays
from reference import torch_model
from tiny import random_model, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers

import deepseek_jax as dsj
from deepseek_jax.cli.main import main
from deepseek_jax.configs.schema import MoE
from deepseek_jax.convert import ladder as ladder_module
from deepseek_jax.convert.ladder import (
    BOUND,
    TIE,
    Gradients,
    Routing,
    Row,
    _call,
    agreement,
    choose,
    compare,
    compare_gradients,
    ladder,
    matched,
)
from deepseek_jax.convert.load import load_first_layers
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.stream import convert
from deepseek_jax.convert.verify import VerifyError, reference_model
from deepseek_jax.core.params import map_variables

CFG = tiny_config(mtp_depth=2)
TOKENS = np.random.default_rng(0).integers(0, 256, (1, 24))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "fp8"
    dsj.save_pretrained(random_model(CFG), folder, quantize="fp8")
    return folder


@pytest.fixture
def scratch(fp8, tmp_path):
    """A copy that a test may damage."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    for file in fp8.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_reader_and_converter_agree_bit_for_bit(fp8):
    """PyTorch's reading of the files against ours, joined by a mapping that neither of them uses."""
    theirs = reference_model(fp8)
    ours = torch_model(dsj.load_pretrained(fp8, dtype=np.float32))
    for a, b in ((theirs.main, ours.main), (theirs.mtp, ours.mtp)):
        expected = b.state_dict()
        assert a.state_dict().keys() == expected.keys()
        for name, tensor in a.state_dict().items():
            np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def test_shards_with_an_index_and_old_spelling(fp8, scratch):
    tensors = arrays(scratch)
    names = sorted(tensors)
    (scratch / "model.safetensors").unlink()
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        write_arrays(scratch, {name: tensors[name] for name in held}, file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    (scratch / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def old(config):
        rope = config.pop("rope_parameters", None) or config.pop("rope_scaling")
        config["rope_theta"] = rope.pop("rope_theta", config.get("rope_theta"))
        config["rope_scaling"] = {"type": rope.pop("rope_type", None) or rope.pop("type"), **rope}

    edit_json(scratch / "config.json", old)
    a, b = (reference_model(folder).run(TOKENS).logits.detach() for folder in (fp8, scratch))
    np.testing.assert_array_equal(a, b)


ABLATIONS = {
    "tied": tiny_config(tie_embeddings=True, n_layers=2),
    "dense": tiny_config(moe=None, n_layers=1, n_dense_layers=1),
    "dense in a MoE config": tiny_config(n_layers=1, n_dense_layers=1, mtp_depth=2),
    "no shared expert": tiny_config(moe=replace(CFG.moe, n_shared=0), n_layers=2),
    "tied without MTP": tiny_config(tie_embeddings=True, n_layers=1, n_dense_layers=0, mtp_depth=0),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_reference_of_an_ablation(name, tmp_path):
    cfg = ABLATIONS[name]
    dsj.save_pretrained(random_model(cfg), tmp_path / "model")
    reference = reference_model(tmp_path / "model")
    assert (reference.main.lm_head.weight is reference.main.model.embed_tokens.weight) == cfg.tie_embeddings
    seen = reference.run(TOKENS)
    assert len(seen.mtp_logits) == cfg.mtp_depth
    assert len(seen.mtp_index) == cfg.mtp_depth * cfg.mtp_layer.is_moe
    assert seen.logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_holds_on_every_rung(name, tmp_path):
    cfg = ABLATIONS[name]
    dsj.save_pretrained(random_model(cfg), tmp_path / "model")
    rows = list(ladder(tmp_path / "model", TOKENS, steps=2, gradients=True))
    assert [row for row in rows if not row.ok] == []
    assert sum(row.what.endswith("logits") for row in rows) == 2 + cfg.mtp_depth


def test_a_config_without_a_reference_says_so(scratch):
    edit_json(scratch / "config.json", lambda c: c.update(hidden_size="64"))
    with pytest.raises(VerifyError, match="there is no reference for this config: transformers refuses it"):
        reference_model(scratch)


@pytest.fixture(scope="module")
def rows(fp8):
    return list(ladder(fp8, TOKENS, steps=3, gradients=True))


def test_every_rung_holds(rows):
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]
    names = [(row.layer, row.what) for row in rows]
    assert names[:7] == [
        (0, "attention"),
        (0, "network"),
        (0, "block"),
        (1, "attention"),
        (1, "router"),
        (1, "network"),
        (1, "block"),
    ]
    assert [what for layer, what in names if layer is None] == [
        "final norm",
        "logits",
        "MTP 0 router",
        "MTP 0 logits",
        "MTP 1 router",
        "MTP 1 logits",
        "decoding routers",
        "decoded logits",
        "gradients",
    ]
    counted = {row.what: row.tokens for row in rows if isinstance(row, Routing)}
    # Two MoE layers: a prompt of 12, then two steps of one token.
    assert counted == {"router": 24, "MTP 0 router": 23, "MTP 1 router": 22, "decoding routers": 2 * 14}
    assert all(row.relative > 0 for row in rows if isinstance(row, Row | Gradients))


def test_gradients_are_those_of_every_published_tensor(rows, fp8):
    buffers_and_copies = re.compile(r".*(_scale_inv|score_correction_bias|layers\.\d\.embed_tokens.*|head\.head.*)")
    stored = [name for name in arrays(fp8) if not buffers_and_copies.fullmatch(name)]
    # No token chose one of the experts of an MTP module.
    assert (rows[-1].tensors, rows[-1].zero) == (len(stored), 3)
    assert rows[-1].worst in stored


def test_gradients_that_differ():
    right = {"a": np.ones((2, 3)), "b": np.full(4, 2.0), "c": np.zeros(2)}
    found = compare_gradients(dict(right), right)
    assert (found.ok, found.relative, found.tensors, found.zero) == (True, 0.0, 3, 1)
    found = compare_gradients(right | {"b": right["b"] * (1 - 2e-4)}, right)
    assert (found.ok, found.worst) == (False, "b")
    assert found.relative == pytest.approx(2e-4)
    assert found.error == pytest.approx(4e-4)
    for wrong in (
        right | {"b": np.full(4, np.nan)},
        right | {"c": np.array([0, 1e-30])},
        {"a": right["a"], "b": right["b"]},
        right | {"d": np.ones(1)},
    ):
        found = compare_gradients(wrong, right)
        assert (found.ok, found.relative) == (False, float("inf"))
        assert found.worst == next(n for n in "bcd" if n not in wrong or wrong.get(n) is not right.get(n))


@pytest.fixture(scope="module")
def parts(fp8, tmp_path_factory):
    """The checkpoint in a file a layer, without those of the last layers; whole, and converted."""
    whole = tmp_path_factory.mktemp("parts") / "whole"
    shutil.copytree(fp8, whole)
    (whole / "model.safetensors").unlink()
    files: dict[str, dict] = {}
    for name, array in arrays(fp8).items():
        layer = re.match(r"model\.layers\.(\d+)", name)
        files.setdefault(f"{layer[1] if layer else 'rest'}.safetensors", {})[name] = array
    for file, tensors in files.items():
        write_arrays(whole, tensors, file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (whole / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert(whole, whole.with_name("converted"))
    first = shutil.copytree(whole, whole.with_name("first"))
    for file in first.glob("[234].safetensors"):
        file.unlink()
    return whole, first, whole.with_name("converted")


def test_the_first_layers_of_a_model(parts, rows, capsys):
    """Only their files have to be there; what they compute is what they compute in the whole model."""
    whole, first, converted = parts
    arguments = ["--tokens", *map(str, TOKENS[0]), "--steps", "3", "--layers", "2"]
    assert main(["verify", str(first), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "A cut: the first 2 layers only, and no MTP modules" in printed
    assert "layer 1 router" in printed
    assert "layer 2" not in printed
    assert "MTP 0" not in printed
    cut = list(ladder(first, TOKENS, steps=3, n_layers=2))
    assert [(r.layer, r.what) for r in cut[:7]] == [(r.layer, r.what) for r in rows[:7]]
    assert all(row.ok for row in cut)
    for source, against in ((converted, first), (whole, first)):
        assert_same_rows(list(ladder(source, TOKENS, steps=3, against=against, n_layers=2)), cut)
    with pytest.raises(VerifyError, match=r"2\.safetensors does not exist"):
        reference_model(first)


def assert_same_rows(a, b):
    assert [(r.layer, r.what) for r in a] == [(r.layer, r.what) for r in b]
    assert all(row.ok for row in a)


def test_a_cut_of_our_model(parts):
    whole, first, _ = parts
    model = dsj.load_pretrained(whole, dtype=np.float32)
    for folder in parts:
        cut = load_first_layers(folder, 2)
        assert (cut.cfg.n_layers, cut.cfg.n_dense_layers, cut.cfg.mtp_depth) == (2, 1, 0)
        np.testing.assert_array_equal(cut.stacks[1].attn.q_a.get_value()[0], model.stacks[1].attn.q_a.get_value()[0])
    with pytest.raises(CheckpointError, match=r"2\.safetensors does not exist"):
        load_first_layers(first, 3)


@pytest.mark.parametrize("n", [0, 4])
def test_cuts_that_cannot_be_taken(parts, n, capsys):
    assert main(["verify", str(parts[0]), "--layers", str(n)]) == 1
    assert f"has 3 layers; its first {n} cannot be taken" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"has 3 layers; its first {n} cannot"):
        load_first_layers(parts[0], n)


def test_against(parts, tmp_path, capsys):
    whole, _, converted = parts
    assert main(["verify", str(converted)]) == 1
    assert "is in Orbax's form, which PyTorch does not read: give its published folder too, with --against" in (
        capsys.readouterr().err
    )
    other = shutil.copytree(whole, tmp_path / "other")
    edit_json(other / "config.json", lambda c: c.update(rms_norm_eps=1e-5))
    assert main(["verify", str(converted), "--against", str(other)]) == 1
    assert "hold different models" in capsys.readouterr().err


def nudged(fp8, path, factor):
    """The checkpoint's model with one leaf of its second stack slightly off."""

    def change(where, variable):
        if where[:2] != ("stacks", 1) or where[-len(path) :] != path:
            return variable
        return type(variable)(variable.get_value() * factor, **variable.get_metadata())

    return map_variables(change, dsj.load_pretrained(fp8, dtype=np.float32))


@pytest.mark.parametrize(
    ("leaf", "factor", "first", "last"),
    [
        (("attn", "kv_b"), 1.0003, (1, "attention"), "decoded logits"),
        # The reference's experts are replayed, so nothing but the routers themselves differs.
        (("router", "bias"), -1.0, (1, "router"), "decoding routers"),
        (("shared", "down"), 1.0003, (1, "network"), "decoded logits"),
    ],
)
def test_first_divergence_is_found(fp8, rows, monkeypatch, leaf, factor, first, last):
    wrong = nudged(fp8, leaf, factor)
    monkeypatch.setattr(ladder_module, "load_pretrained", lambda path, dtype: wrong)
    found = [row for row in ladder(fp8, TOKENS, steps=3) if not row.ok]
    assert (found[0].layer, found[0].what) == first
    assert found[-1].what == last


def test_other_experts_are_replayed_and_reported(fp8):
    reference, model = reference_model(fp8), dsj.load_pretrained(fp8, dtype=np.float32)
    other = np.random.default_rng(1).random((2, 1, 24, 8)).argsort(-1)[..., :2]
    seen = reference.run(TOKENS, routing=other)
    out, routing = matched(model, TOKENS, seen)
    assert compare(out.logits, seen.logits.detach(), None, "logits").ok
    np.testing.assert_array_equal(out.aux.expert_index, other)
    assert all(r.flipped > 10 and r.widest > 0.01 and not r.ok for r in routing)


def test_margins():
    plain = MoE(n_experts=4, top_k=2, expert_dim=8)
    index, margin = choose(np.array([0.1, 0.9, 0.5, 0.45]), plain)
    np.testing.assert_array_equal(index, [1, 2])
    assert margin == pytest.approx(0.05)
    grouped = replace(plain, n_groups=2, top_groups=1, top_k=1)
    index, margin = choose(np.array([0.5, 0.3, 0.7, 0.09]), grouped)
    np.testing.assert_array_equal(index, [0])
    assert margin == pytest.approx(0.01)


def test_flips_pass_at_near_ties_only_and_rarely():
    moe = MoE(n_experts=4, top_k=1, expert_dim=8)
    biased = np.tile(np.float32([0.5, 0.5 + 1e-6, 0.1, 0.0]), (2000, 1))
    theirs = np.ones((2000, 1), int)
    ours = theirs.copy()
    ours[:2] = 0
    assert agreement(ours, theirs, biased, moe).ok
    ours[2] = 0
    assert not agreement(ours, theirs, biased, moe).ok
    ours[:3] = 1
    ours[7] = 2
    assert agreement(ours, theirs, biased, moe).ok
    biased[7, 0] = 0.4
    assert not agreement(ours, theirs, biased, moe).ok


def test_numbers_that_are_not_finite_are_errors():
    assert not compare(np.array([1.0, np.nan]), np.array([1.0, 2.0]), None, "x").ok
    assert compare(np.array([1.0, 2.0]), np.array([1.0, 2.0]), None, "x").relative == 0 <= BOUND


def drop(name):
    return lambda tensors: tensors.pop(name) is None


def shorten(name):
    return lambda tensors: tensors.update({name: tensors[name][1:]})


def poke(name):
    def change(tensors):
        tensors[name] = np.array(tensors[name])
        tensors[name][3, 5] += 1

    return change


DAMAGES = {
    "missing": (drop("model.layers.1.mlp.experts.3.up_proj.weight"), r"lacks 1 tensors.*gate_up_proj\[3\]\.up"),
    "missing norm": (drop("model.norm.weight"), r"lacks 1 tensors.*model\.norm\.weight"),
    "no scale": (drop("model.layers.0.mlp.up_proj.weight_scale_inv"), r"FP8 but has no .*up_proj\.weight_scale_inv"),
    "shape": (shorten("model.layers.2.mlp.gate.weight"), r"gate\.weight has shape \(7, 64\).*\(8, 64\)"),
    "copy": (poke("model.layers.3.embed_tokens.weight"), r"layers\.3\.embed_tokens\.weight differs"),
    "unexpected": (
        lambda t: t.update({"model.layers.0.mlp.bias": np.zeros(3, np.float32)}),
        r"mlp\.bias has shape \(3,\); the reference has no such tensor",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_the_reference_refuses_damage(scratch, case):
    damage, message = DAMAGES[case]
    tensors = arrays(scratch)
    damage(tensors)
    write_arrays(scratch, tensors)
    with pytest.raises(VerifyError, match=message):
        reference_model(scratch)


def test_folders_without_files(tmp_path, scratch):
    with pytest.raises(VerifyError, match=r"holds no config\.json"):
        reference_model(tmp_path)
    (scratch / "model.safetensors").unlink()
    with pytest.raises(VerifyError, match=r"holds no \*\.safetensors"):
        reference_model(scratch)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def weight_map(change):
    """An index of the one file, with ``change`` made to its weight_map."""

    def write(file):
        names = change(dict.fromkeys(arrays(file.parent), file.name))
        file.with_name("model.safetensors.index.json").write_text(json.dumps(names))

    return write


BROKEN = {
    "truncated": (cut, "so that model.layers.4.self_attn.q_b_proj.weight is truncated"),
    "garbage": (lambda file: file.write_bytes(bytes(range(256)) * 9), "too few for its header of 506097522914230528"),
    "empty": (lambda file: file.write_bytes(b""), "model.safetensors: the file has 0 bytes"),
    "no weight_map": (weight_map(lambda names: {}), "index.json has no weight_map"),
    "weight_map of numbers": (weight_map(lambda names: {"weight_map": {"a": 1}}), "a is mapped to 1, which is no file"),
    "names left out": (
        weight_map(lambda names: {"weight_map": {n: f for n, f in names.items() if n != "model.norm.weight"}}),
        "lacks 1 tensors of the reference, among them model.norm.weight",
    ),
    "names too many": (weight_map(lambda names: {"weight_map": {**names, "x": "model.safetensors"}}), "lacks x, which"),
    "file missing": (weight_map(lambda names: {"weight_map": {**names, "x": "y"}}), "scratch/y does not exist"),
    "index no object": (weight_map(lambda names: []), "index.json must hold a JSON object, not list"),
    "index too deep": (
        lambda file: file.with_name("model.safetensors.index.json").write_text("[" * 100_000),
        "index.json is not valid JSON",
    ),
    "many layers": (
        lambda file: edit_json(file.with_name("config.json"), lambda c: c.update(num_hidden_layers=10_000)),
        "config.json describes",
    ),
    "config": (lambda file: file.with_name("config.json").write_text("{"), "config.json is not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_command_names_a_damaged_file(scratch, capsys, case):
    damage, message = BROKEN[case]
    damage(scratch / "model.safetensors")
    assert main(["verify", str(scratch), "--tokens", "1", "2", "3", "4"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("shape", [(3, 3), (7,)])
def test_scales_of_another_shape_are_named(scratch, shape):
    tensors = arrays(scratch)
    name = "model.layers.1.self_attn.kv_b_proj.weight_scale_inv"
    tensors[name] = np.ones(shape, np.float32)
    write_arrays(scratch, tensors)
    with pytest.raises(VerifyError, match=r"kv_b_proj\.weight has shape .* not one for each block of 128 x 128"):
        reference_model(scratch)


def test_command(fp8, rows, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["verify", str(fp8), "--tokens", *map(str, TOKENS[0]), "--steps", "3", "--gradients"]
    assert main([*arguments, "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "layer 2 block" in printed
    assert f"All {len(rows)} comparisons hold (relative error at most 2e-05, of gradients 0.0001)" in printed
    assert f"Gradients of {rows[-1].tensors} tensors, of which 3 are zero on both sides; the worst is that" in printed
    record = json.loads(report.read_text())
    assert record["ok"] is True
    assert record["deepseek_jax"] == dsj.__version__
    assert record["transformers"] == "5.23.0"
    assert record["tokens"] == TOKENS.tolist()
    assert len(record["comparisons"]) == len(rows)


def test_command_fails_on_a_divergence(fp8, rows, monkeypatch, capsys):
    wrong = nudged(fp8, ("attn", "kv_b"), 1.0003)
    monkeypatch.setattr(ladder_module, "load_pretrained", lambda path, dtype: wrong)
    assert main(["verify", str(fp8), "--tokens", *map(str, TOKENS[0]), "--steps", "3"]) == 1
    printed = capsys.readouterr().out
    assert "First divergence: layer 1 attention" in printed
    assert printed.count("DIVERGES") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1", "2"], "give at least 4 tokens"),
        (["--length", "300"], "exceed the model's 256 tokens"),
        (["--tokens", "1", "2", "3", "999"], "token 999 lies outside the vocabulary of 256"),
        (["--tokens", "1", "-7", "3", "200"], "token -7 lies outside the vocabulary of 256"),
        (["--tokens", "1", "--prompt", "x"], "give --prompt or --tokens, not both"),
        (["--prompt", "x"], "tokenizer.json"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder"),
    ],
)
def test_command_names_bad_input(fp8, capsys, arguments, message):
    assert main(["verify", str(fp8), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_pytorch_the_extra_is_named(fp8, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["verify", str(fp8)]) == 1
    assert 'pip install "deepseek-jax[verify]"' in capsys.readouterr().err


def test_stored_reference_logits(scratch, monkeypatch, capsys):
    """The script that makes a checkpoint's stored reference, on a byte-level tokenizer of 256 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(scratch / "tokenizer.json"))
    monkeypatch.setattr(sys, "argv", ["make_reference.py", str(scratch)])
    runpy.run_path(str(ROOT / "checkpoints" / "make_reference.py"), run_name="__main__")
    assert "the closest experts lie" in capsys.readouterr().out

    record = json.loads((scratch / "reference" / "reference.json").read_text())
    assert sorted(record["files"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    for name, digest in record["files"].items():
        assert hashlib.sha256((scratch / name).read_bytes()).hexdigest() == digest
    stored = arrays(scratch / "reference")
    tokens = stored["tokens"]
    assert tokens.shape[1] > 100
    np.testing.assert_array_equal(tokens[0], tokenizer.encode(record["prompt"]).ids[: tokens.shape[1]])
    # A folder that holds its reference is still a checkpoint.
    out = _call(dsj.load_pretrained(scratch, dtype=np.float32), tokens, None, None, True, ())
    np.testing.assert_array_equal(np.sort(out.aux.expert_index, -1), stored["expert_index"])
    assert (stored["expert_margin"] >= TIE).all()
    for name, logits in (("logits", out.logits), ("mtp_logits", out.mtp_logits[0])):
        assert compare(logits[:, : stored[name].shape[1]], stored[name], None, name).ok


@pytest.mark.parametrize(("announced", "depth"), [(None, 2), (3, 2), (0, 0)])
def test_files_of_other_tools(tmp_path, announced, depth):
    """The reference reads them with the meaning that `load_pretrained` gives them."""
    for name in ("plain", "other"):
        dsj.save_pretrained(random_model(CFG), tmp_path / name)
    tensors = arrays(tmp_path / "other")
    for copy in [n for n in tensors if re.search(r"layers\.\d+\.(embed_tokens|shared_head\.head)", n)]:
        del tensors[copy]
    fuse(tensors)
    tensors["model.layers.1.mlp.experts._extra_state"] = np.zeros(0, np.float32)
    write_arrays(tmp_path / "other", tensors)
    write_arrays(tmp_path / "other", {"x.lora_A.weight": np.ones((2, 2), np.float32)}, "adapter_model.safetensors")
    edit_json(tmp_path / "other/config.json", lambda c: c.update(num_nextn_predict_layers=announced))
    whole, other = (reference_model(tmp_path / name) for name in ("plain", "other"))
    assert len(other.mtp) == depth
    expected = whole.main.state_dict() | whole.mtp[:depth].state_dict(prefix="mtp.")
    found = other.main.state_dict() | other.mtp.state_dict(prefix="mtp.")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    main_names = {name for name in whole.names if not name.startswith(("model.layers.3.", "model.layers.4."))}
    assert main_names <= set(other.names) <= set(whole.names)
