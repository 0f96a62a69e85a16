"""Kernels are priced by measurements that stand in tables, and the estimate that follows agrees with a measured run."""

import importlib.util
import json

import numpy as np
import pytest

from deepseek_jax.analysis.counts import counts
from deepseek_jax.aot.hlo import parse
from deepseek_jax.aot.kernels import Kernels, Timed
from deepseek_jax.aot.rates import attention, backward_ratio, causal_flops, grouped, measured
from deepseek_jax.aot.topology import CHIPS
from deepseek_jax.configs.zoo import zoo


@pytest.fixture(scope="module")
def compiled(root):
    """The experiment's script, and the results that are committed."""
    spec = importlib.util.spec_from_file_location("compile_671b", root / "experiments" / "compile_671b" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    return run, json.loads(run.RESULTS.read_text())["configurations"]


def test_a_measured_shape_has_its_measured_rate():
    rate, form = grouped("v5p", "megablox", "forward", 524288, 256, 7168, 2048)
    assert (rate, form) == (pytest.approx(2 * 524288 * 7168 * 2048 / 77.808e-3), "megablox")
    # XLA's own forward kernel has no measurement on v5p, its transposed one has.
    assert grouped("v5p", "ragged", "forward", 524288, 256, 7168, 2048) == (rate, "megablox")
    assert grouped("v5p", "ragged", "transposed", 524288, 256, 2048, 7168)[1] == "ragged"
    assert grouped("v4", "ragged", "forward", 524288, 256, 7168, 2048) is None


def test_between_measured_rows_a_group_the_rate_goes_with_their_logarithm():
    few, many = (grouped("v5p", "megablox", "forward", rows, 256, 7168, 2048)[0] for rows in (262144, 524288))
    middle = grouped("v5p", "megablox", "forward", 262144 * 2**0.5, 256, 7168, 2048)[0]
    assert middle == pytest.approx((few + many) / 2)
    # Of 128 rows a group and fewer, and of 2048 and more, nothing was measured: the rate stays.
    assert grouped("v5p", "megablox", "forward", 2**20, 64, 7168, 2048)[0] == many
    # Gate and up fused are nearest to what was measured for one of them.
    assert grouped("v5p", "megablox", "forward", 524288, 256, 7168, 4096)[0] == many


@pytest.mark.parametrize("sums", [False, True])
def test_the_rate_of_wide_keys_follows_from_others_measurements(sums):
    """V3's 192 and 128 were measured once on v5p, at 1024 tokens: not among the points that are interpolated."""
    product = "forward with sums" if sums else "forward"
    (line,) = [m for m in measured("attention") if (m["chip"], m["key_dim"], m["product"]) == ("v5p", 192, product)]
    found = causal_flops(line, "fwd") / (line["ms"] * 1e-3)
    assert attention("v5p", 2, "fwd", sums, 1024, 192, 128) == pytest.approx(found, rel=0.02)


def test_the_backward_kernel_runs_on_one_core():
    forward = attention("v5p", 2, "fwd", True, 4096, 192, 128)
    assert backward_ratio() == pytest.approx((832 / 6.273) / (320 / 2.728))
    assert attention("v5p", 2, "dkv", True, 4096, 192, 128) == pytest.approx(forward * backward_ratio() / 2)
    assert attention("v5e", 1, "fwd", False, 4096, 192, 128) is None


def test_no_measurement_is_beyond_the_chip():
    for m in measured("grouped"):
        rate = 2 * m["rows"] * m["inner"] * m["outer"] / (m["ms"] * 1e-3)
        assert 0.1 < rate / CHIPS[m["chip"]].flops < 0.95, m
    assert {m["chip"] for m in measured("attention")} == {"v5p", "v6e", "v7x"}


CALLS = """
ENTRY %main (x: bf16[1000,7168], w: bf16[8,7168,4096]) -> bf16[1000,4096] {
  %x = bf16[1000,7168]{1,0} parameter(0)
  %w = bf16[8,7168,4096]{2,1,0} parameter(1)
  %up = bf16[1000,4096]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call", metadata={op_name="FORM"}
  %back = bf16[1000,7168]{1,0} custom-call(%up, %w), custom_call_target="tpu_custom_call", metadata={op_name="FORM"}
  %t = bf16[7168,1000]{1,0} transpose(%x), dimensions={1,0}
  ROOT %dw = bf16[8,7168,4096]{2,1,0} custom-call(%t, %up), custom_call_target="c", metadata={op_name="FORM"}
}
"""


@pytest.mark.parametrize(("source", "form"), [("jit(gmm)/pallas_call", "megablox"), ("x/ragged-dot-none", "ragged")])
def test_a_call_is_known_by_its_shapes(source, form):
    entry = parse(CALLS.replace("FORM", source)).entry
    kernels = Kernels(0.8, "v5p", 2)
    found = {}
    for call in entry.instructions:
        if call.opcode == "custom-call":
            found[call.name] = kernels(call, [a for i in entry.operands(call) for a in i.arrays])
    assert {name: (t.kernel, t.product) for name, t in found.items()} == {
        "up": (form, "forward"),
        "back": (form, "transposed"),
        "dw": (form, "gradient"),
    }
    assert all(isinstance(t, Timed) and t.flops == 2 * 800 * 7168 * 4096 for t in found.values())
    assert found["dw"].shape == {"rows": 800, "groups": 8, "inner": 7168, "outer": 4096}


def test_a_measured_run_is_estimated_within_a_tenth(compiled):
    """MaxText's recipe: its mesh, rows, lengths, kernels, what it keeps in the host's memory, and its compiler flags.

    The compiled program is committed as its figures; its kernels are priced again here.
    """
    run, results = compiled
    found = results["maxtext"]
    time, layout = found["time"], found["program"]
    assert (found["topology"], found["mesh"]["fsdp"], layout["rows"], layout["length"]) == ("v5p:8x8x8", 512, 6, 8192)
    assert layout["rows"] * layout["length"] / run.MAXTEXT["seconds"] == pytest.approx(542.108, rel=1e-5)
    assert found["tokens_per_second_chip"] == pytest.approx(layout["rows"] * layout["length"] / time["seconds"])
    assert found["tokens_per_second_chip"] == pytest.approx(run.MAXTEXT["tokens_per_second_chip"], rel=0.1)
    # The recipe's own count of useful FLOPs, 152.415 TFLOP/s a chip, is ours.
    useful = counts(zoo("deepseek-v3"), layout["length"]).flops_per_token
    assert useful * run.MAXTEXT["tokens_per_second_chip"] == pytest.approx(152.415e12, rel=1e-3)
    # Kernels take most of that time, and all of them are priced.
    assert 0.6 < sum(line["seconds"] * line["runs"] for line in time["kernels"]) / time["seconds"] < 0.8


def test_committed_results_are_priced_by_todays_tables(compiled):
    for name, found in compiled[1].items():
        chip, cores = found["topology"].split(":")[0], CHIPS[found["topology"].split(":")[0]].cores
        for line in found["time"]["kernels"]:
            shape, product = line["shape"], line["product"]
            if line["kernel"] == "attention":
                # A forward kernel of a training step returns its sums.
                sums = found["program"]["kind"] == "train"
                widths = shape["key_dim"], shape["value_dim"]
                rate = attention(chip, cores, product, sums, shape["length"], *widths)
                flops = causal_flops(shape, product)
            else:
                flops = line["flops"]
                rate = grouped(chip, line["kernel"], product, *shape.values())[0]
            np.testing.assert_allclose(line["seconds"], flops / rate, rtol=1e-3, err_msg=name)
