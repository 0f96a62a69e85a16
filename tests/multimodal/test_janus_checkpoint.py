"""A Janus's files: DeepSeek's names and transformers', both ways and byte for byte; pickled ones; bad ones."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from measured import measured
from tiny import fill_randomly
from tiny_janus import tiny_config, tiny_janus

from deepseek_jax import load_pretrained, save_pretrained
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.safetensors import CheckpointError, Writer
from deepseek_jax.core.params import named
from deepseek_jax.multimodal import checkpoint
from deepseek_jax.multimodal.janus import Janus, abstract

UNUSED = {
    "vision_model.vision_tower.attn_pool.latent": np.ones((1, 1, 32), np.float32),
    "gen_vision_model.quantize.codebook_used": np.zeros(65536, np.float32),
}
# Of DeepSeek's modules, as its own code names them.
DEEPSEEK = {
    "vision_model.vision_tower.patch_embed.proj.weight": (32, 3, 2, 2),
    "vision_model.vision_tower.pos_embed": (1, 16, 32),
    "vision_model.vision_tower.blocks.1.attn.qkv.weight": (96, 32),
    "vision_model.vision_tower.blocks.0.attn.qkv.bias": (96,),
    "vision_model.vision_tower.blocks.0.mlp.fc1.weight": (64, 32),
    "vision_model.vision_tower.norm.bias": (32,),
    "aligner.layers.0.weight": (64, 32),
    "aligner.layers.2.bias": (64,),
    "gen_vision_model.encoder.conv_in.weight": (32, 3, 3, 3),
    "gen_vision_model.encoder.conv_blocks.0.downsample.conv.weight": (32, 32, 3, 3),
    "gen_vision_model.encoder.conv_blocks.1.res.0.nin_shortcut.weight": (64, 32, 1, 1),
    "gen_vision_model.encoder.conv_blocks.1.attn.0.proj_out.bias": (64,),
    "gen_vision_model.encoder.mid.1.q.weight": (64, 64, 1, 1),
    "gen_vision_model.decoder.conv_blocks.0.upsample.conv.bias": (64,),
    "gen_vision_model.decoder.conv_blocks.1.res.1.norm2.weight": (32,),
    "gen_vision_model.decoder.norm_out.weight": (32,),
    "gen_vision_model.quantize.embedding.weight": (48, 8),
    "gen_vision_model.quant_conv.weight": (8, 24, 1, 1),
    "gen_vision_model.post_quant_conv.bias": (24,),
    "gen_embed.weight": (48, 8),
    "gen_aligner.layers.2.weight": (64, 64),
    "gen_head.output_mlp_projector.weight": (64, 64),
    "gen_head.vision_head.bias": (48,),
    "language_model.model.embed_tokens.weight": (256, 64),
    "language_model.model.layers.2.self_attn.k_proj.weight": (32, 64),
    "language_model.model.norm.weight": (64,),
    "language_model.lm_head.weight": (256, 64),
}


def arrays(folder) -> dict:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint}


def same(a, b) -> None:
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    for name, x in left.items():
        y = right[name]
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In bfloat16, some tensors in float32, in two files, with what released files hold beside the model."""
    base = tmp_path_factory.mktemp("janus")
    save_pretrained(fill_randomly(abstract(tiny_config(), jnp.bfloat16), seed=2), base / "plain")
    tensors = arrays(base / "plain")
    for name in ("vision_model.vision_tower.blocks.1.attn.qkv.weight", "language_model.model.norm.weight"):
        tensors[name] = tensors[name].astype(np.float32)
    tensors |= UNUSED
    folder, files = base / "mixed", {}
    folder.mkdir()
    for i, name in enumerate(sorted(tensors)):
        files.setdefault(f"model-0000{1 + i % 2}-of-00002.safetensors", []).append(name)
    for file, names in files.items():
        with Writer(folder / file, {name: (tensors[name].dtype, tensors[name].shape) for name in names}) as writer:
            for name in names:
                writer.write(name, tensors[name])
    index = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    shutil.copy(base / "plain/config.json", folder)
    return folder


def test_deepseeks_names(folder):
    found = {name: array.shape for name, array in arrays(folder).items()}
    assert {name: found.get(name) for name in DEEPSEEK} == DEEPSEEK


def test_fused_maps_are_queries_then_keys_then_values(folder):
    model = load_pretrained(folder, dtype=np.float32)
    fused = arrays(folder)["vision_model.vision_tower.blocks.1.attn.qkv.weight"]
    layer = model.vision.layers
    for i, w in enumerate((layer.q, layer.k, layer.v)):
        np.testing.assert_array_equal(fused[32 * i : 32 * (i + 1)], np.asarray(w.get_value()[1]).reshape(32, 32).T)


@pytest.mark.filterwarnings("ignore:.*are stored in another dtype")
def test_there_and_back_in_both_layouts(folder, tmp_path):
    model = load_pretrained(folder, dtype=None)
    save_pretrained(model, tmp_path / "like", like=folder)
    same(tmp_path / "like", folder)
    assert {p.name for p in (tmp_path / "like").iterdir()} == {p.name for p in folder.iterdir()}
    assert isinstance(model, Janus)
    checkpoint.save_pretrained(model, tmp_path / "hf", model_type="janus")
    other = load_pretrained(tmp_path / "hf", dtype=None)
    save_pretrained(other, tmp_path / "hf2", like=tmp_path / "hf")
    same(tmp_path / "hf2", tmp_path / "hf")
    for name, value in named(model).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(named(other)[name]), err_msg=name)
    save_pretrained(other, tmp_path / "back", like=folder)
    same(tmp_path / "back", folder)
    for what in ("load", "export"):
        measured("janus", what, 0)


def test_pickled_files(folder, tmp_path):
    tensors = {}
    for name, array in arrays(folder).items():
        raw = torch.tensor(array.view(np.uint16) if array.dtype == jnp.bfloat16 else array)
        tensors[name] = raw.view(torch.bfloat16) if array.dtype == jnp.bfloat16 else raw
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path)
    ours, theirs = (named(load_pretrained(path)) for path in (tmp_path, folder))
    for name, value in ours.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[name]), err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("gen_embed.weight"), "1 tensors are missing: gen_embed.weight"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "1 tensors are unexpected: extra"),
        (
            lambda t: t.update({"gen_embed.weight": np.zeros((8, 48), np.float32)}),
            r"shape \(8, 48\), the config implies",
        ),
        (lambda t: t.update({"gen_embed.weight": np.zeros((48, 8), np.int32)}), "has dtype int32, which is not read"),
        (lambda t: t.update({"aligner.layers.0.bias": np.full(64, np.nan, np.float32)}), "aligner.* is nan at"),
    ],
)
def test_what_does_not_fit_is_named(folder, tmp_path, change, message):
    tensors = arrays(folder)
    change(tensors)
    with Writer(tmp_path / "model.safetensors", {n: (a.dtype, a.shape) for n, a in tensors.items()}) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_nothing_is_left_of_what_cannot_be_written(folder, tmp_path):
    model = fill_randomly(abstract(tiny_config()), seed=4)
    model.gen_embed = model.gen_embed.replace(model.gen_embed.get_value().at[0, 0].set(jnp.inf))
    with pytest.raises(ValueError, match=r"gen_embed.weight holds values that are not finite"):
        save_pretrained(model, tmp_path / "a")
    with pytest.raises(FileExistsError):
        save_pretrained(tiny_janus(), folder)
    with pytest.raises(ValueError, match="dtype int8"):
        save_pretrained(tiny_janus(), tmp_path / "a", dtype=np.int8)
    with pytest.raises(ValueError, match="quantize='fp8': a Janus's files have no quantised tensors"):
        save_pretrained(tiny_janus(), tmp_path / "a", quantize="fp8")
    with pytest.raises(ValueError, match="holds a Janus, which is loaded under its own config"):
        load_pretrained(folder, cfg=tiny_config().language)
    assert list(tmp_path.iterdir()) == []
