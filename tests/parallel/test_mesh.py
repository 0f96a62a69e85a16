"""A model on meshes of 8 virtual devices equals one device: each axis alone, then together; and what it moves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from measured import measured

from deepseek_jax.kernels.native.library import compiler

AXES = ("data=8", "fsdp=8", "expert=8", "tensor=4", "context=4")
MIXED = (
    "fsdp=2,expert=2,tensor=2",
    "data=2,expert=4",
    "data=2,fsdp=2,context=2",
    "expert=2,tensor=2,context=2",
    "data=2,fsdp=2,tensor=2",
)
SNAPSHOT = MIXED[0]
QUANTIZED = MIXED[1]
HERE = Path(__file__).parent
# A step's loss, gradients, routing and balance are compared on every axis. Logits and decoding are its forward pass's
# layout once more, where nothing but rows or a row's tokens lie apart: there they wait for the slow tests.
FORWARD, FORWARD_SLOWLY = AXES[2:4], (*AXES[:2], AXES[4])
# Experts apart, rows filled up, and an axis that training splits rows over; then heads and vocabulary apart.
WRITTEN = ("expert=4,context=2", "tensor=4", AXES[4], *MIXED[:4])
# Other architectures, on every axis: grouped queries; experts without a router bias, behind GQA and MLA; streams;
# experts chosen by token.
OTHERS = (
    "data=2,tensor=2,context=2|distill-qwen",
    "fsdp=8|distill-qwen",
    "context=4|distill-llama",
    "fsdp=2,expert=2,tensor=2|deepseek-moe",
    "data=2,expert=2,context=2|v2",
    "expert=8|v2-lite",
    "fsdp=2,tensor=2,context=2|v3.2",
    "data=8|deepseek-llm",
    "fsdp=2,expert=2,tensor=2|v4",
    "fsdp=2,tensor=2,context=2|streams",
    "expert=2,tensor=2,context=2|hash",
)
DEFAULT = [
    *(f"sgd|{axis}" for axis in AXES),
    *(f"{what}|{axis}" for axis in FORWARD for what in ("forward", "generated")),
    "sgd|expert=8|concentrated",
    "forward|expert=8|concentrated",
    "drop|expert=8|concentrated",
    "scores|expert=8",
    "loaded|fsdp=4,expert=2",
    "staged|fsdp=8",
    f"saved|{SNAPSHOT}",
]
SLOW = [
    *(f"{what}|{axis}" for axis in FORWARD_SLOWLY for what in ("forward", "generated")),
    *(f"{what}|{case}" for case in MIXED for what in ("sgd", "forward", "generated")),
    *(f"sgd|{case}|concentrated" for case in (MIXED[0], MIXED[3])),
    *(f"text|{case}" for case in WRITTEN),
    *(f"adamw|{case}" for case in MIXED[:2]),
    f"attention|{MIXED[4]}",
    f"kernel|{MIXED[1]}",
    *([f"native|{MIXED[1]}"] if compiler() else []),
    f"stored|{MIXED[0]}",
    f"improved|{MIXED[0]}",
    f"born|{SNAPSHOT}",
    f"snapshot|{SNAPSHOT}",
    *(f"{what}|{QUANTIZED}" for what in ("quantized", "quantized-blocks", "quantized-all")),
]
# The jobs of a mesh share its programs, which may be dropped between jobs.
SLOW.sort(key=lambda job: job.split("|")[1])
# Relative Frobenius errors, float32.
GRADIENT, SGD, ADAMW = 2e-5, 1e-4, 1e-3


def run(jobs: list[str], folder: Path) -> dict[str, dict]:
    """Every job's findings, from one process: devices are made before JAX starts."""
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    path = folder / "results.json"
    command = [sys.executable, str(HERE / "eight_devices.py"), str(path), *jobs]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def default(tmp_path_factory):
    return run(DEFAULT, tmp_path_factory.mktemp("eight"))


@pytest.fixture(scope="session")
def slow(tmp_path_factory):
    return run(SLOW, tmp_path_factory.mktemp("eight"))


@pytest.fixture(scope="session")
def others(tmp_path_factory):
    """In a process of their own: the programs of all would take more memory maps than a process may have."""
    return run([f"other|{case}" for case in OTHERS], tmp_path_factory.mktemp("eight"))


def check_steps(found: dict, bound: float) -> None:
    assert found["loss"] <= GRADIENT
    assert found["gradients"][0] <= GRADIENT, found["gradients"]
    assert found["parameters"][0] <= bound, found["parameters"]
    assert found["moved"][0] > 10 * bound
    assert found["statistics"] <= GRADIENT
    assert found["balance"] <= GRADIENT
    assert found["bias"]
    assert found["load"]
    assert found["dropped"] == 0
    # Copies of one array on several devices stay one array, and nothing changes its place.
    assert found["drifted"] == []
    assert found["moved_away"] == []


def check_forward(found: dict) -> None:
    assert found["logits"] <= GRADIENT
    assert found["mtp_logits"] <= GRADIENT
    assert found["routing"]
    assert found["load"]
    assert found["drifted"] == []


def check_generated(found: dict) -> None:
    assert found["logits"] <= GRADIENT
    assert found["cache"] <= GRADIENT
    assert found["length"]
    assert found["drifted"] == []


@pytest.mark.parametrize("axis", AXES)
def test_three_steps_on_one_axis(default, axis):
    check_steps(default[f"sgd|{axis}"], SGD)
    measured("tiny-v3", "mesh", default[f"sgd|{axis}"]["gradients"][0])


def check_logits_and_decoding(found: dict, axis: str) -> None:
    check_forward(found[f"forward|{axis}"])
    assert found[f"forward|{axis}"]["dropped"] == [0, 0]
    check_generated(found[f"generated|{axis}"])


@pytest.mark.parametrize("axis", FORWARD)
def test_logits_mtp_routing_and_decoding_on_one_axis(default, axis):
    check_logits_and_decoding(default, axis)


@pytest.mark.slow
@pytest.mark.parametrize("axis", FORWARD_SLOWLY)
def test_logits_mtp_routing_and_decoding_on_an_axis_of_rows(slow, axis):
    check_logits_and_decoding(slow, axis)


def check_other(results: dict, case: str) -> None:
    found = results[f"other|{case}"]
    if not case.endswith(("|hash", "|streams")):  # no release's architecture
        measured(case.split("|")[1], "mesh", found["gradients"][0])
    assert found["loss"] <= GRADIENT
    assert found["gradients"][0] <= GRADIENT, found["gradients"]
    assert found["parameters"][0] <= SGD, found["parameters"]
    assert found["moved"][0] > 10 * SGD
    assert found["load"]
    assert found["logits"] <= GRADIENT
    assert found["drifted"] == []
    # What the gradients of indexers are compared by is theirs, not zeros.
    assert bool(found["indexers"]) == case.endswith(("v3.2", "v4"))
    assert all(norm > 1e-4 for norm in found["indexers"]), found["indexers"]


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_other_architectures_on_meshes(others, case):
    check_other(others, case)


@pytest.mark.slow
def test_a_janus_shown_drawing_and_trained(tmp_path):
    """Rows of both kinds, two pictures drawn, which are filled up, text about one; files into shards."""
    job = f"janus|{MIXED[4]}"
    found = run([job], tmp_path)[job]
    assert max(found["errors"].values()) <= GRADIENT, found["errors"]
    assert found["gradients"][0] <= GRADIENT, found["gradients"]
    measured("janus", "mesh", found["gradients"][0])
    assert found["parameters"][0] <= ADAMW, found["parameters"]
    assert found["codes"]
    assert found["images"] <= 1
    assert found["words"]
    assert found["drifted"] == []
    assert found["read"]
    assert found["share"] == 1 / 4


def check_text(found: dict) -> None:
    ours, theirs = found["ours"], found["theirs"]
    for name in ("tokens", "calls", "finish_reason", "drafted", "accepted"):
        assert ours[name] == theirs[name], name
    assert sum(ours["accepted"]) > 0
    for name in ("logprobs", "behaviour_logprobs"):
        for mine, reference in zip(ours[name], theirs[name], strict=True):
            assert mine == pytest.approx(reference, abs=2e-5)
    # Several calls ran each of the two programs.
    assert ours["calls"] > 1
    assert ours["programs"] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRITTEN)
def test_text_greedy_and_sampled_with_drafts(slow, case):
    check_text(slow[f"text|{case}"])


def test_scores(default):
    found = default["scores|expert=8"]
    assert found["largest"] <= 2e-5 < abs(found["first"])


def test_nothing_is_dropped_when_every_token_goes_to_the_same_experts(default):
    check_steps(default["sgd|expert=8|concentrated"], SGD)
    check_forward(default["forward|expert=8|concentrated"])
    for load in default["forward|expert=8|concentrated"]["loads"]:
        assert sum(load[:2]) == sum(load)


def test_what_exceeds_the_buffer_is_dropped_and_counted_when_asked(default):
    found = default["drop|expert=8|concentrated"]
    # Eight devices hold an expert each. A buffer takes twice the mean of what a device sends; the batch has 8 rows.
    for load, dropped in zip(found["loads"], found["dropped"], strict=True):
        buffer = 2 * 32 * 2
        assert dropped == sum(max(assigned - buffer, 0) for assigned in load) > 0
    assert found["load"], "what is dropped counts for the balance all the same"
    assert found["logits"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXED)
def test_mixed_meshes(slow, case):
    check_steps(slow[f"sgd|{case}"], SGD)
    check_forward(slow[f"forward|{case}"])
    check_generated(slow[f"generated|{case}"])


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXED[:2])
def test_adamw_on_mixed_meshes(slow, case):
    check_steps(slow[f"adamw|{case}"], ADAMW)


@pytest.mark.slow
@pytest.mark.parametrize("case", [MIXED[0], MIXED[3]])
def test_concentrated_routing_on_mixed_meshes(slow, case):
    check_steps(slow[f"sgd|{case}|concentrated"], SGD)


@pytest.mark.slow
def test_attention_kernel_takes_each_device_s_rows_and_heads(slow):
    found = slow[f"attention|{MIXED[4]}"]
    assert max(found["expanded"] + found["absorbed"]) <= GRADIENT
    # 8 rows over data=2, fsdp=2 and 4 heads over tensor=2.
    assert found["expanded heads"] == found["absorbed heads"] == [2, 128, 2, 16]


@pytest.mark.slow
def test_grouped_matmul_kernel_on_a_mesh(slow):
    check_forward(slow[f"kernel|{MIXED[1]}"])


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler here")
def test_experts_compiled_for_the_cpu_on_a_mesh(slow):
    check_steps(slow[f"native|{MIXED[1]}"], SGD)


@pytest.mark.slow
def test_weights_that_stay_in_fp8_on_a_mesh(slow):
    found = slow[f"stored|{MIXED[0]}"]
    assert found["routing"]
    assert found["logits"] <= GRADIENT


def test_gathers_among_many_devices_go_in_stages(default):
    assert default["staged|fsdp=8"] == {"right": True, "same": True}


def check_quantized(found: dict):
    """As one device; blocks are rebuilt in the products of parts, and FP8 is not gathered."""
    assert found["routing"]
    assert found["logits"] <= GRADIENT
    assert found["rebuilt"] > 0 == found["gathered"]


@pytest.mark.slow
def test_decoding_gathers_and_rebuilds_no_quantised_matrix_whole(slow):
    found = slow[f"quantized|{QUANTIZED}"]
    check_quantized(found)
    assert found["whole"] == []


@pytest.mark.slow
def test_decoding_from_quantised_parts_in_other_layouts_and_forms(slow):
    check_quantized(slow[f"quantized-blocks|{QUANTIZED}"])
    found = slow[f"quantized-all|{QUANTIZED}"]
    check_quantized(found)
    assert found["whole"] == []


@pytest.mark.slow
def test_a_model_is_born_in_its_shards(slow):
    found = slow[f"born|{SNAPSHOT}"]
    assert found["values"][0] <= 1e-6
    assert found["as_placed"]
    matrices = {name: share for name, share in found["shares"].items() if not name.endswith("norm.weight")}
    assert max(matrices.values()) <= 1 / 4
    assert matrices["stacks.0.ffn.gate_up"] == 1 / 8
    # An id without a row is NaN on a mesh too, and a mesh that is left out is asked for.
    assert found["looked_up"] == [[False, True, False, True]] * 8
    assert found["without_mesh"] == "the model lies on 8 devices: give ctx=dsj.Context(mesh=...), with its mesh."


def test_published_weights_are_read_straight_into_their_shards(default):
    found = default["loaded|fsdp=4,expert=2"]
    assert found["equal"]
    assert found["dequantised_equal"]
    # Every byte once, and by half of the devices only what these hold.
    assert found["all"] == found["size"]
    assert found["half"] == found["half_size"] < 0.55 * found["size"]


def test_a_model_in_shards_is_written_as_on_one_device(default):
    found = default[f"saved|{SNAPSHOT}"]
    assert found["files"] == ["config.json", "model.safetensors"]
    assert found["equal"]
    assert found["mixed_equal"]


@pytest.mark.slow
def test_layers_are_gathered_one_at_a_time(slow):
    found = slow[f"snapshot|{SNAPSHOT}"]
    # Experts as a device of this mesh holds them in use, one layer's and both layers': (experts, width, 2 x inner).
    one, both = [4, 64, 48], [2, 4, 64, 48]
    assert both not in found["gathered"]
    # In the loop over layers, and for the MTP module behind it.
    assert {loops for shape, loops in zip(found["gathered"], found["loops"], strict=True) if shape == one} == {0, 1}


@pytest.mark.slow
def test_parameters_lie_as_recorded_and_a_step_moves_no_more_than_recorded(slow):
    found = slow[f"snapshot|{SNAPSHOT}"]
    path = HERE / "snapshot.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert found["parameters"] == recorded["parameters"]
    # ZeRO: what an optimizer keeps of a parameter lies where the parameter does.
    assert found["moments"] == found["parameters"]
    release = ".".join(jax.__version__.split(".")[:2])
    assert release in recorded["moves"], f"record what the step moves with jax {release} in {path.name}"
    for kind, (count, size) in found["moves"].items():
        assert kind in recorded["moves"][release], f"{count} {kind}, {size} bytes, are new"
        # A hundredth more is room for scalars; a weight or an activation that is gathered anew is more.
        assert size <= 1.01 * recorded["moves"][release][kind][1], f"{kind}: {size} bytes"


@pytest.mark.slow
def test_answers_and_a_step_of_reinforcement_learning(slow):
    found = slow[f"improved|{MIXED[0]}"]
    assert found["same"] >= 0.9  # near-ties may be drawn otherwise
    assert found["behaviour"] < 1e-4
    assert found["loss"] <= GRADIENT
    assert abs(found["mismatch"]) < 1e-6
    assert found["gradients"][0] <= GRADIENT, found["gradients"]
    assert found["parameters"][0] <= SGD, found["parameters"]
