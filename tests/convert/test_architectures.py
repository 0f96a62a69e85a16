"""Published folders of the other architectures: both ways byte for byte, and each against its reference."""

import json
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from architectures import ARCHITECTURES
from folders import arrays, assert_same_tensors
from measured import measured
from reference import forward
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.configs.schema import HyperConnections
from deepseek_jax.convert.ladder import Gradients, Row, ladder
from deepseek_jax.convert.stream import convert
from deepseek_jax.convert.verify import VerifyError, reference_model

NAMES = {
    "v4": {"hc_attn_fn", "attn.wo_a.weight", "attn.attn_sink", "attn.indexer.compressor.ape", "ffn.gate.tid2eid"},
    "distill-qwen": {"self_attn.q_proj.bias", "self_attn.k_proj.weight", "self_attn.v_proj.bias", "mlp.up_proj.weight"},
    "distill-llama": {"self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "deepseek-moe": {"self_attn.k_proj.weight", "mlp.gate.weight", "mlp.experts.7.up_proj.weight"},
    "v2-lite": {"self_attn.q_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "mlp.shared_experts.up_proj.weight"},
    "v3.2": {
        "self_attn.indexer.wq_b.weight",
        "self_attn.indexer.wk.weight",
        "self_attn.indexer.k_norm.weight",
        "self_attn.indexer.k_norm.bias",
        "self_attn.indexer.weights_proj.weight",
    },
    "v2": {"self_attn.q_a_proj.weight", "self_attn.kv_b_proj.weight", "mlp.experts.0.down_proj.weight"},
}


BIASES = ("e_score_correction_bias", "ffn.gate.bias")


@cache
def model_of(name: str):
    return random_model(ARCHITECTURES[name], seed=4, dtype=jnp.bfloat16)


@pytest.mark.parametrize("residual", [HyperConnections(2, sinkhorn_steps=5), HyperConnections(3, constrained=False)])
def test_v3_files_carry_a_residual_of_several_streams(residual, tmp_path):
    """V4's names and fields beside V3's own; and no reference takes it for a plain V3."""
    model = random_model(tiny_config(residual=residual), dtype=jnp.bfloat16)
    dsj.save_pretrained(model, tmp_path / "a", quantize="fp8")
    names = set(arrays(tmp_path / "a"))
    assert {"model.layers.0.hc_attn_fn", "model.layers.3.hc_ffn_base", "model.layers.3.e_proj.weight"} <= names
    assert ("model.hc_head_fn" in names) == residual.constrained
    again = dsj.load_pretrained(tmp_path / "a", dtype=None)
    assert again.cfg == replace(model.cfg, name=again.cfg.name)
    dsj.save_pretrained(again, tmp_path / "b", like=tmp_path / "a")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")
    with pytest.raises(VerifyError, match="there is no reference for this config: only deepseek_v4's has a residual"):
        reference_model(tmp_path / "a")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back(name, tmp_path):
    """Written, read as stored and written again, and through Orbax: the same bytes and the same config."""
    model = model_of(name)
    dsj.save_pretrained(model, tmp_path / "a")
    held = arrays(tmp_path / "a")
    last = {n.split("layers.2.", 1)[1] for n in held if "layers.2." in n}
    assert NAMES.get(name, set()) <= last
    biased = model.cfg.moe is not None and model.cfg.moe.bias
    assert any(n.endswith(BIASES) for n in held) == biased
    assert bool({"lm_head.weight", "head.weight"} & set(held)) != model.cfg.tie_embeddings
    again = dsj.load_pretrained(tmp_path / "a", dtype=None)
    assert again.cfg.attention == model.cfg.attention
    assert again.cfg.moe == model.cfg.moe
    dsj.save_pretrained(again, tmp_path / "b", like=tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "orbax") == "layers"
    assert convert(tmp_path / "orbax", tmp_path / "c") == "published"
    for folder in ("b", "c"):
        assert_same_tensors(tmp_path / "a", tmp_path / folder)
        assert json.loads((tmp_path / folder / "config.json").read_text()) == json.loads(
            (tmp_path / "a/config.json").read_text()
        )
    # Nothing differs, byte for byte.
    measured(name, "load", 0)
    measured(name, "export", 0)


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("distill-llama", "deepseek-moe", "v2", "v3.2", "v4")]


@pytest.mark.parametrize("name", ["distill-qwen", *SLOWLY])
def test_a_folder_is_verified_against_its_own_reference(name, tmp_path):
    dsj.save_pretrained(model_of(name), tmp_path / "a")
    tokens = np.random.default_rng(0).integers(0, 256, (1, 24))
    rows = list(ladder(tmp_path / "a", tokens, steps=2, gradients=True))
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]
    cfg = model_of(name).cfg
    assert sum(isinstance(row, Row) for row in rows) == 3 * cfg.n_layers + 3 + cfg.mtp_depth
    (gradients,) = (row for row in rows if isinstance(row, Gradients))
    # The state of routers has none; an MTP layer's copies of the embedding and the head are no tensors of their own.
    others = (*BIASES, "tid2eid", ".3.embed_tokens.weight", ".3.shared_head.head.weight")
    assert gradients.tensors == len([name for name in arrays(tmp_path / "a") if not name.endswith(others)])


def test_transformers_reads_what_is_written(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(0).integers(0, 256, (1, 24))
    for name in ("distill-qwen", "distill-llama", "v2-lite", "v3.2", "v4"):
        # transformers knows V3.2's and V4's MTP layers in no file.
        model = random_model(replace(ARCHITECTURES[name], mtp_depth=0), seed=4)
        dsj.save_pretrained(model, tmp_path / name)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        ours = np.asarray(forward(model, jnp.asarray(tokens, jnp.int32)).logits)
        assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max(), name
        if name == "v4":  # whose names are then half its own: tests/convert/test_v4_files.py
            continue
        theirs.save_pretrained(tmp_path / f"{name}-theirs")
        again = dsj.load_pretrained(tmp_path / f"{name}-theirs", dtype=None)
        assert (again.cfg.attention, again.cfg.moe) == (model.cfg.attention, model.cfg.moe)
