"""Verification against PyTorch transformers: the same files, read by PyTorch alone, layer by layer.

The reference is `DeepseekV3ForCausalLM` with its MTP layers, float32 on the CPU. Nothing here goes through
this package's reader, so that a mistake there cannot hide. PyTorch is imported inside functions only.

Suffixes: L layers, B rows, T tokens, K chosen experts, E experts.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.configs.schema import MoE

BOUND = 2e-5  # largest |difference| / largest |reference value|
TIE = 1e-5  # a choice of experts may flip when its scores lie closer than this
FLIPS = 1e-3  # the share of tokens a layer may flip
ARGMAX_MARGIN = 1e-4  # greedy tokens are compared where the two best logits lie further apart
EXTRA = 'this command needs PyTorch and transformers: pip install "deepseek-jax[verify]"'


class VerifyError(ValueError):
    """A checkpoint that the reference cannot read, or a missing installation."""


@dataclass
class Observed:
    """One forward pass of the reference; torch tensors.

    ``logits``: [B, T, V]; ``hidden``: [B, T, D] after the final norm. ``mtp_logits``: one a depth d,
    [B, T - 1 - d, V]. ``captured``: "attn", "ffn", "block" -> one [B, T, D] a layer. ``index``, ``biased``:
    one a MoE layer, the chosen experts [B, T, K] in no order and score + bias [B, T, E]; ``mtp_index`` and
    ``mtp_biased`` the same for the MTP modules, T - 1 - d long.
    """

    hidden: Any = None
    logits: Any = None
    mtp_logits: list = field(default_factory=list)
    captured: dict[str, list] = field(default_factory=lambda: {"attn": [], "ffn": [], "block": []})
    index: list = field(default_factory=list)
    biased: list = field(default_factory=list)
    mtp_index: list = field(default_factory=list)
    mtp_biased: list = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """transformers' model ``main`` and its MTP layers ``mtp`` (a ModuleList)."""

    main: Any
    mtp: Any

    def run(self, tokens, positions=None, visible=None, routing=None) -> Observed:
        """Runs tokens int [B, T] without a cache, keeping the graph unless the caller switched it off.

        ``positions``: int [B, T]. ``visible``: bool [B, T, T], which keys each query sees; default causal.
        ``routing``: int [L_moe, B, T, K], experts that replace the chosen ones of the main model.
        """
        import torch

        tokens = torch.tensor(np.asarray(tokens), dtype=torch.long)
        B, T = tokens.shape
        positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else np.asarray(positions)
        positions = torch.tensor(positions, dtype=torch.long)
        visible = np.tril(np.ones((B, T, T), bool)) if visible is None else np.asarray(visible)
        hidden_away = ~torch.tensor(visible)[:, None]
        mask = torch.zeros(hidden_away.shape).masked_fill(hidden_away, torch.finfo(torch.float32).min)
        seen = Observed()
        model = self.main.model
        with self._watch(seen, B, routing):
            seen.hidden = model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            seen.logits = self.main.lm_head(seen.hidden)
            hidden = seen.hidden
            for depth, layer in enumerate(self.mtp):
                n = T - 1 - depth
                if n < 1:
                    break
                embedding, place = model.embed_tokens(tokens[:, 1 + depth :]), positions[:, :n] + 1 + depth
                hidden = layer(
                    embedding,
                    hidden[:, :n],
                    position_embeddings=model.rotary_emb(embedding, place),
                    attention_mask=mask[:, :, :n, :n],
                    position_ids=place,
                    past_key_values=None,
                )
                seen.mtp_logits.append(self.main.lm_head(hidden))
        return seen

    def decode(self, tokens, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Greedy decoding with transformers' cache: tokens int [B, steps], logits float32 [B, steps, V]."""
        import torch
        from transformers import DynamicCache

        cache, out, logits = DynamicCache(config=self.main.config), [], []
        step = torch.tensor(np.asarray(tokens), dtype=torch.long)
        with torch.no_grad():
            for _ in range(steps):
                last = self.main(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
                step = last.argmax(-1, keepdim=True)
                out.append(step)
                logits.append(last)
        return torch.cat(out, 1).numpy(), torch.stack(logits, 1).numpy()

    @contextmanager
    def _watch(self, seen: Observed, batch: int, routing):
        handles = []

        def keep(name, pick=lambda output: output):
            return lambda module, args, output: seen.captured[name].append(pick(output))

        def route(index_to, biased_to, replay):
            def hook(module, args, output):
                logits, weights, index = output
                biased_to.append(
                    (logits.sigmoid() + module.e_score_correction_bias).detach().unflatten(0, (batch, -1))
                )
                if replay is not None:
                    index = replay.flatten(0, 1)
                    weights = logits.sigmoid().gather(1, index)
                    if module.norm_topk_prob:
                        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
                    weights = weights * module.routed_scaling_factor
                index_to.append(index.unflatten(0, (batch, -1)))
                return logits, weights, index

            return hook

        moe = 0
        for layer in self.main.model.layers:
            handles.append(layer.self_attn.register_forward_hook(keep("attn", lambda output: output[0])))
            handles.append(layer.mlp.register_forward_hook(keep("ffn")))
            handles.append(layer.register_forward_hook(keep("block")))
            if hasattr(layer.mlp, "gate"):
                replay = None if routing is None else _long(routing[moe])
                handles.append(layer.mlp.gate.register_forward_hook(route(seen.index, seen.biased, replay)))
                moe += 1
        for layer in self.mtp:
            gate = layer.mtp_block.mlp.gate
            handles.append(gate.register_forward_hook(route(seen.mtp_index, seen.mtp_biased, None)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _long(array):
    import torch

    return torch.tensor(np.asarray(array), dtype=torch.long)


# --- Reading a folder with PyTorch ----------------------------------------------------------------------


def build_reference(config: dict) -> Reference:
    """transformers' modules for a parsed ``config.json``, float32, their weights not filled in.

    Raises VerifyError when PyTorch or transformers is missing.
    """
    try:
        import torch
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
        from transformers.initialization import no_init_weights
        from transformers.modeling_layers import MtpLayer
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
            DeepseekV3DecoderLayer,
            DeepseekV3RMSNorm,
        )
    except ImportError as error:
        raise VerifyError(f"{EXTRA} ({error})") from None

    dropped = ("model_type", "architectures", "auto_map", "quantization_config", "torch_dtype", "dtype")
    config = DeepseekV3Config(**{k: v for k, v in config.items() if k not in dropped})
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    with no_init_weights():
        main = DeepseekV3ForCausalLM(config).float().eval()
        mtp = torch.nn.ModuleList(
            MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, config.num_hidden_layers + depth)
            for depth in range(config.num_mtp_layers or 0)
        )
    return Reference(main, mtp.float().eval())


def reference_model(path: str | Path) -> Reference:
    """The reference with the weights of a published folder, FP8 dequantised block by block.

    Raises VerifyError for a folder that does not hold exactly the model's tensors.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise VerifyError(f"{path} holds no config.json.")
    config = json.loads((path / "config.json").read_text())
    reference = build_reference(config)
    import torch

    targets = reference.main.state_dict() | {f"mtp.{k}": v for k, v in reference.mtp.state_dict().items()}
    missing = {f"{name}[{e}]" for name, t in targets.items() if ".experts." in name for e in range(len(t))}
    missing = {f"{name}.{part}" for name in missing if "gate_up" in name for part in ("gate", "up")} | {
        name for name in missing if "gate_up" not in name
    }
    missing |= {name for name in targets if ".experts." not in name}
    if config.get("tie_word_embeddings"):
        missing.discard("lm_head.weight")
    copies = []
    for name, tensor in read_tensors(path, config):
        key, target = _place(name, targets, len(reference.main.model.layers))
        if key == "copy":
            copies.append((name, tensor, targets[target]))
        elif target is None or target.shape != tensor.shape:
            expected = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
            raise VerifyError(
                f"{path}: {name} has shape {tuple(tensor.shape)}; the reference has {expected}."
            )
        else:
            target.copy_(tensor)
            missing.discard(key)
    if missing:
        raise VerifyError(f"{path} lacks {len(missing)} tensors of the reference, among them {min(missing)}.")
    for name, tensor, original in copies:
        if not torch.equal(tensor, original):
            raise VerifyError(f"{path}: {name} differs from the main model's, of which it is a copy.")
    return reference


def read_tensors(path: Path, config: dict) -> Iterator[tuple[str, Any]]:
    """(published name, float32 tensor) of every weight, FP8 times its scales; read by safetensors."""
    import torch
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
        opened = {file: safe_open(path / file, "pt") for file in sorted(set(files.values()))}
    else:
        opened = {file.name: safe_open(file, "pt") for file in sorted(path.glob("*.safetensors"))}
        opened = {file: f for file, f in opened.items() if file != "reference.safetensors"}
        files = {name: file for file, f in opened.items() for name in f.keys()}  # noqa: SIM118
    if not files:
        raise VerifyError(f"{path} holds no *.safetensors with weights.")
    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size", (128, 128))
    for name, file in files.items():
        if name.endswith("_scale_inv"):
            continue
        tensor = opened[file].get_tensor(name)
        if tensor.dtype == torch.float8_e4m3fn:
            if f"{name}_scale_inv" not in files:
                raise VerifyError(f"{path}: {name} is FP8 but has no {name}_scale_inv.")
            scale = opened[files[f"{name}_scale_inv"]].get_tensor(f"{name}_scale_inv").float()
            n, k = tensor.shape
            spread = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
            tensor = tensor.float() * spread
        yield name, tensor.float()


def _place(name: str, targets: dict, n_layers: int):
    """Where a published tensor goes: a name to tick off, and the view to fill (None: nowhere)."""
    module = name
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if layer and int(layer[1]) >= n_layers:
        rest = layer[2]
        if rest == "embed_tokens.weight":
            return "copy", "model.embed_tokens.weight"
        if rest == "shared_head.head.weight":
            return "copy", "lm_head.weight"
        rest = rest.replace("shared_head.norm", "post_norm")
        if rest.split(".")[0] not in ("enorm", "hnorm", "eh_proj", "post_norm"):
            rest = "mtp_block." + rest
        module = f"mtp.{int(layer[1]) - n_layers}.{rest}"
    expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", module)
    if not expert:
        return module, targets.get(module)
    stack, number, part = expert[1], int(expert[2]), expert[3]
    fused = f"{stack}.{'down' if part == 'down' else 'gate_up'}_proj"
    if fused not in targets or number >= len(targets[fused]):
        return module, None
    view = targets[fused][number]
    if part == "down":
        return f"{fused}[{number}]", view
    half = view.shape[0] // 2
    return f"{fused}[{number}].{part}", view[:half] if part == "gate" else view[half:]


# --- Routing --------------------------------------------------------------------------------------------


def choose(biased: np.ndarray, moe: MoE) -> tuple[np.ndarray, np.ndarray]:
    """The experts that scores + bias [..., E] select, [..., K] ascending, and each choice's margin [...].

    The margin is the smaller of two gaps: between the last chosen and the first unchosen group, and between
    the last chosen and the first unchosen expert within the chosen groups.
    """
    grouped = biased.reshape(*biased.shape[:-1], moe.n_groups, -1)
    margin = np.full(biased.shape[:-1], np.inf, np.float32)
    if moe.n_groups > 1:
        score = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        order = np.argsort(-score, axis=-1, kind="stable")
        if moe.top_groups < moe.n_groups:
            ranked = np.take_along_axis(score, order, -1)
            margin = ranked[..., moe.top_groups - 1] - ranked[..., moe.top_groups]
        kept = (order[..., : moe.top_groups, None] == np.arange(moe.n_groups)).any(-2)
        biased = np.where(kept[..., None], grouped, -np.inf).reshape(biased.shape)
    order = np.argsort(-biased, axis=-1, kind="stable")
    if moe.top_k < moe.n_experts:
        ranked = np.take_along_axis(biased, order, -1)
        margin = np.minimum(margin, ranked[..., moe.top_k - 1] - ranked[..., moe.top_k])
    return np.sort(order[..., : moe.top_k], axis=-1), margin


@dataclass(frozen=True)
class Agreement:
    """How two choices of experts compare: tokens, tokens with another set, and of these the widest margin."""

    tokens: int
    flipped: int
    widest: float

    @property
    def ok(self) -> bool:
        return self.flipped <= FLIPS * self.tokens and self.widest < TIE


def agreement(ours: np.ndarray, theirs: np.ndarray, biased: np.ndarray, moe: MoE) -> Agreement:
    """Compares expert sets [..., K]; the margins are those of the reference's score + bias [..., E]."""
    differs = (np.sort(ours, -1) != np.sort(theirs, -1)).any(-1)
    margin = choose(biased, moe)[1]
    return Agreement(differs.size, int(differs.sum()), float(margin[differs].max(initial=0.0)))
