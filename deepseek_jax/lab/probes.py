"""What is measured of a trained model at a run's end for those setups alone that ask for it by name.

A probe takes a model and a `Text` and returns plain values, which stand in the run's file under its name.

Suffixes: L MoE layers, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.analysis.streams import stream_gains
from deepseek_jax.configs.schema import ModelConfig, Yarn
from deepseek_jax.convert.other_config import with_config
from deepseek_jax.core.params import map_variables
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.data.tasks import Passkey
from deepseek_jax.lab.prose import by_kind
from deepseek_jax.lab.records import PASSKEYS
from deepseek_jax.lab.study import Setup
from deepseek_jax.model.arguments import check_knock_out
from deepseek_jax.model.router import KnockOut
from deepseek_jax.model.transformer import Transformer, init
from deepseek_jax.runs.answers import score_answers
from deepseek_jax.runs.evaluate import evaluate
from deepseek_jax.text.tokenizer import Tokenizer

# Of held-out text knock-outs see one window in so many: there is one for each expert of each layer.
EVERY = 8
# Shares of the routed experts, those of a token's largest scores, that it has to do without.
TOP = (8, 4)
# Of held-out text streams are looked at in so many windows.
WINDOWS = 8
# Where an indexer chooses, a query sees so many times fewer keys than a window has tokens.
FEWER = 16
# Windows in which text is measured at several lengths: as long as rows at first, and four times as long.
LENGTHS = (256, 1024)
# Tokens of a vocabulary that is learnt of texts with passkeys; most tokens of a short one in it, behind BOS and with
# every digit by itself.
VOCABULARY, SHORTEST = 380, 131


@dataclass(frozen=True, eq=False)
class Text:
    """What probes read: the held-out text in windows of the recipe's length, ``held_out``, or of any (``of``), and what
    its tokens are."""

    held_out: HeldOut
    of: Callable[[int], HeldOut]
    tokenizer: Tokenizer


Probe = Callable[[Transformer, Text], dict]


def knock_outs(model: Transformer, held_out: HeldOut) -> dict:
    """Bits per byte where some experts are missing, on every `EVERY`th window of the text (2401.06066 §4.5, figure 4).

    "whole": with all of them. "routed" [L][E]: without that one expert of that layer; its tokens choose another.
    "shared" [L]: without the shared experts of that layer. "no_shared": without those of any layer. "replaced": and
    with one routed expert more for each token, which the paper does. "top" {"1/8", "1/4"}: each token in every layer
    without so many of the experts, its top-scored ones, choosing among the rest. Without shared experts, their entries
    are None.
    """
    cfg, text = model.cfg, thinned(held_out, EVERY)
    nobody_LE = np.zeros((cfg.n_moe_layers, cfg.moe.n_experts), bool)

    def bits(model: Transformer, out_LE: np.ndarray = nobody_LE, top: int = 0) -> float:
        return evaluate(model, text, routing=KnockOut(out_LE, top)).bits_per_byte

    def alone(layer: int, expert: int) -> np.ndarray:
        out_LE = nobody_LE.copy()
        out_LE[layer, expert] = True
        return out_LE

    layers = range(cfg.n_moe_layers)
    found = {
        "whole": bits(model),
        "routed": [[bits(model, alone(layer, expert)) for expert in range(cfg.moe.n_experts)] for layer in layers],
        "shared": None,
        "no_shared": None,
        "replaced": None,
        "top": {f"1/{part}": bits(model, top=cfg.moe.n_experts // part) for part in TOP},
    }
    if not cfg.moe.n_shared:
        return found
    bare = without_shared(model, set(layers))
    found["shared"] = [bits(without_shared(model, {layer})) for layer in layers]
    found["no_shared"] = bits(bare)
    found["replaced"] = bits(with_config(bare, replace(cfg, moe=replace(cfg.moe, top_k=cfg.moe.top_k + 1))))
    return found


def without_shared(model: Transformer, layers: set[int]) -> Transformer:
    """``model`` with the shared experts' outputs 0 in some of its MoE layers, counted from the first of these."""
    numbers = [stack.numbers for stack in model.cfg.stacks]

    def silence(path, variable):
        if path[0] != "stacks" or path[-2:] != ("shared", "down"):
            return variable
        kept = [model.cfg.moe_layers.index(number) not in layers for number in numbers[path[1]]]
        value = variable.get_value()
        return variable.replace(value * np.asarray(kept, value.dtype).reshape(-1, *[1] * (value.ndim - 1)))

    return map_variables(silence, model)


def thinned(held_out: HeldOut, every: int) -> HeldOut:
    """Every so many windows of a text, the first one among them, as a text of one domain whose windows do not follow
    each other."""
    windows_WT, segments_WT = held_out.windows_WT[::every], held_out.segments_WT[::every]
    scored = windows_WT[:, 1:][segments_WT[:, 1:] != 0]
    stream_n = np.concatenate([windows_WT[0, :1], scored])
    return HeldOut(stream_n, windows_WT, segments_WT, held_out.bytes_WT1[::every])


def streams(model: Transformer, held_out: HeldOut) -> dict:
    """The gains of streams that mix, on `WINDOWS` windows: `analysis.streams.Gains`, and the largest of any product."""
    gains = stream_gains(model, jnp.asarray(held_out.windows_WT[:WINDOWS]))
    return {"largest": gains.largest} | {name: value_S.tolist() for name, value_S in vars(gains).items()}


def indexers(model: Transformer, held_out: HeldOut) -> dict:
    """What the indexers of V3.2 have learnt, on every `EVERY`th window, beside indexers of freshly drawn weights.

    "divergence", "drawn_divergence" [L]: from the attention of all keys (2512.02556 §2.1.1, nats a token). "bits": bits
    per byte where a query sees all keys; "sparse", "drawn": where the model's indexers, or drawn ones, choose `FEWER`
    times fewer keys.
    """
    text, attention = thinned(held_out, EVERY), model.cfg.attention
    keys = text.windows_WT.shape[1] // FEWER
    windows, segments = jnp.asarray(text.windows_WT[:WINDOWS]), jnp.asarray(text.segments_WT[:WINDOWS])

    def among(model: Transformer, keys: int) -> Transformer:
        indexer = replace(attention.indexer, index_top_k=keys)
        return with_config(model, replace(model.cfg, attention=replace(attention, indexer=indexer)))

    @jax.jit
    def divergence_L(model: Transformer) -> jax.Array:
        seen = among(model, windows.shape[1])(windows, segments=segments, logits="none", capture=("index_kl",))
        real_BT = segments != 0
        return jnp.where(real_BT, seen.captured["index_kl"], 0).sum((1, 2)) / real_BT.sum()

    fresh = init(model.cfg, jax.random.key(0))
    drawn = map_variables(lambda path, own, other: other if "indexer" in path else own, model, fresh)
    return {
        "divergence": divergence_L(model).tolist(),
        "drawn_divergence": divergence_L(drawn).tolist(),
        "bits": evaluate(among(model, windows.shape[1]), text).bits_per_byte,
        "sparse": evaluate(among(model, keys), text).bits_per_byte,
        "drawn": evaluate(among(drawn, keys), text).bits_per_byte,
    }


def lengths(model: Transformer, of: Callable[[int], HeldOut]) -> dict:
    """Bits per byte in windows of each of `LENGTHS`, of every `EVERY`th window: "as it is"; and, of a model whose RoPE
    nothing extends, "yarn": with YaRN from the first of them to the last and no training. To be compared between
    models, not between lengths: these windows of one length are other text than those of another."""
    first, last = LENGTHS[0], LENGTHS[-1]

    def bits(model: Transformer) -> dict[str, float]:
        return {str(length): evaluate(model, thinned(of(length), EVERY)).bits_per_byte for length in LENGTHS}

    extended = _extended(model, first, last)
    return {"as it is": bits(model)} | ({} if extended is None else {"yarn": bits(extended)})


def _extended(model: Transformer, first: int, last: int) -> Transformer | None:
    """The model with YaRN from one length to another; None where something extends its RoPE already."""
    attention = model.cfg.attention
    if attention.rope.yarn is not None or attention.rope.llama3 is not None:
        return None
    rope = replace(attention.rope, yarn=Yarn(factor=last / first, original_length=first))
    return with_config(model, replace(model.cfg, attention=replace(attention, rope=rope)))


def passkey(tokens: int) -> Passkey:
    """The task whose items fit a row of so many tokens, of the `VOCABULARY` that is learnt of such texts: the first 430
    characters are `SHORTEST` of them at most, and 90 more are 24 more."""
    return Passkey(length=430 + (tokens - SHORTEST) // 24 * 90)


def passkeys(model: Transformer, tokenizer: Tokenizer) -> dict:
    """The share of `PASSKEYS` held-out passkeys (`data.tasks`) that greedy decoding would write, in rows of a quarter
    of ``max_length`` ("short") and of all of it ("long"): "as it is", and "yarn" as in `lengths`."""
    last = model.cfg.max_length
    first = last // 4

    def right(model: Transformer) -> dict[str, float]:
        sides = {"short": passkey(first), "long": passkey(last)}
        return {side: score_answers(model, task, tokenizer, PASSKEYS).exact for side, task in sides.items()}

    extended = _extended(model, first, last)
    return {"as it is": right(model)} | ({} if extended is None else {"yarn": right(extended)})


def drafts(model: Transformer, held_out: HeldOut) -> dict:
    """How the first MTP module's drafts of held-out text fare, by its domains (2412.19437 §5.4.3).

    Of each domain "share" of the tokens; "greedy" and "sampled", the shares of drafts that decoding would accept
    (`Evaluation.draft_agreement`, ``draft_acceptance``); "constant", what a draft would have of the former that is
    always the token which is most often the model's best one there; "bits" per byte.
    """
    seen, windows = evaluate(model, held_out), held_out.windows_WT
    scored_WT1 = held_out.segments_WT[:, 1:] != 0
    parts = [slice(i, i + EVERY) for i in range(0, len(windows), EVERY)]
    best_n = np.concatenate([_best(model, windows[part], held_out.segments_WT[part])[:, :-1] for part in parts])
    best_n, domain_n = best_n[scored_WT1], held_out.domain_WT[:, 1:][scored_WT1]
    own = [best_n[domain_n == at] for at in range(len(held_out.domains))]
    return {
        name: {
            "share": len(tokens) / len(best_n),
            "greedy": seen.domain_agreement[name],
            "sampled": seen.domain_acceptance[name],
            "constant": int(np.bincount(tokens).max()) / len(tokens),
            "bits": seen.domains[name],
        }
        for name, tokens in zip(held_out.domains, own, strict=True)
    }


def _best(model: Transformer, windows_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
    """int [B, T]: the model's best next token at each position of at most `EVERY` windows."""
    padded = [np.pad(a, ((0, EVERY - len(a)), (0, 0))) for a in (windows_BT, segments_BT)]
    return np.asarray(_argmax(model, *padded))[: len(windows_BT)]


@jax.jit
def _argmax(model: Transformer, tokens_BT, segments_BT) -> jax.Array:
    return jnp.argmax(model(tokens_BT, segments=segments_BT, with_mtp=False).logits, -1)


PROBES: dict[str, Probe] = {
    "knock_outs": lambda model, text: knock_outs(model, text.held_out),
    "streams": lambda model, text: streams(model, text.held_out),
    "indexers": lambda model, text: indexers(model, text.held_out),
    "lengths": lambda model, text: lengths(model, text.of),
    "drafts": lambda model, text: drafts(model, by_kind(text.held_out, text.tokenizer)),
    "passkeys": lambda model, text: passkeys(model, text.tokenizer),
}


def chosen(setup: Setup) -> dict[str, Probe]:
    """The probes that a setup asks for, by name.

    Raises ValueError for a probe that there is not, or one that the model does not allow.
    """
    if unknown := [name for name in setup.probes if name not in PROBES]:
        raise ValueError(f"there is no probe {unknown[0]!r}; choose one of {', '.join(PROBES)}.")
    if setup.probes and setup.fp8 is not None:
        raise ValueError(f"probe {setup.probes[0]}: it measures without FP8, and {setup.model.name} is emulated in it.")
    if "knock_outs" in setup.probes:
        _check_knock_outs(setup.model)
    if "streams" in setup.probes and setup.model.residual is None:
        raise ValueError(f"probe streams: {setup.model.name} has one residual stream, which mixes with no other.")
    if "indexers" in setup.probes and getattr(setup.model.attention, "indexer", None) is None:
        raise ValueError(f"probe indexers: {setup.model.name} has none.")
    if "lengths" in setup.probes and setup.model.max_length < LENGTHS[-1]:
        raise ValueError(f"probe lengths: {setup.model.name} has a max_length of less than {LENGTHS[-1]}.")
    if "drafts" in setup.probes and not setup.model.mtp_depth:
        raise ValueError(f"probe drafts: {setup.model.name} has no MTP module that drafts.")
    if "passkeys" in setup.probes and setup.model.max_length < 4 * SHORTEST:
        raise ValueError(
            f"probe passkeys: {setup.model.name} has a max_length of less than {4 * SHORTEST}: a quarter holds no key."
        )
    return {name: PROBES[name] for name in setup.probes}


def _check_knock_outs(cfg: ModelConfig) -> None:
    """Raises ValueError for a model without experts, or with so few that a token would not find enough of them."""
    E = 0 if cfg.moe is None else cfg.moe.n_experts
    check_knock_out(cfg, KnockOut(np.zeros((cfg.n_moe_layers, E), bool), max(1, *(E // part for part in TOP))))
    if cfg.moe.n_hash:
        raise ValueError(f"probe knock_outs: {cfg.name} has hash layers, in which a token has no choice of experts.")
