"""V4's files: released names and dtypes, FP8 beside FP4, hash tables, what transformers writes, and DSpark's drafts."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from architectures import ARCHITECTURES
from folders import arrays, assert_same_tensors, edit_json, edited, with_fp4_experts, write_arrays
from reference import forward
from test_pretrained import assert_same_model
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.configs.releases.v4 import deepseek_v4_flash, deepseek_v4_pro
from deepseek_jax.convert.names import layout
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.stream import convert
from deepseek_jax.core.params import HashTable, is_variable
from deepseek_jax.core.quant import FP4, FP8, PACKED
from deepseek_jax.notes import CheckpointWarning

V4 = ARCHITECTURES["v4"]
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
TABLE = "layers.2.ffn.gate.tid2eid"


@cache
def model():
    return random_model(V4, seed=3)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """As releases are: experts in FP4, the other maps in FP8, all scales in e8m0, the rest in bfloat16 or float32."""
    folder = tmp_path_factory.mktemp("v4")
    dsj.save_pretrained(model(), folder / "fp8", quantize="fp8")
    source = with_fp4_experts(folder / "fp8", folder / "model")
    tensors = arrays(source)
    for name in [name for name in tensors if name.endswith(".scale") and tensors[name].dtype == np.float32]:
        tensors[name] = np.exp2(np.ceil(np.log2(tensors[name]))).astype(E8M0)
    write_arrays(source, tensors)
    edit_json(source / "config.json", lambda config: config["quantization_config"].update(scale_fmt="ue8m0"))
    return source


def test_the_dtypes_of_a_release(released):
    for name, array in arrays(released).items():
        if ".experts." in name and name.endswith(".weight"):
            wanted = PACKED
        elif name.endswith("tid2eid"):
            wanted = np.int64
        elif name.endswith(".scale"):
            wanted = E8M0
        elif "hc_" in name or name.endswith(("attn_sink", ".ape", "gate.bias")):
            wanted = np.float32
        else:
            maps = ("wq_a", "wq_b", "attn.wkv", "wo_a", "wo_b", "e_proj", "h_proj", "w1", "w2", "w3")
            wanted = FP8 if name.endswith(tuple(f".{part}.weight" for part in maps)) else ml_dtypes.bfloat16
        assert array.dtype == wanted, name
    config = json.loads((released / "config.json").read_text())
    assert config["expert_dtype"] == "fp4"
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_every_byte_comes_back(released, tmp_path, dtype):
    held = dsj.load_pretrained(released, dtype)
    dsj.save_pretrained(held, tmp_path / "again", like=released)
    dsj.save_pretrained(held, tmp_path / "fp8", quantize="fp8", like=released)
    for name in ("again", "fp8"):
        assert_same_tensors(released, tmp_path / name)
    if dtype is None:
        dsj.save_pretrained(held, tmp_path / "alone")
        assert_same_tensors(released, tmp_path / "alone")
        assert held.stacks[3].ffn.gate_up.get_value().dtype == FP4
        config = json.loads((tmp_path / "alone/config.json").read_text())
        assert (config["expert_dtype"], config["quantization_config"]["scale_fmt"]) == ("fp4", "ue8m0")
    else:
        # What is float32 in every model, and tables, have their own dtypes.
        fixed = [held.collapse.map, held.stacks[0].attn.sink, held.stacks[1].attn.compressor.position]
        assert {v.get_value().dtype for v in fixed} == {jnp.dtype(jnp.float32)}
    tables = [v for v in jax.tree.leaves(held, is_leaf=is_variable) if isinstance(v, HashTable)]
    assert [v.get_value().dtype for v in tables] == [jnp.int32] * 2


def test_streamed_and_computed_as_stored(released, tmp_path):
    """Through Orbax in its bytes; a model held in FP4 and FP8 computes what its values in float32 do."""
    convert(released, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "again")
    assert_same_tensors(released, tmp_path / "again")
    stored, wide = (dsj.load_pretrained(tmp_path / "orbax", dtype) for dtype in (None, jnp.float32))
    assert_same_model(stored, dsj.load_pretrained(released, None))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V4.vocab_size, (1, 24)), jnp.int32)
    ours, theirs = (forward(m, tokens, ctx=dsj.Context(dtype=jnp.float32)).logits for m in (stored, wide))
    assert float(jnp.abs(ours - theirs).max()) <= 2e-2 * float(jnp.abs(theirs).max())  # norms stay in bfloat16


@pytest.mark.slow
def test_a_release_is_verified_against_transformers(released):
    """PyTorch reads FP8 and FP4 by itself."""
    from deepseek_jax.convert.ladder import ladder

    rows = list(ladder(released, np.random.default_rng(0).integers(0, 256, (1, 24)), steps=2))
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


def test_transformers_names_are_read(tmp_path):
    """Its own model, saved by itself: half its names; what is written then has the released ones."""
    import torch
    from reference import hf_config
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(0)
    theirs = DeepseekV4ForCausalLM(DeepseekV4Config(**hf_config(V4)))
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            tensor.random_(8) if name.endswith("tid2eid") else tensor.normal_()
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.warns(CheckpointWarning, match="the names are those that transformers gives V4|MTP layers"):
        ours = dsj.load_pretrained(tmp_path / "hf", jnp.float32)
    dsj.save_pretrained(ours, tmp_path / "ours")
    written = arrays(tmp_path / "ours")
    assert {t.name for t in layout(ours.cfg)[0]} == set(written)
    again = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_tables(released, tmp_path):
    """Their values are experts; int32 is read, and kept where the model is held as it is stored."""
    narrow = edited(released, tmp_path / "int32", lambda t: t.update({TABLE: t[TABLE].astype(np.int32)}))
    dsj.save_pretrained(dsj.load_pretrained(narrow, None), tmp_path / "again")
    assert arrays(tmp_path / "again")[TABLE].dtype == np.int32
    for value, what in ((8, r"tid2eid is 8 at \[5, 1\], which is none of the 8 experts"), (-1, "tid2eid is -1")):

        def change(tensors, value=value):
            tensors[TABLE] = tensors[TABLE].copy()
            tensors[TABLE][5, 1] = value

        with pytest.raises(CheckpointError, match=what):
            dsj.load_pretrained(edited(released, tmp_path / str(value), change))
    floats = edited(released, tmp_path / "floats", lambda t: t.update({TABLE: t[TABLE].astype(np.float32)}))
    with pytest.raises(CheckpointError, match="tid2eid has dtype float32, not one of int32, int64"):
        dsj.load_pretrained(floats)


def test_dspark_files_are_read_without_drafts(released, tmp_path):
    """The main model of files whose mtp.* are another draft model; a conversion, which would lose it, refuses."""

    def change(tensors: dict) -> None:
        for name in [name for name in tensors if name.startswith("mtp.0.")]:
            for depth in (1, 2):
                tensors[name.replace("mtp.0.", f"mtp.{depth}.")] = tensors[name]
        tensors["mtp.2.markov_head.markov_w1"] = np.ones((4, 4), np.float32)

    folder = edited(released, tmp_path / "model", change)
    edit_json(folder / "config.json", lambda config: config.pop("num_nextn_predict_layers"))
    with pytest.warns(CheckpointWarning) as found:
        held = dsj.load_pretrained(folder, jnp.float32)
    notes = " ".join(str(warning.message) for warning in found)
    assert "the drafts in these files are DSpark's, which is not built: read without drafts" in notes
    assert "those stored as mtp.0, 1, 2 are left out" in notes
    assert held.cfg.mtp_depth == 0
    assert_same_model(held.stacks, dsj.load_pretrained(released, jnp.float32).stacks)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match=r"mtp\.0, 1, 2 are DSpark's draft model"),
    ):
        convert(folder, tmp_path / "orbax")
    edit_json(folder / "config.json", lambda config: config.update(dspark_block_size=5, num_nextn_predict_layers=3))
    with pytest.warns(CheckpointWarning) as found:
        assert dsj.load_pretrained(folder, jnp.float32).cfg.mtp_depth == 0
    assert any("dspark_block_size: DSpark, the draft model of these files, is not" in str(w.message) for w in found)


def test_no_drafts_are_announced_that_are_not_there(released, tmp_path):
    folder = edited(
        released, tmp_path / "model", lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")]
    )
    with pytest.warns(CheckpointWarning, match="announces 1 MTP layers .*, of which the files hold none: read with 0"):
        assert dsj.load_pretrained(folder).cfg.mtp_depth == 0


def test_the_tensors_of_the_releases():
    """Flash's file has 69,187 tensors, scales included; shapes as in its headers."""
    tensors = {t.name: t for t in layout(deepseek_v4_flash("flash"))[0]}
    assert len(tensors) + sum(t.fp8 for t in tensors.values()) == 69_187
    shapes = {
        "hc_head_fn": (4, 16384),
        "layers.0.hc_attn_fn": (24, 16384),
        "layers.0.attn.wq_b.weight": (32768, 1024),
        "layers.0.attn.wo_a.weight": (8192, 4096),
        "layers.0.attn.wo_b.weight": (4096, 8192),
        "layers.0.ffn.gate.tid2eid": (129280, 6),
        "layers.2.attn.compressor.ape": (4, 1024),
        "layers.2.attn.indexer.wq_b.weight": (8192, 1024),
        "layers.2.attn.indexer.compressor.wkv.weight": (256, 4096),
        "layers.3.attn.compressor.ape": (128, 512),
        "layers.3.attn.compressor.wgate.weight": (512, 4096),
        "layers.42.ffn.experts.255.w2.weight": (4096, 2048),
        "mtp.0.e_proj.weight": (4096, 4096),
    }
    assert {name: tensors[name].shape for name in shapes} == shapes
    assert "layers.3.attn.indexer.wq_b.weight" not in tensors
    assert "layers.3.ffn.gate.bias" in tensors
    assert "layers.60.attn.indexer.wq_b.weight" in {t.name for t in layout(deepseek_v4_pro("pro"))[0]}
