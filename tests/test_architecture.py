"""Imports point one way, heavy ones are late, and the rules on how Flax and JAX are used hold."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from deepseek_jax.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deepseek_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Files beside the folders that everything may import; they import one another only.
SHARED = {"version", "notes", "small_files", "kept"}
# What a folder may import besides itself and `SHARED`. `cli` may import everything.
MAY_IMPORT = {
    "configs": set(),
    "core": {"configs"},
    "text": set(),
    "data": {"text"},
    "kernels": {"core"},
    "model": {"configs", "core", "kernels"},
    "parallel": {"configs", "core"},
    "convert": {"configs", "core", "model", "parallel", "text"},
    "analysis": {"configs", "core", "model", "train"},
    "generation": {"core", "model", "parallel"},
    "multimodal": {"analysis", "configs", "core", "model", "convert", "generation", "parallel", "text", "train"},
    "train": {"configs", "core", "model", "convert", "parallel"},
    "runs": {"configs", "core", "model", "text", "data", "parallel", "convert", "analysis", "train"},
    "rl": {"configs", "convert", "core", "data", "generation", "model", "parallel", "runs", "text", "train"},
    "serving": {"generation", "text"},
    "lab": {"analysis", "configs", "convert", "core", "data", "model", "rl", "runs", "text", "train"},
    "aot": {
        "configs",
        "core",
        "kernels",
        "model",
        "parallel",
        "convert",
        "analysis",
        "train",
        "generation",
        "multimodal",
    },
}
LONGEST = 300
# Where nothing may know of a mesh: what it asks of its devices is `ctx.ops`. The exceptions say where arrays may lie.
MESHLESS = ("core", "kernels", "model")
KNOW_THE_MESH = {"core/context.py", "core/layout.py"}
# Of modules, and of a context.
OF_MESHES = {"shard_map", "PartitionSpec", "NamedSharding", "Mesh", "AbstractMesh", "with_sharding_constraint", "psum"}
OF_A_CONTEXT = {"mesh", "layout", "balanced", "folded"}
REFERENCE = {"torch", "transformers", "safetensors"}
REFERENCE_HOME = {
    "convert/pickles.py",
    "convert/reference_files.py",
    "convert/references.py",
    "convert/verify.py",
    "multimodal/reference.py",
}
# Flax's own transforms and side channels: modules are plain pytrees here, driven by jax alone.
BANNED_NNX = {
    "jit",
    "grad",
    "value_and_grad",
    "scan",
    "remat",
    "vmap",
    "cond",
    "while_loop",
    "pop",
    "split",
    "merge",
}


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(node: ast.AST) -> list[str]:
    """Every module imported below a node, with its full name."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            # `from deepseek_jax import core` names a module in its second half.
            found += [f"{child.module}.{alias.name}" for alias in child.names]
    return found


def top_level(path: Path) -> list[str]:
    """Modules imported when a file is imported: not in functions, not for type checkers only."""
    found, waiting = [], list(tree(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += imports(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def for_type_checkers(path: Path) -> list[str]:
    """Modules imported for type checkers only."""
    ifs = [n for n in tree(path).body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return [module for node in ifs for child in node.body for module in imports(child)]


def loaded_by(code: str, modules: set[str]) -> set[str]:
    """Which of ``modules`` a fresh interpreter has loaded after ``code``."""
    script = f"import sys\n{code}\nprint(*({modules!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_every_folder_has_a_rule():
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders == {*MAY_IMPORT, "cli"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    if path.parent == PACKAGE:
        if path.stem in SHARED:
            found = [module.split(".")[1] for module in imports(tree(path)) if module.startswith("deepseek_jax.")]
            assert set(found) <= SHARED - {path.stem}
        return
    folder = path.relative_to(PACKAGE).parts[0]
    if folder == "cli":
        return
    for module in imports(tree(path)):
        parts = module.split(".")
        assert parts[0] not in ("tests", "experiments"), f"{name(path)} imports {module}"
        if parts[0] == "deepseek_jax":
            allowed = {folder} | SHARED | MAY_IMPORT[folder]
            assert len(parts) > 1, f"{name(path)} imports the public API instead of a module"
            assert parts[1] in allowed, f"{name(path)} imports {module}; {folder} may import {sorted(allowed)}"


def test_every_permission_is_used():
    used = {folder: set() for folder in MAY_IMPORT}
    for path in FILES:
        folder = path.relative_to(PACKAGE).parts[0]
        if folder in used:
            used[folder] |= {m.split(".")[1] for m in imports(tree(path)) if m.startswith("deepseek_jax.")}
    assert {folder: allowed - used[folder] for folder, allowed in MAY_IMPORT.items() if allowed - used[folder]} == {}


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """The groups of files that import one another, each sorted."""

    def reached(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    reach = {file: reached(file) for file in graph}
    return sorted({tuple(sorted(o for o in reach[f] if f in reach[o])) for f in graph if f in reach[f]})


def test_no_files_import_one_another():
    """Imports for type checkers count: a circle is one whatever it is made of. Those in functions do not."""
    files = {f"deepseek_jax.{name(path)[:-3].replace('/', '.')}": path for path in FILES if path.stem != "__init__"}
    graph = {}
    for module, path in files.items():
        graph[module] = {
            found.rsplit(".", 1)[0] if found not in files else found
            for found in top_level(path) + for_type_checkers(path)
        } & set(files)
    assert circles(graph) == []


def test_files_are_short():
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {n: lines for n, lines in lengths.items() if lines > LONGEST} == {}


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(PACKAGE).parts[0] in MESHLESS], ids=name)
def test_a_model_knows_nothing_of_the_mesh(path):
    if name(path) in KNOW_THE_MESH:
        return
    for node in ast.walk(tree(path)):
        found = {node.id} if isinstance(node, ast.Name) else set()
        if isinstance(node, ast.Attribute):
            of_context = node.attr in OF_A_CONTEXT and "ctx" in ast.unparse(node.value)
            found = {node.attr} & OF_MESHES | ({node.attr} if of_context else set())
        elif isinstance(node, ast.ImportFrom):
            found = {alias.name for alias in node.names}
        line = getattr(node, "lineno", 0)
        assert not found & (OF_MESHES | OF_A_CONTEXT), f"{name(path)}:{line}: {found}; a model asks `ctx.ops` for it"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_torch_and_transformers_stay_in_functions_of_verify(path):
    found = {module.split(".")[0] for module in imports(tree(path))} & REFERENCE
    assert not found or name(path) in REFERENCE_HOME, f"{name(path)} imports {found}"
    assert not {module.split(".")[0] for module in top_level(path)} & REFERENCE


def test_the_package_loads_no_jax():
    assert loaded_by("import deepseek_jax; dir(deepseek_jax)", {"jax", "flax", "numpy", "torch"}) == set()


def test_commands_load_no_jax():
    code = "import importlib\n" + "\n".join(f"importlib.import_module('deepseek_jax.cli.{c}')" for c in COMMANDS)
    assert loaded_by(code, {"jax", "flax", "orbax", "grain", "torch", "transformers"}) == set()


def test_loading_the_public_api_loads_neither_torch_nor_pallas():
    code = "import deepseek_jax as dsj\nfor n in dsj.__all__: getattr(dsj, n)"
    assert loaded_by(code, {"torch", "transformers", "jax.experimental.pallas"}) == set()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_flax_modules_are_driven_by_jax_alone(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            of_nnx = isinstance(node.value, ast.Name) and node.value.id == "nnx"
            assert not (of_nnx and node.attr in BANNED_NNX), f"{name(path)}:{node.lineno}: nnx.{node.attr}"
            assert node.attr != "sow", f"{name(path)}:{node.lineno}: sow"
            # It says "cpu" while a program is compiled for another platform.
            assert node.attr != "default_backend", f"{name(path)}:{node.lineno}: default_backend"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_what_a_layer_is_is_read_from_the_config(path):
    """`ModelConfig.layers` says it; a module is not asked for the parts that would tell."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            assert ast.unparse(node.args[1]) != "'router'", f"{name(path)}:{node.lineno}: hasattr(..., 'router')"


def test_the_walk_sees_what_it_has_to(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(
        "import a\nfrom b import c\ntry:\n    import d\nexcept ImportError:\n    pass\n"
        "if TYPE_CHECKING:\n    import e\n\ndef f():\n    import g.h\n\nclass K:\n    import i\n"
    )
    assert set(imports(tree(file))) == {"a", "b.c", "d", "e", "g.h", "i"}
    assert set(top_level(file)) == {"a", "b.c", "d", "i"}
    assert for_type_checkers(file) == ["e"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [("b", "c"), ("d",)]
