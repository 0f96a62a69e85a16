"""``deepseek-jax chat``: a conversation with a checkpoint in the terminal."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.devices import Devices
from deepseek_jax.cli.generate import DTYPE, load_model, open_tokenizer
from deepseek_jax.cli.interrupts import EXIT_CODES, remarks
from deepseek_jax.runs.signals import StopSignals, undoing
from deepseek_jax.small_files import read_json

CONTEXT = 4096  # tokens, where nothing is said
FENCE = '"""'
HELP = {
    "/reset": "forgets what was said; a system message stays",
    "/think on": "thinks before it answers, /think off does not, where the checkpoint's template has that switch",
    "/quit": "ends, as Ctrl-D does; Ctrl-C stops an answer and keeps what was said",
    FENCE: "around a message of several lines",
}


@dataclass(frozen=True)
class Chat:
    """Talk with a checkpoint in the terminal, by its own chat template. Answers stream; Ctrl-C stops one and keeps what
    was said, Ctrl-D ends; /help lists the commands. From a pipe each line is a turn."""

    ckpt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Checkpoint folder: config.json, weights, tokenizer.json and a chat template."""
    system: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """System message that the conversation begins with."""
    thinking: Literal["on", "off"] | None = None
    """Think before answering, or not, where the template has that switch; by default as the template has it."""
    preset: Literal["r1"] | None = None
    """Ask as R1's README advises: no system prompt, answers that begin with <think>, temperature 0.6, top-p 0.95.
    Options that are given come first."""
    context: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Tokens of the whole conversation at most, held in the cache; by default 4096, or the model's most where that is
    less."""
    max_new_tokens: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Tokens of an answer at most; by default what is left of the context."""
    temperature: Annotated[float | None, tyro.conf.arg(metavar="NUMBER")] = None
    """0: the likeliest token each time; 1: the model's own distribution. By default, and so for the next three, what
    the checkpoint's generation_config.json says where it samples (do_sample), else 0."""
    top_k: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """Sample from the k likeliest tokens only; 0: all."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    """Sample from the smallest set of tokens with this much probability, in (0, 1]."""
    min_p: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    """Drop tokens below this share of the likeliest one's probability, in [0, 1]."""
    seed: int = 0
    """Seed of the random numbers; the same conversation has the same answers."""
    use_mtp: bool = False
    """Let the multi-token-prediction modules draft tokens; the distribution stays the same."""
    adapter: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Low-rank adapters for the checkpoint, in PEFT's format (adapter_config.json, adapter_model.safetensors)."""
    dtype: DTYPE = "bfloat16"
    """Precision of the weights; "stored" keeps FP8 quantised. On a CPU float32 is the fastest."""
    devices: Annotated[Devices, tyro.conf.arg(name="")] = field(default_factory=Devices)
    """Where it runs."""

    def run(self) -> int:
        ctx = self.devices.context()

        from jax import process_count

        from deepseek_jax.convert.config_file import read_config
        from deepseek_jax.text.presets import PRESETS

        if process_count() > 1:
            raise ValueError("a conversation has one keyboard: chat runs in one process; generate runs in several.")
        tokenizer = open_tokenizer(self.ckpt, needed=None)
        if tokenizer is None or not tokenizer.has_template:
            what = "tokenizer.json" if tokenizer is None else "chat template"
            option = "--prompt-ids ID [ID ...]" if tokenizer is None else "--prompt TEXT"
            raise ValueError(f"{self.ckpt} has no {what}, so it holds no conversations; deepseek-jax generate {option} "
                             "continues what it is given.")  # fmt: skip
        cfg = read_config(self.ckpt)
        tokenizer.check_fits(cfg.vocab_size)
        length = min(CONTEXT, cfg.max_length) if self.context is None else self.context
        if not 2 <= length <= cfg.max_length:
            raise ValueError(f"--context {length}: {cfg.name} takes 2 to {cfg.max_length} tokens.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1.")
        if self.thinking is not None and not tokenizer.template_reads("thinking"):
            raise ValueError(f"--thinking {self.thinking}: {self.ckpt}'s chat template has no such switch.")
        preset = PRESETS[self.preset] if self.preset else None
        if preset and self.system is not None:
            raise ValueError(f"--preset {self.preset}: R1 wants no system prompt; leave out --system.")
        settings = (
            settings_of(self.ckpt) if preset is None else {"temperature": preset.temperature, "top_p": preset.top_p}
        )
        settings |= {
            name: value
            for name in ("temperature", "top_k", "top_p", "min_p")
            if (value := getattr(self, name)) is not None
        }
        settings |= {"seed": self.seed}
        talk = Talk(tokenizer, self.system, self.thinking, self.max_new_tokens, settings, thinks=preset is not None)
        talk.render("")  # a template that refuses says so before the weights are read

        from deepseek_jax.generation.conversation import Conversation

        # Nothing else may hold the model: what decoding wants laid out otherwise is a copy.
        talk.begin(Conversation(load_model(self.ckpt, self.dtype, ctx, self.adapter), length, self.use_mtp, ctx), cfg)
        return talk.run()


def settings_of(folder: Path) -> dict:
    """How the release samples, by its generation_config.json; nothing where it does not."""
    file = folder / "generation_config.json"
    said = read_json(file) if file.exists() else {}
    if said.get("do_sample") is not True:
        return {}
    names = ("temperature", "top_k", "top_p", "min_p")
    return {"temperature": 1.0} | {name: said[name] for name in names if said.get(name) is not None}


class Talk:
    """What was said, and what goes on: messages come in, answers are printed. ``thinks``: they are made to begin with a
    thought.

    At a keyboard an error is one line and the conversation goes on; from a pipe it ends the command."""

    def __init__(
        self, tokenizer, system: str | None, thinking: str | None, most: int | None, settings: dict, thinks: bool
    ):
        self._tokenizer, self._thinking, self._most, self._settings = tokenizer, thinking, most, settings
        self._thinks = thinks
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._said = list(self._first)
        self._typed = sys.stdin.isatty()

    def begin(self, conversation, cfg) -> None:
        self._conversation, self._cfg = conversation, cfg

    def render(self, text: str) -> str:
        """The conversation with one more message, up to where the answer begins."""
        messages, switch = self._chat(text)
        return self._tokenizer.render(messages, **switch)

    def _chat(self, text: str) -> tuple[list[dict], dict]:
        switch = {} if self._thinking is None else {"thinking": self._thinking == "on"}
        return [*self._said, {"role": "user", "content": text}], switch

    def run(self) -> int:
        """Until the end of the input; returns the exit code."""
        remarks(held="the answer stops here; Ctrl-C once more ends the conversation.")
        if self._typed:
            drawn = [f"{name} {value}" for name, value in self._settings.items()]
            how = ", ".join(drawn) if self._settings.get("temperature") else "the likeliest token each time"
            tell(f"{self._cfg.name}: {how}; {self._conversation.length} tokens of context. /help lists the commands.")
        for text in messages(self._typed):
            try:
                word, *rest = text.split()
                if word == "/quit":
                    break
                if re.fullmatch("/[a-z]+", word):
                    self._command(word, rest)
                    continue
                signal = self._answer(text)
            except ValueError as error:
                if not self._typed:
                    raise
                tell(str(error))
                continue
            if signal == "SIGTERM" or (signal and not self._typed):
                return EXIT_CODES[signal]
        return 0

    def _command(self, word: str, rest: list[str]) -> None:
        if word == "/help":
            for name, does in HELP.items():
                tell(f"{name:<10}{does}.", indent=10)
        elif word == "/reset":
            self._said = list(self._first)
        elif word == "/think" and rest in (["on"], ["off"]):
            if not self._tokenizer.template_reads("thinking"):
                raise ValueError("the checkpoint's chat template has no switch for thoughts.")
            (self._thinking,) = rest
        else:
            raise ValueError(f"there is no command {' '.join([word, *rest])!r}; /help lists them.")

    def _answer(self, text: str) -> str | None:
        """Prints the answer and keeps it with the question; returns the signal that stopped it, None if none did."""
        from deepseek_jax.text.presets import THINK, opening
        from deepseek_jax.text.stream import Stream

        rendered = self.render(text)
        messages, switch = self._chat(text)
        ids = self._tokenizer.chat(messages, **switch)
        if self._thinks:
            ids += opening(self._tokenizer, rendered)
        room = self._conversation.length - len(ids)
        if room < 1:
            raise ValueError(self._full(f"the conversation and this message have {len(ids)} tokens"))
        run = self._conversation.stream(ids, min(room, self._most or room), **self._settings)
        stream, parts = Stream(self._tokenizer), []

        def show(part: str) -> None:
            parts.append(part)
            print(part, end="", flush=True)

        with StopSignals() as stop:
            stop.hold()
            if self._thinks or rendered.rstrip().endswith(THINK):
                print(THINK)  # the thoughts that the answer begins with were opened for it
            for (new,) in run:
                show(stream.push(i for i in new if i not in self._cfg.eos_ids))
                if stop.asked:
                    break
            show(stream.finish())
            print(flush=True)
            answer = {"role": "assistant", "content": "".join(parts)}
            self._said += [{"role": "user", "content": text}, answer]
        (tokens,), info = run.result()
        if info.finish_reason == ["length"]:
            cut = f"the answer is cut at --max-new-tokens {self._most}."
            tell(self._full("the answer is cut") if len(tokens) == room else cut)
        return stop.asked

    def _full(self, what: str) -> str:
        length, most = self._conversation.length, self._cfg.max_length
        more = f", --context holds up to {most}" if length < most else ""
        return f"{what}: the context of {length} tokens is full. /reset begins anew{more}."


def tell(text: str, indent: int = 0) -> None:
    """What is no part of the conversation, in a terminal as wide as that."""
    if sys.stderr.isatty():
        text = textwrap.fill(
            text, max(20, shutil.get_terminal_size().columns), subsequent_indent=" " * indent, break_on_hyphens=False
        )
    print(text, file=sys.stderr, flush=True)


def messages(typed: bool) -> Iterator[str]:
    """Messages that are not blank, each a line, or the lines between two fences."""
    if typed:
        with suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401  # input() then edits lines and remembers them
    while (line := _line(typed, ">>> ")) is not None:
        if line.startswith(FENCE):
            lines, end = [line.removeprefix(FENCE)], FENCE
            while not lines[-1].rstrip().endswith(end) and (line := _line(typed, "... ")) is not None:
                lines.append(line)
            line = "\n".join(lines).rstrip().removesuffix(end).strip("\n")
        if line.strip():
            yield line


def _line(typed: bool, prompt: str) -> str | None:
    """The next line without its end, None at the end of the input. Raises ValueError for bytes that are not UTF-8."""
    if not typed:
        raw = sys.stdin.buffer.readline()
        try:
            return raw.decode().removesuffix("\n").removesuffix("\r") if raw else None
        except UnicodeDecodeError as error:
            raise ValueError(f"the standard input is not UTF-8 text: {error}.") from error
    if not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    # The line's editor has the terminal to itself; a signal that ends the command must not leave it so.
    with undoing(_terminal()):
        try:
            return input(prompt)
        except EOFError:
            print()
            return None


def _terminal():
    """What gives the terminal back the settings that it has now."""
    try:
        import termios
    except ImportError:  # no such terminals on this system
        return lambda: None
    before = termios.tcgetattr(sys.stdin)
    return lambda: termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
