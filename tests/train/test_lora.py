"""Low-rank adapters: against merged weights, on bases that stay quantised, and on disk."""

import json
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import random_model, random_tokens, tiny_config

import deepseek_jax as dsj
from deepseek_jax.convert.adapter import adapted, load_adapter, merge, save_adapter
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.core.lowrank import LowRank
from deepseek_jax.core.params import Adapter, matrix_of, named, variables
from deepseek_jax.core.quant import Quantized
from deepseek_jax.train.lora import adapt
from deepseek_jax.train.muon import matrices
from deepseek_jax.train.tuning import LoRA

CFG = tiny_config(dim=136, n_layers=3)
EVERYTHING = LoRA(rank=4, alpha=6.0, targets=("stacks.*", "mtp.*", "head"))
TOKENS = random_tokens(CFG, 2, 24)
FLOAT32 = dsj.Context(dtype=jnp.dtype(jnp.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "fp8"
    dsj.save_pretrained(random_model(CFG, seed=1), path, quantize="fp8")
    return path


@pytest.fixture(scope="module")
def base(folder):
    return dsj.load_pretrained(folder, dtype=None)


def randomised(model, seed: int = 5):
    """The model with B, which begins as zero, random as well wherever A is: of the weights' own size."""
    rng = np.random.default_rng(seed)

    def fill(w):
        if not isinstance(w, LowRank):
            return w
        a, b = w.a.get_value(), w.b.get_value()
        values = rng.normal(0, 0.3, b.shape).astype(b.dtype)
        if a.ndim > 1 + w.inputs + w.split:
            values[~np.asarray(a).reshape(len(a), -1).any(-1)] = 0
        return replace(w, b=w.b.replace(jnp.asarray(values)))

    return jax.tree.map(fill, model, is_leaf=lambda x: isinstance(x, LowRank))


@pytest.fixture(scope="module")
def tuned(base):
    return randomised(adapt(base, EVERYTHING))


def forward(model, ctx=FLOAT32):
    out = model(TOKENS, with_mtp=True, ctx=ctx)
    return jnp.stack([out.logits, *out.mtp_logits]), out.aux.expert_index


logits = jax.jit(forward)


@cache
def direction():
    shape = (1 + CFG.mtp_depth, *TOKENS.shape, CFG.vocab_size)
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def objective(model, ctx):
    out, index = forward(model, ctx)
    return (out * direction()).sum() / out.size, (out, index)


@partial(jax.jit, static_argnames="ctx")
def adapted_run(params, rest, ctx):
    """Gradients of the adapters; logits and experts."""
    return jax.grad(lambda p: objective(dsj.combine(p, rest), ctx), has_aux=True)(params)


@jax.jit
def explicit_run(params, rest):
    """The same of W + (alpha / r) A B, multiplied out before the model sees it."""
    return jax.grad(lambda p: objective(merge(dsj.combine(p, rest), jnp.float32), FLOAT32), has_aux=True)(params)


def relative(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


def declared_matrices(variable) -> tuple[int, ...]:
    """The shape of a leaf's matrices, by what it says of its axes."""
    value = jax.ShapeDtypeStruct(variable.get_value().shape, jnp.float32)
    return jax.eval_shape(partial(matrices, form=matrix_of(variable)), value).shape


def test_fresh_adapters_change_nothing(base):
    model = adapt(base, EVERYTHING)
    kinds = {path[-1] for path in adapted(model)}
    assert kinds == {"q_a", "q_b", "kv_a", "kv_b", "o", "gate_up", "down", "proj", "head"}
    quantised = {path[-1] for path, w in adapted(model).items() if isinstance(w.base.get_value(), Quantized)}
    assert quantised == kinds - {"proj", "head"}
    for w in adapted(model).values():
        a, b, whole = map(declared_matrices, (w.a, w.b, w.base))
        assert a == (*whole[:-1], 4)
        assert b == (*whole[:-2], 4, whole[-1])
    ours, index = logits(model)
    theirs, their_index = logits(base)
    np.testing.assert_array_equal(index, their_index)
    assert relative(ours, theirs) <= 1e-6
    for v in variables(base):
        assert any(v is w for w in variables(model))


@pytest.mark.parametrize("form", ["blocks", pytest.param("ragged", marks=pytest.mark.slow)])
def test_adapters_equal_merged_weights(tuned, base, form):
    params, rest = dsj.partition(tuned)
    assert {name.split(".")[-1] for name in named(params)} == {"a", "b"}
    assert not any(isinstance(v, Adapter) for v in variables(rest))
    ctx = dsj.Context(dtype=jnp.dtype(jnp.float32), experts=form, mla="absorbed" if form == "ragged" else "auto")
    ours, (our_logits, our_index) = adapted_run(params, rest, ctx)
    theirs, (their_logits, their_index) = explicit_run(params, rest)
    np.testing.assert_array_equal(our_index, their_index)
    assert relative(our_logits, their_logits) <= 2e-5
    assert relative(our_logits, logits(base)[0]) > 0.1
    for name, expected in named(theirs).items():
        assert np.linalg.norm(expected) > 0, name
        error = np.linalg.norm(named(ours)[name] - expected) / np.linalg.norm(expected)
        assert error <= 1e-4, (name, error)


def test_layers_that_are_no_target_have_adapters_that_cannot_move(base):
    model = adapt(base, LoRA(rank=2, targets=("layers.2.attn.q_b", "layers.1-2.ffn.down")))
    leaves = adapted(model)
    assert set(leaves) == {("stacks", 1, "attn", "q_b"), ("stacks", 1, "ffn", "down")}
    q_b, down = (leaves[path].a.get_value() for path in sorted(leaves, key=str))
    assert [bool(layer.any()) for layer in (*q_b, *down)] == [False, True, True, True]


def test_the_merged_model_is_saved_in_fp8(tuned, folder, base, tmp_path):
    dsj.save_pretrained(merge(tuned), tmp_path / "merged", quantize="fp8", like=folder)
    again = dsj.load_pretrained(tmp_path / "merged", dtype=np.float32)
    for name, value in named(dsj.partition(merge(tuned, jnp.float32))[0]).items():
        scale = np.abs(value).max()
        assert np.abs(named(again)[name] - value).max() <= scale / 16, name
    with pytest.raises(ValueError, match="adapters"):
        dsj.save_pretrained(tuned, tmp_path / "not-merged")
    assert not (tmp_path / "not-merged").exists()
    # Nothing adapted: every byte as it was.
    part = randomised(adapt(base, LoRA(rank=2, targets=("layers.2.attn.o",))))
    dsj.save_pretrained(merge(part), tmp_path / "part", quantize="fp8", like=folder)
    old, new = (load_file_bytes(path / "model.safetensors") for path in (folder, tmp_path / "part"))
    changed = {name for name in old if old[name] != new[name]}
    assert changed
    assert changed <= {f"model.layers.2.self_attn.o_proj.weight{s}" for s in ("", "_scale_inv")}


def load_file_bytes(path):
    from deepseek_jax.convert.safetensors import read_header

    return {name: entry.read().tobytes() for name, entry in read_header(path)[0].items()}


def test_adapters_come_back_exactly_from_peft_files(tuned, base, folder, tmp_path):
    save_adapter(tuned, tmp_path / "adapter", base=folder)
    again = load_adapter(base, tmp_path / "adapter")
    ours, theirs = named(dsj.partition(tuned)[0]), named(dsj.partition(again)[0])
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert np.array_equal(value, theirs[name]), name
    assert [w.alpha for w in adapted(again).values()] == [6.0] * len(adapted(again))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["deepseek_jax_version"]) == (4, 6.0, dsj.__version__)
    for module in ("q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "down_proj", "lm_head", "eh_proj"):
        assert module in config["target_modules"]


def test_peft_files_hold_the_published_matrices(base, tmp_path):
    """W + (alpha / r) B A, each as PEFT shapes them, is our merged leaf's published tensor."""
    tuned = randomised(adapt(base, LoRA(rank=2, alpha=3.0, targets=("layers.1.*", "mtp.*"))))
    save_adapter(tuned, tmp_path / "adapter")
    pairs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    old, new = in_float32(base, tmp_path / "before"), in_float32(merge(tuned, jnp.float32), tmp_path / "merged")
    prefix = "base_model.model."
    modules = {name.removesuffix(".lora_A.weight") for name in pairs if name.endswith("lora_A.weight")}
    assert f"{prefix}model.layers.1.mlp.experts.7.up_proj" in modules
    assert f"{prefix}model.layers.3.mlp.shared_experts.gate_proj" in modules
    assert not any(".layers.0." in name or ".layers.2." in name for name in modules)
    for module in modules:
        weight = module.removeprefix(prefix) + ".weight"
        change = 1.5 * pairs[f"{module}.lora_B.weight"] @ pairs[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(new[weight], old[weight] + change, atol=1e-5, err_msg=module)
    for name in set(old) - {module.removeprefix(prefix) + ".weight" for module in modules}:
        assert np.array_equal(old[name], new[name]), name
    again = load_adapter(base, tmp_path / "adapter")
    for name, value in named(dsj.partition(tuned)[0]).items():
        assert np.array_equal(value, named(dsj.partition(again)[0])[name]), name


def in_float32(model, path) -> dict[str, np.ndarray]:
    """The published tensors."""
    dsj.save_pretrained(model, path)
    dsj.save_pretrained(dsj.load_pretrained(path, dtype=np.float32), path / "float32")
    return load_file(path / "float32" / "model.safetensors")


def test_damaged_adapters_are_refused(base, tmp_path):
    small = adapt(base, LoRA(rank=2, targets=("stacks.0.attn.*",)))
    save_adapter(small, tmp_path / "good")
    with pytest.raises(FileExistsError, match="good"):
        save_adapter(small, tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    first = next(iter(tensors))

    def damaged(match, tensors=tensors, **changes):
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=match):
            load_adapter(base, folder)

    damaged("without the other", {k: v for k, v in tensors.items() if k != first})
    damaged("belong to no matrix", tensors | {"base_model.model.model.layers.9.lora_A.weight": tensors[first]})
    damaged("imply", tensors | {first: tensors[first][:, :-1].copy()})
    damaged("imply", r=3)
    damaged("r must be a positive integer", r=True)
    damaged("use_dora True", use_dora=True)
    damaged("modules_to_save", modules_to_save=["lm_head"])


def test_wrong_targets_are_refused(base):
    with pytest.raises(ValueError, match=r"'stacks\.\*\.attn\.q_c' matches no .*stacks\.0\.attn\.q_"):
        adapt(base, LoRA(targets=("stacks.*.attn.q_c",)))
    with pytest.raises(ValueError, match="matches no"):
        adapt(base, LoRA(targets=("embed", "*.router.weight")))
    with pytest.raises(ValueError, match=r"'\*\.router\.weight' matches no"):
        adapt(base, LoRA(targets=("head", "*.router.weight")))
    with pytest.raises(ValueError, match="adapters already"):
        adapt(adapt(base, LoRA()), LoRA())
    with pytest.raises(ValueError, match="rank 0"):
        adapt(base, LoRA(rank=0))
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(base, "nowhere")
    for wrong in ({"rank": -1}, {"alpha": 0.0}, {"targets": ()}, {"targets": "stacks.*"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRA(**wrong)
    assert not adapted(base)
    assert all(isinstance(w, LowRank) for w in adapted(adapt(base, LoRA())).values())


@pytest.mark.slow
def test_an_adapted_model_generates_what_the_merged_one_does():
    cfg = tiny_config()
    tuned = randomised(adapt(random_model(cfg), LoRA(rank=4, targets=("stacks.*", "mtp.*", "head"))))
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    for drafts in (False, True):
        ours, _ = dsj.generate(tuned, prompts, max_new_tokens=12, use_mtp=drafts, stop_ids=())
        theirs, _ = dsj.generate(merge(tuned), prompts, max_new_tokens=12, use_mtp=drafts, stop_ids=())
        assert ours == theirs
