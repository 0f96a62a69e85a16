"""PyTorch transformers as the reference: the same files, read by PyTorch alone.

The reference is the class that `deepseek_jax.convert.references` names for a model_type, of V3 with its MTP layers, in
float32 on the CPU. Nothing here goes through this package's reader, so that a mistake there cannot hide. PyTorch is
imported inside functions only.
`deepseek_jax.convert.ladder` compares a model with it.

Suffixes: L layers, B rows, T tokens, D width, K chosen experts, E experts, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.convert.reference_files import find_tensors, read_object, read_tensors
from deepseek_jax.convert.reference_names import in_memory, layer_number, place, published, slots, with_stored_mtp
from deepseek_jax.convert.references import VerifyError, build_modules, rotations, windowed


@dataclass
class Observed:
    """One forward pass of the reference; torch tensors.

    ``logits``: [B, T, V]; ``hidden``: [B, T, D] after the final norm. ``mtp_logits``: one a depth d,
    [B, T - 1 - d, V]. ``captured``: "attn", "ffn", "block" -> one [B, T, D] a layer. ``index``, ``biased``:
    one a MoE layer, the chosen experts [B, T, K] in no order and score (+ bias) [B, T, E]; ``mtp_index`` and
    ``mtp_biased`` the same for the MTP modules, T - 1 - d long. ``streams``: of a model with several, those
    [B, T, H, D] that the main model and each MTP module end with.
    """

    hidden: Any = None
    logits: Any = None
    mtp_logits: list = field(default_factory=list)
    captured: dict[str, list] = field(default_factory=lambda: {"attn": [], "ffn": [], "block": []})
    index: list = field(default_factory=list)
    biased: list = field(default_factory=list)
    mtp_index: list = field(default_factory=list)
    mtp_biased: list = field(default_factory=list)
    streams: list = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """transformers' model ``main`` and its MTP layers ``mtp`` (a ModuleList); ``names``: of the tensors read."""

    main: Any
    mtp: Any
    names: tuple[str, ...] = ()

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
        if (window := windowed(self.main.config)) is not None:  # of a mask that is given nothing is taken away
            visible = visible & np.triu(np.ones((T, T), bool), 1 - window)
        hidden_away = ~torch.tensor(visible)[:, None]
        mask = torch.zeros(hidden_away.shape).masked_fill(hidden_away, torch.finfo(torch.float32).min)
        seen = Observed()
        model = self.main.model
        with self._watch(seen, B, routing):
            seen.hidden = model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            seen.logits = self.main.lm_head(seen.hidden)
            handed = seen.streams[-1] if seen.streams else seen.hidden
            for depth, layer in enumerate(self.mtp):
                n = T - 1 - depth
                if n < 1:
                    break
                embedding, at = model.embed_tokens(tokens[:, 1 + depth :]), positions[:, :n] + 1 + depth
                hidden = layer(
                    embedding,
                    handed[:, :n],
                    position_embeddings=rotations(model.rotary_emb, embedding, at),
                    attention_mask=mask[:, :, :n, :n],
                    position_ids=at,
                    past_key_values=None,
                )
                handed = seen.streams[-1] if seen.streams else hidden
                seen.mtp_logits.append(self.main.lm_head(hidden))
        return seen

    def decode(self, tokens, steps: int) -> tuple[np.ndarray, list[Observed]]:
        """Greedy decoding with transformers' cache: the tokens int [B, steps], and what each call observed.

        The first call takes the prompt int [B, T], each later one the token before; MTP layers do not run.
        """
        import torch
        from transformers import DynamicCache

        cache, chosen, observed = DynamicCache(config=self.main.config), [], []
        step = torch.tensor(np.asarray(tokens), dtype=torch.long)
        with torch.no_grad():
            for _ in range(steps):
                seen = Observed()
                with self._watch(seen, len(step), None):
                    seen.logits = self.main(input_ids=step, past_key_values=cache, use_cache=True).logits
                step = seen.logits[:, -1].argmax(-1, keepdim=True)
                chosen.append(step)
                observed.append(seen)
        return torch.cat(chosen, 1).numpy(), observed

    def observe(self, tokens, prompt, steps: int) -> tuple[Observed, np.ndarray, list[Observed]]:
        """`run` on the tokens and `decode` from the prompt, without a graph."""
        import torch

        with torch.no_grad():
            return self.run(tokens), *self.decode(prompt, steps)

    def gradients(self, tokens, directions) -> dict[str, np.ndarray]:
        """Gradients of every parameter, float32, by published name; those of a copy belong to the original.

        ``directions``: float32 arrays of the shapes of `Observed.logits` and of each of ``mtp_logits``. What is
        differentiated is the logits' inner product with them.
        """
        import torch

        seen = self.run(tokens)
        outputs = zip([seen.logits, *seen.mtp_logits], directions, strict=True)
        sum((logits * torch.tensor(direction)).sum() for logits, direction in outputs).backward()
        parameters = dict(self.main.named_parameters()) | {f"mtp.{k}": p for k, p in self.mtp.named_parameters()}
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        placed = {name: place(in_memory(name), found, len(self.main.model.layers)) for name in self.names}
        return {name: at.numpy() for name, (key, at) in placed.items() if key != "copy" and at is not None}

    @contextmanager
    def _watch(self, seen: Observed, batch: int, routing):
        import torch

        handles = []

        def keep(name, pick=lambda output: output):
            return lambda module, args, output: seen.captured[name].append(pick(output))

        def route(index_to, biased_to, replay):
            def hook(module, args, output):
                logits, weights, index = output
                bias = getattr(module, "e_score_correction_bias", None)
                if hasattr(module, "score_fn"):  # V4
                    scores, normalised = module.score_fn(logits), True
                else:  # A router with a bias has sigmoid scores (V3), one without has softmax ones (V1, V2).
                    scores = logits.softmax(-1) if bias is None else logits.sigmoid()
                    normalised = bias is not None and module.norm_topk_prob
                biased = scores if bias is None else scores + bias
                biased_to.append(biased.detach().unflatten(0, (batch, -1)))
                if replay is not None:
                    index = replay.long().flatten(0, 1)
                    weights = scores.gather(1, index)
                    if normalised:
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
                replay = None if routing is None else torch.tensor(np.asarray(routing[moe]))
                handles.append(layer.mlp.gate.register_forward_hook(route(seen.index, seen.biased, replay)))
                moe += 1
        for head in (self.main.model, *self.mtp):
            if hasattr(head, "hc_head"):
                keep_streams = lambda module, args: seen.streams.append(args[0])  # noqa: E731
                handles.append(head.hc_head.register_forward_pre_hook(keep_streams))
        for layer in self.mtp:
            if hasattr(layer.mtp_block.mlp, "gate"):
                gate = layer.mtp_block.mlp.gate
                handles.append(gate.register_forward_hook(route(seen.mtp_index, seen.mtp_biased, None)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


# --- Reading a folder with PyTorch ----------------------------------------------------------------------


def reference_model(path: str | Path, n_layers: int | None = None) -> Reference:
    """The reference with the weights of a published folder, FP8 dequantised block by block.

    ``n_layers``: cut to the first ones and without MTP layers, whose tensors then need not be there. Raises
    VerifyError for a folder that does not hold exactly the model's tensors.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise VerifyError(f"{path} holds no config.json.")
    config = read_object(path / "config.json")
    if n_layers is not None:
        if not 1 <= n_layers <= config["num_hidden_layers"]:
            raise VerifyError(f"{path} has {config['num_hidden_layers']} layers; its first {n_layers} cannot be taken.")
        config = {k: v for k, v in config.items() if k not in ("num_mtp_layers", "num_nextn_predict_layers")}
        config |= {"num_hidden_layers": n_layers, "num_mtp_layers": 0}
    held = find_tensors(path, n_layers)
    if n_layers is None:
        config = with_stored_mtp(config, held)
    reference = Reference(*build_modules(config))
    import torch

    targets = reference.main.state_dict() | {f"mtp.{k}": v for k, v in reference.mtp.state_dict().items()}
    # Without shared experts the reference has networks of width 0, for which no file holds anything.
    missing = {slot for name, target in targets.items() if target.numel() for slot in slots(name, target)}
    if config.get("tie_word_embeddings"):
        missing.discard("lm_head.weight")
    copies, names = [], []
    layers = len(reference.main.model.layers) + len(reference.mtp)
    for name, tensor in read_tensors(path, config, held):
        if (layer_number(name, config["num_hidden_layers"]) or 0) >= layers:
            continue
        names += published(name, tensor)
        key, target = place(in_memory(name), targets, len(reference.main.model.layers))
        if key == "copy":
            copies.append((name, tensor, targets[target]))
        elif target is None or target.shape != tensor.shape:
            expected = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
            raise VerifyError(f"{path}: {name} has shape {tuple(tensor.shape)}; the reference has {expected}.")
        else:
            target.copy_(tensor)
            missing -= set(slots(key, target)) if key in targets else {key}
    if missing:
        raise VerifyError(f"{path} lacks {len(missing)} tensors of the reference, among them {min(missing)}.")
    for name, tensor, original in copies:
        if not torch.equal(tensor, original):
            raise VerifyError(f"{path}: {name} differs from the main model's, of which it is a copy.")
    return replace(reference, names=tuple(names))
