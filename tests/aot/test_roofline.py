"""A schedule of few operations, played through, takes the time worked out by hand."""

import numpy as np
import pytest

from deepseek_jax.aot.estimates import Slice
from deepseek_jax.aot.hlo import parse
from deepseek_jax.aot.kernels import Kernels
from deepseek_jax.aot.roofline import HBM_RATE, MATRIX_RATE, PLAYED, estimate
from deepseek_jax.aot.topology import Chip, Topology
from deepseek_jax.aot.torus import HOP_SECONDS

# Products of 2 x 1000^3 FLOPs take 2 s, a megabyte of HBM 1 s, a megabyte gathered over 4 chips in line 0.75 s, one to
# the host 0.5 s.
CHIP = Chip("x", 1, 1e9 / MATRIX_RATE, 1e6 / HBM_RATE, 1e6, 2e6, 1, 100)
PRODUCT, PRODUCTS = 2.0, 3 * 1000 * 1000 * 2 / 1e6


@pytest.fixture(autouse=True)
def one_kind_of_chip(monkeypatch):
    monkeypatch.setattr("deepseek_jax.aot.topology.CHIPS", {"x": CHIP})


def play(body: str, *computations: str, trips=lambda source, number: 0):
    text = "\n".join(computations) + "\nENTRY %main (a: bf16[1000,1000]) -> bf16[1000,1000] {\n" + body + "\n}\n"
    on = Slice(Topology("x:4", "x", (4,)), np.arange(4)[:, None], {"fsdp": 4, "expert": 1})
    return estimate(parse(text), Kernels(1.0, "x"), on, trips)


A = "  %a = bf16[1000,1000]{1,0:S(1)} parameter(0)"


def product(name: str, operand: str = "a") -> str:
    """A product whose arrays lie in the chip's vector memory: nothing but FLOPs."""
    dims = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    return f"  %{name} = bf16[1000,1000]{{1,0:S(1)}} dot(%{operand}, %a), {dims}"


def start(name: str, groups: str = "{{0,1,2,3}}") -> str:
    shapes = "(bf16[125,1000]{1,0:S(1)}, bf16[500,1000]{1,0:S(1)})"
    piece = f"  %{name}.in = bf16[125,1000]{{1,0:S(1)}} slice(%a), slice={{[0:125], [0:1000]}}\n"
    return piece + f"  %{name} = {shapes} all-gather-start(%{name}.in), replica_groups={groups}, dimensions={{0}}"


def done(name: str, of: str) -> str:
    return f"  %{name} = bf16[500,1000]{{1,0:S(1)}} all-gather-done(%{of})"


# 1 MB gathered: three quarters of it over the line's busiest link at 1 MB/s, and three hops.
GATHER = 0.75 + 3 * HOP_SECONDS


def test_a_product_takes_its_flops_and_a_copy_its_bytes():
    found = play(f"{A}\n{product('x')}\n  ROOT %far = bf16[1000,1000]{{1,0}} copy(%x)")
    assert found.flops == 2e9
    assert found.matrix == pytest.approx(PRODUCT)
    assert found.hbm == pytest.approx(2.0)
    assert found.seconds == pytest.approx(PRODUCT + 2.0)
    assert found.hbm_bytes == 2e6
    assert found.binds in ("matrix products", "HBM")
    assert [name for _, name, _ in found.operations] == ["x", "far"]


def test_what_is_started_early_is_hidden():
    found = play("\n".join([A, start("g"), product("x"), done("w", "g"), product("y", "x")]))
    assert found.exposed == {}
    assert found.seconds == pytest.approx(2 * PRODUCT)
    assert found.links == pytest.approx(GATHER)
    assert found.sent == {"all-gather over fsdp": 1e6}


def test_what_is_started_late_is_exposed():
    found = play("\n".join([A, product("x"), start("g"), done("w", "g"), product("y", "x")]))
    assert found.exposed == {"all-gather over fsdp": pytest.approx(GATHER)}
    assert found.seconds == pytest.approx(2 * PRODUCT + GATHER)
    assert found.synchronous == ()


def test_collectives_use_the_links_one_after_another():
    starts = [start(f"g{i}") for i in range(3)]
    found = play("\n".join([A, *starts, product("x"), *(done(f"w{i}", f"g{i}") for i in range(3))]))
    assert found.seconds == pytest.approx(3 * GATHER)
    assert found.exposed == {"all-gather over fsdp": pytest.approx(3 * GATHER - PRODUCT)}


def test_a_synchronous_collective_hides_nothing():
    gather = "  %g = bf16[500,1000]{1,0:S(1)} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}"
    piece = "  %p = bf16[125,1000]{1,0:S(1)} slice(%a), slice={[0:125], [0:1000]}"
    found = play("\n".join([A, piece, product("x"), gather, product("y", "x")]))
    assert found.seconds == pytest.approx(2 * PRODUCT + GATHER)
    ((transfer, runs),) = found.synchronous
    assert (transfer.name, transfer.kind, transfer.axes, transfer.nbytes, runs) == ("g", "all-gather", "fsdp", 1e6, 1)


ASYNC = """
%wrapped (p: bf16[125,1000]) -> bf16[500,1000] {
  %p = bf16[125,1000]{1,0:S(1)} parameter(0)
  ROOT %inside = bf16[500,1000]{1,0:S(1)} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_a_wrapped_collective_is_found_and_followed():
    lines = [
        A,
        "  %p.0 = bf16[125,1000]{1,0:S(1)} slice(%a), slice={[0:125], [0:1000]}",
        "  %s = ((bf16[125,1000]{1,0:S(1)}), bf16[500,1000]{1,0:S(1)}) async-start(%p.0), calls=%wrapped",
        product("x"),
        "  %u = ((bf16[125,1000]{1,0:S(1)}), bf16[500,1000]{1,0:S(1)}) async-update(%s)",
        "  %d = bf16[500,1000]{1,0:S(1)} async-done(%u)",
    ]
    hidden, exposed = play("\n".join(lines), ASYNC), play("\n".join([*lines[:3], *lines[4:]]), ASYNC)
    assert hidden.seconds == pytest.approx(PRODUCT)
    assert exposed.seconds == pytest.approx(GATHER)
    assert exposed.synchronous == ()


SPREAD = """
%first (p: bf16[125,1000]) -> bf16[500,1000] {
  %p = bf16[125,1000]{1,0:S(1)} parameter(0)
  %g.0 = bf16[500,1000]{1,0:S(1)} all-gather(%p), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c.0 = bf16[500,1000]{1,0:S(1)} custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}

%between (q: bf16[1000,1000], r: bf16[500,1000], s: bf16[125,1000]) -> (bf16[1000,1000], bf16[500,1000]) {
  %q = bf16[1000,1000]{1,0:S(1)} parameter(0)
  %r = bf16[500,1000]{1,0:S(1)} parameter(1)
  %s = bf16[125,1000]{1,0:S(1)} parameter(2)
  %m = bf16[1000,1000]{1,0:S(1)} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g.1 = bf16[500,1000]{1,0:S(1)} all-gather(%s), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %t = (bf16[1000,1000]{1,0:S(1)}, bf16[500,1000]{1,0:S(1)}) tuple(%m, %r)
}

%last (v: bf16[500,1000], z: bf16[125,1000]) -> bf16[500,1000] {
  %v = bf16[500,1000]{1,0:S(1)} parameter(0)
  %z = bf16[125,1000]{1,0:S(1)} parameter(1)
  %g.2 = bf16[500,1000]{1,0:S(1)} all-gather(%z), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c.1 = bf16[500,1000]{1,0:S(1)} custom-call(%v, %g.2), custom_call_target="AsyncCollectiveDone"
}
"""


def test_a_collective_spread_over_fusions_is_one():
    lines = [
        A,
        "  %p.0 = bf16[125,1000]{1,0:S(1)} slice(%a), slice={[0:125], [0:1000]}",
        "  %begin = bf16[500,1000]{1,0:S(1)} fusion(%p.0), kind=kCustom, calls=%first",
        "  %mid = (bf16[1000,1000]{1,0:S(1)}, bf16[500,1000]{1,0:S(1)}) fusion(%a, %begin, %p.0), calls=%between",
        "  %end = bf16[500,1000]{1,0:S(1)} fusion(%begin, %p.0), kind=kCustom, calls=%last",
    ]
    found = play("\n".join(lines), SPREAD)
    assert found.seconds == pytest.approx(PRODUCT)
    assert found.sent == {"all-gather over fsdp": 1e6}
    late = play("\n".join([*lines[:3], lines[4]]), SPREAD)
    assert late.exposed == {"all-gather over fsdp": pytest.approx(GATHER)}


def test_copies_beside_the_core_take_what_it_leaves_of_hbm():
    near = "(bf16[1000,1000]{1,0:S(1)}, bf16[1000,1000]{1,0}, u32[]{:S(2)})"
    far = f"  %b = bf16[1000,1000]{{1,0}} parameter(1)\n  %s = {near} copy-start(%b)"
    wait = "  %d = bf16[1000,1000]{1,0:S(1)} copy-done(%s)"
    # 2 MB need 2 s: as long as a product, and half of them are left after a copy in HBM of 1 MB in and out.
    assert play("\n".join([A, far, product("x"), wait])).seconds == pytest.approx(2.0)
    assert play("\n".join([A, far, wait, product("x")])).seconds == pytest.approx(4.0)
    copy = "  %c = bf16[500,1000]{1,0} copy(%h)"
    half = "  %h = bf16[500,1000]{1,0} parameter(2)"
    assert play("\n".join([A, half, far, copy, wait])).seconds == pytest.approx(4.0)
    assert play("\n".join([A, half, far, copy, product("x"), wait])).seconds == pytest.approx(4.0)


def test_copies_to_the_host_have_a_bus_of_their_own():
    shapes = "(bf16[1000,1000]{1,0:S(5)}, bf16[1000,1000]{1,0:S(1)}, u32[]{:S(2)})"
    begin, wait = f"  %s = {shapes} copy-start(%a)", "  %d = bf16[1000,1000]{1,0:S(5)} copy-done(%s)"
    found = play("\n".join([A, begin, wait]))
    assert (found.host, found.host_bytes) == (pytest.approx(1.0), 2e6)
    assert play("\n".join([A, begin, product("x"), wait])).seconds == pytest.approx(PRODUCT)


SLICED = """
%put (held: bf16[9,1000,1000], new: bf16[1,1000,1000], at: s32[]) -> bf16[9,1000,1000] {
  %held = bf16[9,1000,1000]{2,1,0:S(5)} parameter(0)
  %new = bf16[1,1000,1000]{2,1,0:S(1)} parameter(1)
  %at = s32[]{:S(1)} parameter(2)
  ROOT %put.0 = bf16[9,1000,1000]{2,1,0:S(5)} dynamic-update-slice(%held, %new, %at, %at, %at)
}

%get (all: bf16[9,1000,1000], at: s32[]) -> bf16[1,1000,1000] {
  %all = bf16[9,1000,1000]{2,1,0:S(5)} parameter(0)
  %at.1 = s32[]{:S(1)} parameter(1)
  ROOT %get.0 = bf16[1,1000,1000]{2,1,0:S(1)} dynamic-slice(%all, %at.1, %at.1, %at.1)
}
"""


def test_slices_go_to_the_host_and_come_back():
    stack, one, number = "bf16[9,1000,1000]{2,1,0:S(5)}", "bf16[1,1000,1000]{2,1,0:S(1)}", "s32[]{:S(1)}"
    lines = [
        A,
        f"  %stack = {stack} parameter(1)\n  %i = {number} parameter(2)\n  %one = {one} bitcast(%a)",
        f"  %s = (({stack}, {one}, {number}), {stack}) async-start(%stack, %one, %i), calls=%put",
        product("x"),
        f"  %d = {stack} async-done(%s)",
        f"  %s.1 = (({stack}, {number}), {one}) async-start(%d, %i), calls=%get",
        f"  %d.1 = {one} async-done(%s.1)",
    ]
    found = play("\n".join(lines), SLICED)
    assert found.host_bytes == 2 * 2e6
    assert (found.host, found.seconds) == (pytest.approx(1.0), pytest.approx(PRODUCT + 1.0))


def counted(limit: int) -> str:
    return f"""
%body (p: (s32[], bf16[1000,1000])) -> (s32[], bf16[1000,1000]) {{
  %p = (s32[], bf16[1000,1000]{{1,0:S(1)}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %a = bf16[1000,1000]{{1,0:S(1)}} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
{product("x")}
{start("g")}
{done("w", "g")}
  ROOT %t = (s32[], bf16[1000,1000]{{1,0:S(1)}}) tuple(%next, %x)
}}

%condition (q: (s32[], bf16[1000,1000])) -> pred[] {{
  %q = (s32[], bf16[1000,1000]{{1,0:S(1)}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant({limit})
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}}
"""


@pytest.mark.parametrize("trips", [1, PLAYED, 58])
def test_loops_take_as_often_their_time(trips):
    state = "(s32[], bf16[1000,1000]{1,0:S(1)})"
    lines = [A, "  %zero = s32[] constant(0)", f"  %state = {state} tuple(%zero, %a)"]
    lines += [f"  %while = {state} while(%state), condition=%condition, body=%body", product("y")]
    found = play("\n".join(lines), counted(trips))
    # The counter is four bytes in HBM; adding to it takes no time worth counting.
    assert found.seconds == pytest.approx(trips * (PRODUCT + GATHER) + PRODUCT, rel=1e-4)
    assert found.flops == (trips + 1) * 2e9
    assert found.sent == {"all-gather over fsdp": pytest.approx(trips * 1e6)}
    assert [(t.name, runs) for t, runs in found.transfers] == [("g", trips)]


def test_loops_whose_length_the_data_decides_are_named_or_run_as_told():
    state = "(s32[], bf16[1000,1000]{1,0:S(1)})"
    lines = [A, "  %n = s32[] parameter(1)", f"  %state = {state} tuple(%n, %a)"]
    lines += [f'  %while = {state} while(%state), condition=%condition, body=%body, metadata={{op_name="rounds"}}']
    found = play("\n".join(lines), counted(9))
    assert (found.seconds, found.loops) == (0.0, ("rounds",))
    told = play(
        "\n".join(lines), counted(9), trips=lambda source, number: 2 if (source, number) == ("rounds", 0) else 0
    )
    assert (told.flops, told.loops) == (2 * 2e9, ())


def test_grouped_products_count_the_rows_that_routing_fills():
    call = (
        '  %r = bf16[1000,50]{1,0:S(1)} custom-call(%x, %w), custom_call_target="tpu_custom_call", '
        'frontend_attributes={ragged_dot_tiling="10,100,50"}, metadata={op_name="experts/ragged-dot-none"}'
    )
    x, w = "  %x = bf16[1000,100]{1,0:S(1)} parameter(1)", "  %w = bf16[4,100,50]{2,1,0:S(1)} parameter(2)"
    text = "\n".join([A, x, w, call])
    on = Slice(Topology("x:4", "x", (4,)), np.arange(4)[:, None], {"fsdp": 4, "expert": 1})
    module = parse(f"ENTRY %main (a: bf16[1000,1000]) -> bf16[1000,1000] {{\n{text}\n}}\n")
    # 800 rows, and three tiles of 10 in which two experts meet.
    assert estimate(module, Kernels(0.8, "x"), on).flops == 2 * 830 * 100 * 50
    assert estimate(module, Kernels(1.0, "x"), on).flops == 2 * 1000 * 100 * 50


@pytest.mark.parametrize(("kernel", "products"), [("fwd", 192 + 128), ("dkv", 2 * 320), ("dq", 2 * 192 + 128)])
def test_attention_counts_the_blocks_below_the_diagonal(kernel, products):
    shapes = [f"bf16[2,16,4096,{width}]{{3,2,1,0:S(1)}} parameter({i})" for i, width in enumerate((192, 192, 128))]
    lines = [f"  %{name} = {shape}" for name, shape in zip("qkv", shapes, strict=True)]
    source = f"attention/splash_mha_{kernel}_residuals/pallas_call"
    lines.append(
        "  ROOT %o = bf16[2,16,4096,128]{3,2,1,0:S(1)} custom-call(%q, %k, %v), "
        f'custom_call_target="tpu_custom_call", metadata={{op_name="{source}"}}'
    )
    # Ten of sixteen blocks of 1024 x 1024.
    assert play("\n".join(lines)).flops == 2 * 32 * 10 * 1024**2 * products
