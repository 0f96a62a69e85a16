"""HLO text is read as it stands; loops are counted; costs are those of the program that JAX compiled."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.aot.costs import Costs
from deepseek_jax.aot.hlo import HOST, VMEM, Array, Module, parse

LOOP = """
HloModule loop, is_scheduled=true

%body (p: (s32[], f32[8,8], f32[5,8,8])) -> (s32[], f32[8,8], f32[5,8,8]) {
  %p = (s32[], f32[8,8]{1,0}, f32[5,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[5,8,8]{2,1,0} get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %zero = s32[] constant(0)
  %slice = f32[1,8,8]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,8,8}
  %matrix = f32[8,8]{1,0} bitcast(%slice)
  %y = f32[8,8]{1,0} dot(%x, %matrix), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="a {dot}"}
  ROOT %t = (s32[], f32[8,8]{1,0}, f32[5,8,8]{2,1,0}) tuple(%next, %y, /*index=2*/%w)
}

%condition (q: (s32[], f32[8,8], f32[5,8,8])) -> pred[] {
  %q = (s32[], f32[8,8]{1,0}, f32[5,8,8]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%j, %limit), direction=DIRECTION
}

ENTRY %main (a: f32[8,8], b: f32[5,8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[5,8,8]{2,1,0} parameter(1)
  %start = s32[] constant(1)
  %state = (s32[], f32[8,8]{1,0}, f32[5,8,8]{2,1,0}) tuple(%start, %a, %b)
  %while = (s32[], f32[8,8]{1,0}, f32[5,8,8]{2,1,0}) while(%state), condition=%condition, body=%body, attributes={note={
"text":"{\\"}\\": 1}"
}}, metadata={op_name="jit(f)/while"}
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%while), index=1
}
"""


def loop(limit="9", direction="LT") -> Module:
    return parse(LOOP.replace("LIMIT", limit).replace("DIRECTION", direction))


def total_flops(module: Module) -> float:
    """With loops multiplied out; every loop's length has to be known."""
    costs = Costs(module, lambda call, operands: None)

    def of(computation, times):
        flops = 0.0
        for i in computation.instructions:
            if i.opcode == "while":
                flops += of(module.computations[i.called["body"][0]], times * module.trips(i, computation))
            elif i.opcode == "call":
                flops += sum(of(c, times) for c in module.called(i))
            else:
                flops += times * costs.of(i, computation).flops
        return flops

    return of(module.entry, 1)


def test_instructions_stand_as_scheduled():
    module = loop()
    assert [i.name for i in module.entry.instructions] == ["a", "b", "start", "state", "while", "out"]
    assert module.entry.root.name == "out"
    (found,) = [i for i in module.entry.instructions if i.opcode == "while"]
    assert found.source == "jit(f)/while"
    assert found.called == {"condition": ("condition",), "body": ("body",)}
    assert [a.dims for a in found.arrays] == [(), (8, 8), (5, 8, 8)]
    body = module.computations["body"]
    assert body.by_name["t"].operands == ("next", "y", "w")
    assert body.by_name["y"].source == "a {dot}"
    assert body.by_name["y"].attribute("rhs_contracting_dims") == "{0}"
    assert body.by_name["y"].attribute("contracting_dims") is None


@pytest.mark.parametrize(
    ("limit", "direction", "trips"),
    [("9", "LT", 4), ("10", "LT", 5), ("9", "LE", 5), ("1", "LT", 0), ("9", "NE", None), ("-3", "LT", None)],
)
def test_loops_are_counted_from_their_condition(limit, direction, trips):
    module = loop(limit, direction)
    assert module.trips(module.entry.by_name["while"], module.entry) == trips


def test_a_length_that_the_compiler_knows_counts():
    module = parse(LOOP.replace("LIMIT", "9").replace("DIRECTION", "NE").replace(
        "condition=%condition", 'condition=%condition, backend_config={"known_trip_count":{"n":"7"}}'))  # fmt: skip
    assert module.trips(module.entry.by_name["while"], module.entry) == 7


def test_a_slice_costs_what_is_cut_out():
    module = loop()
    body = module.computations["body"]
    costs = Costs(module, lambda call, operands: None)
    assert costs.of(body.by_name["slice"], body).hbm == 2 * 8 * 8 * 4
    assert costs.of(body.by_name["y"], body).flops == 2 * 8**3
    assert costs.of(body.by_name["y"], body).hbm == 3 * 8 * 8 * 4
    assert total_flops(module) == 4 * 2 * 8**3


def test_layouts_pad_and_name_memories():
    text = "ENTRY %e (a: bf16[10,14]) -> bf16[10,14] {\n  ROOT %a = bf16[10,14]{0,1:T(8,128)(2,1)S(1)} parameter(0)\n}"
    (array,) = parse(text).entry.root.arrays
    assert array == Array("bf16", (10, 14), (0, 1), (8, 128), VMEM)
    assert (array.nbytes, array.stored) == (280, 128 * 16 * 2)
    assert Array("s4", (3, 3)).nbytes == 4
    assert Array("pred", (7,), (0,), (256,), HOST).stored == 256


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("%body () -> f32[] {\n}\n")


def test_a_scan_multiplied_out_is_what_jax_was_asked_for():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def loss(x, w):
        return f(x, w).sum()

    x, w = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
    text = jax.jit(jax.grad(loss, argnums=1)).lower(x, w).compile().as_text()
    one = 2 * 16 * 32 * 32
    # Forward, and backward both products; that of the first layer's input is not needed, but is in the loop.
    assert total_flops(parse(text)) == 3 * 5 * one


# A batch of 4 products [6, 5] x [5, 7], written as the TPU compiler does: the batch is a spatial axis of window 4,
# whose dilated input meets each place of the window once.
CONVOLUTION = """
ENTRY %e (a: f32[4,6,5], b: f32[4,5,7]) -> f32[4,6,7] {
  %a = f32[4,6,5]{2,1,0} parameter(0)
  %b = f32[4,5,7]{2,1,0} parameter(1)
  %narrow = f32[6,7]{1,0} convolution(%m, %n), dim_labels=bf_io->bf, operand_precision={highest,highest}
  ROOT %c = f32[4,6,7]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""


def test_matrix_products_written_as_convolutions():
    module = parse(
        CONVOLUTION.replace("%narrow", "%m = f32[6,5]{1,0} slice(%a)\n  %n = f32[5,7]{1,0} slice(%b)\n  %narrow")
    )
    costs, where = Costs(module, lambda call, operands: None), module.entry
    assert costs.of(where.by_name["c"], where).flops == 2 * 4 * 6 * 5 * 7
    narrow = costs.of(where.by_name["narrow"], where)
    assert (narrow.flops, narrow.passes) == (2 * 6 * 5 * 7, 6 * 2 * 6 * 5 * 7)


UPDATE = """
%inner (held: f32[9,64], new: f32[1,64], at: s32[]) -> f32[9,64] {
  %held = f32[9,64]{1,0} parameter(0)
  %new = f32[1,64]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %none = s32[] constant(0)
  %twice = f32[1,64]{1,0} add(%new, %new)
  ROOT %written = f32[9,64]{1,0} dynamic-update-slice(%held, %twice, %at, %none)
}

%cut (whole: f32[9,64], at: s32[]) -> f32[1,64] {
  %whole = f32[9,64]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %none.1 = s32[] constant(0)
  %half = bf16[9,64]{1,0} convert(%whole)
  %row = bf16[1,64]{1,0} dynamic-slice(%half, %at.1, %none.1), dynamic_slice_sizes={1,64}
  ROOT %back = f32[1,64]{1,0} convert(%row)
}

ENTRY %e (a: f32[9,64], b: f32[1,64], i: s32[]) -> f32[9,64] {
  %a = f32[9,64]{1,0} parameter(0)
  %b = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %part = f32[1,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%cut
  %near = f32[1,64]{1,0:S(1)} copy(%b)
  %kernel = f32[1,64]{1,0} custom-call(%part, %near), custom_call_target="mine"
  ROOT %u = f32[9,64]{1,0} fusion(%a, %kernel, %i), kind=kLoop, calls=%inner
}
"""


def test_fusions_cost_what_they_touch_and_unknown_kernels_are_named():
    module = parse(UPDATE)
    costs, where = Costs(module, lambda call, operands: None), module.entry
    row, number = 64 * 4, 4
    cut, update = (costs.of(where.by_name[name], where) for name in ("part", "u"))
    assert (cut.read, cut.written) == (row + number, row)
    assert (update.read, update.written) == (row + number, row)
    near = costs.of(where.by_name["near"], where)
    assert (near.read, near.written) == (row, 0)
    assert costs.of(where.by_name["kernel"], where).read == row
    assert list(costs.unknown) == ["kernel"]
