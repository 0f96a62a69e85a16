"""How processes find each other and agree, and what a run on a mesh refuses; no second process is started here."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tiny import tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.layout import MESH_AXES, LayoutError
from deepseek_jax.parallel import processes
from deepseek_jax.parallel.placement import row_share
from deepseek_jax.parallel.processes import ProcessError, first_then_all, from_first, join
from deepseek_jax.runs.finetune import fine_tune
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import check_fit
from deepseek_jax.runs.signals import StopSignals
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.tuning import LoRA

SLURM = {"SLURM_STEP_NODELIST": "host[1-2]", "SLURM_NTASKS": "2"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "host1:80", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
CHIP = "/dev/null"


@pytest.fixture
def joined(monkeypatch):
    """What JAX was told, in a process that nothing has started."""
    for name in (*SLURM, *OPEN_MPI, *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "TPU_DEVICES", ())
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *how, shutdown_timeout_seconds: told.append(how))
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.append((name, value)))
    return told


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, None),
        (SLURM, {}, (None, None, None)),
        (SLURM | {"SLURM_NTASKS": "1"}, {}, None),
        (SLURM, {"coordinator": "none"}, None),
        (OPEN_MPI, {}, (None, None, None)),
        (VARIABLES, {}, ("host1:80", 2, 1)),
        (VARIABLES, {"coordinator": "host2:1", "index": 0}, ("host2:1", 2, 0)),
        ({}, {"coordinator": "auto"}, (None, None, None)),
        ({}, {"coordinator": "host1:80", "processes": 4, "index": 3}, ("host1:80", 4, 3)),
    ],
)
def test_what_jax_is_told(joined, monkeypatch, environment, given, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join(**given)
    # The training loop takes SIGTERM itself.
    assert joined == ([] if expected is None else [("jax_enable_preemption_service", False), expected])


def test_a_tpu_machine_of_no_cluster_is_alone(joined, monkeypatch):
    def undetected(*how, **more):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes, "TPU_DEVICES", (CHIP,))
    monkeypatch.setattr(jax.distributed, "initialize", undetected)
    join()
    with pytest.raises(ProcessError, match=r"do not find each other.*Give --coordinator HOST:PORT"):
        join(coordinator="auto")
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ProcessError, match="JAX_PROCESS_ID='first' is not a number"):
        join()


def test_alone_nothing_is_exchanged():
    given = object()
    assert from_first(lambda: given, "nothing") is first_then_all(lambda: given, "nothing") is given
    assert row_share(dsj.Context()) == ((0,), 1)


class Exchange:
    """Two processes' `Agreement`, called in turn."""

    def __init__(self):
        self.named, self.found = [], 0

    def exchange(self, number: int) -> int:
        self.named.append(number)
        found = self.found
        if len(self.named) == 2:
            self.found, self.named = max(self.named), []
        return found


def test_processes_stop_at_the_same_step():
    shared = Exchange()
    with StopSignals(shared) as first, StopSignals(shared) as second:
        seen = []
        for step in range(4):
            if step == 1:
                second.asked = "SIGINT"
            if step == 2:
                first.asked = "SIGTERM"  # too late: they have agreed
            seen.append((first.agreed(), second.agreed()))
    assert seen[0] == seen[1] == (None, None)
    assert seen[2][0] == seen[2][1] == seen[3][0] == "SIGINT"


def on(**sizes) -> dsj.Context:
    shape = tuple(sizes.get(a, 1) for a in MESH_AXES)
    return dsj.Context(mesh=jax.sharding.AbstractMesh(shape, MESH_AXES))


def test_a_recipe_that_does_not_divide_is_refused():
    recipe = replace(Recipe(), length=32, batch_rows=12, first_rows=6, micro_rows=6, ema_decay=0.9)
    check_fit(tiny_config(), recipe, Options(), on(data=3, expert=2, tensor=4, context=8))
    with pytest.raises(ValueError, match=r"micro-batches of 6 rows do not divide over the 4 devices"):
        check_fit(tiny_config(), recipe, Options(), on(fsdp=4))
    with pytest.raises(LayoutError, match="rows of 32 tokens do not divide into 2 x 3 runs"):
        check_fit(tiny_config(), recipe, Options(), on(context=3))


def test_processes_need_a_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="2 processes need a mesh of all their devices"):
        check_fit(tiny_config(), replace(Recipe(), length=32), Options())


def test_parts_and_adapters_are_trained_on_one_device(root: Path, tmp_path):
    source, out = root / "checkpoints" / "tiny-v3", tmp_path / "out"
    recipe = replace(Recipe(), length=32, batch_rows=8, first_rows=None, micro_rows=None)
    for how in ({"patterns": ["head"]}, {"lora": LoRA(rank=2)}):
        with pytest.raises(ValueError, match="are trained on one device: leave the mesh out"):
            fine_tune(source, recipe, tmp_path / "chats.jsonl", out, ctx=on(fsdp=2), **how)
    assert not out.exists()
