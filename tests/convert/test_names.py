"""Published names, from the table of a model's naming tradition."""

from dataclasses import replace

import pytest
from tiny import tiny_config

from deepseek_jax.configs import hf
from deepseek_jax.convert.names import layout
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.tables import DEEPSEEK, TRADITIONS


def test_every_name_follows_from_the_tradition(monkeypatch):
    """Prefix, rows, copies and the names of scales: nothing else of a tradition is known to what reads the table."""
    rows = {kind: tuple((a, b.replace("mlp.", "ffn."), fp8) for a, b, fp8 in r) for kind, r in DEEPSEEK.rows.items()}
    other = replace(DEEPSEEK, prefix="h.{layer}.", rows=rows, scale=lambda name: name.removesuffix("weight") + "scale")
    monkeypatch.setitem(TRADITIONS, "kimi_k2", other)
    (tensors, leaves), (theirs, same) = layout(tiny_config()), layout(tiny_config(name="h", model_type="kimi_k2"))
    assert leaves == same
    assert [t.name.replace("model.layers.", "h.").replace("mlp.", "ffn.") for t in tensors] == [t.name for t in theirs]
    assert {t.scale.rsplit(".", 1)[-1] for t in tensors if t.fp8} == {"weight_scale_inv"}
    assert {t.scale.rsplit(".", 1)[-1] for t in theirs if t.fp8} == {"scale"}


def test_a_model_type_without_a_tradition_is_named():
    with pytest.raises(CheckpointError, match=r"tiny: no published names .* 'mine', only of llama, qwen2, deepseek, "):
        layout(tiny_config(model_type="mine"))
    with pytest.raises(CheckpointError, match="no published names are known of MLA here, only of GQA, Dense"):
        layout(tiny_config(model_type="llama"))
    assert TRADITIONS.keys() == hf.TRADITIONS.keys()
