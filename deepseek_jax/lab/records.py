"""Runs as files: one JSON a run, written whole at its end, found again by what it trained. Loads no JAX.

A file is called SPEC-CORPUS.json: a hash of model, recipe, text, seed and `CODE`, and one of the tokens that the text
became. All studies keep their runs in one folder, so that a run that two of them ask for is made once. `CODE` is raised
by hand: no hash notices by itself that the package computes something else than before.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from deepseek_jax.lab.study import Setup, Study, described, digest
from deepseek_jax.small_files import read_json

# Raised where the package computes something else than before from the same setup: its runs are then others.
CODE = 1
DIGITS = 5  # after the point, of a run's figures
PASSKEYS = 500  # that a model is asked for by `probes.passkeys`


def spec(setup: Setup, seed: int) -> str:
    """The hash of what a run trains. Two setups that compute the same have one, whatever they are called."""
    return digest([CODE, described(setup.seeded(seed))])


def _last_evaluations(name: str) -> Callable[[dict], float]:
    def measure(run: dict) -> float:
        return math.inf if run["diverged"] else float(np.mean([np.mean(e[name]) for e in run["evaluations"]]))

    return measure


def _divergence(run: dict) -> float:
    """NaN where a run diverged, or has no experts or one domain."""
    found = [e["load_divergence"] for e in run["evaluations"]]
    return float(np.mean(found)) if found and None not in found else math.nan


def _over_layers(name: str) -> Callable[[dict], float]:
    return lambda run: math.inf if run["diverged"] else float(np.mean(run[name]))


def _over_steps(run: dict, *names: str) -> float:
    """The mean over the steps of the sum of some figures; 0 of a run without steps."""
    return float(np.mean([sum(step[name] for name in names) for step in run["steps"]] or [0.0]))


# A run's figures by which rules compare; each falls to infinity's side where a run has diverged.
OF_TRAINING: dict[str, Callable[[dict], float | list]] = {
    "bits_per_byte": _last_evaluations("bits_per_byte"),
    "max_violation_global": _last_evaluations("max_violation_global"),
    "max_violation_batch": _over_layers("max_violation_batch"),
    "dead_experts": lambda run: math.inf if run["diverged"] else float(np.sum(run["dead_experts"])),
    "curve": lambda run: run["curve"] or [(0.0, math.inf)],
}


def _probed(name: str, figure: Callable[[dict], float], diverged: float = math.nan) -> Callable[[dict], float]:
    """A figure of a probe; of a run that diverged, or was made without it, ``diverged``: NaN, with which no rule finds
    anything, or the worst."""
    return lambda run: figure(found) if (found := run.get("probes", {}).get(name)) else diverged


def _shared_to_routed(found: dict) -> float:
    layers = zip(found["shared"], found["routed"], strict=True)
    whole, least = found["whole"], 10**-DIGITS
    return min((shared - whole) / max(max(routed) - whole, least) for shared, routed in layers)


# Of single experts and what they hold: how far the domains' loads lie apart; by the probe `probes.knock_outs` what a
# layer's shared experts cost in their absence, over the one routed expert that costs most, where that is least; and by
# what share bits per byte rise.
OF_EXPERTS: dict[str, Callable[[dict], float]] = {
    "load_divergence": _divergence,
    "shared_to_routed": _probed("knock_outs", _shared_to_routed),
    "replaced": _probed("knock_outs", lambda found: found["replaced"] / found["whole"] - 1),
    "top_eighth": _probed("knock_outs", lambda found: found["top"]["1/8"] / found["whole"] - 1),
}


def _stream_gain(run: dict) -> float:
    """Of the probe `probes.streams`: how far a product of mixing matrices amplifies at most; one stream never does."""
    if run["diverged"]:
        return math.inf
    return 1.0 if run["model"]["residual"] is None else run["probes"]["streams"]["largest"]


OF_STREAMS: dict[str, Callable[[dict], float]] = {"stream_gain": _stream_gain}


# Of the probe `probes.indexers`: how many times further drawn indexers are from attention, in the layer where that is
# least; and by what share bits per byte are higher where drawn ones choose the keys.
OF_INDEXERS: dict[str, Callable[[dict], float]] = {
    "divergence_ratio": _probed(
        "indexers",
        lambda found: min(a / b for a, b in zip(found["drawn_divergence"], found["divergence"], strict=True)),
    ),
    "drawn_cost": _probed("indexers", lambda found: found["drawn"] / found["sparse"] - 1),
}


def _untrained_yarn(found: dict) -> float:
    return found["as it is"]["1024"] / found["yarn"]["1024"] if "yarn" in found else math.nan


# Of the probe `probes.lengths`: bits per byte in short and in long windows; and how many times as high as with YaRN,
# untrained, those in long ones are, NaN where RoPE is extended already.
OF_LENGTHS: dict[str, Callable[[dict], float]] = {
    "bits_short": _probed("lengths", lambda found: found["as it is"]["256"], math.inf),
    "bits_long": _probed("lengths", lambda found: found["as it is"]["1024"], math.inf),
    "untrained_yarn": _probed("lengths", _untrained_yarn, math.inf),
}


def _found_with_yarn(found: dict) -> float:
    without, extended = found["as it is"]["long"], found["yarn"]["long"] if "yarn" in found else 0.0
    return extended / max(without, 1 / PASSKEYS) if "yarn" in found and without + extended > 0 else math.nan


# Of the probe `probes.passkeys`: the shares that are found in long rows and missed in short ones; and how many times as
# many as without, one at least, are found in long ones with YaRN, untrained: NaN where none is found either way, or
# RoPE is extended already.
OF_PASSKEYS: dict[str, Callable[[dict], float]] = {
    "passkey_long": _probed("passkeys", lambda found: found["as it is"]["long"], 0.0),
    "passkey_missed": _probed("passkeys", lambda found: 1 - found["as it is"]["short"], 1.0),
    "passkey_untrained": _probed("passkeys", _found_with_yarn),
}


# Of the probe `probes.drafts`: how many times as often greedy decoding accepts a draft as one that is always the same
# token, of code or of prose, where that is least; and how many times as often of code as of prose.
OF_DRAFTS: dict[str, Callable[[dict], float]] = {
    "draft_over_constant": _probed("drafts", lambda found: min(k["greedy"] / k["constant"] for k in found.values())),
    "draft_code_over_prose": _probed("drafts", lambda found: found["code"]["greedy"] / found["prose"]["greedy"]),
}
# Of runs of reinforcement learning (`lab.practice`): held out at the end, and means over the steps.
OF_PRACTICE: dict[str, Callable[[dict], float]] = {
    "pass_at_1": lambda run: run["after"]["pass_at_1"],
    "wrong": lambda run: 1 - run["after"]["pass_at_1"],
    "pass_at_k": lambda run: run["after"]["pass_at_k"],
    "maj_at_k": lambda run: run["after"]["maj_at_k"],
    "clipped": lambda run: _over_steps(run, "clipped_low", "clipped_high"),
    "mismatch": lambda run: _over_steps(run, "mismatch"),
}
MEASURES = OF_TRAINING | OF_EXPERTS | OF_STREAMS | OF_INDEXERS | OF_LENGTHS | OF_PASSKEYS | OF_DRAFTS | OF_PRACTICE
LABELS = {
    "bits_per_byte": "held-out bits per byte",
    "max_violation_global": "MaxVio, held-out text",
    "max_violation_batch": "MaxVio, training batches",
    "dead_experts": "experts never chosen",
    "load_divergence": "divergence of domains' loads, nats",
    "curve": "training loss, nats",
    "shared_to_routed": "cost of no shared expert, over a routed one's",
    "replaced": "rise of bits per byte, shared replaced",
    "top_eighth": "rise of bits per byte, top eighth masked",
    "stream_gain": "largest gain of mixed streams",
    "divergence_ratio": "drawn indexers' divergence, over trained ones'",
    "drawn_cost": "rise of bits per byte, keys chosen at random",
    "bits_short": "bits per byte in windows of 256",
    "bits_long": "bits per byte in windows of 1024",
    "untrained_yarn": "long bits per byte, over those with YaRN",
    "passkey_long": "passkeys found in long rows",
    "passkey_missed": "passkeys missed in short rows",
    "passkey_untrained": "found with YaRN, untrained, over those without",
    "draft_over_constant": "drafts accepted, over one constant token's",
    "draft_code_over_prose": "drafts accepted of code, over prose's",
    "pass_at_1": "pass@1",
    "wrong": "wrong answers",
    "pass_at_k": "pass@k",
    "maj_at_k": "maj@k",
    "clipped": "share of tokens clipped",
    "mismatch": "mismatch, nats a token",
}


@dataclass(frozen=True)
class Runs:
    """The runs of a folder, which need not exist yet."""

    folder: Path

    @cached_property
    def _by_spec(self) -> dict[str, dict[str, dict]]:
        """spec -> corpus -> run."""
        found: dict[str, dict[str, dict]] = {}
        for path in sorted(self.folder.glob("*-*.json")):
            run = read_json(path)
            found.setdefault(run["spec"], {})[run["corpus"]["hash"]] = run
        return found

    def path(self, setup: Setup, seed: int, corpus: str) -> Path:
        return self.folder / f"{spec(setup, seed)}-{corpus}.json"

    def of(self, study: Study) -> dict[tuple[str, int], dict]:
        """(variant, seed) -> run, of those that a study asks for at its scale and that are there.

        Raises ValueError where they were made on more than one corpus: such runs must not be compared.
        """
        wanted = {(v, s): spec(study.setup(v), s) for v, s in study.runs}
        found = {key: self._by_spec.get(name, {}) for key, name in wanted.items()}
        corpora = sorted({corpus for runs in found.values() for corpus in runs})
        if len(corpora) > 1:
            raise ValueError(
                f"the runs of {study.stem} in {self.folder} are of {len(corpora)} corpora, {', '.join(corpora)}, which "
                "must not be compared: keep those of one in a folder of their own (--runs)."
            )
        return {key: runs[corpora[0]] for key, runs in found.items() if runs}


def text(record: dict) -> str:
    """A run's file, an entry a line. Raises ValueError for figures that are not finite."""
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
