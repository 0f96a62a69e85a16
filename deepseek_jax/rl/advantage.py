"""How much better an answer is than the others to the same prompt: GRPO's baseline, without a value model.

Suffix: N answers. On the host, in float64: rewards are few.
"""

from dataclasses import dataclass

import numpy as np

# Rewards of a group that differ by less than this share of the largest are equal: sums of the same parts in another
# order differ so. They are compared, and never divided by their own deviation: in float32 twelve rewards of 1.1 have a
# "deviation" of 1e-7, which made advantages of -0.9 of nothing.
EQUAL = 1e-6
SCALES = ("std", "none")


@dataclass(frozen=True, eq=False)
class Advantages:
    """``value``: float32 [N], 0 in a group without signal and of an answer without a reward. ``scored``: bool [N],
    whether the answer has a reward; one that has none is no part of the loss. ``signal``: bool [N], whether its group's
    rewards differ. ``silent``: the share of groups whose rewards are all equal, of those with a reward."""

    value: np.ndarray
    scored: np.ndarray
    signal: np.ndarray
    silent: float


def advantages(reward_N, group_N, scale: str = "std", ddof: int = 0) -> Advantages:
    """The rewards less their group's mean, and with ``scale="std"`` divided by its standard deviation (DeepSeekMath
    2402.03300 §4.1.2; "none": V3.2 2512.02556).

    ``reward_N``: NaN where a reward could not be computed: the answer then leaves its group's mean and deviation.
    ``group_N``: the prompt of each answer, any numbers in any order; statistics are by prompt, never by batch.
    ``ddof``: 0 divides the squares by the answers, as the paper's std of the group's rewards reads (1: by one fewer, as
    torch.std does). Nothing is added to the deviation: a group of equal rewards is compared, and has exactly 0. So has
    a group of one, under either ``ddof``.

    Raises ValueError for arrays that do not belong together, infinite rewards, and other choices.
    """
    reward_N, group_N = np.asarray(reward_N, np.float64), np.asarray(group_N)
    if reward_N.ndim != 1 or reward_N.shape != group_N.shape:
        raise ValueError(f"rewards {reward_N.shape} and groups {group_N.shape}: one of each for every answer.")
    if np.isinf(reward_N).any():
        raise ValueError("a reward is infinite; NaN stands for one that could not be computed.")
    if scale not in SCALES or ddof not in (0, 1):
        raise ValueError(f"scale={scale!r}, ddof={ddof!r}: choose among {', '.join(SCALES)}, and 0 or 1.")
    scored_N = ~np.isnan(reward_N)
    value_N, signal_N, silent, groups = np.zeros(reward_N.shape), np.zeros(reward_N.shape, bool), 0, 0
    for group in np.unique(group_N):
        of_group = (group_N == group) & scored_N
        found = reward_N[of_group]
        groups += bool(found.size)
        if not differ(found):
            silent += bool(found.size)
            continue
        centred = found - found.mean()
        value_N[of_group] = centred / found.std(ddof=ddof) if scale == "std" else centred
        signal_N |= of_group
    return Advantages(value_N.astype(np.float32), scored_N, signal_N, silent / max(groups, 1))


def differ(reward_N: np.ndarray) -> bool:
    """Whether rewards are not all equal, up to `EQUAL`."""
    return reward_N.size > 1 and bool(np.ptp(reward_N) > EQUAL * np.abs(reward_N).max())


def informative(accuracy_N, group_N) -> np.ndarray:
    """bool [N]: whether some of the group's answers are right and some are not, for a filter that is to leave groups
    out. It asks for the accuracy, not for the sum of all rewards: by that an all-wrong group of unequal format would
    stay, and teach format only. A group that is left out no longer feels the KL either."""
    accuracy_N, group_N = np.asarray(accuracy_N, np.float64), np.asarray(group_N)
    kept_N = np.zeros(accuracy_N.shape, bool)
    for group in np.unique(group_N):
        of_group = group_N == group
        kept_N |= of_group & differ(accuracy_N[of_group & ~np.isnan(accuracy_N)])
    return kept_N


def share_without_signal(right: float, size: int) -> float:
    """The expected share of groups of ``size`` answers that are all right or all wrong, where one is right with
    probability ``right``: what a task teaches nothing with, by arithmetic alone."""
    return right**size + (1 - right) ** size
