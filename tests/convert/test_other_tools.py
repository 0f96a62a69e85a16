"""Checkpoints as other tools write them: read with the reference's meaning and a note, or refused by name."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import EDGES, arrays, assert_same_tensors, edge_model, edit_json, edited, fuse, write_arrays
from test_pretrained import BF16, EXPERT, KV_A, NORM, assert_same_model
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.cli.main import main
from deepseek_jax.configs.schema import ConfigError
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.layers import RECORD
from deepseek_jax.convert.load import load_first_layers
from deepseek_jax.convert.safetensors import INDEX, CheckpointError, read_header
from deepseek_jax.convert.stream import convert
from deepseek_jax.core.params import is_variable
from deepseek_jax.core.quant import FP8, Quantized, dequantize_matrix, quantize_matrix
from deepseek_jax.notes import CheckpointWarning

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
FIELD = "num_nextn_predict_layers"
COPIES = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
O_PROJ = "model.layers.2.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "model"
    dsj.save_pretrained(edge_model(), path, quantize="fp8")
    return path


@pytest.fixture(scope="module")
def fp32(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "model"
    dsj.save_pretrained(edge_model(), path)
    return path


def dense(tensors: dict, name: str, dtype=BF16) -> None:
    scale = tensors.pop(name + "_scale_inv")
    tensors[name] = dequantize_matrix(tensors[name], scale, (128, 128)).astype(dtype)


def noted(call, *words: str):
    """What ``call`` returns; it gives one note, a line that has each of ``words``."""
    with pytest.warns(CheckpointWarning) as notes:
        result = call()
    texts = {str(n.message) for n in notes}
    assert len(texts) == 1, texts
    (text,) = texts
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert word in text
    return result


def there_and_back(folder: Path, tmp_path: Path, *words: str) -> None:
    """Converted, converted back, and saved again like it: the same files, the same tensors."""
    noted(lambda: convert(folder, tmp_path / "orbax"), *words)
    noted(lambda: convert(tmp_path / "orbax", tmp_path / "back"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    for dtype in (None, jnp.float32):
        model, again = noted(lambda d=dtype: dsj.load_pretrained(folder, dtype=d), *words), tmp_path / f"like-{dtype}"
        assert_same_model(model, noted(lambda d=dtype: dsj.load_pretrained(tmp_path / "orbax", dtype=d)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            dsj.save_pretrained(model, again, like=folder)
        assert_same_tensors(folder, again)
        configs = [json.loads((path / "config.json").read_text()) for path in (folder, again)]
        assert configs[0] == configs[1]


# --- The MTP layers --------------------------------------------------------------------------------------------


def without_mtp(tensors: dict) -> None:
    for name in [n for n in tensors if n.startswith("model.layers.3.")]:
        del tensors[name]


def test_the_number_of_mtp_layers_is_that_of_the_files(fp32, tmp_path):
    """Where config.json does not say it."""
    for name, change, depth in (("with", lambda tensors: None, 1), ("without", without_mtp, 0)):
        folder = edited(fp32, tmp_path / name, change)
        edit_json(folder / "config.json", lambda c: c.pop(FIELD))
        model = noted(lambda f=folder: dsj.load_pretrained(f, jnp.float32), str(folder), FIELD, f"taken to be {depth}")
        assert model.cfg == replace(EDGES, mtp_depth=depth, name=name)
        assert_same_model(model.stacks, edge_model().stacks)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ConfigError, match=f"lacks {FIELD}"):
        read_config(folder)


def test_announced_and_absent(fp8, tmp_path):
    folder = edited(fp8, tmp_path / "model", without_mtp)
    there_and_back(folder, tmp_path, "announces 1 MTP layers", FIELD, "hold none: read with 0")
    model = noted(lambda: dsj.load_pretrained(folder, dtype=None))
    assert model.cfg.mtp_depth == 0
    assert_same_model(model.stacks, dsj.load_pretrained(fp8, dtype=None).stacks)
    noted(lambda: load_first_layers(folder, 2))


def test_one_of_two_mtp_layers_is_there(tmp_path):
    model = random_model(replace(EDGES, mtp_depth=2), seed=1)
    dsj.save_pretrained(model, tmp_path / "two")

    def drop(layer):
        return lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(f"model.layers.{layer}.")]

    one = noted(lambda: dsj.load_pretrained(edited(tmp_path / "two", tmp_path / "one", drop(4)), F32), "hold 1")
    assert_same_model(one.mtp[0], model.mtp[0])
    with pytest.raises(CheckpointError, match=r"42 tensors are missing: model\.layers\.3\."):
        dsj.load_pretrained(edited(tmp_path / "two", tmp_path / "gap", drop(3)))


def test_layers_that_the_config_does_not_have(fp32, tmp_path):
    """As the reference, without them; a conversion, which would lose them, is refused."""
    folder = shutil.copytree(fp32, tmp_path / "model")
    edit_json(folder / "config.json", lambda c: c.update({FIELD: 0}))
    model = noted(lambda: dsj.load_pretrained(folder, F32), "0 MTP layers", "model.layers.3 are left out")
    assert_same_model(model.stacks, edge_model().stacks)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match=f"model.layers.3, which.*would lose: set {FIELD} to 1"),
    ):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gone", [COPIES, pytest.param(COPIES[:1], marks=pytest.mark.slow)])
def test_shared_copies_left_out(fp8, tmp_path, gone):
    folder = edited(fp8, tmp_path / "model", lambda tensors: [tensors.pop(name) for name in gone])
    there_and_back(folder, tmp_path, *gone, "the main model's embedding and head are taken")
    model = noted(lambda: dsj.load_pretrained(folder, dtype=None))
    assert_same_model(model, dsj.load_pretrained(fp8, dtype=None))
    dsj.save_pretrained(model, tmp_path / "published")
    assert_same_tensors(fp8, tmp_path / "published")


def test_a_tied_head_that_is_stored(tmp_path):
    """It is kept by ``like`` and conversion, and has to be the embedding."""
    model = random_model(replace(EDGES, tie_embeddings=True), seed=1)
    dsj.save_pretrained(model, tmp_path / "tied")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "tied").entries
    folder = edited(tmp_path / "tied", tmp_path / "both", lambda t: t.update(both(t)))
    assert_same_model(dsj.load_pretrained(folder, dtype=None), model)
    dsj.save_pretrained(model, tmp_path / "like", like=folder)
    assert_same_tensors(folder, tmp_path / "like")
    convert(folder, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(folder, tmp_path / "back")
    other = edited(folder, tmp_path / "other", lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is a copy of model\.embed_tokens\.weight, but they"):
        dsj.load_pretrained(other)


def both(tensors: dict) -> dict:
    return {"lm_head.weight": tensors["model.embed_tokens.weight"]}


# --- Dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["both", *(pytest.param(d, marks=pytest.mark.slow) for d in (BF16, F16))], ids=str)
def test_scales_of_other_dtypes(fp8, tmp_path, kind):
    """Value times scale in float32; every form is kept."""

    def change(tensors):
        for i, name in enumerate(n for n in tensors if n.endswith("_scale_inv")):
            tensors[name] = tensors[name].astype((BF16, F16)[i % 2] if kind == "both" else kind)

    folder = edited(fp8, tmp_path / "model", change)
    stored = arrays(folder)
    if kind == "both":
        model = noted(lambda: dsj.load_pretrained(folder, dtype=None), "float8_e4m3fn with float32 scales")
        with pytest.warns(CheckpointWarning, match="each has an array of its own"):
            convert(folder, tmp_path / "orbax")
    else:
        model = dsj.load_pretrained(folder, dtype=None)
        convert(folder, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(folder, tmp_path / "back")
    dsj.save_pretrained(model, tmp_path / "again")
    assert_same_tensors(folder, tmp_path / "again")
    wide = dsj.load_pretrained(folder, F32)
    expected = dequantize_matrix(stored[KV_A], stored[KV_A + "_scale_inv"].astype(F32), (128, 128))
    np.testing.assert_array_equal(np.asarray(wide.stacks[0].attn.kv_a[0]).T, expected)
    np.testing.assert_array_equal(np.asarray(model.stacks[0].attn.kv_a.get_value().dequantize(F32))[0].T, expected)
    dsj.save_pretrained(wide, tmp_path / "like", like=folder)
    assert_same_tensors(folder, tmp_path / "like")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_new_scales_are_rounded_before_they_divide(dtype):
    """Else every value of a block would be off by the rounding of its scale."""
    w = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    values, scale = quantize_matrix(w, (4, 8), scale_dtype=dtype)
    assert scale.dtype == dtype
    np.testing.assert_array_equal(values, (w / scale.astype(np.float32)).astype(FP8))
    with pytest.raises(ValueError, match="larger scales than float16 holds"):
        quantize_matrix(w * 1e9, (4, 8), scale_dtype=F16)


NORM_2 = "model.layers.2.self_attn.kv_a_layernorm.weight"
EXPERT_F32 = "model.layers.1.mlp.experts.3.down_proj.weight"
LAST = "model.layers.2.mlp.experts.7.up_proj.weight"
# What is stored unlike the rest of its leaf: tensor -> dtype; and the dtype in which the leaf of each is held.
MIXED = {
    "a layer's o_proj": ({O_PROJ: BF16}, "bfloat16 with float32 scales"),
    "one expert, the last": ({LAST: BF16}, "bfloat16 with float32 scales"),
    "experts of three dtypes": ({EXPERT: BF16, EXPERT_F32: F32, LAST: F16}, "float32 with float32 scales"),
    "a float16 expert": ({EXPERT: F16}, "float16 with float32 scales"),
    "a norm": ({NORM_2: F32}, "as float32"),
    "a router bias": ({"model.layers.1.mlp.gate.e_score_correction_bias": BF16}, None),
}


# Near relatives of the others.
SLOWLY = ("one expert, the last", "a float16 expert")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOWLY else c for c in MIXED])
def test_mixed_dtypes_in_one_leaf(fp8, tmp_path, case):
    kept, held = MIXED[case]

    def change(tensors):
        for name, dtype in kept.items():
            if name + "_scale_inv" in tensors:
                dense(tensors, name, dtype)
            tensors[name] = tensors[name].astype(dtype)

    folder = edited(fp8, tmp_path / "model", change)
    (name, *_), words = kept, () if held is None else (*kept, held)
    model = noted(lambda: dsj.load_pretrained(folder, dtype=None), *words)
    dsj.save_pretrained(model, tmp_path / "again")
    assert_same_tensors(folder, tmp_path / "again")
    dsj.save_pretrained(model, tmp_path / "like", like=folder)
    assert_same_tensors(folder, tmp_path / "like")
    wide = dsj.load_pretrained(folder, F32)
    for ours, exact in zip(*(jax.tree.leaves(m, is_leaf=is_variable) for m in (model, wide)), strict=True):
        value = ours.get_value()
        value = value.dequantize(F32) if isinstance(value, Quantized) else value.astype(F32)
        np.testing.assert_array_equal(np.asarray(value), np.asarray(exact.get_value()))
    dsj.save_pretrained(wide, tmp_path / "wide", like=folder)
    assert_same_tensors(folder, tmp_path / "wide")
    experts = [n for n in kept if ".experts." in n]
    if experts:
        noted(lambda: convert(folder, tmp_path / "orbax"), *experts, "an array of its own")
        assert json.loads((tmp_path / "orbax" / RECORD).read_text())["format_version"] == 3
        again = noted(lambda: dsj.load_pretrained(tmp_path / "orbax", dtype=None), *experts)
        assert_same_model(again, model)
    else:
        convert(folder, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(folder, tmp_path / "back")
    # Asked for FP8 blocks: the kept matrices get them, the stored ones keep their bytes.
    if name.endswith("proj.weight"):
        dsj.save_pretrained(model, tmp_path / "fp8", quantize="fp8")
        assert Checkpoint(tmp_path / "fp8").entries[name].dtype == FP8
        assert arrays(tmp_path / "fp8")[KV_A].tobytes() == arrays(folder)[KV_A].tobytes()


def test_a_record_of_what_stands_apart_is_checked(fp8, tmp_path):
    folder = edited(fp8, tmp_path / "model", lambda tensors: dense(tensors, EXPERT))
    noted(lambda: convert(folder, tmp_path / "orbax"))
    edit_json(tmp_path / "orbax" / RECORD, lambda r: r.update(apart=["x"]))
    with pytest.raises(CheckpointError, match=r"apart must list tensors of its files, not \['x'\]"):
        dsj.load_pretrained(tmp_path / "orbax")


def test_one_expert_in_fp4(fp8, tmp_path):
    """Beside others in FP8: converted in its bytes and read with a dtype; no leaf holds both as they are stored."""
    rng = np.random.default_rng(0)

    def change(tensors: dict) -> None:
        rows, columns = tensors[EXPERT].shape
        tensors[EXPERT] = rng.integers(-128, 128, (rows, columns // 2)).astype(np.int8)
        tensors[EXPERT + "_scale_inv"] = np.ones((rows, -(-columns // 32)), np.float32)

    folder = edited(fp8, tmp_path / "model", change)
    noted(lambda: convert(folder, tmp_path / "orbax"))
    convert(tmp_path / "orbax", tmp_path / "again")
    assert_same_tensors(folder, tmp_path / "again")
    assert_same_model(*(dsj.load_pretrained(tmp_path / name, F32) for name in ("orbax", "again")))
    with pytest.raises(CheckpointError, match=f"{EXPERT}: FP4 stands beside another form in one leaf"):
        dsj.load_pretrained(folder, dtype=None)


def test_float64(fp32, tmp_path):
    """Read where a dtype is asked for and holds the values; JAX holds no float64."""
    folder = edited(fp32, tmp_path / "model", lambda t: t.update({NORM: t[NORM].astype(np.float64)}))
    assert_same_model(dsj.load_pretrained(folder, F32), edge_model())
    with pytest.raises(CheckpointError, match=f"{NORM}: float64 cannot be held as it is stored, load with a dtype"):
        dsj.load_pretrained(folder, dtype=None)
    large = edited(fp32, tmp_path / "large", lambda t: t.update({NORM: np.full(136, 1e300)}))
    with pytest.raises(CheckpointError, match=f"{NORM} holds float64 values that are too large for float32"):
        dsj.load_pretrained(large, F32)


def test_scales_beside_weights_that_are_not_fp8(fp8, tmp_path):
    """The reference ignores them, unless the config has it multiply."""

    def change(tensors):
        scale = tensors[O_PROJ + "_scale_inv"]
        dense(tensors, O_PROJ)
        tensors[O_PROJ + "_scale_inv"] = scale

    folder = edited(fp8, tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=rf"1 scales.*{O_PROJ}_scale_inv beside bfloat16.*by which they would be"):
        dsj.load_pretrained(folder)
    plain = edited(fp8, tmp_path / "plain", lambda t: [dense(t, n[:-10]) for n in list(t) if n.endswith("_scale_inv")])
    edit_json(plain / "config.json", lambda c: c.pop("quantization_config"))
    model = dsj.load_pretrained(plain, dtype=None)
    edited(plain, tmp_path / "left", lambda t: t.update({O_PROJ + "_scale_inv": np.ones((2, 1), F32)}))
    again = noted(lambda: dsj.load_pretrained(tmp_path / "left", dtype=None), f"left out: {O_PROJ}_scale_inv")
    assert_same_model(again, model)


def test_what_is_no_weight_is_left_out(fp32, tmp_path):
    others = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.layers.1.mlp.experts._extra_state": np.zeros(0, np.float32),
        "model.layers.1.mlp.shared_experts.linear_fc1._extra_state": np.ones(7, np.uint8),
        "model.empty": np.zeros((0, 3), np.float32),
    }
    folder = edited(fp32, tmp_path / "model", lambda tensors: tensors.update(others))
    model = noted(lambda: dsj.load_pretrained(folder, F32), "4 tensors that are no weights are left out", *others)
    assert_same_model(model, edge_model())
    noted(lambda: convert(folder, tmp_path / "orbax"))
    convert(tmp_path / "orbax", tmp_path / "back")
    assert_same_tensors(fp32, tmp_path / "back")


# --- Files -----------------------------------------------------------------------------------------------------


def test_files_beside_the_model(fp32, tmp_path):
    """`model.safetensors` is the model, whatever lies beside it, an index of other files included."""
    folder = shutil.copytree(fp32, tmp_path / "model")
    write_arrays(folder, {"base_model.model.x.lora_A.weight": np.ones((2, 2), F32)}, "adapter_model.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: "model-00001-of-00001.safetensors"}}))
    words = ("model.safetensors is the model", "adapter_model.safetensors, consolidated.safetensors, pytorch_model-")
    assert_same_model(noted(lambda: dsj.load_pretrained(folder, F32), *words), edge_model())
    noted(lambda: convert(folder, tmp_path / "orbax"), *words)
    noted(lambda: dsj.save_pretrained(edge_model(), tmp_path / "like", like=folder), *words)
    assert_same_tensors(fp32, tmp_path / "like")


@pytest.mark.parametrize("indexed", [True, False])
def test_several_files_beside_others(fp32, tmp_path, monkeypatch, indexed):
    monkeypatch.setattr("deepseek_jax.convert.files.SHARD_BYTES", 1_000_000)
    folder = tmp_path / "model"
    dsj.save_pretrained(edge_model(), folder)
    if not indexed:
        (folder / INDEX).unlink()
    write_arrays(folder, {NORM: np.ones(3, F32)}, "consolidated.safetensors")
    model = noted(lambda: dsj.load_pretrained(folder, F32), "consolidated.safetensors beside it: left out")
    assert_same_model(model, edge_model())
    if indexed:
        sorted(folder.glob("model-00002-*"))[0].unlink()
        with (
            pytest.warns(CheckpointWarning),
            pytest.raises(CheckpointError, match=r"model-00002-of-\S+\.safetensors does not exist, but .*index"),
        ):
            dsj.load_pretrained(folder)


def test_files_that_are_links(fp32, tmp_path):
    """As the hub's cache lays them out."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    for i, file in enumerate(sorted(fp32.iterdir())):
        shutil.copy(file, tmp_path / "blobs" / str(i))
        (tmp_path / "snapshots/abc" / file.name).symlink_to(f"../../blobs/{i}")
    folder = tmp_path / "snapshots/abc"
    assert_same_model(dsj.load_pretrained(folder, dtype=None), edge_model())
    convert(folder, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    dsj.save_pretrained(edge_model(), tmp_path / "like", like=folder)
    for again in (tmp_path / "back", tmp_path / "like"):
        assert_same_tensors(fp32, again)
        assert not (again / "model.safetensors").is_symlink()


def test_metadata_that_is_null(fp32, tmp_path):
    folder = shutil.copytree(fp32, tmp_path / "model")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + size]) | {"__metadata__": None}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    assert read_header(file)[1] == {}
    assert_same_model(dsj.load_pretrained(folder, dtype=None), edge_model())


# --- Names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.model.", "language_model.model.", "model.language_model."])
def test_other_prefixes(fp32, tmp_path, prefix):
    """Of the trunk, and of the head where the prefix is one of the whole model."""
    outer = prefix.removesuffix("model.") if prefix.count(".") > 1 and prefix.endswith(".model.") else ""

    def change(tensors):
        for name in list(tensors):
            trunk = name.startswith("model.")
            tensors[prefix + name.removeprefix("model.") if trunk else outer + name] = tensors.pop(name)

    folder = edited(fp32, tmp_path / "model", change)
    assert "model.norm.weight" not in Checkpoint(folder).entries
    model = noted(lambda: dsj.load_pretrained(folder, F32), repr(prefix), "'model.'")
    assert_same_model(model, edge_model())
    noted(lambda: dsj.save_pretrained(model, tmp_path / "like", like=folder))
    noted(lambda: convert(folder, tmp_path / "orbax"))
    convert(tmp_path / "orbax", tmp_path / "back")
    for again in (tmp_path / "like", tmp_path / "back"):
        assert_same_tensors(fp32, again)
    if prefix:
        edited(folder, tmp_path / "more", lambda tensors: tensors.update({"vision.patch.weight": np.ones(3, F32)}))
        with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match="1 tensors are unexpected: vision"):
            dsj.load_pretrained(tmp_path / "more")


def test_experts_in_one_tensor(fp32, tmp_path):
    folder = edited(fp32, tmp_path / "model", fuse)
    model = noted(
        lambda: dsj.load_pretrained(folder, F32), "model.layers.1.mlp.experts.down_proj and 5 more", "transformers 5"
    )
    assert_same_model(model, edge_model())
    noted(lambda: dsj.save_pretrained(model, tmp_path / "like", like=folder))
    noted(lambda: convert(folder, tmp_path / "orbax"), "save_original_format=False")
    convert(tmp_path / "orbax", tmp_path / "back")
    for again in (tmp_path / "like", tmp_path / "back"):
        assert_same_tensors(fp32, again)
    twice = edited(folder, tmp_path / "twice", lambda t: t.update({EXPERT: np.ones((48, 136), F32)}))
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match=f"read as {EXPERT}, which is there"):
        dsj.load_pretrained(twice)


def test_fp8_experts_in_one_tensor(tmp_path):
    """Where blocks end between gate and up; else they would have scales in common."""
    for name, size in (("whole", 128), ("odd", 96)):
        cfg = replace(EDGES, moe=replace(EDGES.moe, expert_dim=size))
        dsj.save_pretrained(random_model(cfg, seed=2), tmp_path / name, quantize="fp8")
    folder = edited(tmp_path / "whole", tmp_path / "fused", fuse)
    model = noted(lambda: dsj.load_pretrained(folder, dtype=None))
    assert_same_model(model, dsj.load_pretrained(tmp_path / "whole", dtype=None))
    noted(lambda: dsj.save_pretrained(model, tmp_path / "like", like=folder))
    assert_same_tensors(tmp_path / "whole", tmp_path / "like")

    def common(tensors):
        fuse(tensors)
        for name in [n for n in tensors if n.endswith("gate_up_proj_scale_inv")]:
            tensors[name] = tensors[name][:, :1]

    odd = edited(tmp_path / "odd", tmp_path / "common", common)
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match="blocks of 128 rows span gate and up"):
        dsj.load_pretrained(odd)


def test_the_references_own_fused_experts(tmp_path):
    """What `save_original_format=False` writes has the values of what it writes by default."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from deepseek_jax.configs.hf import config_to_json

    torch.manual_seed(0)
    reference = DeepseekV3ForCausalLM(DeepseekV3Config(**config_to_json(replace(EDGES, mtp_depth=0))))
    with torch.no_grad():
        for tensor in reference.state_dict().values():
            tensor.normal_()
    reference.save_pretrained(tmp_path / "published")
    reference.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in Checkpoint(tmp_path / "fused").entries
    model = noted(lambda: dsj.load_pretrained(tmp_path / "fused", dtype=None))
    assert_same_model(model, dsj.load_pretrained(tmp_path / "published", dtype=None))


# --- Exports by choice -------------------------------------------------------------------------------------------


def dtypes(folder: Path) -> set[str]:
    entries = Checkpoint(folder).entries.values()
    return {e.dtype.name for e in entries if not e.name.endswith("e_score_correction_bias")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exports_in_a_dtype(fp8, tmp_path, dtype):
    """From any model and like any folder; router biases stay float32, and config.json says what is there."""
    model = dsj.load_pretrained(fp8, dtype=None)
    edit_json(shutil.copytree(fp8, tmp_path / "like") / "config.json", lambda c: c.update(auto_map={"x": "y"}))
    dsj.save_pretrained(model, tmp_path / "plain", dtype=dtype)
    dsj.save_pretrained(model, tmp_path / "a", dtype=jnp.dtype(dtype), like=tmp_path / "like")
    assert main(["convert", str(tmp_path / "like"), str(tmp_path / "b"), "--dtype", dtype]) == 0
    for folder in ("plain", "a", "b"):
        assert dtypes(tmp_path / folder) == {dtype}
        assert_same_model(dsj.load_pretrained(tmp_path / folder, dtype=None), dsj.load_pretrained(fp8, dtype=dtype))
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["torch_dtype"], "quantization_config" in config) == (dtype, False)
        assert config.get("auto_map") == (None if folder == "plain" else {"x": "y"})


def test_exports_in_fp8(fp8, fp32, tmp_path):
    """Blocks that are there keep their bytes; others are made, and all else is as the source has it."""
    mixed = edited(fp8, tmp_path / "mixed", lambda tensors: dense(tensors, O_PROJ))
    assert main(["convert", str(mixed), str(tmp_path / "whole"), "--dtype", "fp8"]) == 0
    before, after = arrays(fp8), arrays(tmp_path / "whole")
    assert after[O_PROJ].dtype == FP8
    assert {n for n in before if before[n].tobytes() != after[n].tobytes()} <= {O_PROJ, O_PROJ + "_scale_inv"}
    assert main(["convert", str(fp32), str(tmp_path / "fp8"), "--dtype", "fp8"]) == 0
    assert arrays(tmp_path / "fp8")[KV_A].tobytes() == before[KV_A].tobytes()
    assert arrays(tmp_path / "fp8")[NORM].dtype == F32
    assert "quantization_config" in json.loads((tmp_path / "fp8/config.json").read_text())


def test_exports_that_are_refused(fp8, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"dtype float32 with quantize='fp8': choose"):
        dsj.save_pretrained(edge_model(), tmp_path / "a", quantize="fp8", dtype="float32")
    with pytest.raises(ValueError, match="dtype int8 with quantize=None: choose float32, bfloat16 or float16"):
        dsj.save_pretrained(edge_model(), tmp_path / "a", dtype="int8")
    convert(fp8, tmp_path / "orbax")
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "a"), "--dtype", "float32"]) == 1
    assert main(["convert", str(fp8), "--dry-run", "--dtype", "float32"]) == 2
    nan = edited(fp8, tmp_path / "nan", lambda t: t.update({NORM: np.full_like(t[NORM], np.nan)}))
    assert main(["convert", str(nan), str(tmp_path / "a"), "--dtype", "fp8"]) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert "is a converted folder: convert it back first" in first
    assert "leave --dtype out" in second
    assert f"{NORM} is nan at [0]" in third
    assert {p.name for p in tmp_path.iterdir()} == {"orbax", "nan"}


def test_like_a_converted_folder(fp8, tmp_path):
    """Its tensors' dtypes, scales and bytes, and the files that it was made of."""
    folder = edited(fp8, tmp_path / "mixed", lambda tensors: dense(tensors, EXPERT))
    noted(lambda: convert(folder, tmp_path / "orbax"))
    dsj.save_pretrained(dsj.load_pretrained(folder, dtype=F32), tmp_path / "like", like=tmp_path / "orbax")
    assert_same_tensors(folder, tmp_path / "like")


def test_the_command_line_says_it_in_one_line(fp8, tmp_path, capsys):
    folder = edited(fp8, tmp_path / "model", without_mtp)
    assert main(["convert", str(folder), str(tmp_path / "orbax")]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"note: {folder}: config.json announces 1 MTP layers")
