"""The compiler's dump is read by kind of memory, and the fullest moment is found."""

import pytest

from deepseek_jax.aot.memory import ASSIGNMENT, HLO, LIVE, read_memory

DUMP = {
    HLO: """
%body (x: f32[4,8,2]) -> f32[4,8,2] {
  %x = f32[4,8,2]{2,1,0} parameter(0), metadata={op_name="inside"}
}

ENTRY %main (p.1: f32[4,8,2], p.2: s32[]) -> f32[4,8,2] {
  %p.1 = f32[4,8,2]{2,1,0} parameter(0), metadata={op_name="state.params.stacks[0].w.value"}
  %p.2 = s32[] parameter(1), metadata={op_name="batch[\\'tokens\\']"}
  %first = f32[9]{0} copy(%p.1), metadata={op_name="forward/first"}
  %second = f32[4,8,2]{2,1,0} copy(%p.1), metadata={op_name="backward/second"}
  ROOT %out = f32[4,8,2]{2,1,0} copy(%second)
}
""",
    ASSIGNMENT: """BufferAssignment:
allocation 0: size 256, page 0, parameter 0, shape |f32[4,8,2]| at ShapeIndex {}, maybe-live-out:
 value: <1 other @0> (size=256,offset=0): f32[4,8,2]{2,1,0}
 value: <2 p.1 @0> (size=256,offset=0): f32[4,8,2]{2,1,0}
allocation 1: size 4, page 0, parameter 1, shape |s32[]| at ShapeIndex {}:
 value: <3 p.2 @0> (size=4,offset=0): s32[]
allocation 2: size 64, page 0, maybe-live-out:
 value: <4 out @0> (size=64,offset=0): f32[16]{0}
allocation 3: size 16, page 0, constant:
 value: <5 c @0> (size=16,offset=0): f32[4]{0}
allocation 4: size 8, page 0, thread-local:
 value: <6 t @0> (size=8,offset=0): f32[2]{0}
allocation 5: size 1000, page 0, preallocated-temp:
 value: <7 first @0> (size=300,offset=0): f32[9]{0:T(128)}
 value: <8 while{1} (phi) @0> (size=300,offset=0): f32[9]{0:T(128)}
 value: <9 second @0> (size=500,offset=400): f32[4,8,2]{2,1,0}
 value: <10 third @0> (size=200,offset=0): f32[7]{0}
allocation 6: size 5000, color 1, page 0, preallocated-temp:
 value: <11 near @1> (size=5000,offset=0): f32[7]{0:S(1)}
allocation 7: size 700, color 5, page 0, preallocated-temp:
 value: <12 host @5> (size=700,offset=0): f32[7]{0:S(5)}
""",
    LIVE: """HloLiveRange (max 9):
  InstructionSequence:
    0:p.1
  BufferLiveRange:
    first{}:0-3
    while{1}:3-5
    second{}:5-6
    third{}:6-9
    near{}:0-9
  Live ranges at 0 (peak):
    first{}: 300 bytes (cumulative: 300 bytes)
""",
}


def test_a_dump_by_kind(tmp_path):
    for name, text in DUMP.items():
        (tmp_path / f"module_0001.jit_small.{name}").write_text("")
        (tmp_path / f"module_0000.jit_step.{name}").write_text(text)
    found = read_memory(tmp_path)
    assert found.arguments == {"state.params": 256, "batch.tokens": 4}
    assert (found.donated, found.outputs, found.temporaries, found.constants, found.host) == (256, 64, 1000, 16, 700)
    assert found.total == 256 + 4 + 64 + 1000 + 16
    # At 5 the loop's state and the second buffer; the first is where the loop's state is.
    assert found.live == 800
    assert [(b.nbytes, b.shape, b.source, b.like_parameter) for b in found.largest] == [
        (500, "f32[4,8,2]", "backward/second", True),
        (300, "f32[9]", "forward/first", False),
    ]
    gradients, activations, work = "gradients, weights cast", "kept activations of all layers", "at work"
    assert found.live_by_kind({3, 9}) == {activations: 300, gradients: 500, work: 0}
    assert found.live_by_kind({4}) == {activations: 0, gradients: 500, work: 300}


def test_a_dump_that_is_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_memory(tmp_path)
