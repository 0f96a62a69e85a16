"""Every measurement under experiments at toy size, so that none of them rots; and what its record says of itself."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from deepseek_jax.analysis.provenance import commit, provenance
from deepseek_jax.kernels.native.library import compiler

STEMS = (
    "bench_convert",
    "bench_cpu",
    "bench_data",
    "bench_gpu_decode",
    "bench_load",
    "bench_long_context",
    "bench_reading",
    "bench_serve",
    "bench_step",
    "bench_support",
    "bench_train",
    "compile_671b",
)
# Tested by itself, without a GPU and with one.
ELSEWHERE = {"bench_gpu"}


def test_every_measurement_has_a_smoke_run(root):
    folders = (p.parent.name for p in (root / "experiments").glob("*/run.py"))
    assert {stem for stem in folders if stem.startswith(("bench_", "compile_"))} == {*STEMS, *ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_it_runs(stem, root, tmp_path):
    script, out = root / "experiments" / stem / "run.py", tmp_path / "results.json"
    env = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(out.read_text())
    found = record["configurations"]["smoke"] if stem == "compile_671b" else record
    head = found.get("compiled_with", found)
    assert {"commit", "date", "machine", "versions"} <= set(head)
    if stem == "bench_cpu":
        train = record["results"]["train"]
        native = ["jax, native"] * (compiler() is not None)
        assert set(train["cores_used"]) == {"jax", *native, "torch, 2 threads, grouped_mm"}
        assert all(0 < cores <= 1.2 * (os.cpu_count() or 1) for cores in train["cores_used"].values())
        stored = ["jax, stored"] * (compiler() is not None)
        assert set(record["results"]["prefill"]["seconds"]) == {*train["seconds"], *stored}
        assert set(record["results"]["grouped-4"]) == {"forward", "backward", "aim", *(["native"] if native else [])}
        assert train["limit"] > 0
        assert set(record["dense"]["results"]) == {"train", "prefill", "decode-1", "decode-8"}
    if stem == "bench_gpu_decode":
        assert [r["rows"] for r in record["records"]] == [1, 4]
        assert all(0 < r["bytes_a_step"] < 10**7 for r in record["records"])
        assert record["bytes_a_second"] > 0
    if stem == "bench_load":
        assert record["load"]["weights_bytes"] == record["bytes"]
        assert record["generate"]["tokens_a_second"] > 0 < record["torch"]["tokens_a_second"]
    if stem == "bench_long_context":
        assert set(record["results"]["256"]) == {"v3", "v3.2", "v4"}
        assert record["results"]["256"]["v3"]["cache_bytes"] > record["results"]["256"]["v4"]["cache_bytes"] > 0
    if stem == "bench_reading":
        assert {"model/mla.py", "model/outputs.py", "train/loss.py"} < set(record["files"])
        assert 0 < record["totals"]["forward"]["code"] < record["totals"]["loss"]["code"]
    if stem == "bench_serve":
        assert len(record["results"]) == 10
        assert record["same_as_transformers"] == 1
        assert 0 < record["accepted_share"] < 1
        assert 0.3 < record["shared_share"] < 1
    if stem == "compile_671b":
        assert found["memory"]["total"] > 0


def test_lines_of_code_are_those_that_are_more_than_words(root):
    spec = importlib.util.spec_from_file_location("bench_reading", root / "experiments" / "bench_reading" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    source = '"""Words."""\n\n@f\ndef a():\n    "Words."\n    # Words.\n    return (\n        1\n    )\n\nb = 2  # w\n'
    assert run.code_lines(source) == {3, 4, 7, 8, 9, 11}
    assert run.code_lines(source) - run.passed_over(source, {3}) == run.code_lines(source)
    assert run.code_lines(source) - run.passed_over(source, set()) == {11}


def test_a_record_names_its_commit_date_and_machine(root, tmp_path):
    head = provenance()
    assert head["machine"]["cores"] == os.cpu_count()
    assert set(head["versions"]) >= {"python", "jax", "flax"}
    assert len(head["date"]) == 10
    assert commit(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    written = ("figure.png", "results.json")
    for file in ("file", *written):
        (tmp_path / file).write_text("one")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    first = commit(tmp_path)
    assert 7 <= len(first) <= 40
    for file in written:
        (tmp_path / file).write_text("two")
    assert commit(tmp_path) == first
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == f"{first}+changes"
