"""Auxiliary losses of load balance: V3's sequence- and batch-wise, V2's and DeepSeekMoE's by expert, device, traffic.

Each is a sum of f times P: f, the experts' share of the choices, counts and carries no gradient; P, their mean score,
does. They differ in what they count and over what: DeepSeekMoE (2401.06066) eq. 12-17, V2 (2405.04434) eq. 23-31,
V3 (2412.19437) eq. 17-20 and §4.5.3.

Suffixes: L routers, B rows, T tokens, K chosen experts, E experts, G devices (groups of experts).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from deepseek_jax.configs.schema import MoE
from deepseek_jax.model.outputs import Aux, Output
from deepseek_jax.train.weights import LossWeights


def balance_losses(
    out: Output, moe: MoE, weights: LossWeights, rows: jax.Array, tokens: jax.Array
) -> tuple[jax.Array | float, dict[str, jax.Array]]:
    """The weighted sum of the terms, and each unweighted term by name, summed over the model's and MTP's routers.

    A term is the mean over rows, but for "batch", which is over all tokens of this (micro-)batch. ``rows``, ``tokens``:
    [1 + MTP modules], what the means are over, which may be more than ``out`` has: `loss.Counts`. Rows without a token
    add nothing. Terms of weight 0 are left out.

    Raises ValueError for device-level terms that do not fit the experts.
    """
    chosen = {
        "sequence": weights.balance,
        "batch": weights.batch_balance,
        "expert": weights.expert_balance,
        "device": weights.device_balance,
        "communication": weights.communication_balance,
    }
    terms: dict[str, jax.Array] = {}
    for aux, part in ((out.aux, slice(0, 1)), (out.mtp_aux, slice(1, None))):
        if aux is None:
            continue
        for name, term_L in _terms(aux, moe, weights, {n for n, w in chosen.items() if w}):
            # The batch-wise term of a part counts by the part's tokens.
            over = rows[part] if name != "batch" else tokens[part] / _tokens(aux).sum(-1)
            terms[name] = terms.get(name, 0.0) + (term_L / over).sum()
    return sum((chosen[name] * term for name, term in terms.items()), 0.0), terms


def _terms(aux: Aux, moe: MoE, weights: LossWeights, names: set[str]) -> Iterator[tuple[str, jax.Array]]:
    """Name and float32 [L]: the sum over rows, or the term of the whole batch."""
    tokens_LB = _tokens(aux)
    if "sequence" in names:
        yield "sequence", aux.balance["sequence"].sum(-1)
    if "batch" in names:
        total_L = jnp.maximum(tokens_LB.sum(-1), 1.0)[:, None]
        f_LE = frequency(chosen_by_row(aux.expert_index, moe.n_experts).sum(1), total_L, moe.top_k)
        yield "batch", (f_LE * aux.share.sum(1) / total_L).sum(-1)
    by_row = names & {"expert", "device", "communication"}
    if not by_row:
        return
    each_LB = jnp.maximum(tokens_LB, 1.0)[..., None]
    f_LBE = frequency(chosen_by_row(aux.expert_index, moe.n_experts), each_LB, moe.top_k)
    p_LBE = aux.share / each_LB
    if "expert" in by_row:
        yield "expert", (f_LBE * p_LBE).sum((-2, -1))
    if by_row == {"expert"}:
        return
    n_devices = _devices(moe, weights)
    by_device = (*p_LBE.shape[:-1], n_devices, -1)
    p_LBG = p_LBE.reshape(by_device).sum(-1)
    if "device" in by_row:
        yield "device", (f_LBE.reshape(by_device).mean(-1) * p_LBG).sum((-2, -1))
    if "communication" in by_row:
        sent_LBG = tokens_by_device(aux.expert_index, moe.n_experts, n_devices)
        yield "communication", (frequency(sent_LBG, each_LB, moe.top_groups) * p_LBG).sum((-2, -1))


def check_devices(moe: MoE | None, weights: LossWeights) -> None:
    """Raises ValueError for device-level terms that do not fit the experts."""
    if moe is not None and (weights.device_balance or weights.communication_balance):
        _devices(moe, weights)


def frequency(count: jax.Array, tokens: jax.Array, choices: int) -> jax.Array:
    """f: each one's part of the choices, times how many there are; 1 for all is balance."""
    return count.shape[-1] * count / (choices * tokens)


def chosen_by_row(index_LBTK: jax.Array, n_experts: int) -> jax.Array:
    """float32 [L, B, E]: how often a row's tokens chose each expert; -1 counts for none."""
    L, B = index_LBTK.shape[:2]
    at = jnp.where(index_LBTK >= 0, index_LBTK, n_experts).reshape(L, B, -1)
    rows = (jnp.arange(L)[:, None, None], jnp.arange(B)[None, :, None])
    return jnp.zeros((L, B, n_experts)).at[(*rows, at)].add(1.0, mode="drop")


def tokens_by_device(index_LBTK: jax.Array, n_experts: int, n_devices: int) -> jax.Array:
    """float32 [L, B, G]: how many of a row's tokens chose an expert of each device; a token counts once a device."""
    device_LBTK = jnp.where(index_LBTK >= 0, index_LBTK // (n_experts // n_devices), -1)
    sent_LBTG = (device_LBTK[..., None] == jnp.arange(n_devices)).any(-2)
    return sent_LBTG.sum(2).astype(jnp.float32)


def _tokens(aux: Aux) -> jax.Array:
    """float32 [L, B]: the tokens of each row that are routed."""
    return (aux.expert_index[..., 0] >= 0).sum(-1).astype(jnp.float32)


def _devices(moe: MoE, weights: LossWeights) -> int:
    n_devices = moe.n_groups if weights.devices is None else weights.devices
    if n_devices < 2 or moe.n_experts % n_devices:
        raise ValueError(
            f"device_balance and communication_balance need the {moe.n_experts} experts on 2 devices or more, equally "
            f"many on each: devices={n_devices} does not do."
        )
    if weights.communication_balance and n_devices != moe.n_groups:
        raise ValueError(
            f"communication_balance limits the devices that a token is sent to, as the router does with its "
            f"{moe.n_groups} groups: devices={n_devices} must be that number."
        )
    return n_devices
