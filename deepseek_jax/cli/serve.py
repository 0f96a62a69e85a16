"""``deepseek-jax serve``: a checkpoint behind OpenAI's API."""

import asyncio
import ipaddress
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from deepseek_jax.cli.chat import settings_of
from deepseek_jax.cli.devices import Devices
from deepseek_jax.cli.generate import DTYPE, load_model, open_tokenizer
from deepseek_jax.cli.interrupts import remarks
from deepseek_jax.runs.signals import StopSignals

CONTEXT = 4096  # tokens, where nothing is said
KEY = "DEEPSEEK_JAX_KEY"
MISSING = "a server needs packages that are not installed: pip install 'deepseek-jax[serve]'."


@dataclass(frozen=True)
class Serve:
    """Serve a checkpoint over HTTP as OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, and /health,
    /metrics, /tokenize, /detokenize, /version. Requests are continued together, in slots of one cache. SIGTERM and
    Ctrl-C let the answers under way end; a second Ctrl-C does not."""

    ckpt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Checkpoint folder: config.json, weights, tokenizer.json and, for chats, a chat template."""
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen on; one that other machines reach needs --key."""
    port: Annotated[int, tyro.conf.arg(metavar="PORT")] = 8000
    """TCP port; 0 for any that is free."""
    key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """Key that clients must give as a bearer's token; by default what the environment's DEEPSEEK_JAX_KEY says."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name that the model is served under; by default the folder's."""
    slots: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Answers that are written at the same time."""
    context: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Tokens of a prompt with its answer at most; by default 4096, or the model's most where that is less."""
    queue: Annotated[int, tyro.conf.arg(metavar="N")] = 64
    """Requests that may wait for a slot; one more is answered 429."""
    drafts: bool = True
    """Let the multi-token-prediction modules draft tokens, where the checkpoint has them; the distribution stays the
    same."""
    prefixes: bool = True
    """Keep the caches of answers that have ended for prompts that begin alike, where the model's can be taken back."""
    routing: bool = False
    """Record which experts each token goes to, for chats that ask with "routing": true, as the page at / does."""
    origins: Annotated[tuple[str, ...], tyro.conf.arg(metavar="URL [URL ...]")] = ()
    """Origins whose pages a browser may let ask (CORS); by default none."""
    max_body: Annotated[int, tyro.conf.arg(metavar="BYTES")] = 16 * 2**20
    """Bytes of a request at most."""
    adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Low-rank adapters for the checkpoint, in PEFT's format (adapter_config.json, adapter_model.safetensors)."""
    dtype: DTYPE = "bfloat16"
    """Precision of the weights; "stored" keeps FP8 quantised. On a CPU float32 is the fastest."""
    devices: Annotated[Devices, tyro.conf.arg(name="")] = field(default_factory=Devices)
    """Where it runs: one device."""

    def run(self) -> int:
        key = self.key if self.key is not None else os.environ.get(KEY) or None
        if key == "":
            raise ValueError("--key is empty: give a text, or leave it out.")
        if key is None and not _loopback(self.host):
            raise ValueError(f"--host {self.host} can be reached from other machines: give --key KEY, or set {KEY}.")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: must be from 0 to 65535.")
        for option, value in (("slots", self.slots), ("queue", self.queue), ("max-body", self.max_body)):
            if value < 1:
                raise ValueError(f"--{option} {value}: must be at least 1.")
        try:
            from deepseek_jax.serving.api import Api
            from deepseek_jax.serving.jobs import Jobs
            from deepseek_jax.serving.schema import Limits
            from deepseek_jax.serving.server import listening, serve
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("deepseek_jax"):
                raise
            raise ValueError(MISSING) from error
        ctx = self.devices.context()

        from jax import process_count

        from deepseek_jax.convert.config_file import read_config
        from deepseek_jax.multimodal.checkpoint import holds_janus, load_pretrained
        from deepseek_jax.multimodal.checkpoint import read_config as read_janus
        from deepseek_jax.multimodal.served import Chats, Seen
        from deepseek_jax.serving.worker import Worker

        if process_count() > 1 or ctx.mesh is not None:
            raise ValueError("a server runs in one process on one device: it takes no --mesh and no --coordinator.")
        janus = read_janus(self.ckpt) if holds_janus(self.ckpt) else None
        if janus is not None and self.adapter is not None:
            raise ValueError(f"--adapter: {self.ckpt} holds a Janus, which has none here. Leave it out.")
        tokenizer, cfg = open_tokenizer(self.ckpt, needed=None), janus.language if janus else read_config(self.ckpt)
        if tokenizer is None:
            raise ValueError(f"{self.ckpt} has no tokenizer.json, and a server takes and gives text.")
        tokenizer.check_fits(cfg.vocab_size)
        length = min(CONTEXT, cfg.max_length) if self.context is None else self.context
        if not 2 <= length <= cfg.max_length:
            raise ValueError(f"--context {length}: {cfg.name} takes 2 to {cfg.max_length} tokens.")
        if self.routing and cfg.moe is None:
            raise ValueError(f"--routing: {cfg.name} has no experts.")
        drafts, name = self.drafts and cfg.mtp_depth > 0, self.name or self.ckpt.resolve().name
        limits = Limits(
            cfg.vocab_size, length, {"temperature": 1.0} | settings_of(self.ckpt), pictures=janus is not None
        )
        # Configurations and tokenizers do not always name the same ends.
        ends = sorted({*cfg.eos_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])})
        shows = None if janus is None else Chats(tokenizer, janus)
        jobs = Jobs(name, tokenizer, limits, ends, drafts, self.routing, shows)

        def make():
            from deepseek_jax.generation.batcher import Batcher

            how = {"prefixes": self.prefixes, "routing": self.routing, "ctx": ctx}
            if janus is None:
                model = load_model(self.ckpt, self.dtype, ctx, self.adapter)
            else:
                whole = load_pretrained(self.ckpt, None if self.dtype == "stored" else self.dtype)
                model, how["sight"] = whole.language, Seen(whole, ctx)
            return Batcher(model, self.slots, length, drafts, self.queue, **how)

        sock = listening(self.host, self.port)
        remarks(held="answers under way are let end; Ctrl-C once more does not wait for them.")
        with StopSignals() as stop:
            stop.hold()
            worker, began = Worker(make), time.monotonic()
            host, port = sock.getsockname()[:2]
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
            how = f"{self.slots} slots of {length} tokens{', MTP drafts' if drafts else ''}{', key' if key else ''}"
            print(f"deepseek-jax serve: {name} at {where}: {how}; loading the model.", file=sys.stderr, flush=True)
            app = Api(worker, jobs, key, self.origins, self.max_body).app()
            asyncio.run(_until(serve(app, sock, worker, lambda: stop.asked is not None), worker, began))
        return 0


async def _until(serving, worker, began: float) -> None:
    """Serves, and says when the model is there."""

    async def say() -> None:
        await worker.started()
        print(f"ready after {time.monotonic() - began:.0f} s.", file=sys.stderr, flush=True)

    saying = asyncio.create_task(say())
    try:
        await serving
    finally:
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
