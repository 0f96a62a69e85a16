"""Breaks the mathematics line by line and reports what no test notices.

    python tests/mutate.py                        # all of TARGETS: one mutant a line, then a second
    python tests/mutate.py model/router.py --per-line 1
    python tests/mutate.py --results out.jsonl    # goes on where the file ends

A mutant is the source with one thing changed: an operator, a comparison, a constant, a call taken away, a statement
left out, two arguments exchanged. Each is written into a copy of the repository in a temporary folder, and a process
forked from one that has imported JAX and PyTorch runs the test files of its target, cheapest first, until one fails.
`survivors.toml` beside this file says of each mutant that may live why it computes the same, or why nothing has to
notice. Exits with 1 if any other lives. Takes hours for everything, minutes for a file.
"""

import argparse
import ast
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 600

# What should notice a change of the file, cheapest first.
TARGETS = {
    "core/rope.py": [
        *("core/test_norm_and_rope.py", "paper/test_v3_mla.py", "paper/test_v3_quirks.py"),
        "model/test_execution.py",
    ],
    "model/router.py": [
        *("model/test_router.py", "paper/test_v3_balance.py", "paper/test_v3_router.py"),
        "model/test_execution.py",
    ],
    "model/mtp.py": ["paper/test_v3_mtp.py", "model/test_arguments.py", "model/test_parity.py"],
    "model/moe.py": ["model/test_experts.py", "model/test_arguments.py", "model/test_parity.py"],
    "train/balance.py": ["paper/test_v3_balance.py", "train/test_balance.py"],
    "train/balance_loss.py": ["paper/test_v2_balance.py", "train/test_balance.py"],
    "model/mla.py": ["model/test_mla.py", "paper/test_v3_mla.py", "model/test_cache.py", "model/test_parity.py"],
    "train/muon.py": ["paper/test_v4_muon.py", "train/test_muon.py"],
    "train/loss.py": ["train/test_loss.py", "paper/test_v3_mtp.py", "train/test_step.py"],
    "rl/advantage.py": ["rl/test_advantage.py", "paper/test_r1_grpo.py"],
}
# Lines that act on a mesh only, and what notices those: minutes for each, so only with --mesh.
MESH = re.compile(
    r"ops\.(rows|attend|heads|experts|nats|row_order|constrain|fence)|\[:, order\]|next_tokens"
    r'|"segments": _segments|batch\.get\("positions"|B, T = batch'
)
MESH_TESTS = ["parallel/test_mesh.py"]

OPERATORS = {
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Pow: "*", ast.Mod: "+"},
    **{ast.BitAnd: "|", ast.BitOr: "&"},
}
COMPARISONS = {
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="},
    **{ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"},
}
SIBLINGS = {
    **{"sum": "mean", "mean": "sum", "max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum"},
    **{"floor": "ceil", "ceil": "floor", "any": "all", "all": "any", "cos": "sin", "sin": "cos"},
    **{"zeros": "ones", "ones_like": "zeros_like", "softmax": "sigmoid", "sigmoid": "softmax"},
    **{"concatenate": "stack", "add": "set"},
}
# From the subtle to the crude: what runs and computes something else comes before what merely crashes.
KINDS = ("call", "comparison", "keyword", "operator", "scale", "sibling", "constant", "condition", "removed", "swapped")


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    kind: str
    was: str
    now: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.file}: {self.was}  ->  {self.now}"


class Mutants(ast.NodeVisitor):
    """Collects the mutants of one source text."""

    def __init__(self, file: str, source: str):
        self.file, self.source, self.found = file, source, []
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line.encode()))
        self.visit(ast.parse(source))

    def text(self, node: ast.AST) -> str:
        return ast.get_source_segment(self.source, node)

    @staticmethod
    def from_library(node: ast.AST) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in ("jax", "jnp", "np", "math", "optax", "self")

    def add(self, kind: str, node: ast.AST, now: str) -> None:
        data = self.source.encode()
        a = self.starts[node.lineno - 1] + node.col_offset
        b = self.starts[node.end_lineno - 1] + node.end_col_offset
        mutated = (data[:a] + now.encode() + data[b:]).decode()
        try:
            compile(mutated, self.file, "exec")
        except SyntaxError:
            return
        first, last = node.lineno - 1, node.end_lineno
        removed = len(self.lines) - len(mutated.splitlines())
        was = " ".join("".join(self.lines[first:last]).split())
        after = " ".join("".join(mutated.splitlines(keepends=True)[first : last - removed]).split())
        if was != after:
            self.found.append(Mutant(self.file, node.lineno, kind, was, after, mutated))

    # Neither types nor imports compute anything; what an error says is no mathematics.
    def visit_Import(self, node):
        pass

    visit_ImportFrom = visit_JoinedStr = visit_Import

    def visit_FunctionDef(self, node):
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_ClassDef(self, node):
        for statement in node.body:
            self.visit(statement)

    def visit_Call(self, node):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if isinstance(node.func, ast.Attribute) and not self.from_library(node.func):
            # x.f(...): x. A Variable computes as its value does.
            if name != "get_value":
                self.add("call", node, self.text(node.func.value))
        elif len(node.args) == 1 and not node.keywords and name not in ("len", "range", "set", "sorted"):
            self.add("call", node, self.text(node.args[0]))
        if name in SIBLINGS:
            text = self.text(node.func)
            self.add("sibling", node.func, text[: len(text) - len(name)] + SIBLINGS[name])
        parts = [self.text(a) for a in node.args]
        named = [f"{k.arg}={self.text(k.value)}" if k.arg else f"**{self.text(k.value)}" for k in node.keywords]
        for number in range(len(named)):
            rest = named[:number] + named[number + 1 :]
            self.add("keyword", node, f"{self.text(node.func)}({', '.join(parts + rest)})")
        for number in range(len(parts) - 1):
            order = [*parts[:number], parts[number + 1], parts[number], *parts[number + 2 :]]
            self.add("swapped", node, f"{self.text(node.func)}({', '.join(order + named)})")
        self.generic_visit(node)

    def visit_BinOp(self, node):
        left, right = self.text(node.left), self.text(node.right)
        if type(node.op) in OPERATORS:
            self.add("operator", node, f"({left}) {OPERATORS[type(node.op)]} ({right})")
        self.add("scale", node, f"({left})")
        if not isinstance(node.op, (ast.Pow, ast.Div, ast.FloorDiv)):
            self.add("scale", node, f"({right})")
        self.generic_visit(node)

    def visit_Compare(self, node):
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            sign = COMPARISONS[type(node.ops[0])]
            self.add("comparison", node, f"{self.text(node.left)} {sign} {self.text(node.comparators[0])}")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        sign = " or " if isinstance(node.op, ast.And) else " and "
        self.add("condition", node, sign.join(f"({self.text(v)})" for v in node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return self.add("constant", node, f"-{node.operand.value + 1}")
        if isinstance(node.op, (ast.USub, ast.Not)):
            self.add("operator", node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            self.add("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            self.add("constant", node, str(node.value + 1))
        elif isinstance(node.value, float):
            self.add("constant", node, repr(node.value * 1.5 if node.value else 1.0))

    def visit_IfExp(self, node):
        self.add("condition", node, f"({self.text(node.orelse)} if {self.text(node.test)} else {self.text(node.body)})")
        self.generic_visit(node)

    def visit_If(self, node):
        self.add("condition", node.test, f"not ({self.text(node.test)})")
        self.generic_visit(node)

    def visit_Assign(self, node):
        names = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        if names & {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}:
            self.add("removed", node, "pass")
        self.visit(node.value)

    def visit_AugAssign(self, node):
        self.add("removed", node, "pass")
        self.visit(node.value)

    def visit_Raise(self, node):
        self.add("removed", node, "pass")

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):
            self.add("removed", node, "pass")
            self.generic_visit(node)


def mutants(file: str, source: str, per_line: int) -> list[Mutant]:
    """Up to ``per_line`` mutants of each line, of different kinds where there are; the first of every line first."""
    lines: dict[int, list[Mutant]] = {}
    for mutant in Mutants(file, source).found:
        lines.setdefault(mutant.line, []).append(mutant)
    ranked = []
    for line, found in lines.items():
        seen: dict[str, int] = {}
        order = []
        for mutant in sorted(found, key=lambda m: KINDS.index(m.kind)):
            order.append((seen.get(mutant.kind, 0), KINDS.index(mutant.kind), mutant))
            seen[mutant.kind] = seen.get(mutant.kind, 0) + 1
        order.sort(key=lambda entry: entry[:2])
        ranked += [(place, line, mutant) for place, (_, _, mutant) in enumerate(order[:per_line])]
    return [mutant for _, _, mutant in sorted(ranked, key=lambda entry: entry[:2])]


def copy_repository(to: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def prepare(copy: Path) -> None:
    """Imports what every test imports, without a JAX backend: threads do not survive a fork."""
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(copy / "xla"))
    sys.path[:] = [str(copy), str(copy / "tests"), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "tests")]
    subprocess.run([sys.executable, "-m", "compileall", "-q", "deepseek_jax"], check=True)
    importlib.import_module("conftest")
    for name in (
        *("numpy", "pytest", "hypothesis", "jax", "jax.numpy", "flax.nnx", "optax", "orbax.checkpoint", "torch"),
        *("transformers", "transformers.models.deepseek_v3.modeling_deepseek_v3", "tokenizers", "grain", "tyro"),
    ):
        importlib.import_module(name)
    for name in [n for n in sys.modules if n.split(".")[0] in ("conftest", "deepseek_jax")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True


def noticed(files: list[str], log: Path) -> str:
    """The test that fails, "" if none does; run in a process of its own."""
    child = os.fork()
    if not child:
        code = 70
        try:
            code = _tests(files, log)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # Not by an exception: what the parent cleans up at its end is still in use.
            os._exit(code)
    end = time.monotonic() + LIMIT_SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time limit"
        time.sleep(0.05)
    if status == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text(), re.MULTILINE)
    return failed[1] if failed else f"exit status {status}"


def _tests(files: list[str], log: Path) -> int:
    """pytest's exit status for the first file that fails, in this process."""
    os.setsid()
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    import pytest

    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    for file in files:
        code = pytest.main([*options, f"tests/{file}"])
        if code:
            return int(code)
    return 0


def run(copy: Path, chosen: list[Mutant], known: dict[str, dict], results: Path | None) -> Iterator[dict]:
    """Each mutant's record, as it is known."""
    sound = set()
    for mutant in chosen:
        if mutant.name not in known:
            if mutant.file not in sound:
                failed = noticed(TARGETS[mutant.file], copy / "log")
                if failed:
                    log = (copy / "log").read_text()[-3000:]
                    sys.exit(f"the tests of {mutant.file} fail without any mutant: {failed}\n{log}")
                sound.add(mutant.file)
            path = copy / "deepseek_jax" / mutant.file
            whole, began = path.read_text(), time.monotonic()
            for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
                stale.unlink()
            path.write_text(mutant.source)
            extra = MESH_TESTS if MESH.search(mutant.was) else []
            failed = noticed(TARGETS[mutant.file] + extra, copy / "log")
            path.write_text(whole)
            known[mutant.name] = {
                **{"name": mutant.name, "line": mutant.line, "kind": mutant.kind, "noticed": failed},
                "seconds": round(time.monotonic() - began, 1),
            }
            if results:
                with results.open("a") as out:
                    out.write(json.dumps(known[mutant.name]) + "\n")
        yield known[mutant.name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TARGETS), help="files below deepseek_jax (default: all)")
    parser.add_argument("--per-line", type=int, default=2, help="mutants of each line")
    parser.add_argument("--matching", default="", help="only mutants whose name has this regular expression")
    parser.add_argument("--mesh", action="store_true", help="the lines that act on a mesh, and no others")
    parser.add_argument("--results", type=Path, help="JSON lines: what is known and what is found out")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    if unknown := set(options.files) - set(TARGETS):
        parser.error(f"no tests are named for {sorted(unknown)}; known are {sorted(TARGETS)}")
    chosen = []
    for file in options.files:
        source = (ROOT / "deepseek_jax" / file).read_text()
        found = [m for m in mutants(file, source, options.per_line) if re.search(options.matching, m.name)]
        chosen += [m for m in found if bool(MESH.search(m.was)) == options.mesh]
    if options.list:
        print(*(f"{m.kind:10} {m.line:4} {m.name}" for m in chosen), f"{len(chosen)} mutants", sep="\n")
        return 0
    results = options.results.resolve() if options.results else None
    lines = results.read_text().splitlines() if results and results.exists() else []
    known = {record["name"]: record for record in map(json.loads, lines)}
    groups = tomllib.loads((ROOT / "tests" / "survivors.toml").read_text())["group"]
    explained = {name for group in groups for name in group["mutants"]}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        copy_repository(copy)
        prepare(copy)
        alive, count = [], 0
        for record in run(copy, chosen, known, results):
            count += 1
            if not record["noticed"]:
                alive.append(record["name"])
                print(f"alive at line {record['line']}: {record['name']}", flush=True)
    unexplained = [name for name in alive if name not in explained]
    print(f"{count} mutants, {len(alive)} alive, {len(unexplained)} of them not explained")
    print(*(f"not explained: {name}" for name in unexplained), sep="\n")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
