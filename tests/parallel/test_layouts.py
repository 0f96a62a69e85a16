"""Meshes, layouts and contexts: what fits, what is refused and how; no program runs here."""

import itertools
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.layout import MESH_AXES, Layout, LayoutError, spec
from deepseek_jax.core.params import named
from deepseek_jax.core.partition import partition
from deepseek_jax.model.transformer import abstract
from deepseek_jax.parallel.linear import Split
from deepseek_jax.parallel.mesh import _cubes, make_mesh
from deepseek_jax.parallel.rules import LAYOUTS, find_layout
from deepseek_jax.parallel.sequence import balanced_order
from deepseek_jax.parallel.shardings import shardings


def abstract_mesh(**sizes):
    """A mesh of devices that do not exist: enough to lay a model out."""
    return jax.sharding.AbstractMesh(tuple(sizes.get(a, 1) for a in MESH_AXES), MESH_AXES)


def places(cfg, layout=None, **sizes) -> dict:
    ctx = dsj.Context(mesh=abstract_mesh(**sizes), layout=layout)
    return {n: s.spec for n, s in named(partition(shardings(abstract(cfg), ctx))[0]).items()}


def test_a_mesh_has_all_axes():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.shape.values()) == {1}
    assert make_mesh(fsdp=-1, devices=jax.devices()[:1]).shape["fsdp"] == 1
    with pytest.raises(LayoutError, match=r"data=1 x fsdp=3 x .* does not make up 1 devices"):
        make_mesh(fsdp=3, devices=jax.devices()[:1])


def test_an_expert_axis_of_eight_chips_is_a_cube():
    @dataclass(frozen=True)
    class Chip:
        coords: tuple[int, int, int]

    chips = [Chip(place) for place in itertools.product(range(4), range(2), range(4))]
    cubes = _cubes(chips).reshape(4, 8)
    for cube in cubes:
        places = np.array([chip.coords for chip in cube])
        assert len(np.unique(places, axis=0)) == 8
        assert (np.ptp(places, axis=0) == 1).all()
    assert len({chip.coords for chip in cubes.flat}) == 32
    assert _cubes([Chip(place) for place in itertools.product(range(3), range(2), range(4))]) is None
    assert _cubes(chips[:8]) is None
    assert _cubes(jax.devices()[:1]) is None


def test_v3_on_512_devices():
    """DeepSeek-V3 on EP 8 x FSDP 64: experts apart, all else split 512 ways along one axis."""
    found = places(dsj.zoo("deepseek-v3"), "fsdp_ep", fsdp=64, expert=8)
    assert found["stacks.1.ffn.gate_up"] == PartitionSpec(None, ("expert",), ("fsdp",), None, None)
    assert found["stacks.1.attn.q_b"] == PartitionSpec(None, ("fsdp", "expert"), None, None)
    assert found["embed"] == PartitionSpec(None, ("expert", "fsdp"))
    assert found["stacks.1.attn_norm.weight"] == PartitionSpec(None, None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_named_layouts_divide_v3(name):
    """Every matrix lies in as many parts as the layout's axes make, but over data; what serves rests as it is used."""
    axes = set(LAYOUTS[name].mesh_axes)
    found = places(dsj.zoo("deepseek-v3"), name, **dict.fromkeys(axes, 2))
    over = {path: set(jax.tree.leaves(tuple(spec))) for path, spec in found.items()}
    split = axes - {"data"}
    used = split - {"expert"} if name in ("tensor", "serve") else split
    gathered = set() if name in ("tensor", "serve") else split - {"tensor"}
    for path, expected in (
        ("stacks.1.ffn.gate_up", split),
        ("stacks.1.ffn.down", split),
        ("stacks.1.attn.q_b", used),
        ("stacks.0.ffn.down", used),
        ("head", used),
        ("embed", used),
        ("stacks.1.attn.q_a", gathered),
        ("stacks.1.attn_norm.weight", set()),
    ):
        assert over[path] == expected, path


def test_serving_keeps_parameters_as_they_are_used():
    found = places(dsj.zoo("deepseek-v3"), "serve", expert=32, tensor=2)
    assert found["stacks.1.ffn.down"] == PartitionSpec(None, ("expert",), ("tensor",), None)
    assert found["stacks.1.attn.q_a"] == PartitionSpec(None, None, None)


def test_decoding_keeps_matrices_apart_by_their_outputs():
    found = places(dsj.zoo("deepseek-v3"), "decode", expert=32, tensor=2)
    assert found["stacks.1.ffn.gate_up"] == PartitionSpec(None, ("expert",), None, None, ("tensor",))
    assert found["stacks.1.attn.q_b"] == PartitionSpec(None, None, ("tensor", "expert"), None)
    assert found["stacks.1.attn.o"] == PartitionSpec(None, ("tensor",), None, ("expert",))
    assert found["stacks.0.ffn.gate_up"] == PartitionSpec(None, None, None, ("tensor", "expert"))
    assert found["stacks.0.ffn.down"] == PartitionSpec(None, ("tensor",), ("expert",))
    assert found["head"] == PartitionSpec(None, ("tensor", "expert"))


def test_what_does_not_divide_is_named():
    message = r"layout all: mtp\.0\.block\.attn\.kv_b: its axis 'heads' of size 4 does not divide over .* tensor=8"
    with pytest.raises(LayoutError, match=message):
        places(tiny_config(), tensor=8)
    with pytest.raises(LayoutError, match=r"mtp\.0\.block\.ffn\.down: its axis 'expert' of size 8 .* expert=16"):
        places(tiny_config(), expert=16)


def test_wrong_contexts_are_refused():
    mesh = abstract_mesh(tensor=2)
    with pytest.raises(LayoutError, match="there is no layout 'fast'; choose one of all, data"):
        dsj.Context(mesh=mesh, layout="fast")
    with pytest.raises(LayoutError, match="layout fsdp splits nothing over the mesh's tensor=2"):
        dsj.Context(mesh=mesh, layout="fsdp")
    with pytest.raises(ValueError, match="give both or neither"):
        dsj.Context(layout="fsdp")
    with pytest.raises(LayoutError, match="make it with make_mesh"):
        find_layout("all", jax.sharding.AbstractMesh((2,), ("x",)))
    with pytest.raises(ValueError, match="expert_buffer=0"):
        dsj.Context(expert_buffer=0)
    with pytest.raises(ValueError, match="expert_chunks=0"):
        dsj.Context(expert_chunks=0)
    with pytest.raises(ValueError, match="the oracle needs all experts on a device"):
        dsj.Context(mesh=abstract_mesh(expert=2), experts="dense")


def test_free_layouts():
    layout = Layout("mine", rest=(("embed", ("data",)),), use=(("batch", ("data",)),))
    ctx = dsj.Context(mesh=abstract_mesh(data=4), layout=layout)
    assert ctx.layout is layout
    assert hash(ctx) == hash(replace(ctx))
    for rules, message in (
        ((("width", ("data",)),), "'width' is no logical axis"),
        ((("embed", ("model",)),), "embed is mapped to"),
        ((("embed", ("data", "data")),), "embed is mapped to"),
    ):
        with pytest.raises(LayoutError, match=message):
            Layout("mine", rest=rules, use=())
    with pytest.raises(LayoutError, match="experts are split over the mesh axis 'expert' or none, and the batch with"):
        Layout("mine", rest=(), use=(("batch", ("data",)), ("expert", ("expert",))))


def test_few_tokens_are_brought_to_a_weight_that_is_apart_in_one_axis():
    mesh, axes = abstract_mesh(fsdp=4, tensor=2), ("embed", "heads", "head_dim")
    rest, batch = (("embed", ("fsdp",)),), ("batch", ("fsdp",))

    def brought(tokens: int, *heads):
        layout = Layout("mine", rest=(*rest, *heads), use=(batch, ("heads", ("tensor",))))
        x, w = np.zeros((8, tokens, 256)), np.zeros((256, 8, 64))
        return Split("BTD,DNX->BTNX", x, w, axes, dsj.Context(mesh=mesh, layout=layout)).brought(x, w)

    assert brought(1, ("heads", ("tensor",))) == ("D", ("fsdp",))
    assert brought(512, ("heads", ("tensor",))) is None, "a gather of the weight moves less"
    assert brought(1) is None, "the heads lie otherwise than in use"


def test_a_mesh_axis_is_taken_once():
    mesh, rules = abstract_mesh(fsdp=2, expert=2), LAYOUTS["all"].rest
    assert spec(("expert", "embed", None), (8, 64, 3), rules, mesh, "it") == PartitionSpec(("expert",), ("fsdp",), None)
    assert spec(("embed", "q_rank"), (5, 64, 48), rules, mesh, "it") == PartitionSpec(None, ("fsdp", "expert"), None)


def test_rows_in_balanced_order():
    order = balanced_order(24, 3)
    assert sorted(order) == list(range(24))
    parts = order.reshape(3, 8)
    np.testing.assert_array_equal(parts[0], [0, 1, 2, 3, 20, 21, 22, 23])
    # Causal attention costs a query its position: every device has the same sum.
    assert len(set(parts.sum(1))) == 1
    with pytest.raises(LayoutError, match="rows of 20 tokens do not divide into 2 x 3 runs"):
        balanced_order(20, 3)
