"""Records of a run: whole lines whatever ends the process, valid JSON whatever the numbers, rates of steps only."""

import builtins
import json
import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.runs.metrics import JsonLines, Reporters, TensorBoard, TextLog, describe, plain, short
from deepseek_jax.runs.throughput import Throughput

STEP = {
    "kind": "step",
    "step": 20,
    "tokens": 4096,
    "loss": jnp.float32(2.3456789),
    "main": np.float32("nan"),
    "balance": {"sequence": jnp.inf},
    "max_violation": jnp.asarray([0.25, 0.75]),
    "load": jnp.asarray([[1, 3], [2, 2]]),
    "bias": jnp.asarray([[0.5, -0.5], [0, 1]], jnp.bfloat16),
    "mfu": None,
    "tokens_per_second": 12_345.6,
}


def test_a_record_is_one_line_of_json(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.record(STEP)
    lines.record({"kind": "event", "step": 20, "event": "saved", "message": "at\nstep 20"})
    lines.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    assert first["loss"] == 2.34568
    assert math.isnan(float(first["main"]))
    assert float(first["balance"]["sequence"]) == math.inf
    assert first["load"] == [[1, 3], [2, 2]]
    assert first["bias"] == [[0.5, -0.5], [0, 1]]
    assert first["mfu"] is None
    assert second["message"] == "at\nstep 20"


def test_a_line_left_unfinished_spoils_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "st')
    lines = JsonLines(path)
    lines.record({"kind": "event"})
    lines.close()
    assert path.read_text() == '{"kind": "step", "st\n{"kind": "event"}\n'


def test_a_line_is_one_write(tmp_path, monkeypatch):
    lines, written, write = JsonLines(tmp_path / "m.jsonl"), [], os.write
    monkeypatch.setattr(os, "write", lambda file, data: written.append(data) or write(file, data))
    lines.record(STEP)
    assert len(written) == 1
    assert written[0].count(b"\n") == 1
    assert written[0].endswith(b"\n")
    lines.close()
    lines.close()


def test_a_full_disk_is_an_error_that_names_the_file():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    lines = JsonLines("/dev/full")
    with pytest.raises(OSError, match="/dev/full"):
        lines.record(STEP)
    lines.close()


def test_what_no_record_can_hold_is_refused():
    with pytest.raises(TypeError, match="a record cannot hold a set"):
        plain({"kind": "step", "x": {1}})


def test_the_text_log_says_what_matters(tmp_path):
    log = TextLog(tmp_path / "train.log")
    log.say("hello")
    log.record(plain(STEP))
    log.record({"kind": "evaluation", "step": 20, "bits_per_byte": 1.25, "trigram_bits_per_byte": None})
    log.record({"kind": "result", "steps": 20})
    log.close()
    lines = [line.split("min  ")[1] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert lines == [
        "hello",
        "step 20: loss 2.3457, main nan, MaxVio 0.50, tokens a second 12.3k",
        "step 20: held-out bits per byte 1.2500",
    ]
    assert describe({"kind": "event", "step": 3, "event": "skipped", "message": "not finite"}) == (
        "step 3: skipped: not finite"
    )


def test_short_counts():
    assert [short(x) for x in (950, 12_345, 999_900, 1.25e6, 14.8e12, math.nan)] == [
        "950",
        "12.3k",
        "1M",
        "1.25M",
        "14.8T",
        "nan",
    ]


class Broken:
    closed = 0

    def record(self, record):
        raise OSError("full")

    def say(self, line):
        pass

    def close(self):
        Broken.closed += 1
        raise OSError("full")


def test_all_reporters_are_closed_and_errors_are_raised(tmp_path):
    last = Broken()
    with pytest.raises(OSError, match="full"), Reporters([Broken(), TextLog(tmp_path / "log"), last]):
        pass
    assert Broken.closed == 2
    with pytest.raises(OSError, match="full"):
        Reporters([last]).record(STEP)


def test_tensorboard_holds_the_figures(tmp_path):
    board = TensorBoard(tmp_path)
    board.record(plain(STEP))
    board.record({"kind": "evaluation", "step": 20, "bits_per_byte": 1.25, "domains": {"code": 1.0}})
    board.record({"kind": "event", "step": 20, "event": "saved", "message": "here"})
    board.close()
    (file,) = tmp_path.iterdir()
    tags = events(file.read_bytes())
    assert tags["train/loss"] == pytest.approx(2.34568)
    assert tags["train/max_violation/layer.1"] == 0.75
    assert tags["held_out/domains/code"] == 1.0
    assert {"bias/layer.0", "load/times_the_mean_0_to_3"} <= set(tags)
    assert not {"train/main", "train/mfu", "train/balance/sequence"} & set(tags)


def events(data: bytes) -> dict[str, float]:
    """Tag -> value of an event file: records of length (8 bytes), its check (4), a message, its check (4)."""
    from tensorboardX.proto.event_pb2 import Event

    tags = {}
    while data:
        size = int.from_bytes(data[:8], "little")
        for value in Event.FromString(data[12 : 12 + size]).summary.value:
            tags[value.tag] = value.simple_value
        data = data[16 + size :]
    return tags


def test_a_missing_tensorboardx_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **options):
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"deepseek-jax\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_rates_are_those_of_steps_alone():
    now = [0.0]
    rates = Throughput(flops_per_token=1e9, peak_flops=1e13, clock=lambda: now[0])
    now[0] = 60.0  # compilation
    rates.restart()
    for _ in range(4):
        now[0] += 0.5
        rates.step(1000, data_wait=0.1)
    assert rates.measure() == {"tokens_per_second": 2000.0, "mfu": pytest.approx(0.2), "data_wait": pytest.approx(0.1)}
    now[0] += 30  # an evaluation
    rates.restart()
    now[0] += 1.0
    rates.step(1000, data_wait=0)
    assert rates.measure()["tokens_per_second"] == 1000.0
    assert rates.measure() == {"tokens_per_second": None, "mfu": None, "data_wait": None}
    unknown = Throughput(1e9, None, clock=lambda: now[0])
    now[0] += 1
    unknown.step(1000, 0)
    assert unknown.measure()["mfu"] is None
