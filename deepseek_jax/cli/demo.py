"""``deepseek-jax demo``: the tour on the checkpoint that comes with the package."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from deepseek_jax.cli.files import check_destination, write_json
from deepseek_jax.cli.programs import keep_programs

if TYPE_CHECKING:
    from deepseek_jax.model.transformer import Transformer
    from deepseek_jax.text.tokenizer import Tokenizer

# DESIGN's bound for float32 parity: the largest logit difference, relative to the largest logit.
BOUND = 2e-5
ROUTED_TOKENS = 24


@dataclass(frozen=True)
class Demo:
    """Load the shipped checkpoint, check it against stored reference logits, let it write, show its routing; let a
    small Janus draw and read.

    Everything is on disk already; nothing is downloaded.
    """

    prompt: str = "def read_lines(path, encoding):\n    "
    """Text to continue."""
    max_new_tokens: int = 96
    """Tokens to generate."""
    picture: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None
    """Also draw the routing of the text into this image."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write the figures to this file; "-" is the standard output."""
    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/deepseek-jax, or where XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR say, and
    find them there; at most 2 GB."""

    def run(self) -> int:
        check_destination(self.json)
        check_destination(self.picture, "--picture")
        if self.picture is not None and self.picture.suffix.lower() != ".png":
            raise ValueError(f"--picture {self.picture}: the picture is a PNG image; give a name that ends in .png.")

        from rich.rule import Rule

        import deepseek_jax as dsj
        from deepseek_jax.cli.tables import Output, show

        keep_programs(self.compilation_cache)
        console = Output(highlight=False)
        folder = shipped_checkpoint()

        console.print(Rule("1. The checkpoint", align="left"))
        began = time.perf_counter()
        model, text = dsj.load_pretrained(folder, dtype="float32"), dsj.load_tokenizer(folder)
        console.print(describe(folder, model), soft_wrap=True)
        console.print(f"loaded in {time.perf_counter() - began:.1f} s")

        console.print(Rule("2. Against PyTorch transformers", align="left"))
        checked = check_reference(folder, model)
        console.print(checked["text"], soft_wrap=True)

        console.print(Rule("3. Generation, plain and with MTP drafts", align="left"))
        prompt = text.encode(self.prompt)
        written = {name: write(model, prompt, self.max_new_tokens, name == "mtp") for name in ("plain", "mtp")}
        console.print(self.prompt + text.decode(written["plain"]["tokens"][0]), markup=False)
        console.print()
        for name, label in (("plain", "plain"), ("mtp", "MTP drafts")):
            console.print(f"{label + ':':12}{written[name]['text']}", soft_wrap=True)
        same = written["plain"]["tokens"] == written["mtp"]["tokens"]
        console.print("the same tokens both ways" if same else "[red]the two texts differ[/red]")

        console.print(Rule("4. Where the tokens went", align="left"))
        ids = (prompt + written["plain"]["tokens"][0])[: len(prompt) + ROUTED_TOKENS]
        index_LTK = routing(model, ids)
        show(console, routing_table(text, ids[-ROUTED_TOKENS:], index_LTK[:, -ROUTED_TOKENS:]))
        if self.picture is not None:
            from deepseek_jax.analysis.plots import routing_picture

            pieces = [piece(text, i) for i in ids]
            routing_picture(pieces, index_LTK, model.cfg.moe.n_experts, self.picture)
            console.print(f"drawn: {self.picture}", soft_wrap=True)

        from deepseek_jax.cli.demo_janus import draw_and_read

        drawn = draw_and_read(shipped_janus())
        console.print(Rule("5. A picture, drawn and read by a small Janus", align="left"))
        console.print(f"asked for: {drawn['asked']}\n{drawn['picture']}\nseen in it: {drawn['said']}", markup=False)
        if self.json is not None:
            write_json(self.json, {"reference": checked, "generation": written, "same": same, "picture": drawn})
        if not checked["ok"] or not same:
            console.print("[red]The demo failed: see above.[/red]")
            return 1
        return 0


def shipped_checkpoint() -> Path:
    """The folder of the checkpoint that comes with the package. Raises FileNotFoundError where it does not."""
    return _shipped("tiny-v3", "checkpoints/tiny-v3")


def shipped_janus() -> Path:
    """The Janus that draws shapes; as above."""
    return _shipped("janus-shapes", "experiments/janus_shapes/checkpoint")


def _shipped(name: str, checkout: str) -> Path:
    """Inside a wheel, or beside the package in an editable checkout."""
    package = Path(__file__).resolve().parent.parent
    places = (package / "shipped" / name, package.parent / checkout)
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(
        f"the shipped checkpoint is missing: neither {places[0]} nor {places[1]} has a config.json; install the "
        "package again."
    )


def describe(folder: Path, model: "Transformer") -> str:
    """What the checkpoint is, how large, and how it was made."""
    from deepseek_jax.analysis.counts import counts

    cfg, figures = model.cfg, counts(model.cfg)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    lines = [
        f"{folder}",
        f"{cfg.n_layers} layers ({cfg.n_dense_layers} dense), {cfg.moe.n_experts} experts, {cfg.moe.top_k} a token, "
        f"{cfg.mtp_depth} MTP module",
        f"{figures.total:,} parameters, {figures.activated:,} activated a token, {size / 1e6:.1f} MB of weights",
    ]
    training = folder / "training"
    if training.is_dir():
        data = json.loads((training / "run.json").read_text(encoding="utf-8"))["data"]
        result = json.loads((training / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        text = " and the ".join(source["source"] for source in data["sources"].values())
        lines.append(
            f"trained on the {text} for {result['steps']} steps, {result['minutes']:.0f} minutes: "
            f"{result['stored_bits']:.3f} bits per byte of held-out files (trigram {result['trigram_bits']:.3f})"
        )
    else:
        lines.append("its weights are random: no training lies beside them")
    return "\n".join(lines)


def check_reference(folder: Path, model: "Transformer") -> dict:
    """Compares logits, MTP logits and routed experts with those stored beside the checkpoint.

    Raises ValueError when the stored reference belongs to other files.
    """
    import hashlib

    import jax
    import numpy as np

    from deepseek_jax.convert.safetensors import read_header

    described = json.loads((folder / "reference" / "reference.json").read_text(encoding="utf-8"))
    for name, digest in described["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{folder / name} is not the file that the stored reference logits were computed from.")
    stored = {n: e.read() for n, e in read_header(folder / "reference" / "reference.safetensors")[0].items()}
    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda model, tokens: model(tokens, with_mtp=True))(model, stored["tokens"].astype(np.int32))
    errors = {}
    for name, ours in (("logits", out.logits), ("mtp_logits", out.mtp_logits[0])):
        reference, ours = stored[name], np.asarray(ours)[:, : stored[name].shape[1]]
        errors[name] = float(np.abs(ours - reference).max() / np.abs(reference).max())
    routed = np.sort(np.asarray(out.aux.expert_index), axis=-1)
    agree = float((routed == np.sort(stored["expert_index"], axis=-1)).all(-1).mean())
    ok = max(errors.values()) <= BOUND and agree == 1.0
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    text = "\n".join(
        [
            f"stored by {described['script']} with {versions}",
            f"logits: largest difference {errors['logits']:.1e} of the largest logit (bound {BOUND:.0e})",
            f"MTP logits: {errors['mtp_logits']:.1e}",
            f"routed experts: {agree:.2%} of {routed.shape[0]} layers x {routed[0, ..., 0].size} tokens identical",
            "[green]equal[/green]" if ok else "[red]not equal[/red]",
        ]
    )
    return {"ok": ok, "errors": errors, "routing_agreement": agree, "bound": BOUND, "text": text}


def write(model: "Transformer", prompt: list[int], count: int, use_mtp: bool) -> dict:
    """Greedy tokens, their number a second (compilation apart) and the drafts' acceptance."""
    import jax

    import deepseek_jax as dsj

    def generate():
        return dsj.generate(model, [prompt], max_new_tokens=count, use_mtp=use_mtp)

    # With and without drafts the products have other shapes. At a GPU's default precision they would differ by
    # enough to turn a near-tie.
    with jax.default_matmul_precision("highest"):
        generate()
        began = time.perf_counter()
        tokens, info = generate()
        seconds = time.perf_counter() - began
    text = f"{len(tokens[0])} tokens, {len(tokens[0]) / seconds:.0f} a second"
    if use_mtp:
        share = info.accepted[0] / max(info.drafted[0], 1)
        text += f", {info.accepted[0]} of {info.drafted[0]} drafts accepted ({share:.0%})"
    return {"tokens": tokens, "seconds": seconds, "drafted": info.drafted, "accepted": info.accepted, "text": text}


def routing(model: "Transformer", ids: list[int]):
    """int32 [L, T, K]: the experts of every token, sorted."""
    import jax
    import numpy as np

    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda model, tokens: model(tokens, logits="none"))(model, np.asarray([ids], np.int32))
    return np.sort(np.asarray(out.aux.expert_index)[:, 0], axis=-1)


def routing_table(text: "Tokenizer", ids: list[int], index_LTK):
    """A row a token, a column a MoE layer."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), title="experts by MoE layer", title_justify="left")
    table.add_column("token", no_wrap=True)
    for layer in range(index_LTK.shape[0]):
        table.add_column(f"layer {layer}", no_wrap=True)
    for place, i in enumerate(ids):
        table.add_row(escape(piece(text, i)), *(" ".join(map(str, row[place])) for row in index_LTK))
    return table


def piece(text: "Tokenizer", i: int) -> str:
    """One token's text with its spaces and line ends visible."""
    shown = {" ": "·", "\n": "⏎", "\t": "⇥", "｜": "|", "▁": "_"}
    return "".join(shown.get(c, c) for c in text.decode([i]))
