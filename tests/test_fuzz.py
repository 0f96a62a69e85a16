"""At least 500 damaged and hostile inputs, under limits of time and memory: refused by name, or read as they are meant.

Deterministic: an input follows from its index. `fuzz_inputs.py` makes and reads them, in processes that may die.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.convert.stream import convert

INPUTS = 640
PROCESSES = 2
SECONDS = 600  # of a process that reads hundreds, on a machine that does other things too

pytestmark = pytest.mark.slow


def read_all(base: Path, scratch: Path, first: int, last: int) -> list[dict]:
    """The verdicts on the inputs [first, last); a process that dies has failed at its input, and another goes on."""
    found, begun = [], first
    while begun < last:
        command = [sys.executable, str(Path(__file__).parent / "fuzz_inputs.py")]
        command += [str(base), str(scratch), str(begun), str(last)]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        done = [line for line in lines if "verdict" in line]
        kinds = {line["index"]: line["kind"] for line in lines if "kind" in line}
        found += [{**line, "kind": kinds[line["index"]]} for line in done]
        begun = max(kinds, default=begun - 1) + 1
        if len(kinds) > len(done) or not kinds:
            what = f"the process ended with {process.returncode}: {err[-300:]}"
            found.append({"index": begun - 1, "kind": kinds.get(begun - 1), "verdict": "failed", "what": what})
            if not kinds:
                break
    return found


def test_damaged_inputs_are_refused_or_read_as_they_are_meant(tmp_path, root, capsys):
    dsj.save_pretrained(random_model(tiny_config(n_layers=2)), tmp_path / "base/model", quantize="fp8")
    convert(tmp_path / "base/model", tmp_path / "base/converted")
    (tmp_path / "base/tokenizer").mkdir()
    for file in (root / "checkpoints/tiny-v3").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base/tokenizer")
    (tmp_path / "scratch").mkdir()
    share = INPUTS // PROCESSES
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = pool.map(
            lambda i: read_all(tmp_path / "base", tmp_path / "scratch", i * share, (i + 1) * share), range(PROCESSES)
        )
        found = [line for part in parts for line in part]
    counts = Counter((line["kind"], line["verdict"]) for line in found)
    with capsys.disabled():
        print()
        for (kind, verdict), count in sorted(counts.items(), key=str):
            print(f"  {kind:10} {verdict:8} {count}")
    assert [line for line in found if line["verdict"] == "failed"] == []
    assert sorted(line["index"] for line in found) == list(range(INPUTS))
    # Both ways are taken by every kind: damage that nothing notices, or that nothing survives, tests nothing.
    for kind in {line["kind"] for line in found}:
        assert min(counts[kind, "refused"], counts[kind, "read"]) >= 8 or kind == "documents", counts
