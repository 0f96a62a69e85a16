"""A checkpoint against the reference, rung by rung: activations, experts, logits, MTP, cached decoding.

Experts are compared before anything that depends on them. Where scores lie too close for float32 to decide,
the two sides may choose differently; then the reference's experts are replayed and the rest is still compared.

Suffixes: L layers, B rows, T tokens, K chosen experts, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.schema import ModelConfig, MoE
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.gradients import Gradients, compare_gradients, gradients_of
from deepseek_jax.convert.layers import RECORD
from deepseek_jax.convert.load import load_first_layers, load_pretrained
from deepseek_jax.convert.pickles import weight_files
from deepseek_jax.convert.verify import Observed, VerifyError, reference_model
from deepseek_jax.model.outputs import Output
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.small_files import SMALL

BOUND = 2e-5  # largest |difference| / largest |reference value|
TIE = 1e-5  # a choice of experts may flip when its scores lie closer than this
FLIPS = 1e-3  # the share of a layer's tokens that may flip
CAPTURED = ("attn", "ffn", "block")


def choose(biased: np.ndarray, moe: MoE) -> tuple[np.ndarray, np.ndarray]:
    """The experts that scores + bias [..., E] select, [..., K] ascending, and each choice's margin [...].

    The margin is the smaller of two gaps: between the last chosen and the first unchosen group, and between
    the last chosen and the first unchosen expert within the chosen groups.
    """
    grouped = biased.reshape(*biased.shape[:-1], moe.n_groups, -1)
    margin = np.full(biased.shape[:-1], np.inf, np.float32)
    if moe.n_groups > 1:
        score = np.sort(grouped, axis=-1)[..., -2 if moe.group_score == "top2" else -1 :].sum(-1)
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
class Row:
    """One comparison of numbers. ``layer``: None after the last; ``error``: largest |difference|."""

    layer: int | None
    what: str
    error: float
    relative: float

    @property
    def ok(self) -> bool:
        return self.relative <= BOUND


@dataclass(frozen=True)
class Routing:
    """One comparison of expert sets. ``closest``: the reference's smallest margin between chosen and unchosen;
    ``widest``: the largest margin at which a token chose other experts, 0 if none did."""

    layer: int | None
    what: str
    tokens: int
    flipped: int
    closest: float
    widest: float

    @property
    def ok(self) -> bool:
        return self.flipped <= FLIPS * self.tokens and self.widest < TIE


def differing(ours, theirs) -> np.ndarray:
    """bool [...]: tokens whose sets of experts [..., K] differ."""
    return (np.sort(np.asarray(ours), -1) != np.sort(np.asarray(theirs), -1)).any(-1)


def agreement(ours, theirs, biased, moe: MoE, layer: int | None = None, what: str = "router") -> Routing:
    """Compares expert sets [..., K]; the margins are those of the reference's score + bias [..., E]. Where a token's id
    chooses nothing is near."""
    flipped = differing(ours, theirs)
    margin = np.full(flipped.shape, np.inf) if moe.n_hash else choose(np.asarray(biased), moe)[1]
    return Routing(
        layer,
        what,
        flipped.size,
        int(flipped.sum()),
        float(margin.min()),
        float(margin[flipped].max(initial=0.0)),
    )


def compare(ours, theirs, layer: int | None, what: str) -> Row:
    """Errors of an array against the reference's; a number that is not finite is an infinite error."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
    error = float(np.abs(ours - theirs).max(initial=0.0))
    error = error if np.isfinite(error) else float("inf")
    return Row(layer, what, error, error / max(float(np.abs(theirs).max(initial=0.0)), 1e-30))


@partial(jax.jit, static_argnames=("with_mtp", "capture"))
def _call(model: Transformer, tokens_BT, cache, routing, with_mtp: bool, capture: tuple[str, ...]) -> Output:
    return model(tokens_BT, cache=cache, routing=routing, with_mtp=with_mtp, capture=capture)


def matched(model: Transformer, tokens, seen: Observed, cache=None, with_mtp=False) -> tuple[Output, list[Routing]]:
    """Our pass and the agreement of every MoE layer's experts.

    Where any layer chose differently, the pass is repeated with the reference's experts, and the choices
    compared are those of the routers in that repetition: one flip would otherwise move all that follows.
    """
    cfg = model.cfg
    capture = (*CAPTURED, "router_scores") if cfg.n_moe_layers else CAPTURED
    tokens = jnp.asarray(tokens, jnp.int32)
    out = _call(model, tokens, cache, None, with_mtp, capture)
    if not cfg.n_moe_layers:
        return out, []
    theirs = np.stack([np.asarray(index) for index in seen.index])
    ours = np.asarray(out.aux.expert_index)
    networks = [cfg.layers[layer].ffn for layer in cfg.moe_layers]
    if differing(ours, theirs).any():
        hashed = np.array([moe.n_hash > 0 for moe in networks])[:, None, None, None]  # by the tokens alone
        out = _call(model, tokens, cache, jnp.asarray(theirs, jnp.int32), with_mtp, capture)
        scores = np.asarray(out.captured["router_scores"]) + router_biases(model)[:, None, None]
        ours = np.where(hashed, ours, choose(scores, cfg.moe)[0])
    return out, [
        agreement(ours[i], theirs[i], seen.biased[i], networks[i], layer) for i, layer in enumerate(cfg.moe_layers)
    ]


def router_biases(model: Transformer) -> np.ndarray:
    """float32 [L_moe, E] of the main model; zero of routers that have none."""
    cfg = model.cfg
    found = np.zeros((cfg.n_layers, cfg.moe.n_experts), np.float32)
    for stack, block in zip(cfg.stacks, model.stacks, strict=True):
        if stack.layer.is_moe and block.ffn.router.bias is not None:
            found[list(stack.numbers)] = np.asarray(block.ffn.router.bias.get_value())
    return found[list(cfg.moe_layers)]


def ladder(
    path: str | Path,
    tokens: np.ndarray,
    steps: int = 8,
    against: str | Path | None = None,
    n_layers: int | None = None,
    gradients: bool = False,
) -> Iterator[Row | Routing | Gradients]:
    """Compares a checkpoint on tokens int [B, T], from the first layer up; float32 on both sides.

    The reference runs first and is freed before our model is loaded. Decoding starts from the first half of
    the tokens and follows the reference's greedy choices for ``steps`` tokens.

    ``against``: the published folder that PyTorch reads; default ``path`` itself, which may else be a converted
    one. ``n_layers``: only so many layers, between the embedding and the head, without MTP modules; only their
    tensors are read. ``gradients``: those of every parameter too.

    Raises VerifyError for what the reference cannot read and without PyTorch; CheckpointError and ConfigError
    as `load_pretrained` does; ValueError for tokens that do not fit the model, and for two different models.
    """
    against = path if against is None else against
    if (Path(against) / RECORD).exists():
        raise VerifyError(
            f"{against} is in Orbax's form, which PyTorch does not read: give its published folder too, with --against."
        )
    if read_model(against) != read_model(path):
        raise ValueError(f"{path} and {against} hold different models, by their config.json.")
    _check_size(Path(against), n_layers)
    reference = reference_model(against, n_layers)
    vocabulary, longest = reference.main.config.vocab_size, reference.main.config.max_position_embeddings
    tokens, T = np.asarray(tokens), np.shape(tokens)[1]
    if T < 4 or steps < 1:
        raise ValueError(f"{T} tokens and {steps} decoding steps: give at least 4 tokens and 1 step.")
    if max(T, T // 2 + steps) > longest:
        raise ValueError(f"{T} tokens and {steps} decoding steps exceed the model's {longest} tokens.")
    outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if outside.size:
        raise ValueError(f"token {outside[0]} lies outside the vocabulary of {vocabulary}.")
    seen, generated, decoded = reference.observe(tokens, tokens[:, : T // 2], steps)
    if gradients:
        rng = np.random.default_rng(0)
        directions = [rng.standard_normal(tuple(a.shape), np.float32) for a in (seen.logits, *seen.mtp_logits)]
        slopes = reference.gradients(tokens, directions)
    del reference

    with jax.default_matmul_precision("highest"):
        model = load_pretrained(path, jnp.float32) if n_layers is None else load_first_layers(path, n_layers)
        cfg = model.cfg
        out, routing = matched(model, tokens, seen, with_mtp=cfg.mtp_depth > 0)
        routing = dict(zip(cfg.moe_layers, routing, strict=True))
        for layer in range(cfg.n_layers):
            yield compare(out.captured["attn"][layer], seen.captured["attn"][layer], layer, "attention")
            if layer in routing:
                yield routing[layer]
            yield compare(out.captured["ffn"][layer], seen.captured["ffn"][layer], layer, "network")
            yield compare(out.captured["block"][layer], seen.captured["block"][layer], layer, "block")
        yield compare(out.hidden, seen.hidden, None, "final norm")
        yield compare(out.logits, seen.logits, None, "logits")
        yield from _mtp_rows(out, seen, cfg.moe if cfg.mtp_layer.is_moe else None)
        yield from _decoding_rows(model, tokens[:, : T // 2], generated, decoded)
        if gradients:
            experts = jnp.asarray(np.stack(seen.index), jnp.int32) if cfg.n_moe_layers else None
            yield compare_gradients(gradients_of(model, tokens, directions, experts), slopes)


def _check_size(folder: Path, n_layers: int | None) -> None:
    """Raises VerifyError for a config of far more values than the files can hold: PyTorch would take their memory."""
    cfg = read_model(folder)
    if n_layers is not None and 1 <= n_layers <= cfg.n_layers:
        cfg = cfg.first_layers(n_layers)
    values = sum(leaf.size for leaf in jax.tree.leaves(abstract(cfg)))
    if values > 2 * (held := sum(file.stat().st_size for file in weight_files(folder))) + SMALL:
        raise VerifyError(f"{folder}: config.json describes {values} values; its files of weights have {held} bytes.")


def read_model(folder: str | Path) -> ModelConfig:
    """A folder's config, apart from its name and the tokens that begin and end a text."""
    return replace(read_config(Path(folder)), name="", bos_id=None, eos_ids=())


def _mtp_rows(out: Output, seen: Observed, moe: MoE | None) -> Iterator[Row | Routing]:
    reached = np.zeros(out.logits.shape[:2], bool)
    for depth, theirs in enumerate(seen.mtp_logits):
        n = theirs.shape[1]
        same, ours = ~reached[:, :n], out.mtp_logits[depth][:, :n]
        if moe is None:
            yield compare(ours, theirs, None, f"MTP {depth} logits")
            continue
        index = np.asarray(out.mtp_aux.expert_index[depth][:, :n])
        choices = (index, np.asarray(seen.mtp_index[depth]), np.asarray(seen.mtp_biased[depth]))
        yield agreement(*(a[same] for a in choices), moe, what=f"MTP {depth} router")
        # An MTP router's flip cannot be replayed. It moves its own token and, in later modules, those after it.
        same &= ~differing(*choices[:2])
        yield compare(np.asarray(ours)[same], np.asarray(theirs)[same], None, f"MTP {depth} logits")
        reached[:, :n] |= np.logical_or.accumulate(~same, axis=1)


def _decoding_rows(model: Transformer, prompt, generated, decoded: list[Observed]) -> Iterator[Row | Routing]:
    B, T = prompt.shape
    cache = model.init_cache(B, T + len(decoded))
    rows, routings, step = [], [], prompt
    for i, seen in enumerate(decoded):
        out, routing = matched(model, step, seen, cache)
        rows.append(compare(out.logits[:, -1], np.asarray(seen.logits)[:, -1], None, "decoded logits"))
        routings += routing
        cache, step = out.cache, generated[:, i : i + 1]
    if routings:
        tokens, flipped = sum(r.tokens for r in routings), sum(r.flipped for r in routings)
        closest, widest = min(r.closest for r in routings), max(r.widest for r in routings)
        yield Routing(None, "decoding routers", tokens, flipped, closest, widest)
    yield max(rows, key=lambda row: row.relative)
