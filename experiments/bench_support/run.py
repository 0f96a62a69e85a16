"""What is supported of each release, measured: errors that the tests find, and each architecture compiled at full size.

    python experiments/bench_support/run.py                    # half an hour on two cores
    python experiments/bench_support/run.py --only compile     # the others' figures stay

Runs the tests of each architecture's tiny config against the reference, of the conversion and on meshes of 8 virtual
devices, which write down the largest error of each kind (`tests/measured.py`), and compiles a training step of a
release for a TPU slice (`deepseek-jax compile --quick`, extra `compile`). What fails stops it. `experiments/figures.py`
makes README's table of the results.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deepseek_jax.analysis.provenance import provenance

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
V3 = "tiny-v3"
MODEL = "tests/model/test_"
MESH = "tests/parallel/test_mesh.py::test_"
PICTURES = "tests/multimodal/test_janus_"
TESTS = {
    "reference": (
        f"{MODEL}family.py",
        f"{MODEL}parity.py::test_forward_equals_transformers[tiny-v3]",
        f"{MODEL}cache.py::test_cached_decoding_equals_the_full_forward[tiny-v3]",
        f"{MODEL}gradients.py::test_gradients_of_every_parameter_equal_torch",
        f"{PICTURES}parity.py",
        f"{PICTURES}gradients.py",
    ),
    "convert": (
        "tests/convert/test_architectures.py::test_there_and_back",
        "tests/convert/test_stream.py::test_there_and_back",
        f"{PICTURES}checkpoint.py::test_there_and_back_in_both_layouts",
    ),
    "mesh": (
        f"{MESH}three_steps_on_one_axis",
        f"{MESH}other_architectures_on_meshes",
        f"{MESH}a_janus_shown_drawing_and_trained",
    ),
}
# Architecture -> the releases that have it.
RELEASES = {
    "distill-qwen": "R1-Distill-Qwen 1.5B, 7B, 14B, 32B",
    "distill-llama": "R1-Distill-Llama 8B, 70B",
    "deepseek-llm": "DeepSeek-LLM 7B, 67B",
    "deepseek-moe": "DeepSeekMoE 16B",
    "v2-lite": "V2-Lite",
    "v2": "V2, V2.5, Coder-V2",
    V3: "V3, R1, V3.1; Moonlight, Kimi-K2",
    "v3.2": "V3.2, V3.2-Exp",
    "v4": "V4-Flash, V4-Pro",
    "janus": "Janus-Pro 1B, 7B",
}
# Architecture -> a release, the slice and the mesh that its training step is compiled for.
COMPILED = {
    "distill-qwen": ("r1-distill-qwen-1.5b", "v5e:2x2", "fsdp=-1"),
    "distill-llama": ("r1-distill-llama-8b", "v5p:2x2x2", "fsdp=-1"),
    "deepseek-llm": ("deepseek-llm-7b", "v5p:2x2x2", "fsdp=-1"),
    "deepseek-moe": ("deepseek-moe-16b", "v5p:2x2x2", "fsdp=4,expert=2"),
    "v2-lite": ("deepseek-v2-lite", "v5p:2x2x2", "fsdp=4,expert=2"),
    "v2": ("deepseek-v2", "v5p:8x8x4", "fsdp=32,expert=8"),
    "v3.2": ("deepseek-v3.2", "v5p:8x8x8", "fsdp=8,expert=64"),
    "v4": ("deepseek-v4-flash", "v5p:8x8x4", "fsdp=32,expert=8"),
    "janus": ("janus-pro-7b", "v5p:2x2x2", "fsdp=-1"),
}


def tested(part: str, only: str | None) -> dict[str, dict[str, float]]:
    """architecture -> what -> the largest error that the tests of a part measured."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "measured.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", *TESTS[part]]
        done = subprocess.run(
            [*command, *(("-k", only) if only else ())],
            cwd=ROOT,
            env=os.environ | {"DEEPSEEK_JAX_MEASURED": str(place)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the tests of {part} fail:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
    found: dict[str, dict[str, float]] = {}
    for line in lines:
        of = found.setdefault(line["architecture"], {})
        of[line["what"]] = max(of.get(line["what"], 0.0), line["error"])
    return found


def compiled(architecture: str) -> dict:
    """The memory of a chip, in bytes, of a release's training step."""
    release, topology, mesh = COMPILED[architecture]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compiled.json"
        command = ["compile", release, "--topology", topology, "--mesh", mesh, "--quick", "--json", str(out)]
        code = "import sys; from deepseek_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{release} does not compile for {topology}: {done.stderr[-2000:]}")
        memory = json.loads(out.read_text(encoding="utf-8"))["memory"]
    return {"release": release, "topology": topology, "mesh": mesh, "bytes": memory["total"]}


def table(record: dict) -> list[list[str]]:
    """README's rows: the releases, and the largest error of each kind; what a model does not have is left out."""
    lines = []
    for architecture, releases in RELEASES.items():
        errors = record["measured"][architecture]
        cells = [
            f"{errors[what]:.0e}" if what in errors else "" for what in ("logits", "gradients", "decode", "MTP", "mesh")
        ]
        flips = f"{errors['routing']:.0f} flips" if "routing" in errors else ""
        equal = "bytes equal" if errors["load"] == errors["export"] == 0 else "differ"
        step = record["compiled"][architecture]
        size = f"{step['release']}, {step['topology']}: {step['bytes'] / 1e9:.1f}"
        lines.append([releases, equal, cells[0], flips, *cells[1:], size])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*TESTS, "compile"), help="measure this part; the others' figures stay")
    parser.add_argument("--architecture", choices=tuple(COMPILED), help="this one only; the others' figures stay")
    parser.add_argument("--smoke", action="store_true", help="one architecture against the reference")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"measured": {}, "compiled": {}}
    parts = ("reference",) if args.smoke else (args.only,) if args.only else (*TESTS, "compile")
    for part in parts:
        if part == "compile":
            for architecture in (args.architecture,) if args.architecture else COMPILED:
                record["compiled"][architecture] = compiled(architecture)
                print(architecture, record["compiled"][architecture], flush=True)
            continue
        for architecture, errors in tested(part, "distill-llama" if args.smoke else args.architecture).items():
            record["measured"].setdefault(architecture, {}).update(errors)
            print(architecture, errors, flush=True)
    head = provenance()
    # Parts are measured apart, some of one architecture alone; each says at which commit.
    of = f", {args.architecture}" if args.architecture else ""
    record.setdefault("at", {}).update({part + of: head["commit"] for part in parts})
    record |= head
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
