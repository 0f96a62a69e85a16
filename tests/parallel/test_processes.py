"""Two processes of four devices train one model; another number of processes goes on with it on another mesh."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from deepseek_jax.cli.main import main
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.convert.training import read_leaves, read_record
from deepseek_jax.runs.checkpoint import Checkpoints

HERE = Path(__file__).parent
ROWS = 8  # of a micro-batch
# Batches of 8, then of 16 rows. What is measured is measured at the end, so that rows are read for training only.
SIZES = [
    *("--tokens", "6000", "--length", "32", "--batch-rows", "16", "--first-rows", str(ROWS), "--micro-rows", str(ROWS)),
    *("--ramp-tokens", "500", "--dtype", "float32", "--optimizer.no-muon", "--ema-decay", "0.9", "--vocab-size", "280"),
    *("--held-out-share", "0.2", "--log-every", "1", "--save-every", "2", "--evaluate-every", "1000"),
]
# Relative errors of figures and, in Frobenius norm, of arrays.
FIGURE, PARAMETER = 2e-5, 1e-4


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "def", "(x)", "+ 1"]
    for i in range(12):
        lines = [" ".join(rng.choice(words, 8)) for _ in range(40)]
        (folder / f"part{i}.txt").write_text("\n".join(lines))
    model = tmp_path_factory.mktemp("model") / "config.json"
    model.write_text(json.dumps(config_to_json(tiny_config(n_layers=2, n_dense_layers=0))))
    return ["--model", str(model), "--data", str(folder), *SIZES]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """A run on one device that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", str(folder), *arguments]) == 0
    return folder


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def slurm(port: int, index: int) -> dict[str, str]:
    """What ``srun --ntasks 2`` tells a task."""
    said = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(index), "LOCALID": str(index)}
    return {"JAX_COORDINATOR_PORT": str(port), **{f"SLURM_{name}": value for name, value in said.items()}}


def variables(port: int, index: int) -> dict[str, str]:
    address = f"localhost:{port}"
    return {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}


def started(folder: Path, cluster, *words: str) -> list[subprocess.Popen]:
    """The two processes of one command; each notes what it reads beside the run's folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(2):
        notes = folder.with_name(f"rows-{index}")
        command = [sys.executable, str(HERE / "reading_command.py"), str(notes), *words]
        with folder.with_name(f"log-{index}").open("w") as log:
            env = environment(4) | cluster(port, index)
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return processes


def ended(folder: Path, processes: list[subprocess.Popen], code: int) -> None:
    try:
        for index, process in enumerate(processes):
            assert process.wait(timeout=300) == code, folder.with_name(f"log-{index}").read_text()[-4000:]
            assert "[Gloo]" not in folder.with_name(f"log-{index}").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def records(folder: Path, kind: str) -> list[dict]:
    path, found = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # being written
            continue
        if record["kind"] == kind:
            found.append(record)
    return found


def until(folder: Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Waits until a step has been recorded and a checkpoint is whole."""
    while not (records(folder, "step")[step - 1 :] and Checkpoints(folder / "checkpoints").steps()):
        for index, process in enumerate(processes):
            assert process.poll() is None, folder.with_name(f"log-{index}").read_text()[-4000:]
        time.sleep(0.05)


def rows_read(folder: Path, index: int) -> set[int]:
    return {int(line) for line in folder.with_name(f"rows-{index}").read_text().split()}


def last_state(folder: Path) -> dict[str, np.ndarray]:
    import jax

    step = Checkpoints(folder / "checkpoints").newest()
    leaves = read_record(step)["leaves"]
    wanted = {name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for name, (dtype, shape) in leaves.items()}
    return {name: np.asarray(a, np.float64) for name, a in read_leaves(step, wanted).items()}


def assert_same_training(folder: Path, reference: Path) -> None:
    """Every step's figures, its routing exactly, and all that the last checkpoint holds."""
    ours, theirs = records(folder, "step"), records(reference, "step")
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(1, len(theirs) + 1))
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("load", "bias", "batch_rows", "targets", "lr"):
            assert mine[name] == other[name], (mine["step"], name)
        for name in ("loss", "main", "mtp", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=FIGURE), (mine["step"], name)
    mine, other = last_state(folder), last_state(reference)
    assert mine.keys() == other.keys()
    errors = {n: np.linalg.norm(mine[n] - other[n]) / max(np.linalg.norm(other[n]), 1e-30) for n in other}
    assert {n: e for n, e in errors.items() if e > PARAMETER and n.startswith(("params.", "ema."))} == {}
    assert all((mine[n] == other[n]).all() for n in other if n.startswith("rest."))
    (a,), (b,) = records(folder, "result"), records(reference, "result")
    for name in ("model_bits", "stored_bits", "ema_bits"):
        assert a[name] == pytest.approx(b[name], rel=PARAMETER), name
    assert (a["steps"], a["tokens"], a["trigram_bits"]) == (b["steps"], b["tokens"], b["trigram_bits"])


@pytest.mark.slow
def test_processes_stop_together_and_one_goes_on_alone(arguments, whole, tmp_path):
    """SIGTERM to the one that does not write; each reads the rows of its own devices and no others."""
    folder = tmp_path / "run"
    processes = started(folder, slurm, "train", str(folder), *arguments, "--mesh", "fsdp=2,expert=2,tensor=2")
    until(folder, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    ended(folder, processes, 143)
    stopped = int(Checkpoints(folder / "checkpoints").newest().name)
    assert 2 <= stopped == len(records(folder, "step")) < len(records(whole, "step"))
    assert ["SIGTERM" in r["message"] for r in records(folder, "event") if r["event"] == "interrupted"] == [True]
    assert len(records(folder, "run")) == 1
    taken = sum(r["batch_rows"] for r in records(folder, "step"))
    for index, of_batch in enumerate((range(ROWS // 2), range(ROWS // 2, ROWS))):
        rows = rows_read(folder, index)
        assert {row % ROWS for row in rows} == set(of_batch)
        assert {row for row in range(taken) if row % ROWS in of_batch} <= rows
    # The run's own mesh is not to be had here: it names one device.
    assert main(["train", str(folder), "--resume"]) == 1
    assert main(["train", str(folder), "--resume", "--mesh", "none"]) == 0
    assert_same_training(folder, whole)


@pytest.mark.slow
def test_processes_that_are_killed_are_followed_by_one_on_another_mesh(arguments, whole, tmp_path):
    """SIGKILL to both, whose devices share all rows; then one process with eight devices, which share none."""
    folder = tmp_path / "run"
    mesh = ["--mesh", "tensor=4,context=2", "--layout", "all"]
    processes = started(folder, variables, "train", str(folder), *arguments, *mesh)
    until(folder, 4, processes)
    for process in processes:
        process.kill()
    ended(folder, processes, -signal.SIGKILL)
    assert {row % ROWS for row in rows_read(folder, 0)} == {row % ROWS for row in rows_read(folder, 1)} == set(range(8))
    command = [sys.executable, "-m", "deepseek_jax.cli.main", "train", str(folder), "--resume"]
    done = subprocess.run(
        [*command, "--mesh", "data=2,expert=4", "--layout", "fsdp_ep"],
        env=environment(8), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resumed" in [r["event"] for r in records(folder, "event")]
    assert_same_training(folder, whole)


@pytest.mark.slow
def test_processes_write_the_text_of_one_device(whole, tmp_path):
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    words = ["generate", str(whole / "checkpoint"), "--prompt", "alpha beta", "gamma", "return", "--dtype", "float32"]
    words += ["--max-new-tokens", "12", "--use-mtp", "--temperature", "0.7", "--json"]
    assert main([*words, str(theirs)]) == 0
    mesh = ["--mesh", "expert=4,tensor=2", "--layout", "serve"]
    ended(tmp_path / "logs", started(tmp_path / "logs", variables, *words, str(ours), *mesh), 0)
    found, expected = (json.loads(path.read_text())["rows"] for path in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        assert mine["ids"] == other["ids"]
        assert mine["accepted"] == other["accepted"]
        assert mine["logprobs"] == pytest.approx(other["logprobs"], abs=FIGURE)
    # The first process alone speaks.
    assert "tokens in" in (tmp_path / "log-0").read_text()
    assert "tokens in" not in (tmp_path / "log-1").read_text()
