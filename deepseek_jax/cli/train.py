"""``deepseek-jax train``: by a paper's recipe, from scratch or from a checkpoint; fine-tuning on chats."""

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.architecture import changed_fields, default_config
from deepseek_jax.cli.devices import Devices
from deepseek_jax.cli.files import check_destination, free_folder, write_json
from deepseek_jax.cli.given import count, given
from deepseek_jax.cli.interrupts import EXIT_CODES, remarks
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.data.config import DataConfig
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.run_folder import extended, read_run
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.recipes import RECIPES, recipe
from deepseek_jax.train.scaling import scaled
from deepseek_jax.train.tuning import FINE_TUNING, LoRA, fine_tuning

# Said after the first Ctrl-C or SIGTERM that has something to keep, and after one that ends the process.
HELD = "stopping after the step under way; Ctrl-C again stops at once."
GO_ON = "deepseek-jax train {} --resume goes on"
# Options that scale the recipe, and the arguments of `scaled` that they are.
SCALES = {"--tokens": "tokens", "--batch-rows": "batch_rows", "--length": "length"}


@dataclass(frozen=True)
class Train:
    """Train a model by a recipe and export it in the published layout.

    The recipe's numbers are the options below, shown with the values of the one that --recipe names. --tokens,
    --batch-rows and --length scale the whole recipe to that budget: its schedules keep their shares of the run, other
    options then have the last word.

    The text is the source of the running Python's standard library, without its tests, unless --data names other text.
    A tokenizer is trained on it, unless --tokenizer names one. Held-out files are measured in bits per byte beside a
    Kneser-Ney trigram counted on the same tokens (not with --from: the model has seen other text before).

    With --from, a checkpoint is trained further: on text, or with --sft on chats, of which the assistant's tokens are
    learned. --train names the parts to train, --lora.rank trains adapters beside weights that stay as they are stored.
    What is exported has the checkpoint's own dtypes.

    Ctrl-C saves, measures and exports (exit code 130), a second one, or one before the first step, stops at once;
    SIGTERM saves and ends (143). After either, or a crash, `deepseek-jax train OUT --resume` goes on from the newest
    whole checkpoint and ends bit-equal to a run that never stopped. A run stops with an error after --max-skipped steps
    in a row that are not finite.

    With --mesh the model lies on several devices. Started once on each host (srun, or with --coordinator), the
    processes train together: each reads its share of the text, the first one reports and writes, OUT is a folder that
    all of them see. A run may be resumed on another mesh and by another number of processes.
    """

    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """Folder for the run: run.json, train.log, metrics.jsonl, tokenizer/, tokens/, checkpoints/, checkpoint/. Unless
    --resume is given it must not exist, or be empty; by default the first free one of runs/MODEL-1, runs/MODEL-2..."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in OUT. Its own options are the defaults then; one that would change what is trained is an
    error, but for more --tokens or --epochs: they extend the run. Its schedules stay where they were in tokens, so that
    the rate stays at its last value (after a cosine; for a new schedule begin a run with --from)."""
    recipe_name: Annotated[str, tyro.conf.arg(name="recipe", metavar="NAME")] = "tiny"
    """Recipe: tiny, deepseek-v3, deepseek-v2, deepseek-v2-lite, deepseek-moe-2b, deepseek-moe-16b, deepseek-moe-145b,
    loss-free-1b, loss-free-3b, deepseek-v4-flash or deepseek-v4-pro; for fine-tuning sft-tiny (the default of --sft),
    sft-deepseek-v3, sft-deepseek-v2, sft-deepseek-r1 or sft-lora."""
    source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="CKPT")] = None
    """Continue from the weights of this checkpoint, with its architecture and tokenizer, instead of --model's."""
    sft: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Chats to learn from instead of text: JSON lines of {"messages": [{"role": ..., "content": ...}, ...]}, rendered
    by the checkpoint's own template. A share of --held-out-share is measured."""
    epochs: float | None = None
    """Passes over the chats; by default the recipe's, or as many as --tokens are."""
    too_long: Literal["cut", "drop"] = "cut"
    """What becomes of a chat longer than a row: its beginning is kept, or it is left out. Both are counted."""
    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """Train these parts of --from only, by patterns of parameter paths: 'stacks.*.ffn.router.*', 'layers.58-60.*',
    head, 'mtp.*'. All else stays bit-equal. A router bias that a pattern matches is moved by the load balance at
    --bias-speed, any other stays."""
    lora: LoRA = field(default_factory=lambda: LoRA(rank=0))
    """Adapters."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder with a tokenizer.json to use."""
    vocab_size: int = 2048
    """Tokens of the tokenizer that is trained."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: recipe("tiny"))
    """What the run does."""
    cfg: Annotated[ModelConfig | None, tyro.conf.AvoidSubcommands] = None
    """The architecture: --model's or that of --from, in which any field may be another. With --from the weights that
    fit are kept, and what is new is drawn from --seed."""
    text: Annotated[DataConfig, tyro.conf.arg(name=""), tyro.conf.SuppressFixed] = field(default_factory=DataConfig)
    """What it reads."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    """How it is kept."""
    devices: Annotated[Devices, tyro.conf.arg(name="")] = field(default_factory=Devices)
    """Where it runs."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write the result to this file; "-" is the standard output."""
    arguments: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """What was given, for run.json."""

    @classmethod
    def defaults(cls, arguments: list[str], parse: Callable) -> "Train":
        """What the options default to, given those that are there: a recipe's numbers, or a resumed run's options.

        ``parse``: makes a command of arguments and defaults.
        """
        if given(arguments, "--from") is not None:
            _refuse_others_with_from(arguments)
        default = cls._from_recipe(arguments)
        if "--resume" not in arguments:
            return default
        out = parse(arguments, default=default).out
        if out is None or not (out / "run.json").is_file():
            return default
        run = read_run(out)
        begun = run.get("arguments")
        if begun is None:
            return default
        was = parse(begun, default=cls._from_recipe(begun))
        if was.source is not None:
            _refuse_others_with_from(arguments)
        tokens, epochs = extended(run, "recipe.tokens"), extended(run, "epochs")
        if tokens is not None:
            was = replace(was, recipe=replace(was.recipe, tokens=tokens))
        if epochs is not None:
            was = replace(was, epochs=epochs)
        # The processes are this command's own.
        devices = Devices(mesh=was.devices.mesh, layout=was.devices.layout, set=was.devices.set)
        was = replace(was, out=None, devices=devices)
        if given(arguments, "--recipe") not in (None, was.recipe_name):
            raise ValueError(
                f"{out} was begun with the recipe {was.recipe_name}, not {default.recipe_name}: resume it as it was "
                "begun, or choose another folder."
            )
        return was

    @classmethod
    def _from_recipe(cls, arguments: list[str]) -> "Train":
        """The recipe that is named, scaled, and the config that is."""
        found = cls._scaled(arguments)
        model = given(arguments, "--from") or given(arguments, "--model") or found.recipe.model
        return replace(found, cfg=default_config(model, arguments))

    @classmethod
    def _scaled(cls, arguments: list[str]) -> "Train":
        name = given(arguments, "--recipe") or ("tiny" if given(arguments, "--sft") is None else "sft-tiny")
        scale = {word: given(arguments, option) for option, word in SCALES.items()}
        # What is no count is left to the parser's and the recipe's own complaints.
        scale = {word: n for word, text in scale.items() if (n := count(text)) is not None}
        if name not in RECIPES and name not in FINE_TUNING:
            raise ValueError(f"there is no recipe {name!r}; choose one of {', '.join([*RECIPES, *FINE_TUNING])}.")
        if name in FINE_TUNING:
            found = fine_tuning(name).sized(**scale)
            lora = LoRA() if name == "sft-lora" else LoRA(rank=0)
            return cls(
                recipe_name=name, recipe=found.recipe, epochs=found.epochs, lora=lora, arguments=tuple(arguments)
            )
        numbers = recipe(name)
        numbers = scaled(numbers, **{"tokens": numbers.tokens, **scale}) if scale else numbers
        return cls(recipe_name=name, recipe=numbers, arguments=tuple(arguments))

    def run(self) -> int:
        began = time.monotonic()
        ctx = self.devices.context()

        from deepseek_jax.cli.tables import Output
        from deepseek_jax.parallel.processes import from_first, is_first
        from deepseek_jax.runs.live import LiveView
        from deepseek_jax.runs.pretrain import train

        check_destination(self.json)
        if self.resume and self.out is None:
            raise ValueError("--resume needs the folder of the run: deepseek-jax train OUT --resume.")
        tuned = bool(self.sft is not None or self.train or self.lora.rank)
        self._check(tuned)
        base = self._architecture()
        cfg = self._ablated(base)
        out = self.out
        if out is None:
            stem = Path(self.recipe.model).name
            out = Path(from_first(lambda: str(free_folder(Path("runs"), stem)), "choosing a folder"))
        how = {
            "options": self.options,
            "resume": self.resume,
            "ctx": ctx,
            "began": began,
            "command": shlex.join(["deepseek-jax", "train", *self.arguments]),
            "arguments": list(self.arguments),
        }
        if is_first():
            remarks(HELD, lambda: f"{GO_ON.format(shlex.quote(str(out)))}." if (out / "run.json").is_file() else "")
        view = LiveView(self.recipe.tokens, cfg.name, Output(highlight=False), began=began) if is_first() else None
        try:
            if tuned:
                result = self._fine_tune(out, view, how, cfg)
            else:
                tokenizer = self.tokenizer or self.source or self.vocab_size
                result = train(cfg, self.recipe, self.text, tokenizer, out, source=self.source, view=view, **how)
        finally:
            if view is not None:
                view.close()
        if is_first():
            print(f"{out}: {_told(result)}")
        if self.json is not None and is_first():
            write_json(self.json, {**asdict(result), "checkpoint": result.checkpoint and str(result.checkpoint)})
        return EXIT_CODES[result.interrupted]

    def _architecture(self):
        from deepseek_jax.cli.summary import find_config
        from deepseek_jax.configs.schema import ConfigError
        from deepseek_jax.convert.config_file import read_config
        from deepseek_jax.convert.folders import why_no_checkpoint

        if self.source is not None:
            if (why := why_no_checkpoint(self.source)) is not None:
                raise ValueError(f"--from {why}")
            return read_config(self.source)
        try:
            return find_config(self.recipe.model)
        except ConfigError as error:
            if self.recipe_name in RECIPES and self.recipe.model == recipe(self.recipe_name).model:
                raise ValueError(f"{error} --model takes the recipe {self.recipe_name} to another one.") from None
            raise

    def _ablated(self, base: ModelConfig) -> ModelConfig:
        """``base`` with what the --cfg options change."""
        from deepseek_jax.cli.summary import find_config

        changes = changed_fields(self.cfg, find_config(str(self.source or self.recipe.model)))
        if "vocab_size" in changes and self.source is None:
            raise ValueError(
                "--cfg.vocab-size: a model has its tokenizer's vocabulary, which --vocab-size or --tokenizer chooses."
            )
        if "init_std" in changes and self.source is None:
            raise ValueError("--cfg.init-std: fresh weights have the recipe's deviation; give --init-std.")
        return replace(base, **changes)

    def _check(self, tuned: bool) -> None:
        if not self.lora.rank and self.lora != LoRA(rank=0):
            raise ValueError("--lora options without adapters: give these a rank above 0 with --lora.rank.")
        if self.source is None and self.recipe_name in FINE_TUNING and not tuned:
            raise ValueError(f"the recipe {self.recipe_name} trains a checkpoint further: name it with --from.")
        if self.source is None and tuned:
            raise ValueError("--sft, --train and --lora.rank train a checkpoint further: name it with --from.")
        if self.epochs is not None and self.sft is None:
            raise ValueError("epochs count passes over chats (--sft); the length of a run on text is --tokens.")

    def _fine_tune(self, out: Path, view, how: dict, cfg: ModelConfig):
        from deepseek_jax.data.chat_rows import ChatConfig
        from deepseek_jax.runs.finetune import fine_tune

        text = self.text
        return fine_tune(
            self.source,
            self.recipe,
            text if self.sft is None else self.sft,
            out,
            cfg=cfg,
            epochs=self.epochs,
            chats=ChatConfig(self.too_long, text.held_out_share, text.damaged_share, text.workers),
            patterns=self.train,
            lora=self.lora,
            view=view,
            planned=lambda recipe: None if view is None else view.expect(recipe.tokens),
            **how,
        )


def _told(result) -> str:
    steps = f"{result.steps} steps in {result.minutes:.1f} minutes"
    if result.checkpoint is None:
        return f"{steps}; saved, to go on with --resume."
    told = f"{steps}, held-out bits per byte {result.model_bits:.4f}"
    if result.trigram_bits is None:
        return f"{told}."
    passed = "never did" if result.crossed_at is None else f"did after {result.crossed_at:.1f} minutes"
    return f"{told}, trigram {result.trigram_bits:.4f}; the model was to pass it and {passed}."


def _refuse_others_with_from(arguments: list[str]) -> None:
    """A checkpoint has its architecture and tokenizer: what names others would be passed over."""
    for option in ("--model", "--tokenizer", "--vocab-size"):
        if given(arguments, option) is not None:
            raise ValueError(
                f"{option} does not go with --from: a checkpoint is trained further with its own tokenizer and "
                f"architecture. Leave {option} out, or --from to begin anew."
            )
