"""Loads of links and times of collectives against numbers worked out by hand."""

import numpy as np
import pytest

from deepseek_jax.aot.torus import HOP_SECONDS, Torus, axes_of, pairs_of, replica_groups

CHIPS = np.stack(np.unravel_index(np.arange(512), (8, 8, 8)), -1)
RINGS = CHIPS.reshape(64, 8, 3)
CUBES = CHIPS.reshape(4, 2, 4, 2, 4, 2, 3).transpose(0, 2, 4, 1, 3, 5, 6).reshape(64, 8, 3)
# The complement of the cubes: every second chip along each axis.
STRIDED = CHIPS.reshape(4, 2, 4, 2, 4, 2, 3).transpose(1, 3, 5, 0, 2, 4, 6).reshape(8, 64, 3)
TORUS = Torus((8, 8, 8), (True, True, True), link=1.0)


def wire_seconds(torus: Torus, kind: str, groups: np.ndarray) -> float:
    """Without what the way to the neighbours takes."""
    return torus.seconds(kind, groups, 1.0) - torus.seconds(kind, groups, 0.0)


# A ring of 8 sends 2 x (1 + 2 + 3) + 4 hops of an eighth from each chip, over two links; a cube's chip sends four of
# its eight parts over its one link along each axis.
@pytest.mark.parametrize(
    ("kind", "groups", "expected"),
    [
        ("all-to-all", RINGS, 1.0),
        ("all-to-all", CUBES, 0.5),
        ("ragged-all-to-all", CUBES, 0.5),
        ("all-gather", RINGS, 7 / 8 / 2),
        ("reduce-scatter", RINGS, 7 / 8 / 2),
        ("all-reduce", RINGS, 7 / 8),
        ("all-gather", CHIPS.reshape(8, 64, 3), 63 / 64 / 4),
        ("all-gather", CHIPS[None], 511 / 512 / 6),
        ("all-gather", CUBES, 7 / 8 / 3),
        ("all-gather", STRIDED, 2 * 63 / 64 / 6),
    ],
)
def test_times_on_a_torus(kind, groups, expected):
    assert wire_seconds(TORUS, kind, groups) == pytest.approx(expected)


def test_a_line_has_no_way_round():
    line = Torus((4,), (False,), link=2.0)
    chips = np.arange(4).reshape(1, 4, 1)
    # The middle link carries 2 x 2 of 16 parts of what all four send: a quarter of 4.
    assert wire_seconds(line, "all-to-all", chips) == pytest.approx(1.0 / 2.0)
    assert wire_seconds(line, "all-gather", chips) == pytest.approx(3 / 4 / 2.0)


def test_a_permutation_takes_its_busiest_link():
    ring = Torus((8,), (True,), link=1.0)
    shift = np.array([[[i], [(i + 1) % 8]] for i in range(8)])
    far = np.array([[[0], [3]], [[1], [3]]])
    assert wire_seconds(ring, "collective-permute", shift) == pytest.approx(1.0)
    assert wire_seconds(ring, "collective-permute", far) == pytest.approx(2.0)
    half = np.array([[[0], [4]]])
    assert wire_seconds(ring, "collective-permute", half) == pytest.approx(0.5)


def test_other_groups_go_round_as_they_are_listed():
    ring = Torus((8,), (True,), link=1.0)
    odd = np.array([[[0], [1], [3]]])
    # Forward 0-1, 1-3, 3-0 the other way round: no link carries two of these.
    assert wire_seconds(ring, "all-gather", odd) == pytest.approx(2 / 3 / 2)


def test_small_collectives_take_the_way_to_the_farthest():
    assert TORUS.seconds("all-gather", RINGS, 0.0) == pytest.approx(3.5 * HOP_SECONDS)
    assert TORUS.seconds("all-gather", RINGS[:, :1], 1.0) == 0.0


def test_replica_groups_in_every_form():
    expected = [[0, 4], [1, 5], [2, 6], [3, 7]]
    for text in (
        "{{0,4},{1,5},{2,6},{3,7}}",
        "[4,2]<=[2,4]T(1,0)",
        "mesh['a'=2,'b'=4] {'a'}",
        "mesh['a'=8] {'a':(1)2}",
        "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
    ):
        assert replica_groups(text, 8).tolist() == expected, text
    assert replica_groups("{}", 4).tolist() == [[0, 1, 2, 3]]
    assert replica_groups("[2,4]<=[8]", 8).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="has a form that is not known"):
        replica_groups("everyone", 8)
    assert pairs_of("{{0,1},{1,0}}") == [(0, 1), (1, 0)]


def test_axes_of_groups():
    sizes = {"data": 1, "fsdp": 4, "expert": 2}
    assert axes_of(replica_groups("[4,2]<=[8]", 8), sizes) == "expert"
    assert axes_of(replica_groups("[2,4]<=[4,2]T(1,0)", 8), sizes) == "fsdp"
    assert axes_of(replica_groups("{}", 8), sizes) == "fsdp+expert"
    assert axes_of(np.array([[0, 3]]), sizes) == "mixed"
