"""`load_pretrained` and `save_pretrained`: byte-equal round trips, the reference's names, refusals."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import EDGES, arrays, assert_same_tensors, edge_model, edit_json, with_fp4_experts, write_arrays
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.configs.schema import ConfigError
from deepseek_jax.convert import files as files_module
from deepseek_jax.convert import save as save_module
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.names import layout
from deepseek_jax.convert.safetensors import INDEX, CheckpointError, Writer
from deepseek_jax.convert.shards import read_values
from deepseek_jax.core.params import RouterBias, is_variable
from deepseek_jax.core.quant import FP8, PACKED, Quantized, dequantize_matrix, quantize_matrix, unpack
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.text.tokenizer import Tokenizer

BF16 = np.dtype(ml_dtypes.bfloat16)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    """FP8 blocks, bfloat16 for the rest: the released layout."""
    path = tmp_path_factory.mktemp("fp8") / "model"
    dsj.save_pretrained(edge_model(), path, quantize="fp8")
    return path


@pytest.fixture(scope="module")
def fp32(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "model"
    dsj.save_pretrained(edge_model(), path)
    return path


@pytest.fixture
def scratch(fp8, tmp_path) -> Path:
    """A copy of the FP8 folder, to be damaged."""
    return shutil.copytree(fp8, tmp_path / "copy")


def assert_same_model(a, b):
    left, right = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [p for p, _ in left] == [p for p, _ in right]
    for (path, x), (_, y) in zip(left, right, strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def test_as_stored_is_the_model(fp32):
    assert_same_model(dsj.load_pretrained(fp32, dtype=None), edge_model())
    assert dsj.load_pretrained(fp32, dtype=jnp.float32).cfg == replace(EDGES, name="model")


def test_what_is_quantised(fp8):
    """FP8 for the linear maps, partial blocks at the edges; the rest bfloat16, the router bias float32."""
    tensors, _ = layout(EDGES)
    entries = Checkpoint(fp8).entries
    assert set(entries) == {t.name for t in tensors} | {t.name + "_scale_inv" for t in tensors if t.fp8}
    for tensor in tensors:
        entry = entries[tensor.name]
        assert entry.shape == tensor.shape
        if tensor.fp8:
            scale = entries[tensor.name + "_scale_inv"]
            assert entry.dtype == FP8
            assert (scale.dtype, scale.shape) == (np.float32, tuple(-(-n // 128) for n in tensor.shape))
        else:
            bias = tensor.name.endswith("e_score_correction_bias")
            assert entry.dtype == (np.float32 if bias else BF16), tensor.name
    quantised = {t.name.split(".", 3)[-1] for t in tensors if t.fp8 and ".layers.3." in t.name}
    assert "self_attn.q_a_proj.weight" in quantised
    assert "mlp.experts.7.up_proj.weight" in quantised
    assert "mlp.shared_experts.down_proj.weight" in quantised
    assert not quantised & {
        "eh_proj.weight",
        "mlp.gate.weight",
        "embed_tokens.weight",
        "shared_head.head.weight",
    }


def test_quantised_round_trip(fp8, tmp_path):
    model = dsj.load_pretrained(fp8, dtype=None)
    held = {type(v.get_value()) for v in jax.tree.leaves(model, is_leaf=is_variable)}
    assert Quantized in held
    dsj.save_pretrained(model, tmp_path / "again")
    assert_same_tensors(fp8, tmp_path / "again")
    dsj.save_pretrained(model, tmp_path / "fp8", quantize="fp8")
    assert_same_tensors(fp8, tmp_path / "fp8")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scales", ["float32", "powers", "e8m0", "fp4"])
def test_dequantised_round_trip(fp8, tmp_path, dtype, scales):
    """Blocks that the values still represent keep their scales, also where a new scale would differ."""
    source = rescaled(fp8, tmp_path / "source", scales)
    model = dsj.load_pretrained(source, dtype=dtype)
    dsj.save_pretrained(model, tmp_path / "again", quantize="fp8", like=source)
    assert_same_tensors(source, tmp_path / "again")
    dsj.save_pretrained(model, tmp_path / "like", like=source)
    assert_same_tensors(source, tmp_path / "like")
    dsj.save_pretrained(dsj.load_pretrained(source, dtype=None), tmp_path / "stored")
    assert_same_tensors(source, tmp_path / "stored")


def test_fp4_is_read_in_parts(fp8, tmp_path):
    """As on a mesh, where a device reads of a matrix what its shard holds; FP4 has two columns a byte."""
    source = with_fp4_experts(fp8, tmp_path / "source")
    ctx = dsj.Context(mesh=make_mesh(devices=jax.devices()[:1]))
    for dtype in (None, jnp.float32):
        assert_same_model(dsj.load_pretrained(source, dtype, ctx), dsj.load_pretrained(source, dtype))
    checkpoint = Checkpoint(source)
    entry = checkpoint.entries["model.layers.1.mlp.experts.5.up_proj.weight"]
    whole = unpack(checkpoint.read(entry.name))
    for rows, columns in ((slice(3, 9), slice(0, 136)), (slice(0, 48), slice(68, 136)), (slice(1, 2), slice(5, 12))):
        np.testing.assert_array_equal(read_values(entry, (rows, columns)), whole[rows, columns])


def rescaled(fp8: Path, folder: Path, scales: str) -> Path:
    """The same folder with scales that are powers of two, larger than a block needs; "fp4": with experts in FP4."""
    if scales == "float32":
        return fp8
    if scales == "fp4":
        return with_fp4_experts(fp8, folder)
    shutil.copytree(fp8, folder)
    tensors = arrays(folder)
    for name, array in tensors.items():
        if name.endswith("_scale_inv"):
            rounded = np.exp2(np.ceil(np.log2(array)) + 1).astype(np.float32)
            tensors[name] = rounded.astype(E8M0) if scales == "e8m0" else rounded
    write_arrays(folder, tensors)
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(scale_fmt="ue8m0"))
    return folder


@pytest.mark.parametrize("scales", ["float32", "powers", "e8m0"])
def test_changed_blocks_get_new_scales(fp8, tmp_path, scales):
    """One changed value changes its own block; all other blocks of all tensors keep their bytes."""
    source = rescaled(fp8, tmp_path / "source", scales)
    model = dsj.load_pretrained(source, dtype=jnp.float32)
    leaf = model.stacks[0].attn.kv_a
    value = leaf.get_value()
    # Published [out, in] = ours [in, out]: block (0, 1) of [40, 136].
    leaf.set_value(value.at[0, 130, 7].set(3.0))
    dsj.save_pretrained(model, tmp_path / "new", quantize="fp8", like=source)
    before, after = arrays(source), arrays(tmp_path / "new")
    for name in before:
        if not name.startswith(KV_A):
            assert before[name].tobytes() == after[name].tobytes(), name
    old, new = before[KV_A + "_scale_inv"], after[KV_A + "_scale_inv"]
    assert new.dtype == old.dtype
    assert old[0, 0] == new[0, 0]
    scale = np.float32(new[0, 1])
    assert scale >= np.float32(3 / 448)
    assert scale == (np.float32(3 / 448) if scales == "float32" else 2.0**-7)
    restored = dequantize_matrix(after[KV_A], new, (128, 128))
    np.testing.assert_allclose(restored[7, 130], 3.0, rtol=2**-4)
    np.testing.assert_array_equal(before[KV_A][:, :128].view(np.uint8), after[KV_A][:, :128].view(np.uint8))


def test_dequantised_values_are_the_formula(fp8):
    """Value times its block's scale in float32, then the cast; one leaf each of every index shape."""
    stored = arrays(fp8)

    def formula(name):
        q, s = stored[name].astype(np.float32), stored[name + "_scale_inv"]
        spread = s.repeat(128, 0)[: q.shape[0]].repeat(128, 1)[:, : q.shape[1]]
        return (q * spread).astype(BF16)

    model = dsj.load_pretrained(fp8)
    moe, mtp, a = model.stacks[1], model.mtp[0], EDGES.attention
    pairs = [
        (moe.attn.q_b[1].reshape(a.q_rank, -1), "model.layers.2.self_attn.q_b_proj.weight"),
        (moe.attn.o[0].reshape(-1, EDGES.dim), "model.layers.1.self_attn.o_proj.weight"),
        (moe.ffn.gate_up[1, 5, :, 0], "model.layers.2.mlp.experts.5.gate_proj.weight"),
        (moe.ffn.gate_up[1, 5, :, 1], "model.layers.2.mlp.experts.5.up_proj.weight"),
        (moe.ffn.down[0, 3], "model.layers.1.mlp.experts.3.down_proj.weight"),
        (model.stacks[0].ffn.gate_up[0, :, 1], "model.layers.0.mlp.up_proj.weight"),
        (mtp.block.ffn.shared.down.get_value(), "model.layers.3.mlp.shared_experts.down_proj.weight"),
    ]
    for ours, name in pairs:
        np.testing.assert_array_equal(np.asarray(ours).T, formula(name), err_msg=name)
    as_stored = dsj.load_pretrained(fp8, dtype=None)
    for v in jax.tree.leaves(as_stored, is_leaf=is_variable):
        if isinstance(v, RouterBias):
            assert v.get_value().dtype == jnp.float32
    quantised = as_stored.stacks[1].ffn.gate_up.get_value().dequantize(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(quantised), np.asarray(moe.ffn.gate_up.get_value()))
    quantised = as_stored.stacks[1].attn.o.get_value().dequantize(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(quantised), np.asarray(moe.attn.o.get_value()))


CONFIGS = {
    "no query compression": {"attention": replace(EDGES.attention, q_rank=None)},
    "all dense": {"n_dense_layers": 3, "moe": None},
    "all MoE": {"n_dense_layers": 0},
    "no MTP": {"mtp_depth": 0},
    "two MTP": {"mtp_depth": 2},
    "tied": {"tie_embeddings": True},
    "no shared experts": {"moe": replace(EDGES.moe, n_shared=0)},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_other_architectures(tmp_path, case):
    model = random_model(replace(EDGES, **CONFIGS[case]), seed=1, dtype=jnp.bfloat16)
    dsj.save_pretrained(model, tmp_path / "a")
    again = dsj.load_pretrained(tmp_path / "a", dtype=None)
    assert_same_model(again, model)
    assert replace(again.cfg, name=model.cfg.name) == model.cfg
    dsj.save_pretrained(model, tmp_path / "q", quantize="fp8")
    dsj.save_pretrained(dsj.load_pretrained(tmp_path / "q", dtype=None), tmp_path / "q2")
    assert_same_tensors(tmp_path / "q", tmp_path / "q2")


def test_other_block_sizes(tmp_path, fp8):
    """A checkpoint says its block; what is loaded as stored is saved with it."""
    tensors = arrays(fp8)
    for name in [n for n in tensors if n + "_scale_inv" in tensors]:
        w = dequantize_matrix(tensors[name], tensors[name + "_scale_inv"], (128, 128))
        tensors[name], tensors[name + "_scale_inv"] = quantize_matrix(w, (64, 32))
    shutil.copytree(fp8, tmp_path / "source")
    write_arrays(tmp_path / "source", tensors)
    edit_json(tmp_path / "source/config.json", lambda c: c["quantization_config"].update(weight_block_size=[64, 32]))
    model = dsj.load_pretrained(tmp_path / "source", dtype=None)
    assert model.stacks[1].ffn.gate_up.get_value().block == (1, 32, 1, 64)
    dsj.save_pretrained(model, tmp_path / "again")
    assert_same_tensors(tmp_path / "source", tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [64, 32]
    dsj.save_pretrained(dsj.load_pretrained(tmp_path / "source"), tmp_path / "like", like=tmp_path / "source")
    assert_same_tensors(tmp_path / "source", tmp_path / "like")
    # Another block means other scales: values are taken over, bytes are not.
    dsj.save_pretrained(model, tmp_path / "wide", like=fp8)
    assert Checkpoint(tmp_path / "wide").entries[KV_A + "_scale_inv"].shape == (1, 2)


def test_a_block_beyond_every_tensor_is_one_scale_a_tensor(scratch, tmp_path):
    changed = {n: a[:1, :1] if n.endswith("_scale_inv") else a for n, a in arrays(scratch).items()}
    write_arrays(scratch, changed)
    read = []
    for number, block in enumerate(([512, 512], [10**30, 2**62])):
        config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
        edit_json(scratch / "config.json", lambda c, config=config: c.update(quantization_config=config))
        read.append(dsj.load_pretrained(scratch, dtype=None))
        dsj.save_pretrained(read[-1], tmp_path / str(number))
        dsj.save_pretrained(read[-1], tmp_path / f"like-{number}", like=scratch)
        for written in (str(number), f"like-{number}"):
            again = arrays(tmp_path / written)
            assert all(again[name].tobytes() == array.tobytes() for name, array in changed.items())
    for a, b in zip(*map(jax.tree.leaves, read), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert_same_model(dsj.load_pretrained(scratch, jnp.float32), dsj.load_pretrained(tmp_path / "0", jnp.float32))


def test_a_model_that_its_config_json_cannot_carry_is_not_saved(fp8, tmp_path):
    model = random_model(replace(EDGES, model_type="mine"))
    for like in (None, fp8):
        with pytest.raises(ConfigError, match=r"cannot carry this model, which is not saved: .*model_type 'mine'"):
            dsj.save_pretrained(model, tmp_path / "new", like=like)
    assert list(tmp_path.iterdir()) == []


def test_casting_to_the_template(fp32, fp8, tmp_path):
    """``like`` decides every dtype: float32 in, the FP8 folder's dtypes out, and the other way round."""
    dsj.save_pretrained(edge_model(), tmp_path / "a", like=fp8)
    dtypes = {name: entry.dtype for name, entry in Checkpoint(fp8).entries.items()}
    assert {name: entry.dtype for name, entry in Checkpoint(tmp_path / "a").entries.items()} == dtypes
    dsj.save_pretrained(dsj.load_pretrained(fp8, dtype=None), tmp_path / "b", like=fp32)
    assert {entry.dtype for entry in Checkpoint(tmp_path / "b").entries.values()} == {np.dtype(np.float32)}
    assert_same_model(dsj.load_pretrained(tmp_path / "b", jnp.float32), dsj.load_pretrained(fp8, jnp.float32))
    assert "quantization_config" not in json.loads((tmp_path / "b/config.json").read_text())


def test_a_tokenizer_goes_along_byte_for_byte(fp32, tmp_path, root):
    words, model = root / "checkpoints/tiny-v3", dsj.load_pretrained(fp32)
    for number, given in enumerate((words, str(words), dsj.load_tokenizer(words))):
        dsj.save_pretrained(model, tmp_path / str(number), tokenizer=given)
        copies = {file.name: file.read_bytes() for file in (tmp_path / str(number)).glob("tokenizer*")}
        assert copies == {file.name: file.read_bytes() for file in words.glob("tokenizer*")}
    for given, match in (
        (tmp_path, "has no tokenizer.json"),
        (Tokenizer(dsj.load_tokenizer(words).backend), "in memory"),
    ):
        with pytest.raises(ValueError, match=match):
            dsj.save_pretrained(model, tmp_path / "none", tokenizer=given)
    assert not (tmp_path / "none").exists()


def test_shards_and_template_files(fp8, tmp_path, monkeypatch):
    """The split, the index, the tokenizer and unknown config fields come from ``like``."""
    monkeypatch.setattr(files_module, "SHARD_BYTES", 100_000)
    model = dsj.load_pretrained(fp8, dtype=None)
    dsj.save_pretrained(model, tmp_path / "sharded")
    files = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_tensors(fp8, tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / INDEX).read_text())
    total = sum(entry.nbytes for entry in Checkpoint(fp8).entries.values())
    assert index["metadata"]["total_size"] == total
    source = tmp_path / "sharded"
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "notes.txt").write_text("not copied")
    edit_json(source / "config.json", lambda c: c.update(auto_map={"x": "y"}, torch_dtype="float16"))
    monkeypatch.undo()
    dsj.save_pretrained(model, tmp_path / "again", like=source)
    assert_same_tensors(source, tmp_path / "again")
    assert {p.name for p in (tmp_path / "again").iterdir()} == {p.name for p in source.iterdir()} - {"notes.txt"}
    assert json.loads((tmp_path / "again" / INDEX).read_text())["weight_map"] == index["weight_map"]
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config == json.loads((source / "config.json").read_text())
    # A model that differs from the template keeps its own values, and the template's further fields.
    changed = jax.tree.map(lambda a: a, model)
    changed.cfg = replace(model.cfg, max_length=99)
    dsj.save_pretrained(changed, tmp_path / "changed", like=source)
    config = json.loads((tmp_path / "changed/config.json").read_text())
    assert (config["max_position_embeddings"], config["auto_map"]) == (99, {"x": "y"})


def test_written_by(fp8):
    from deepseek_jax.convert.safetensors import read_header

    assert read_header(fp8 / "model.safetensors")[1]["deepseek_jax_version"] == dsj.__version__
    config = json.loads((fp8 / "config.json").read_text())
    assert config["deepseek_jax_version"] == dsj.__version__
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }


# --- The reference's own files ----------------------------------------------------------------------------


@pytest.mark.parametrize("q_rank", [48, None])
def test_names_and_values_are_the_references(tmp_path, q_rank):
    """What transformers saves, we load; what we save has its names, shapes and values."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from deepseek_jax.configs.hf import config_to_json

    cfg = replace(EDGES, mtp_depth=0, attention=replace(EDGES.attention, q_rank=q_rank))
    torch.manual_seed(0)
    reference = DeepseekV3ForCausalLM(DeepseekV3Config(**config_to_json(cfg)))
    with torch.no_grad():
        for tensor in reference.state_dict().values():  # the router bias is a buffer
            tensor.normal_()
    reference.save_pretrained(tmp_path / "hf")
    model = dsj.load_pretrained(tmp_path / "hf", dtype=jnp.float32)
    dsj.save_pretrained(model, tmp_path / "ours")
    theirs, ours = Checkpoint(tmp_path / "hf"), Checkpoint(tmp_path / "ours")
    assert {n: e.shape for n, e in theirs.entries.items()} == {n: e.shape for n, e in ours.entries.items()}
    for name in theirs:
        np.testing.assert_array_equal(theirs.read(name), ours.read(name), err_msg=name)
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


# --- Refusals ---------------------------------------------------------------------------------------------


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, array):
    return lambda tensors: tensors.update({name: array})


def poke(name, index, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][index] = value

    return change


NORM = "model.norm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.2.mlp.experts.4.up_proj.weight"
DAMAGE = {
    "missing": (drop(NORM), f"1 tensors are missing: {NORM}"),
    "missing scale": (drop(KV_A + "_scale_inv"), f"missing: {KV_A}_scale_inv"),
    "missing MTP tensor": (drop("model.layers.3.eh_proj.weight"), r"missing: model\.layers\.3\.eh_proj"),
    "unexpected": (
        put("model.extra", np.ones(2, np.float32)),
        r"unexpected: model\.extra in model\.safetensors",
    ),
    "unexpected scale": (put(NORM + "_scale_inv", np.ones((1, 1), np.float32)), "unexpected: model.norm"),
    "shape": (put(NORM, np.ones(5, np.float32)), rf"{NORM} has shape \(5,\), the config implies \(136,\)"),
    "scale shape": (
        put(KV_A + "_scale_inv", np.ones((1, 1), np.float32)),
        r"scale_inv has shape \(1, 1\), blocks of \(128, 128\) imply \(1, 2\)",
    ),
    "scale dtype": (put(KV_A + "_scale_inv", np.ones((1, 2))), "dtype float64, which no scale has here: float32, bf"),
    "FP4 shape": (put(EXPERT, np.ones((48, 136), PACKED)), rf"{EXPERT} has shape .*the config implies \(48, 68\)"),
    "integers": (put(NORM, np.ones(136, np.int32)), f"{NORM} has dtype int32"),
    "FP8 norm": (put(NORM, np.ones(136, FP8)), f"{NORM} has dtype float8_e4m3fn"),
    "NaN": (poke(NORM, 7, np.nan), rf"{NORM} is nan at \[7\]"),
    "infinite": (poke(BIAS, 3, np.inf), rf"{BIAS} is inf at \[3\]"),
    "NaN in FP8": (poke(EXPERT, (2, 5), np.nan), rf"{EXPERT} is nan at \[2, 5\]"),
    "NaN scale": (poke(EXPERT + "_scale_inv", (0, 1), np.nan), r"scale_inv is nan at \[0, 1\]"),
    "negative scale": (poke(EXPERT + "_scale_inv", (0, 0), -1), r"scale_inv is -1.0 at \[0, 0\]"),
    "copy of the embedding": (
        poke("model.layers.3.embed_tokens.weight", (2, 3), 9.0),
        r"embed_tokens\.weight is a copy of .*at \[2, 3\] 9\.0 stands against",
    ),
    "copy of the head": (
        poke("model.layers.3.shared_head.head.weight", (1, 2), 9.0),
        r"shared_head\.head\.weight is a copy of lm_head\.weight.*\[1, 2\] 9\.0",
    ),
}


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensors(scratch, case, dtype):
    change, message = DAMAGE[case]
    tensors = arrays(scratch)
    change(tensors)
    write_arrays(scratch, tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        dsj.load_pretrained(scratch, dtype=dtype)
    assert str(scratch) in str(error.value)


def test_copy_of_another_dtype(scratch):
    tensors = arrays(scratch)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32)
    write_arrays(scratch, tensors)
    with pytest.raises(CheckpointError, match=r"is a copy of lm_head\.weight, but its dtype is bfloat16, not float32"):
        dsj.load_pretrained(scratch)


CONFIG_ERRORS = {
    "contradicts the tensors": ({"hidden_size": 128}, CheckpointError, "the config implies"),
    "fewer layers": ({"num_hidden_layers": 2}, CheckpointError, r"missing: model\.layers\.2\.enorm"),
    "fewer layers, no MTP": (
        {"num_hidden_layers": 2, "num_nextn_predict_layers": 0},
        CheckpointError,
        r"unexpected: model\.layers\.2\.",
    ),
    "model_type": ({"model_type": "mixtral"}, ConfigError, "'mixtral'.*deepseek_v3, kimi_k2"),
    "other quantisation": ({"quantization_config": {"quant_method": "awq"}}, ConfigError, "'awq'"),
    "other format": ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, ConfigError, "'e5m2'"),
    "other blocks": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        ConfigError,
        r"weight_block_size.*\[128\]",
    ),
    "wrong blocks": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        CheckpointError,
        r"blocks of \(64, 64\) imply",
    ),
    "no object": ({"quantization_config": "fp8"}, ConfigError, "must be an object"),
    "a forest": (
        {"num_hidden_layers": 10_000, "n_routed_experts": 10_000, "n_group": 1, "topk_group": 1},
        CheckpointError,
        "says num_hidden_layers 10000, .* n_routed_experts 10000, which is some .* tensors; the files hold .* in 4",
    ),
    "many experts": ({"n_routed_experts": 8000}, CheckpointError, "tensors are missing"),
    "many layers": ({"num_hidden_layers": 10_000}, CheckpointError, "says num_hidden_layers 10000, "),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_config_errors(scratch, case):
    changes, kind, message = CONFIG_ERRORS[case]
    edit_json(scratch / "config.json", lambda c: c.update(changes))
    with pytest.raises(kind, match=message) as error:
        dsj.load_pretrained(scratch)
    assert str(scratch) in str(error.value)


@pytest.mark.parametrize("content", [None, "", "{", "[1]"])
def test_bad_config_json(scratch, content):
    path = scratch / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        dsj.load_pretrained(scratch)


def test_bad_arguments(fp8, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        dsj.load_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="dtype int8 is not supported"):
        dsj.load_pretrained(fp8, dtype=jnp.int8)
    with pytest.raises(ValueError, match="quantize='int4'"):
        dsj.save_pretrained(edge_model(), tmp_path / "a", quantize="int4")
    assert not (tmp_path / "a").exists()


def test_destinations(fp8, tmp_path, monkeypatch):
    """Full folders are left alone; a failure leaves nothing behind."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        dsj.save_pretrained(edge_model(), full)
    (tmp_path / "empty").mkdir()
    dsj.save_pretrained(edge_model(), tmp_path / "empty")
    assert (tmp_path / "empty/config.json").exists()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module, "_published", fail)
    with pytest.raises(OSError, match="No space"):
        dsj.save_pretrained(edge_model(), tmp_path / "failed")
    assert {p.name for p in tmp_path.iterdir()} == {"full", "empty"}


def test_a_link_to_an_empty_folder_is_written_through(tmp_path):
    (tmp_path / "disk/target").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/target")
    dsj.save_pretrained(edge_model(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/target/config.json").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "link"}


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    """Full in the middle of the weights' file."""
    whole, calls = Writer._write, []

    def write(self, data, position):
        calls.append(len(data))
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, data, position)

    monkeypatch.setattr(Writer, "_write", write)
    with pytest.raises(OSError, match="No space"):
        dsj.save_pretrained(edge_model(), tmp_path / "failed")
    assert list(tmp_path.iterdir()) == []
    assert len(calls) == 6


def test_templates_of_another_model(fp8, tmp_path):
    other = random_model(replace(EDGES, ffn_dim=96), seed=0)
    with pytest.raises(CheckpointError, match=r"like=|the model's is"):
        dsj.save_pretrained(other, tmp_path / "a", like=fp8)
    fewer = random_model(replace(EDGES, n_layers=2), seed=0)
    with pytest.raises(CheckpointError, match=r"has shape|no tensor"):
        dsj.save_pretrained(fewer, tmp_path / "a", like=fp8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_values_that_are_not_finite_are_not_saved(tmp_path, quantize):
    model = jax.tree.map(lambda a: a, edge_model())
    model.stacks[0].attn.kv_a.set_value(model.stacks[0].attn.kv_a.get_value().at[0, 1, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=r"kv_a_proj_with_mqa\.weight.*not finite"):
        dsj.save_pretrained(model, tmp_path / "a", quantize=quantize)
    assert list(tmp_path.iterdir()) == []


def test_stop_tokens_are_those_of_the_generation_config(fp8, tmp_path):
    source, again, changed = (tmp_path / name for name in ("source", "again", "changed"))
    shutil.copytree(fp8, source)
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 5], "temperature": 0.6}')
    model = dsj.load_pretrained(source, dtype=None)
    assert model.cfg.eos_ids == (3, 5)
    dsj.save_pretrained(model, again, like=source)
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == 1
    assert dsj.load_pretrained(again).cfg.eos_ids == (3, 5)
    model.cfg = replace(model.cfg, eos_ids=(7,))
    dsj.save_pretrained(model, changed, like=source)
    assert dsj.load_pretrained(changed).cfg.eos_ids == (7,)
    assert json.loads((changed / "generation_config.json").read_text())["temperature"] == 0.6
    (source / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id must hold integers"):
        dsj.load_pretrained(source)
