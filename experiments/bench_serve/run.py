"""The serving engine: 16 clients with texts of mixed lengths, in batches that end together or slots that come and go.

The shipped checkpoint continues pieces of Python's standard library, greedily, each to a length of its own, 8 at a
time. Sides: "static", `generate`'s batches of 8 in the order of their coming, each of which waits for its longest text;
"slots", the batcher of `deepseek_jax/generation/batcher.py`. Both with and without the MTP module's drafts; slots with
one choice that has a grammar (which forbids nothing: what it costs is that all decode one token a call); where the
requests begin with the same 256 tokens, slots that feed each prompt whole and slots that share what is kept; and slots
behind the server, asked by 16 clients over HTTP. Beside them PyTorch transformers' own continuous batching (`peer.py`),
on the same random weights of a dense model, as many requests at a time.

All is compiled before; sides take turns, round by round, and medians count. A first token counts when it is handed
over, by slots and transformers after one step, by "static" after at most 8, from the moment when all 16 came. Times
vary from machine to machine; the ratios are the result.

    python experiments/bench_serve/run.py          # two to six minutes on 2 cores; writes results.json beside itself
    python experiments/bench_serve/run.py --smoke  # the same code with short texts and one round
"""

import argparse
import inspect
import json
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from clients import over_http, served
from peer import DISTILL, batching

import deepseek_jax as dsj
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.generation.batcher import Batcher
from deepseek_jax.generation.engine import stream
from deepseek_jax.generation.request import Request

HERE = Path(__file__).parent
CHECKPOINT = HERE.parents[1] / "checkpoints" / "tiny-v3"
REQUESTS, SLOTS, STEPS, CHUNK = 16, 8, 8, 64


class Free:
    """A grammar that forbids nothing."""

    def mask(self) -> None:
        return None

    def accept(self, ids) -> None:
        pass


def workload(tokenizer, longest: int, shared: int) -> list[Request]:
    """Prompts and texts of 1/16 of ``longest`` tokens to all of it, drawn evenly in the logarithm; the prompts behind
    the first ``shared`` tokens of another file."""
    rng = np.random.default_rng(0)
    source = tokenizer.encode(inspect.getsource(argparse) + inspect.getsource(statistics))
    head = tokenizer.encode(inspect.getsource(textwrap))[:shared]
    found = []
    for _ in range(REQUESTS):
        size, new = (int(longest * 16 ** -rng.random()) for _ in range(2))
        start = int(rng.integers(0, len(source) - size))
        found.append(Request([*head, *source[start : start + size]], new, stop_ids=()))
    return found


def static(model, requests: list[Request], length: int, drafts: bool) -> Callable[[], tuple]:
    def run():
        begin, first, texts = time.perf_counter(), [], []
        for at in range(0, REQUESTS, SLOTS):
            part, heard = requests[at : at + SLOTS], [0.0] * SLOTS
            news = [request.max_new_tokens for request in part]
            rows = [request.prompt for request in part]
            settings = {"cache_length": length, "chunk": CHUNK, "steps": STEPS, "use_mtp": drafts, "stop_ids": ()}
            going = stream(model, rows, news, **settings)
            for new in going:
                now = time.perf_counter() - begin
                heard = [was or (now if tokens else 0.0) for was, tokens in zip(heard, new, strict=True)]
            first, texts = first + heard, texts + going.result()[0]
        return texts, first, time.perf_counter() - begin

    return run


def slots(batcher: Batcher, model, requests: list[Request]) -> Callable[[], tuple]:
    def run():
        batcher.update(model)  # nothing is kept from the round before
        begin = time.perf_counter()
        place = {batcher.submit(request): i for i, request in enumerate(requests)}
        texts, first, going = [[] for _ in requests], [0.0] * len(requests), len(requests)
        while going:
            for delta in batcher.step():
                i, going = place[delta.request], going - (delta.finish is not None)
                first[i] = first[i] or time.perf_counter() - begin
                texts[i] += delta.tokens
        return texts, first, time.perf_counter() - begin

    return run


def measured(sides: dict[str, Callable], rounds: int) -> tuple[dict, dict]:
    """A side's medians over the rounds, after one that is not counted; and its texts."""
    found, said = {name: [] for name in sides}, {}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            texts, first, seconds = run()
            if turn:
                found[name].append((sum(map(len, texts)) / seconds, *np.percentile(first, (50, 95))))
            else:
                assert all(texts), f"{name}: a request has no text"
                said[name] = texts
    names = ("tokens_a_second", "first_token_p50_seconds", "first_token_p95_seconds")
    return {
        name: {
            of: round(statistics.median(column), 4) for of, column in zip(names, zip(*rows, strict=True), strict=True)
        }
        for name, rows in found.items()
    }, said


def same(texts: list[list[int]], others: list[list[int]]) -> float:
    """The share of tokens before two sides first differ in a text."""
    pairs = list(zip(texts, others, strict=True))
    equal = sum(next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in pairs)
    return round(equal / sum(map(len, texts)), 3)


def over(side: dict, base: dict) -> dict:
    return {f"{name.removesuffix('_seconds')}_ratio": round(side[name] / base[name], 3) for name in side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of every side, after one")
    parser.add_argument("--smoke", action="store_true", help="short texts, one round; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    given = parser.parse_args()
    longest, shared, rounds = (16, 32, 1) if given.smoke else (192, 256, given.rounds)
    model, tokenizer = dsj.load_pretrained(CHECKPOINT, dtype="float32"), dsj.load_tokenizer(CHECKPOINT)
    length = 2 * longest + shared
    mixed, behind = workload(tokenizer, longest, 0), workload(tokenizer, longest, shared)
    drafting = [replace(request, use_mtp=True) for request in mixed]
    bound = [replace(mixed[0], grammar=Free), *mixed[1:]]

    def made(use_mtp: bool, prefixes: bool, model=model) -> Batcher:
        sizes = {"slots": SLOTS, "length": length, "queue": REQUESTS, "chunk": CHUNK, "steps": STEPS}
        return Batcher(model, use_mtp=use_mtp, prefixes=prefixes, **sizes)

    plain, drafts, sharing = made(False, False), made(True, False), made(False, True)
    distill, cfg = dsj.init(DISTILL, jax.random.key(0)), model.cfg
    with ExitStack() as stack:
        folder = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "distill")
        dsj.save_pretrained(distill, folder)
        port = stack.enter_context(served(lambda: made(False, False), cfg, tokenizer, length))
        sides = {
            "static": static(model, mixed, length, False),
            "slots": slots(plain, model, mixed),
            "static, drafts": static(model, mixed, length, True),
            "slots, drafts": slots(drafts, model, drafting),
            "slots, one grammar": slots(plain, model, bound),
            "one beginning, fed whole": slots(plain, model, behind),
            "one beginning, shared": slots(sharing, model, behind),
            "slots, over HTTP": over_http(port, mixed, cfg.eos_ids),
            "distill, slots": slots(made(False, False, distill), distill, mixed),
            "distill, transformers": stack.enter_context(batching(folder, mixed, SLOTS, CHUNK, length)),
        }
        results, texts = measured(sides, rounds)
    pairs = (
        ("slots", "static"),
        ("slots, drafts", "static, drafts"),
        ("slots, drafts", "slots"),
        ("slots, one grammar", "slots"),
        ("one beginning, shared", "one beginning, fed whole"),
        ("slots, over HTTP", "slots"),
        ("distill, slots", "distill, transformers"),
    )
    stats, again = drafts.stats(), sharing.stats()
    record = {
        "requests": REQUESTS,
        "slots": SLOTS,
        "prompt_tokens": [len(request.prompt) for request in mixed],
        "new_tokens": [request.max_new_tokens for request in mixed],
        "results": results,
        "ratios": {f"{side} / {base}": over(results[side], results[base]) for side, base in pairs},
        "accepted_share": round(stats.accepted / stats.drafted, 3),
        "shared_share": round(again.cached / again.prompt, 3),
        "same_as_transformers": same(texts["distill, slots"], texts["distill, transformers"]),
        **provenance(),
    }
    for name, found in results.items():
        print(f"{name:26}", *(f"{of.removesuffix('_seconds')} {value:9.3f}" for of, value in found.items()))
    for name, found in record["ratios"].items():
        print(f"{name:50}", *(f"{value:7.3f}" for value in found.values()))
    out = given.out or (None if given.smoke else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
