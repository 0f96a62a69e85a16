"""Many clients at once, for as long as is wanted: random requests, clients that leave in every phase, hostile bodies.

    python tests/serving/soak.py --minutes 30    # prints what it did, a line a minute; fails at the end if anything did

What must hold: every text that is not left to chance is that of `dsj.generate`, and of a schema the same each time;
what is wrong is answered with 4xx, in OpenAI's shape; in the end no slot is taken, and neither memory nor threads nor
open files have grown; nothing is compiled on the way. The test of the server has a short one.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import jax
import numpy as np
from served import serving

import deepseek_jax as dsj
from deepseek_jax.generation.batcher import Batcher
from deepseek_jax.generation.sampling import make_sampling
from deepseek_jax.serving.worker import Worker

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "tiny-v3"
SLOTS, LENGTH, NEW, QUEUE, CLIENTS, BODY = 4, 128, 16, 6, 12, 2**16
GROWTH = 64  # MiB of memory after the first part, at most: caches fill, and a request's garbage comes and goes
# What clients do, all of it at least once: on a slow machine the time alone may not be enough, and they go on a while.
KINDS = {"whole", "streamed", "schema", "hostile", "left early", "left in a stream", "looked"}
LONGER = 120  # seconds, at most
POOLS = 40  # threads that the event loop's pools may add: they start as they are needed, and stay
PROMPTS = ["def add(a, b):\n", "class Point:\n    def", "import os\n\n", "for i in range(", "naïve = '日本 🙂'\n", "x"]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
# Request lines, headers and bodies of which none may be answered with 5xx, or with 200.
HOSTILE = [b"", b"{", b"null", b"[]", b"\xff", b"[" * 9999, b'{"prompt": 5}', b'{"prompt": [99999]}', b'{"prompt": []}']
HOSTILE += [
    b'{"prompt": "x", "max_tokens": 1e999}',
    b'{"prompt": "\\ud800"}',
    b"x" * (BODY + 1),
    b'{"prompt": "x"',
    b"NaN",
]
HOSTILE += [b'{"prompt": "x", "n": %d}' % n for n in (0, -1, 99, 2**70)]
JUNK = [
    None,
    True,
    -1,
    0,
    0.5,
    2**70,
    1e308,
    "",
    "\x00",
    "x" * 5000,
    [],
    {},
    [[]],
    [None] * 50,
    {"type": "json_schema"},
]


@dataclass
class Case:
    """A request, and the texts of its choices with their log-probabilities; None where a schema makes them."""

    path: str
    body: dict
    texts: list[str] | None
    logprobs: list[list[float]] | None = None


@dataclass
class Found:
    """What was done, by kind; what should not have been; MiB of memory at the end of every part of the time."""

    done: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    compiled: list[float] = field(default_factory=list)


def cases_of(model, tokenizer) -> list[Case]:
    """Greedy and seeded ones, of one choice and of several, of texts and chats; all their rows go to one `generate`."""
    drawn = {"temperature": 0.8, "top_p": 0.9}
    settings = [{"temperature": 0}, drawn | {"seed": 5}, drawn | {"seed": 6, "n": 3, "min_p": 0.02}]
    cases, rows = [], {name: [] for name in ("prompts", "temperature", "top_p", "min_p", "seed")}
    for prompt in PROMPTS:
        for setting in settings:
            for chat in (False, True):
                given = {"model": "tiny", "max_tokens": NEW, "top_p": 1.0, **setting}
                given |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
                cases.append(Case(f"/v1/{'chat/' if chat else ''}completions", given, []))
                n, ids = given.get("n", 1), tokenizer.chat(given["messages"]) if chat else tokenizer.encode(prompt)
                rows["prompts"] += [ids] * n
                rows["seed"] += make_sampling(n, 1.0, 0, 1.0, 0.0, given.get("seed", 0)).seed.tolist()
                for name in ("temperature", "top_p", "min_p"):
                    rows[name] += [given.get(name, 0.0)] * n
    prompts = rows.pop("prompts")
    found, info = dsj.generate(model, prompts, NEW, use_mtp=True, cache_length=LENGTH, **rows)
    row = 0
    for case in cases:
        mine = slice(row, row := row + case.body.get("n", 1))
        case.texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found[mine]]
        case.logprobs = info.logprobs[mine]
    schema = {
        "model": "tiny",
        "max_tokens": 60,
        "response_format": FORM,
        "messages": [{"role": "user", "content": "x"}],
    }
    return [
        *cases,
        *(Case("/v1/chat/completions", schema | {"seed": seed, "n": 1 + seed % 2}, None) for seed in range(3)),
    ]


class Client:
    """One of the clients, with random numbers of its own."""

    def __init__(self, url: str, cases: list[Case], seed: int, found: Found, known: dict):
        self._url, self._cases, self._draw, self._found, self._known = url, cases, random.Random(seed), found, known
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = host, int(port)

    def run(self, end: float) -> None:
        kinds = {
            self._whole: 6,
            self._leaves: 3,
            self._leaves_early: 2,
            self._hostile: 2,
            self._mutated: 2,
            self._asks: 1,
        }
        with httpx2.Client(base_url=self._url, timeout=120) as self._web:
            while (now := time.monotonic()) < end or (now < end + LONGER and not set(self._found.done) >= KINDS):
                kind = self._draw.choices(list(kinds), list(kinds.values()))[0]
                try:
                    kind()
                except Exception as error:
                    self._found.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}"[:2000])

    def _count(self, name: str) -> None:
        self._found.done[name] += 1

    def _check(self, holds: bool, *what) -> None:
        if not holds:
            self._found.wrong.append(" ".join(map(str, what))[:2000])

    def _request(self) -> tuple[Case, dict, str]:
        """A case, varied in what does not change its text, or cuts it where a stop string says."""
        case, draw = self._draw.choice(self._cases), self._draw
        body, stop = dict(case.body), ""
        chat = "messages" in body
        if draw.random() < 0.4:
            body |= {"stream": True} | ({"stream_options": {"include_usage": True}} if draw.random() < 0.5 else {})
        if draw.random() < 0.4:
            body |= {"logprobs": True, "top_logprobs": draw.randrange(4)} if chat else {"logprobs": draw.randrange(4)}
        if chat and draw.random() < 0.3:
            body["routing"] = True
        if case.texts and draw.random() < 0.3:
            text = draw.choice(case.texts)
            at = draw.randrange(max(1, len(text)))
            if stop := text[at : at + draw.randint(1, 4)]:
                body["stop"] = [stop, "never said at all"]
        return case, body, stop

    def _whole(self) -> None:
        case, body, stop = self._request()
        if body.get("stream"):
            with self._web.stream("POST", case.path, json=body) as answer:
                if self._full(answer):
                    return
                choices = self._streamed(answer)
        else:
            answer = self._web.post(case.path, json=body)
            if self._full(answer):
                return
            self._check(answer.status_code == 200, body, answer.status_code, answer.text)
            choices = [
                (c.get("text") or (c.get("message") or {}).get("content") or "", c) for c in answer.json()["choices"]
            ]
        texts = [text for text, _ in choices]
        self._count("schema" if case.texts is None else "streamed" if body.get("stream") else "whole")
        if case.texts is None:
            known = self._known.setdefault((body["seed"], body["n"]), texts)
            self._check(texts == known, "of one seed", texts, "and", known)
            for text in texts:
                self._check(set(json.loads(text)) == {"a", "b"}, text)
            return
        wanted = [text.partition(stop)[0] if stop else text for text in case.texts]
        self._check(texts == wanted, body, "gave", texts, "not", wanted)
        if body.get("logprobs") is not None and not body.get("stream"):
            self._likely(case, body, [choice["logprobs"] for _, choice in choices])

    def _likely(self, case: Case, body: dict, found: list[dict]) -> None:
        for logprobs, wanted in zip(found, case.logprobs, strict=True):
            values = [e["logprob"] for e in logprobs["content"]] if "messages" in body else logprobs["token_logprobs"]
            near = np.allclose(values, wanted[: len(values)], atol=1e-4)
            self._check(near, body, "has log-probabilities", values, "not", wanted)

    def _streamed(self, answer) -> list[tuple[str, dict]]:
        texts, last = {}, None
        for line in answer.iter_lines():
            if not line:
                continue
            last = line.removeprefix("data: ")
            chunk = {} if last == "[DONE]" else json.loads(last)
            self._check("error" not in chunk, "a stream broke off:", last)
            for choice in chunk.get("choices", ()):
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + text
        self._check(last == "[DONE]", "a stream ended with", last)
        return [(texts[i], {}) for i in sorted(texts)]

    def _full(self, answer) -> bool:
        """Whether the queue was."""
        if answer.status_code == 429:
            self._check("retry-after" in answer.headers, "429 without Retry-After")
            self._count("refused")
            time.sleep(0.3 * self._draw.random())
        return answer.status_code == 429

    def _leaves(self) -> None:
        """After some events of a stream, after all but its end, or before the first."""
        case, body, _ = self._request()
        with self._web.stream("POST", case.path, json=body | {"stream": True}) as answer:
            if self._full(answer):
                return
            lines = answer.iter_lines()
            for _ in range(self._draw.choice((0, 1, 2, 3, 8, 40))):
                if next(lines, None) is None:
                    break
        self._count("left in a stream")

    def _leaves_early(self) -> None:
        """In the middle of its request, or some time after it; without a word, or with its writing half shut first."""
        case, body, _ = self._request()
        raw = json.dumps(body | {"max_tokens": 60}).encode()
        head = f"POST {case.path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sent = f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw
        if self._draw.random() < 0.4:
            sent = sent[: self._draw.randrange(len(sent))]
        with socket.create_connection(self._address, timeout=60) as connection:
            connection.sendall(sent)
            time.sleep(self._draw.choice((0, 0, 0.01, 0.05, 0.2)))
            if self._draw.random() < 0.3:
                connection.shutdown(socket.SHUT_WR)
                time.sleep(0.01)
        self._count("left early")

    def _hostile(self) -> None:
        path = self._draw.choice(("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"))
        body = self._draw.choice(HOSTILE)
        if path == "/tokenize" and body.startswith(b'{"prompt": "x",'):
            return
        answer = self._web.post(path, content=body, headers={"content-type": "application/json"})
        self._refused(answer, path, body[:80])
        self._count("hostile")

    def _mutated(self) -> None:
        """A good request with junk in one of its fields, which some take."""
        case, body, _ = self._request()
        field = self._draw.choice(
            [*body, "stop", "seed", "tools", "logit_bias", "echo", "temperature", "stream_options"]
        )
        body |= {"max_tokens": 8, field: self._draw.choice(JUNK)}
        answer = self._web.post(case.path, json=body)
        if not self._full(answer):
            if answer.status_code != 200:
                self._refused(answer, case.path, body)
            self._count(f"junk, {answer.status_code}")

    def _refused(self, answer, *what) -> None:
        error = answer.json().get("error", {}) if answer.headers.get("content-type") == "application/json" else {}
        right = 400 <= answer.status_code < 500 and error.get("message")
        self._check(bool(right), *what, "gave", answer.status_code, answer.text)

    def _asks(self) -> None:
        path = self._draw.choice(("/health", "/metrics", "/v1/models", "/version", "/", "/nothing"))
        answer = self._web.get(path)
        self._check(answer.status_code == (404 if path == "/nothing" else 200), path, answer.status_code)
        self._count("looked")


@contextmanager
def compilations(found: list[float]):
    def heard(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def memory() -> float:
    """MiB that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def opened() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def idle(stats) -> bool:
    """Waits until nothing is under way. That every slot comes back is what is tested."""
    end = time.monotonic() + 30
    while (stats().running or stats().waiting) and time.monotonic() < end:
        time.sleep(0.02)
    return (stats().running, stats().waiting) == (0, 0)


def soak(model, tokenizer, seconds: float, parts: int = 4, tell=lambda found: None) -> Found:
    """``parts``: between which all clients go, the server is idle, and its memory is taken. ``tell``: is shown what was
    found so far."""
    found, known = Found(), {}
    cases = cases_of(model, tokenizer)
    worker = Worker(lambda: Batcher(model, SLOTS, LENGTH, True, QUEUE, chunk=16, routing=True))
    asyncio.run(worker.started())
    how = {"name": "tiny", "context": LENGTH, "drafts": True, "routing": True, "body": BODY}
    with serving(worker, tokenizer, **how) as url, compilations(found.compiled):
        before = None
        for part in range(parts):
            end = time.monotonic() + seconds / parts
            clients = [Client(url, cases, part * CLIENTS + i, found, known) for i in range(CLIENTS)]
            threads = [threading.Thread(target=client.run, args=(end,)) for client in clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if not idle(worker.stats):
                found.wrong.append(f"slots are not free: {worker.stats()}")
            time.sleep(0.2)  # connections close
            now = (threading.active_count(), opened(), len(worker._callers))
            before = before or now
            if now[0] > before[0] + POOLS or now[1] > before[1] + 2 or now[2]:
                found.wrong.append(f"threads, open files and callers were {before}, and are {now}")
            found.memory.append(memory())
            tell(found)
        if found.memory[-1] > found.memory[0] + GROWTH:
            found.wrong.append(f"memory grew: {found.memory} MiB")
        if worker.error is not None or worker.state != "ready":
            found.wrong.append(f"the engine is {worker.state}: {worker.error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    model, tokenizer = dsj.load_pretrained(CHECKPOINT, dtype=np.float32), dsj.load_tokenizer(CHECKPOINT)
    told = [0]

    def tell(found: Found) -> None:
        print(time.strftime("%H:%M:%S"), dict(found.done), f"{found.memory[-1]:.0f} MiB", flush=True)
        print("".join(f"wrong: {what}\n" for what in found.wrong[told[0] :]), end="", flush=True)
        told[0] = len(found.wrong)

    found = soak(model, tokenizer, 60 * minutes, max(2, round(minutes)), tell)
    print(f"compiled on the way: {len(found.compiled)}; memory after each part: {[round(m) for m in found.memory]} MiB")
    print(*(found.wrong[told[0] :] or [f"wrong: {len(found.wrong)}"]), sep="\n")
    raise SystemExit(bool(found.wrong or found.compiled))


if __name__ == "__main__":
    main()
