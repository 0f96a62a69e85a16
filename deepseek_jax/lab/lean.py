"""One run, lean: a fixed budget of tokens, its last evaluations and its figures; no checkpoint, export or baseline.

Suffixes: L MoE layers, E experts.
"""

import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict

import jax
import numpy as np

from deepseek_jax.analysis.counts import counts
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.core.context import Context
from deepseek_jax.lab.corpus import Corpus
from deepseek_jax.lab.probes import Text, chosen
from deepseek_jax.lab.records import CODE, DIGITS, spec
from deepseek_jax.lab.stages import Diverged, stepping
from deepseek_jax.lab.study import Setup
from deepseek_jax.runs.evaluate import evaluate
from deepseek_jax.runs.guards import Skips
from deepseek_jax.text.tokenizer import load_tokenizer
from deepseek_jax.train.schedule import count_steps

POINTS = 20
# Shares of a run: held-out text is measured at its end, and after so many of its steps; batches are looked at before.
EVALUATED = (0.92, 0.94, 0.96, 0.98, 1.0)
BATCHES = (0.7, 0.9)
MEASURED = ("bits_per_byte", "max_violation_global", "load_divergence", "draft_agreement", "draft_acceptance")
BY_DOMAIN = ("domains", "domain_agreement", "domain_acceptance")
WATCHED = ("main", "skipped", "max_violation")


def carry_out(setup: Setup, seed: int, corpus: Corpus, tell: Callable[[int, int], None]) -> dict:
    """Trains a setup and returns what the run's file holds. ``tell``: is given steps taken and steps of the run.

    "curve": at `POINTS` points (tokens, mean training loss since the one before). "evaluations": after `EVALUATED` of
    the steps, on the same held-out tokens: bits per byte, of each layer MaxVio of the whole text's load and its
    divergence between domains, and where there is MTP how its drafts did. Of the last one "by_domain"; "load", int
    [L, E]; "dead_experts" [L], those without a token. "max_violation_batch" [L]: the mean over the batches of
    `BATCHES`, in which the router bias should still move. "probes": what the setup's probes found. "diverged": None, or
    at which step, of this setup or of its first one, too many steps in a row had come to nothing; such a run has no
    figures. "first": the spec of what trained the model before; tokens, steps and curve are those of its last stage.

    Raises ValueError as `probes.chosen`, before it trains.
    """
    began, origin = time.monotonic(), provenance()
    setup = setup.seeded(seed)
    recipe, cfg, probes = setup.recipe, setup.model, chosen(setup)
    held_out = corpus.data.held_out(recipe.length)
    steps = count_steps(recipe)
    at = {round(share * steps) for share in EVALUATED}
    points = {round(steps * n / POINTS) for n in range(1, POINTS + 1)}
    watched = range(round(BATCHES[0] * steps), round(BATCHES[1] * steps))
    skips, diverged, tokens = Skips(recipe.max_skipped), None, 0
    losses, curve, violations, evaluations, last = [], [], [], [], None
    try:
        with closing(stepping(setup, corpus, lambda: tell(0, steps))) as stepped:
            for number, (fed, state, metrics) in enumerate(stepped, 1):
                tokens += fed.setting.rows * recipe.length
                seen = jax.device_get({name: metrics[name] for name in WATCHED if name in metrics})
                if skips.see(bool(seen["skipped"])):
                    diverged = number
                    break
                losses.append(float(seen["main"]))
                if number in watched and "max_violation" in seen:
                    violations.append(seen["max_violation"])
                if number in points:
                    curve.append([tokens, round(float(np.mean(losses)), 5)])
                    losses = []
                if number in at:
                    last = evaluate(state.model, held_out, Context(fp8=setup.fp8))
                    kept = last.record()
                    evaluations.append({"tokens": tokens} | {name: _rounded(kept[name]) for name in MEASURED})
                tell(number, steps)
    except Diverged as first:
        diverged = first.step
    figures = {"curve": [], "evaluations": [], "max_violation_batch": None, "load": None, "dead_experts": None}
    figures |= {"probes": {}}
    if diverged is None:
        text = Text(held_out, corpus.data.held_out, load_tokenizer(corpus.folder / "tokenizer"))
        load_LE = None if last.load_DLE is None else last.load_DLE.sum(0).tolist()
        figures = {
            "curve": curve,
            "evaluations": evaluations,
            "by_domain": _rounded({name: getattr(last, name) for name in BY_DOMAIN}),
            "max_violation_batch": _rounded(np.mean(violations, 0).tolist()) if violations else None,
            "load": load_LE,
            "dead_experts": None if load_LE is None else [sum(load == 0 for load in row) for row in load_LE],
            "probes": _rounded({name: probe(state.model, text) for name, probe in probes.items()}),
        }
    size = asdict(counts(cfg))
    return {
        "spec": spec(setup, seed),
        "code": CODE,
        "corpus": corpus.record(),
        "seed": seed,
        "tokens": tokens,
        "steps": steps,
        "diverged": diverged,
        "parameters": {name: size[name] for name in ("total", "activated", "activated_no_embedding")},
        "held_out_tokens": len(held_out.stream_n) - 1,
        **figures,
        "cpu_seconds": round(time.process_time(), 1),
        "wall_seconds": round(time.monotonic() - began, 1),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **origin,
        "model": asdict(cfg),
        "recipe": asdict(recipe),
        "fp8": None if setup.fp8 is None else asdict(setup.fp8),
        "first": None if setup.first is None else spec(setup.first, seed),
        "trained": list(setup.trained),
    }


def _rounded(value):
    """Floats to `DIGITS` after the point, in whatever holds them."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, DIGITS) if isinstance(value, float) else value
