"""A study: a question to a paper, put so that runs can answer it, before the first of them. Loads no JAX.

``experiments/STEM/run.py`` holds one as ``STUDY``. It compares changes of one base, each a field of a config or
recipe with another value, at scale "cpu" and, with the same claims, at larger ones; what follows from the runs say its
claims' rules.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from deepseek_jax.configs.fp8 import Fp8
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.data.config import DataConfig
from deepseek_jax.lab.rules import Rule
from deepseek_jax.train.recipe import Recipe

# The seed on which what is tuned is chosen; no verdict has runs of it.
TUNING_SEED = 100
# Fields without an effect on what a run computes.
SILENT = {"ModelConfig": {"name"}, "Recipe": {"model", "log_every", "evaluate_every"}}
SILENT["DataConfig"] = {"workers", "token_folder", "fim_rate", "sample_masks"}


@dataclass(frozen=True)
class Setup:
    """What a run trains, but for its seed. Of ``model.vocab_size`` tokens a tokenizer is trained on ``text``.

    ``fp8``: which products are emulated in it, in training and where held-out text is measured. ``probes``: names of
    `probes.PROBES`, what is measured of the trained model beside its evaluations. A run with a probe is another than
    the same one without.

    ``first``: what trains the model before; this setup goes on with its weights, under a config and an optimizer of its
    own, on the same text. None: the model is a fresh one. ``trained``: which of its parameters, as
    `train.patterns.select` takes them; none are all. ``reads``: labels of the sources of ``text`` that its steps read;
    none are all.

    Raises ValueError for a ``first`` that is of other tokens, and for a label that the text has not.
    """

    model: ModelConfig
    recipe: Recipe
    text: DataConfig = field(default_factory=DataConfig)
    fp8: Fp8 | None = None
    probes: tuple[str, ...] = ()
    first: "Setup | None" = None
    trained: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    def __post_init__(self):
        labels = [source.label for source in self.text.sources()]
        if unknown := [label for label in self.reads if label not in labels]:
            raise ValueError(f"a setup reads {unknown[0]!r}, which its text has not: choose of {', '.join(labels)}.")
        if self.first is not None and self.first._read() != self._read():
            raise ValueError(
                "a setup goes on with what its first one trained: text, vocabulary, fill in the middle and sample "
                "masks must be the same."
            )

    def _read(self) -> tuple:
        """What decides which tokens are read."""
        return self.text, self.model.vocab_size, self.recipe.fim_rate, self.recipe.sample_masks

    def seeded(self, seed: int) -> "Setup":
        first = None if self.first is None else self.first.seeded(seed)
        return replace(self, recipe=replace(self.recipe, seed=seed), first=first)


@dataclass(frozen=True)
class Claim:
    """One statement of a paper. ``id``: its number in the note. ``source``: paper and table. ``expected``: what is
    expected here, with the paper's numbers. ``paper``: those that the figure shows, variant -> value, of the rule's
    measure or of what ``paper_as`` says in its place. ``mechanism_only``: why the rule could not see what the paper
    saw; then its outcome is shown, but no verdict is drawn from it."""

    id: str
    source: str
    says: str
    expected: str
    rule: Rule
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_as: str | None = None
    mechanism_only: str | None = None


@dataclass(frozen=True)
class Scale:
    """What a study compares at one size. ``variants``: name -> changes of ``base``, as `changed` takes them. ``tuned``:
    a side of a comparison -> variants of which claims about it compare one, the best on `TUNING_SEED`, by
    `verdicts.best`; each side has as many."""

    base: Setup
    variants: Mapping[str, Mapping[str, Any]]
    tuned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[str, ...]:
        """What claims compare: sides that are tuned, in place of their variants, and all other variants."""
        side_of = {variant: side for side, names in self.tuned.items() for variant in names}
        return tuple(dict.fromkeys(side_of.get(variant, variant) for variant in self.variants))


@dataclass(frozen=True)
class Study:
    """``scales``: by their names; "cpu" is the one that the ledger shows. ``minutes``: of one core, that a run takes
    there, by estimate. ``scale``: the one that is looked at (`at`): its base, variants and runs are this study's.
    ``registered_with``: other scales whose bases its rule hash is of, since they were there when it was registered.
    ``against``: two measures of which the figure shows one over the other.

    Raises ValueError for a scale that is not there, and where at one of them claims name variants that are not there, a
    change does not fit a base, or one side is tuned with more variants than another.
    """

    stem: str
    question: str
    scales: Mapping[str, Scale]
    claims: tuple[Claim, ...]
    minutes: float
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    registered_with: tuple[str, ...] = ()
    scale: str = "cpu"
    against: tuple[str, str] | None = None

    def __post_init__(self):
        if self.scale not in self.scales:
            raise ValueError(f"{self.stem} has no scale {self.scale!r}; choose one of {', '.join(self.scales)}.")
        for scale in self.scales.values():
            self._check(scale)

    def _check(self, scale: Scale) -> None:
        for claim in self.claims:
            unknown = sorted({*claim.rule.variants} - {*scale.sides} | {*claim.paper} - {*scale.variants})
            if unknown:
                raise ValueError(f"claim {claim.id} of {self.stem} compares {', '.join(unknown)}: no such variant.")
        if unknown := sorted({v for names in scale.tuned.values() for v in names} - set(scale.variants)):
            raise ValueError(f"{self.stem} tunes {', '.join(unknown)}: no such variant.")
        if len({len(names) for names in scale.tuned.values()}) > 1 or (scale.tuned and TUNING_SEED in self.seeds):
            raise ValueError(
                f"{self.stem} must tune each side with as many variants as the others, on a seed, {TUNING_SEED}, that "
                "no verdict has."
            )
        self.check_text([scale.base, *(changed(scale.base, changes) for changes in scale.variants.values())])

    def at(self, scale: str) -> "Study":
        """The same study at another scale."""
        return replace(self, scale=scale)

    def check_text(self, setups: Iterable[Setup]) -> None:
        """Raises ValueError for setups that learn from different tokens, which must not be compared."""
        if len({(setup.text, setup.model.vocab_size) for setup in setups}) > 1:
            raise ValueError(
                f"what is compared on {self.stem}'s base must learn from the same tokens: neither text nor vocabulary "
                "may differ."
            )

    @property
    def base(self) -> Setup:
        """What the variants are changes of."""
        return self.scales[self.scale].base

    @property
    def variants(self) -> Mapping[str, Mapping[str, Any]]:
        return self.scales[self.scale].variants

    @property
    def tuned(self) -> Mapping[str, tuple[str, ...]]:
        return self.scales[self.scale].tuned

    @property
    def sides(self) -> tuple[str, ...]:
        return self.scales[self.scale].sides

    def setup(self, variant: str) -> Setup:
        """A variant's setup; ValueError for one that is not there."""
        if variant not in self.variants:
            raise ValueError(f"{self.stem} has no variant {variant!r}; choose one of {', '.join(self.variants)}.")
        return changed(self.base, self.variants[variant])

    @property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """(variant, seed) of every run that a verdict or its tuning may rest on."""
        tuning = tuple((variant, TUNING_SEED) for names in self.tuned.values() for variant in names)
        return tuning + tuple((variant, seed) for seed in self.seeds for variant in self.variants)

    @property
    def rule_hash(self) -> str:
        """Of all that a verdict follows from beside the runs: rules, seeds, variants, bases; words are not in it."""
        claims = [[c.id, described(c.rule), c.mechanism_only is not None] for c in self.claims]
        bases = {scale: described(self.scales[scale].base) for scale in (self.scale, *self.registered_with)}
        tuned = [{side: list(names) for side, names in self.tuned.items()}] if self.tuned else []
        variants = {n: {path: described(value) for path, value in c.items()} for n, c in self.variants.items()}
        return digest([claims, bases, variants, list(self.seeds), *tuned])


def changed(setup: Setup, changes: Mapping[str, Any]) -> Setup:
    """``setup`` with other values in fields named by their path, such as ``recipe.rate.peak``.

    Raises ValueError for a path that is no field, or a value that does not fit it.
    """
    for path, value in changes.items():
        setup = _replaced(setup, path.split("."), path, value)
    return setup


def _replaced(owner: Any, path: list[str], whole: str, value: Any) -> Any:
    name, *deeper = path
    if not is_dataclass(owner) or name not in {f.name for f in fields(owner)}:
        known = ", ".join(f.name for f in fields(owner)) if is_dataclass(owner) else "none"
        raise ValueError(f"{whole}: {name!r} is no field there; the fields are {known}.")
    if deeper:
        value = _replaced(getattr(owner, name), deeper, whole, value)
    return replace(owner, **{name: value})


def described(value: Any) -> Any:
    """A dataclass as plain values: its class, and those fields that have not their default value.

    So a field that is added later with a default that changes nothing leaves descriptions, and hashes, as they are.
    """
    if is_dataclass(value):
        found = {"": type(value).__name__}
        for f in fields(value):
            if f.name in SILENT.get(found[""], ()):
                continue
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if (own := getattr(value, f.name)) != default:
                found[f.name] = described(own)
        return found
    if isinstance(value, tuple | list):
        return [described(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def digest(plain: Any) -> str:
    """Twelve digits of a hash of plain values."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def load(folder: Path, stem: str) -> Study:
    """The study of ``folder/STEM/run.py``. Raises ValueError where there is none."""
    path = folder / stem / "run.py"
    known = ", ".join(stems(folder)) or "none"
    if not path.is_file():
        raise ValueError(f"there is no experiment {stem!r} in {folder}; those of the workbench are: {known}.")
    if (study := defined(path, "STUDY")) is None:
        raise ValueError(f"{path} defines no STUDY and is run by itself: python {path}. The workbench has: {known}.")
    return study


def defined(path: Path, name: str) -> Any:
    """What a run.py calls ``name``, STUDY or DRILL; None where it has none, and is not run then."""
    if not _defines(path, name):
        return None
    spec = importlib.util.spec_from_file_location(f"{name.lower()}_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def stems(folder: Path) -> list[str]:
    """The stems of all studies in ``folder``. Raises ValueError where it is no folder of experiments."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: experiments are files of the repository; call this from its folder, or name "
            "theirs with --folder."
        )
    return sorted(path.parent.name for path in folder.glob("*/run.py") if _defines(path, "STUDY"))


def _defines(path: Path, name: str) -> bool:
    return any(line.startswith(f"{name} =") for line in path.read_text(encoding="utf-8").splitlines())
