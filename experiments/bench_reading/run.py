"""How much is to be read for one forward pass of DeepSeek-V3: files, lines and lines of code.

The script runs, on shapes alone, what a reader would follow, and records every function of this package that is called:

- forward: `zoo("deepseek-v3")`, `init`, and a forward pass with MTP;
- cache: `init_cache`, and a forward pass of one more token on it;
- loss: `loss`, next token, MTP and balance terms, as training differentiates it.

A file is read when any function in it is called in a stage or an earlier one, or a dataclass of it made, and then as a
whole: its lines, and its code, which are the lines that have more than comment, docstring or nothing on them (a
statement on three lines counts three). "Called" is its code without the functions that never are. What happens at
import is not followed, and what an optimizer, a mesh, a file format or the command line needs is not part of it, nor
are JAX and Flax. The goal is 1,250 lines of code in all stages. `baseline.json` is commit 7d82c97, before the house of
a family was built.

    python experiments/bench_reading/run.py
    PYTHONPATH=CHECKOUT python experiments/bench_reading/run.py --out FILE   # of another commit
"""

import argparse
import ast
import contextlib
import io
import json
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

import deepseek_jax as dsj
from deepseek_jax.analysis.provenance import provenance

HERE = Path(__file__).parent
PACKAGE = Path(dsj.__file__).parent
ZOO, INIT, LOSS = dsj.zoo, dsj.init, dsj.loss  # imported here: the stages are to import nothing
GOAL = 1250
BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
OPTIMIZED = 1  # flag of functions' code, which bodies of modules and classes lack
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@contextlib.contextmanager
def called() -> Iterator[set[tuple[Path, int]]]:
    """The functions of the package that are called: file and first line, that of a decorator where there is one, or 0
    for a function that a class was given."""
    found, before = set(), sys.getprofile()

    def see(frame, event, _):
        code, file = frame.f_code, frame.f_globals.get("__file__") or ""
        if event == "call" and code.co_flags & OPTIMIZED and file.startswith(str(PACKAGE)):
            # What a dataclass generates has no line of its own.
            found.add((Path(file), code.co_firstlineno if code.co_filename == file else 0))

    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(before)


def stages(name: str) -> dict[str, Callable[[], None]]:
    """Stage -> what it runs. Each uses what the ones before have made."""
    held, tokens, one = {}, jax.ShapeDtypeStruct((1, 64), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def forward() -> None:
        held["cfg"] = ZOO(name)
        held["model"] = jax.eval_shape(lambda key: INIT(held["cfg"], key), jax.random.key(0))
        jax.eval_shape(lambda model, tokens: model(tokens, with_mtp=True).logits, held["model"], tokens)

    def cache() -> None:
        cache = jax.eval_shape(lambda: held["model"].init_cache(1, 64))
        jax.eval_shape(lambda model, tokens, cache: model(tokens, cache=cache).cache, held["model"], one, cache)

    def loss() -> None:
        jax.eval_shape(lambda model, tokens: LOSS(model, {"tokens": tokens})[0], held["model"], tokens)

    return {"forward": forward, "cache": cache, "loss": loss}


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that have code."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in BLANK:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found -= set(range(node.lineno, node.end_lineno + 1))
    return found


def passed_over(source: str, calls: set[int]) -> set[int]:
    """The lines of functions that are never called; of one that is, those within it that are not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first not in calls:
                found |= set(range(first, node.end_lineno + 1))
    return found


def measure(name: str) -> dict:
    seen: set[tuple[Path, int]] = set()
    totals, first = {}, {}
    for stage, run in stages(name).items():
        with called() as calls:
            run()
        seen |= calls
        files = {}
        for path in sorted({path for path, _ in seen}):
            source = path.read_text(encoding="utf-8")
            code = code_lines(source)
            used = code - passed_over(source, {line for p, line in seen if p == path})
            relative = path.relative_to(PACKAGE).as_posix()
            first.setdefault(relative, stage)
            files[relative] = {
                "stage": first[relative],
                "lines": len(source.splitlines()),
                "code": len(code),
                "called": len(used),
            }
        sums = {what: sum(file[what] for file in files.values()) for what in ("lines", "code", "called")}
        totals[stage] = {"files": len(files), **sums}
    return {"model": name, "goal_code": GOAL, "totals": totals, "files": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="of the tiny V3; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    given = parser.parse_args()
    record = {**provenance(), **measure("tiny-v3" if given.smoke else "deepseek-v3")}
    out = given.out or (None if given.smoke else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{'':24}{'files':>7}{'lines':>8}{'code':>7}{'called':>8}")
    for stage, total in record["totals"].items():
        head = stage if stage == "forward" else f"and {stage}"
        print(f"{head:24}{total['files']:7}{total['lines']:8,}{total['code']:7,}{total['called']:8,}")
    print(f"goal: {GOAL:,} lines of code. By file:")
    for name, file in sorted(record["files"].items(), key=lambda item: -item[1]["code"]):
        print(f"{name:24}{file['stage']:>7}{file['lines']:8,}{file['code']:7,}{file['called']:8,}")


if __name__ == "__main__":
    main()
