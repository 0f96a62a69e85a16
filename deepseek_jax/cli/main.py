"""The entry point of ``deepseek-jax``: finds a command, reads its arguments, turns errors into one line.

A command is one file with a frozen dataclass whose fields are its arguments and whose ``run`` does the work.
Nothing here, and nothing a command imports at its top, loads JAX, so that help answers at once.
"""

import contextlib
import gc
import importlib
import os
import sys
import warnings

from deepseek_jax.notes import CheckpointWarning
from deepseek_jax.version import __version__

# command -> (class in deepseek_jax/cli/<command>.py, what it does)
COMMANDS = {
    "demo": ("Demo", "the tour on the shipped checkpoint: load, check, generate, show the routing"),
    "summary": ("Summary", "exact parameter, cache, FLOP and cost figures of a model"),
    "convert": ("Convert", "published checkpoint layout to Orbax, or back"),
    "verify": ("Verify", "compare a checkpoint layer by layer with PyTorch transformers"),
    "generate": ("Generate", "continue a prompt with a checkpoint"),
    "draw": ("Draw", "pictures of a text, by a Janus"),
    "chat": ("Chat", "a conversation with a checkpoint in the terminal"),
    "serve": ("Serve", "a checkpoint over HTTP, as OpenAI's API"),
    "score": ("Score", "log-probabilities of given text"),
    "train": ("Train", "train a model from scratch on real text"),
    "rl": ("Rl", "teach a checkpoint a task with verifiable rewards by GRPO"),
    "distill": ("Distill", "teach a student by a teacher's answers or distribution"),
    "plot": ("Plot", "a run's metrics as images"),
    "experiment": ("Experiment", "put a paper's claim to the test: its runs, verdicts and figure; the ledger"),
    "sweep": ("Sweep", "a grid over fields of an experiment's base, to find settings"),
    "report": ("Report", "the papers' exact figures beside ours, and those that do not reproduce"),
    "compile": ("Compile", "memory and time of a model on a TPU slice, compiled without one"),
}
# A message may quote what a file holds; beyond this it is cut.
LONGEST = 4000
# Shows where an error comes from, for those who work on the package.
TRACEBACK = "DEEPSEEK_JAX_TRACEBACK"


class CommandError(ValueError):
    """Bad input to a command; the message is all that the user sees."""

    exit_code = 1


class UsageError(CommandError):
    """Arguments that do not make a command."""

    exit_code = 2


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Without ``argv`` it is the process's own, and Ctrl-C and SIGTERM
    end the process (`cli.interrupts`).

    0: done. 1: the command failed, or its check did not hold. 2: a command line that cannot be read.
    130: interrupted. 141: the reader of the output has gone. 143: terminated.
    """
    if argv is not None:
        return _run(list(argv))
    from deepseek_jax.cli.interrupts import Interrupts

    # A start makes a million objects that stay; looking through them again and again would take a tenth of it.
    gc.set_threshold(50_000, *gc.get_threshold()[1:])
    argv = sys.argv[1:]
    with Interrupts(" ".join(["deepseek-jax", *(word for word in argv[:1] if word in COMMANDS)])):
        return _run(argv)


def _run(argv: list[str]) -> int:
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has gone (`... | head`). What is left in the buffer has nowhere to go: without this the
        # interpreter complains about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, *arguments = argv
    if name in ("-V", "--version"):
        print(f"deepseek-jax {__version__}")
        return 0
    if name not in COMMANDS:
        return _fail("", f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}.", 2)
    try:
        with _notes():
            command = _parse(name, arguments)
            if isinstance(command, int):
                return command
            from deepseek_jax.cli.files import json_alone

            with json_alone(getattr(command, "json", None)):
                return command.run() or 0
    except KeyboardInterrupt:
        return _fail(name, "interrupted.", 130)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        return _fail(name, _message(error), getattr(error, "exit_code", 1))
    except Exception as error:
        if os.environ.get(TRACEBACK) or not _out_of_memory(error):
            raise
        return _fail(name, f"out of memory. {_first_line(error)}".strip(), 1)


@contextlib.contextmanager
def _notes():
    """Inside, a `CheckpointWarning` is one line on stderr, said once however often a command reads the file."""
    said, others = set(), warnings.showwarning

    def show(message, category, *where, **more):
        if not issubclass(category, CheckpointWarning):
            others(message, category, *where, **more)
        elif (text := " ".join(str(message).split())) not in said:
            said.add(text)
            print(f"note: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        warnings.showwarning = show
        yield


def _out_of_memory(error: Exception) -> bool:
    """Whether Python, NumPy or a device of JAX ran out of memory; JAX is looked at only where it is loaded."""
    jax = sys.modules.get("jax")
    device = jax is not None and isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return device or isinstance(error, MemoryError)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _parse(name: str, arguments: list[str]):
    """The command's dataclass filled from its arguments, or an exit code when help or bad usage ended it."""
    import io

    import tyro

    from deepseek_jax.cli.helptext import description, flow

    command = getattr(importlib.import_module(f"deepseek_jax.cli.{name}"), COMMANDS[name][0])
    if {"-h", "--help"} & {*arguments}:
        flow(command)
    text = description(command)

    def parse(arguments: list[str], **default):
        return tyro.cli(command, prog=f"deepseek-jax {name}", description=text, args=arguments, **default)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            # A command may take its defaults from its arguments.
            default = {"default": command.defaults(arguments, parse)} if hasattr(command, "defaults") else {}
            return parse(arguments, **default)
    except SystemExit as stop:
        if stop.code in (0, None):
            return 0
        return _fail(name, f"{_one_line(complaint.getvalue())} See deepseek-jax {name} --help.", 2)


def _one_line(box: str) -> str:
    """What a parser complains of, of its framed complaint, and the options that it takes for meant.

    A rule parts the message from hints; where the output takes ASCII only, the title from the message as well.
    """
    import re

    blocks: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        text = line.strip("│╭╮╰╯ ").strip()
        if text and set(text) <= {"─", "-"}:
            blocks.append([])
        elif text and "──" not in text:
            blocks[-1].append(text)
    message, *others = blocks if "│" in box else blocks[1:] or blocks
    hints = [line for block in others for line in block]
    text = " ".join(message)
    text = text if text.endswith((".", "!", "?")) else f"{text}."
    if any(line.startswith("Perhaps you meant") for line in hints):
        text += f" Perhaps you meant {' or '.join(line.split()[0] for line in hints if line.startswith('--'))}?"
    return text


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)"


def _fail(name: str, message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"{f'deepseek-jax {name}'.strip()}: {message}", file=sys.stderr)
    return code


def _help() -> str:
    import shutil
    import textwrap

    width = max(40, min(shutil.get_terminal_size().columns, 110))
    column = 2 + max(map(len, COMMANDS)) + 2

    def fill(text: str, label: str = "", indent: int = 0) -> str:
        return textwrap.fill(
            text,
            width,
            initial_indent=label.ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )

    return "\n".join(
        [
            "usage: deepseek-jax COMMAND [ARGUMENTS]",
            "",
            fill(
                "DeepSeek models in JAX, from the dense ones to V4: load, convert, verify, train, serve and run them."
            ),
            "",
            *(fill(text, f"  {name}", column) for name, (_, text) in COMMANDS.items()),
            "",
            fill("deepseek-jax COMMAND --help lists a command's arguments, with units and defaults."),
            fill(
                "Compiled programs are kept in ~/.cache/deepseek-jax, so that a command starts sooner the next time; "
                "--no-compilation-cache keeps none."
            ),
            fill("deepseek-jax --version prints the version."),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
