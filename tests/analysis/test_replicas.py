"""Copies of busy experts, and where they lie."""

import numpy as np
import pytest

from deepseek_jax.analysis.published.serving import EXAMPLE
from deepseek_jax.analysis.replicas import placed


@pytest.mark.parametrize(("loads", "printed"), EXAMPLE)
def test_the_load_balancers_example(loads, printed):
    assert placed(loads, slots=16, groups=4, nodes=2, devices=8) == list(printed)


def test_a_placement_by_hand():
    """6 in one is 3 in two and 2 in three copies; then 5 on each of two devices."""
    assert placed([6, 2, 1, 1], slots=6, groups=1, nodes=1, devices=2) == [0, 0, 2, 1, 0, 3]
    # Without a slot more than experts nothing is copied: 6 and the lightest lie together.
    assert placed([6, 2, 1, 1], slots=4, groups=1, nodes=1, devices=2) == [0, 3, 1, 2]


@pytest.mark.parametrize(("groups", "nodes"), [(8, 4), (4, 4), (6, 4)])
def test_every_expert_has_slots_and_no_other_copies_are_lighter(groups, nodes):
    """Where nodes hold whole groups, all on its group's node."""
    experts, slots = 48, 64
    loads = np.random.default_rng(0).lognormal(0, 1, experts)
    found = np.asarray(placed(loads.tolist(), slots, groups, nodes, devices=16))
    assert set(found.tolist()) == set(range(experts))
    if groups % nodes:
        assert found.tolist() == placed(loads.tolist(), slots, 1, 1, devices=16)
        nodes = 1
    else:
        groups_by_node = [set(node) for node in (found.reshape(nodes, -1) // (experts // groups)).tolist()]
        assert sorted(group for node in groups_by_node for group in node) == list(range(groups))
    for node in found.reshape(nodes, -1):
        own, copies = np.unique(node, return_counts=True)
        heaviest = (loads[own] / copies).max()
        # Copies that are all lighter would need more slots than the node has.
        assert np.floor(loads[own] / heaviest * (1 + 1e-12) + 1).sum() > len(node)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, 16, 5, 1, 8), "12 experts cannot be shared out evenly over 5 groups"),
        ((12, 15, 4, 2, 8), "15 slots cannot be shared out evenly over 8 devices"),
        ((12, 18, 4, 2, 9), "9 devices cannot be shared out evenly over 2 nodes"),
        ((12, 16, 4, 0, 8), "nodes must be at least 1, not 0"),
        ((12, 8, 4, 2, 8), "8 slots are too few for 12 experts"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    experts, *rest = sizes
    with pytest.raises(ValueError, match=message):
        placed([1] * experts, *rest)
