"""Randomness by hash: every choice is a function of a seed and of what is chosen, never of what was drawn before.

Orders and choices so do not depend on workers, hosts, the machine or a library's version. Suffix n: any count.
"""

import hashlib

import numpy as np

ORDER, ROWS, FIM, CUT, SPLIT = range(5)  # what a hash is for; two uses never share one


def text_key(text: str) -> int:
    """64 bits of a text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def seed_key(*parts: int | str) -> int:
    """One 64-bit seed from several values."""
    return text_key(":".join(map(str, parts)))


def mixed(keys_n: np.ndarray, seed: int) -> np.ndarray:
    """Keys uint64 [n] mixed with a seed: uniform over 64 bits, uint64 [n] (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        x_n = (np.asarray(keys_n, np.uint64) ^ np.uint64(seed)) + np.uint64(0x9E3779B97F4A7C15)
        x_n = (x_n ^ (x_n >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_n = (x_n ^ (x_n >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x_n ^ (x_n >> np.uint64(31))


def shuffled(keys_n: np.ndarray, seed: int) -> np.ndarray:
    """The order of n things with the keys uint64 [n] under a seed: int64 [n], a permutation."""
    return np.argsort(mixed(keys_n, seed), kind="stable")
