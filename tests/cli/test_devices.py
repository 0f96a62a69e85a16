"""Fields of the context from the command line."""

import pytest

from deepseek_jax.cli.devices import Devices, fields


def test_fields_of_the_context():
    assert fields(("remat=full", "loss_chunk=512", "drop=True", "expert_buffer=1.5")) == {
        "remat": "full",
        "loss_chunk": 512,
        "drop": True,
        "expert_buffer": 1.5,
    }
    ctx = Devices(set=("expert_chunks=4",)).context()
    assert (ctx.expert_chunks, ctx.mesh) == (4, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remat", "--set 'remat': give NAME=VALUE"),
        ("mesh=2", "--set mesh: choose among attention, cache, drop, expert_buffer"),
        ("remat=wild", r"Context\(remat='wild'\): choose one of none, full"),
    ],
)
def test_what_the_context_does_not_take(text, message):
    with pytest.raises(ValueError, match=message):
        Devices(set=(text,)).context()
