"""How differently experts are used by different text. Loads no JAX.

Suffixes: D domains, L MoE layers, E experts.
"""

import numpy as np


def load_divergence(load_DLE: np.ndarray) -> np.ndarray:
    """float64 [L], nats: Jensen-Shannon divergence of the experts' shares of the load between domains.

    The entropy of the mean share minus the mean entropy of the shares, every domain counting the same however many
    tokens it has: 0 where all domains use the experts alike, log(D) where no two share an expert. ``load_DLE``: counts
    (`runs.evaluate.Evaluation.load_DLE`), or two rows of it for a pair. A domain without tokens takes no part.

    Raises ValueError for fewer than two domains with tokens.
    """
    load_DLE = np.asarray(load_DLE, np.float64)
    load_DLE = load_DLE[load_DLE.sum((1, 2)) > 0]
    if len(load_DLE) < 2:
        raise ValueError(f"A divergence is between two domains or more that have tokens; there are {len(load_DLE)}.")
    share_DLE = load_DLE / load_DLE.sum(-1, keepdims=True)
    return _entropy(share_DLE.mean(0)) - _entropy(share_DLE).mean(0)


def _entropy(share_E: np.ndarray) -> np.ndarray:
    return -np.sum(share_E * np.log(np.where(share_E > 0, share_E, 1)), axis=-1)
