"""The rules of the house: notes have their tests, paths that are written exist, names are documented."""

import ast
import inspect
import json
import re
import subprocess
import tomllib
from pathlib import Path

import mutate
import pytest

import deepseek_jax as dsj
from deepseek_jax.cli.main import COMMANDS
from deepseek_jax.lab.records import Runs, spec
from deepseek_jax.lab.study import defined, load, stems
from deepseek_jax.lab.verdicts import judge

ROOT = Path(__file__).parent.parent
CODE = sorted(path for folder in ("deepseek_jax", "tests", "experiments") for path in (ROOT / folder).rglob("*.py"))
TEXTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "paper_notes").glob("*.md"),
        *(ROOT / "experiments").rglob("*.md"),
        *(ROOT / "checkpoints").rglob("*.md"),
        *(ROOT / "deepseek_jax").rglob("*.md"),
    ]
)
NOTES = {path.stem for path in (ROOT / "paper_notes").glob("*.md")} - {"README"}
PAPER_TESTS = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "paper").glob("test_*.py")}
STUDIES = {stem: load(ROOT / "experiments", stem) for stem in stems(ROOT / "experiments")}
RUNS = sorted((ROOT / "experiments").glob("*/run.py"))
EXPERIMENTS = {path.parent.name for path in RUNS}
DRILLS = {path.parent: drill for path in RUNS if (drill := defined(path, "DRILL"))}
# "STEM C1" in a line by itself below the head of a test: it is what holds the claim.
HOLDS = re.compile(r"^def test_\w+\([^)]*\):\n    # (\w+ C\d+)$", flags=re.MULTILINE)
TESTED = {claim for path in (ROOT / "tests").rglob("test_*.py") for claim in HOLDS.findall(path.read_text("utf-8"))}
FEW = 4  # files of a folder that need no README
MEASUREMENTS = ("bench_", "compile_")
SUFFIXES = (".py", ".md", ".toml", ".json", ".cff", ".png", ".safetensors", ".npz", ".log")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def written_paths(text: str) -> set[str]:
    """What stands in backticks and claims to be a path of this repository."""
    tops = {path.name for path in ROOT.iterdir()}
    found = set()
    for quoted in re.findall(r"`([^`\n]+)`", text):
        path = quoted.removeprefix("./").rstrip("/")
        if re.search(r"[\s<>{}*$=()]|\.\.\.|://", path):
            continue
        inside = path.split("/")[0] in tops and "/" in path
        if inside or (path.endswith(SUFFIXES) and "/" in path):
            found.add(path)
    return found


def commands(text: str) -> set[str]:
    """Every subcommand that a text's code spans and code blocks run."""
    code = re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"\bdeepseek-jax ([a-z][a-z-]*)", "\n".join(code)))


def test_every_note_has_a_test_or_an_experiment():
    assert sorted(NOTES - PAPER_TESTS - EXPERIMENTS) == []


def test_every_paper_test_has_a_note():
    assert sorted(PAPER_TESTS - NOTES) == []


def test_every_experiment_has_a_note():
    assert sorted(stem for stem in EXPERIMENTS - NOTES if not stem.startswith(MEASUREMENTS)) == []


def test_every_note_is_in_the_index():
    index = ROOT / "paper_notes" / "README.md"
    text = index.read_text(encoding="utf-8") if NOTES else ""
    assert [stem for stem in sorted(NOTES) if f"{stem}.md" not in text] == []


def test_every_experiment_is_in_the_ledger():
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert [stem for stem in sorted(EXPERIMENTS) if f"`{stem}`" not in text] == []


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_written_paths_exist(path):
    text = path.read_text(encoding="utf-8")
    # A path may be written from the repository's folder or from the text's own.
    dead = [p for p in written_paths(text) if not (ROOT / p).exists() and not (path.parent / p).exists()]
    links = re.findall(r"\]\(([^)#\s]+)", text)
    dead += [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert sorted(dead) == []


def test_a_folder_of_more_than_a_few_files_says_how_to_read_it():
    """And the files that it names are there."""
    wrong = {}
    for folder in sorted(path for path in (ROOT / "deepseek_jax").iterdir() if path.is_dir()):
        files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        readme = folder / "README.md"
        if not readme.exists():
            wrong |= {folder.name: "has no README.md"} if len(files) > FEW else {}
            continue
        named = set(re.findall(r"`(\w+\.py)`", readme.read_text(encoding="utf-8")))
        if named - files or (len(files) > FEW and not named):
            wrong[folder.name] = sorted(named - files) or "names no file"
    assert wrong == {}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 300


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_written_commands_exist(path):
    unknown = commands(path.read_text(encoding="utf-8")) - set(COMMANDS)
    assert not unknown, f"no such command: {sorted(unknown)}"


def test_nothing_is_left_for_later():
    mark = re.compile(rf"\b({'|'.join(('TO' + 'DO', 'FIX' + 'ME', 'XX' + 'X'))})\b")
    assert [name(path) for path in CODE if mark.search(path.read_text(encoding="utf-8"))] == []


def test_every_file_says_what_it_is():
    without = [path for path in CODE if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert list(map(name, without)) == []


def test_the_version_stands_in_one_place():
    version = re.compile(rf"(?<![\d.]){re.escape(dsj.__version__)}(?![\d.])")
    files = [*CODE, ROOT / "pyproject.toml", ROOT / "CITATION.cff"]
    holders = [name(path) for path in files if version.search(path.read_text(encoding="utf-8"))]
    assert holders == ["deepseek_jax/version.py"]


@pytest.mark.parametrize("public", [public for public in dsj.__all__ if public != "__version__"])
def test_the_public_api_is_documented(public):
    thing = getattr(dsj, public)
    doc = inspect.getdoc(thing) or ""
    # A dataclass without a docstring gets its own signature as one.
    assert len(doc) > 40, f"dsj.{public} has no docstring"
    assert not doc.startswith(f"{public}("), f"dsj.{public} has no docstring"
    assert public in dir(dsj)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        dsj.no_such_name  # noqa: B018


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted({n for n in names if names.count(n) > 1}) == []


def test_the_checks_see_what_they_have_to():
    text = "`deepseek_jax/nowhere.py`, `tests/<stem>.py`, `x/y`, `a b/c.py`, `docs/z.md`"
    assert written_paths(text) == {"deepseek_jax/nowhere.py", "docs/z.md"}
    assert commands("deepseek-jax is prose; `deepseek-jax fly`\n```\ndeepseek-jax run x\n```\n") == {
        "fly",
        "run",
    }


def test_every_claim_of_a_study_stands_in_its_note_and_every_claim_there_has_a_test_or_an_experiment():
    """A note's front matter says where each of its claims is checked, and which papers they are of."""
    paper, wrong = re.compile(r"\b\d{4}\.\d{5}\b"), []
    for stem, study in [*STUDIES.items(), *((drill.stem, drill) for drill in DRILLS.values())]:
        text = (ROOT / "paper_notes" / f"{stem}.md").read_text(encoding="utf-8")
        head = re.search(r"^claims: (.*)$", text, flags=re.MULTILINE)[1]
        named = re.search(r"^---\narxiv: (.*)$", text, flags=re.MULTILINE)
        cited = {number for claim in study.claims for number in paper.findall(claim.source)}
        wrong += [
            f"{stem}: {number} is no arxiv of its front matter"
            for number in cited - set(paper.findall(named[1] if named else ""))
        ]
        where = {found[2]: found[1].split() for found in re.finditer(r"([C\d ]+) \(([^)]+)\)", head)}
        if where.pop(f"experiments/{stem}", None) != [claim.id for claim in study.claims]:
            wrong.append(f"{stem}: its claims in the experiment are others than in the note's front matter")
        tested = where.pop("tests", [])
        wrong += [f"{stem} {claim}: no test says that it is its" for claim in tested if f"{stem} {claim}" not in TESTED]
        listed = set(re.findall(r"\bC\d+\b", head))
        wrong += [f"{stem}: {place}" for place in where]
        wrong += [f"{stem}: {claim}" for claim in sorted(set(re.findall(r"\*\*(C\d+)\*\*", text)) ^ listed)]
    assert wrong == []


def test_the_note_of_a_study_has_all_its_parts():
    """For somebody new, what differs from the paper, what came out and, once all runs are there, what did not work."""
    parts, missing = ("newcomer", "\n## Deviations", "\n## Result\n"), []
    runs = Runs(ROOT / "experiments" / "runs")
    for stem, study in STUDIES.items():
        text = (ROOT / "paper_notes" / f"{stem}.md").read_text(encoding="utf-8")
        whole = all(one.there == one.needed for one in judge(study, runs.of(study)))
        wanted = (*parts, "\n## What did not work\n") if whole else parts
        missing += [f"{stem}: {part.strip()}" for part in wanted if part not in text]
    assert missing == []


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_rule_is_older_than_its_results():
    """A run carries the hash of the rules that it was made under, and the commit that had them.

    They must be today's. Where the history is at hand, that commit is a part of it, and its file is the study's.
    """
    wrong = []
    for path in sorted((ROOT / "experiments" / "runs").glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        by = run["asked"]
        study = STUDIES[by["study"]].at(by["scale"]) if by["study"] in STUDIES else None
        if study is None or study.rule_hash != by["rule"]:
            wrong.append(f"{path.name}: the rules of {by['study']} are not those that it was made under")
        elif path.name != f"{spec(study.setup(by['variant']), run['seed'])}-{run['corpus']['hash']}.json":
            wrong.append(f"{path.name}: it is not the run of {by['variant']}, seed {run['seed']}")
        elif not by["rule_commit"] or run["commit"].endswith("+changes"):
            wrong.append(f"{path.name}: made with a rule or code that was not committed")
        elif not older(by["rule_commit"], by["study"]):
            wrong.append(f"{path.name}: {by['rule_commit']} is no commit of the rule before this one")
    assert wrong == []


def older(commit: str, stem: str) -> bool:
    """Whether a commit is a part of the history and has a study's file, where the history is at hand."""
    if git("cat-file", "-e", commit).returncode:
        return True
    return not (
        git("cat-file", "-e", f"{commit}:experiments/{stem}/run.py").returncode
        or git("merge-base", "--is-ancestor", commit, "HEAD").returncode
    )


def test_a_rule_of_reinforcement_learning_is_older_than_its_results():
    """As above, of the studies whose runs lie beside them."""
    wrong = []
    for folder, drill in DRILLS.items():
        for path in sorted((folder / "results").glob("*.json")):
            run = json.loads(path.read_text(encoding="utf-8"))
            if run["rule"] != drill.rule_hash:
                wrong.append(f"{path}: the rules of {drill.stem} are not those that it was made under")
            elif path.name != f"{run['variant']}-{run['seed']}.json" or run["variant"] not in drill.variants:
                wrong.append(f"{path}: it is not the run of {run['variant']}, seed {run['seed']}")
            elif not run["rule_commit"] or run["commit"].endswith("+changes"):
                wrong.append(f"{path}: made with a rule or code that was not committed")
            elif not older(run["rule_commit"], drill.stem):
                wrong.append(f"{path}: {run['rule_commit']} is no commit of the rule before this one")
    assert wrong == []


def test_mutants_that_may_live_are_of_lines_that_there_are():
    """A line that changes takes its excuse with it."""
    groups = tomllib.loads((ROOT / "tests" / "survivors.toml").read_text(encoding="utf-8"))["group"]
    excused = {name for group in groups for name in group["mutants"]}
    found: set[str] = set()
    for file in {name.split(":")[0] for name in excused}:
        source = (ROOT / "deepseek_jax" / file).read_text(encoding="utf-8")
        found |= {mutant.name for mutant in mutate.Mutants(file, source).found}
    assert excused - found == set()
