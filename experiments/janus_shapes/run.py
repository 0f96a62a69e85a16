"""Does guidance make drawn pictures truer to their text, and are two encoders better than one? On pictures of shapes.

Janus-Pro 2501.17811 and Janus 2410.13848; the claims stand in paper_notes/janus_shapes.md. Pictures are 32 x 32, one to
three shapes of one form and colour around a corner (`shapes.py`), with captions such as "two red circles at the top
left". A reader that knows no model says what a picture shows; it is right on 99.8% of true pictures' attributes.

C1: drawn with w = 5, pictures have more of their text's attributes than with w = 1.
C2: with an encoder for shown pictures beside the code for drawn ones, captions have no fewer right attributes than
    where shown pictures are the code as well.
C3: nor have drawn pictures.

Rules: C1 is `lab.rules.Ordering` over the seeds of the variant with two encoders; C2 and C3 are `lab.rules.NoWorse`
on the share that is wrong, with a margin of a quarter of the other variant's. Variants differ in what stands in the
places of shown pictures alone: "two", the vision tower's features through their aligner; "one", the codes' embeddings
through theirs. Same pictures, order, steps, initial values and VQ. What differs from the paper: the tower is not
trained before, so that everything but the VQ learns from the first step on (stage III's mask); the VQ is our own, of
squared errors alone.

A pilot of 260 and 400 steps gave, with two encoders, captions with 91% of the attributes right and pictures with 57%
at w = 1 and 43% at w = 5: the papers' weight may be too strong for so small a model, so w = 2 is told as well, of which
no rule speaks.

    python experiments/janus_shapes/run.py             # a VQ (6 minutes of a core), then 6 runs of about 15: 3 seeds of
                                                       # 2 variants; goes on if stopped
    python experiments/janus_shapes/run.py --seeds 1   # a seed of both
    python experiments/janus_shapes/run.py --smoke --out F

    python experiments/janus_shapes/run.py --sheet     # draws pictures.png anew, with the model of checkpoint/

Each run is written to runs/VARIANT-SEED.json; results.json is made of these files. The first run of "two" leaves its
model in checkpoint/ and pictures that it drew in pictures.png: of eight captions at w = 1, 2 and 5, a row each.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from shapes import ATTRIBUTES, SIDE, WORDS, Scene, drawn_set, matches

import deepseek_jax as dsj
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.configs.multimodal import VQ, JanusConfig, Vision
from deepseek_jax.configs.schema import GQA, ModelConfig
from deepseek_jax.lab.rules import NoWorse, Ordering
from deepseek_jax.multimodal.checkpoint import load_pretrained, save_pretrained
from deepseek_jax.multimodal.draw import draw_pictures
from deepseek_jax.multimodal.janus import init
from deepseek_jax.multimodal.objective import Pictures, begin, picture_nats, step, vq_loss
from deepseek_jax.multimodal.pictures import write_png
from deepseek_jax.multimodal.prompts import ASSISTANT, BEGIN, END, PAD, PLACEHOLDER, SYSTEM, USER, PromptWriter
from deepseek_jax.multimodal.stages import STAGES
from deepseek_jax.text.bpe import BOS, EOS, save_tokenizer
from deepseek_jax.version import __version__

HERE = Path(__file__).parent
SEEDS, VARIANTS = (0, 1, 2), ("two", "one")
WEIGHTS = (1.0, 2.0, 5.0)  # of guidance
UNKNOWN = "<unknown>"
QUESTION = "what is it ?"


@dataclass(frozen=True)
class Budget:
    """``rows``: of each kind a step. ``shown``: held-out pictures described, and drawn at each weight."""

    vq_steps: int = 1000
    vq_rows: int = 16
    steps: int = 1500
    rows: int = 16
    rate: float = 1e-3
    warmup: int = 50
    pictures: int = 2880
    held_out: int = 144


SMOKE = Budget(vq_steps=2, vq_rows=2, steps=2, rows=2, pictures=8, held_out=4)


def tokenizer() -> tokenizers.Tokenizer:
    """Words. The system prompt, of which no word is known, is left out."""
    special = [BOS, EOS, PAD, UNKNOWN, BEGIN, END, PLACEHOLDER, USER, ASSISTANT]
    words = [*special, ":", *QUESTION.split(), *WORDS]
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNKNOWN))
    found.normalizer = tokenizers.normalizers.Replace(f"{SYSTEM}\n\n", "")
    found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    # Between two words a space: no word begins with "##".
    found.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    found.add_special_tokens(special)
    return found


def config(vocab_size: int, image_id: int) -> JanusConfig:
    """2.1 million parameters."""
    language = ModelConfig(
        name="janus-shapes",
        vocab_size=vocab_size,
        dim=128,
        n_layers=4,
        n_dense_layers=4,
        ffn_dim=352,
        attention=GQA(4, 4, 32),
        moe=None,
        max_length=256,
        init_std=0.02,
        model_type="llama",
        bos_id=0,
        eos_ids=(1,),
    )
    vision = Vision(image_size=SIDE, patch=4, dim=96, n_layers=3, n_heads=4, ffn_dim=384)
    vq = VQ(n_codes=128, code_dim=8, z_dim=32, channels=32, multipliers=(1, 1, 2), n_blocks=1)
    return JanusConfig("janus-shapes", language, vision, vq, head_dim=128, image_id=image_id, model_type="janus")


# --- The code ---------------------------------------------------------------------------------------------------------


def train_vq(model, budget: Budget, seed: int = 0):
    """A VQ on pictures; codes that nothing is near are put where pictures are, now and then in the first half."""
    stage = replace(STAGES["janus-pro-3"], trained=("*",))
    _, images = drawn_set(budget.pictures, seed=100 + seed)
    rng, training = np.random.default_rng(seed), begin(jax.tree.map(jnp.array, model.vq), stage)
    look = jax.jit(lambda vq, x: (vq.vectors(x), vq.encode(x)))
    for i in range(budget.vq_steps):
        batch = images[rng.integers(0, len(images), budget.vq_rows)]
        if i % 25 == 5 and i < budget.vq_steps // 2:
            training = begin(_revived(training.model, look, images, rng), stage)
        rate = 2e-3 * min(1, (i + 1) / 20) * (1 if i < 0.7 * budget.vq_steps else 0.3)
        training, value = step(training, batch, np.float32(rate), stage=stage, objective=vq_loss)
        if i % 50 == 0:
            print(f"VQ step {i}: {float(value):.4f}", flush=True)
    return training.model


def _revived(vq, look, images, rng):
    some = images[rng.integers(0, len(images), 128)]
    z, codes = look(vq, some)
    table, used = np.array(vq.codebook.get_value()), np.unique(codes)
    idle = np.setdiff1d(np.arange(len(table)), used)
    pool = np.asarray(z).reshape(-1, table.shape[1])
    table[idle] = pool[rng.integers(0, len(pool), len(idle))]
    vq.codebook = vq.codebook.replace(jnp.asarray(table))
    return vq


# --- Rows -------------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Captions:
    """Rows about pictures, as `objective.Text`; ``codes``: the pictures' own, for the variant with one encoder."""

    tokens: jax.Array
    weight: jax.Array
    images: jax.Array
    codes: jax.Array


def embedded(model, tokens, images, codes, variant: str):
    """[B, T, D], with the variant's features in the places of pictures."""
    if variant == "two":
        return model.embed(tokens, images)
    x, features = model.embed_text(tokens), model.embed_codes(codes)
    at = tokens == model.cfg.image_id
    place = jnp.maximum(jnp.cumsum(at, axis=1) - 1, 0)
    return jnp.where(at[..., None], jnp.take_along_axis(features, place[..., None], axis=1), x)


def both(model, batch, variant: str):
    """The mean over captions' tokens and pictures' codes."""
    captions, pictures = batch
    x = embedded(model, captions.tokens, captions.images, captions.codes, variant)
    logits = model.language(captions.tokens, embeddings=x).logits[:, :-1]
    nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, captions.tokens[:, 1:, None], -1)[..., 0]
    words, count = (nats * captions.weight[:, 1:]).sum(), captions.weight[:, 1:].sum()
    codes, number = picture_nats(model, pictures)
    return (words + codes) / (count + number)


OBJECTIVES = {variant: partial(both, variant=variant) for variant in VARIANTS}


class Rows:
    """Prompts and answers of scenes, padded to one length."""

    def __init__(self, words, cfg: JanusConfig):
        self.words, self.cfg = words, cfg
        self.writer = PromptWriter(words, cfg)
        self.question = self.writer.about_pictures(QUESTION, 1)
        self.answer = max(len(s.caption.split()) for s in drawn_set(144, 0)[0]) + 1
        self.longest = max(len(self.writer.to_draw(s.caption)) for s in drawn_set(144, 0)[0])

    def captions(self, scenes, images, codes) -> Captions:
        tokens, start = np.full((len(scenes), len(self.question) + self.answer), 2, np.int32), len(self.question)
        weight = np.zeros(tokens.shape, np.float32)
        for row, scene in enumerate(scenes):
            answer = [*self.words.encode(scene.caption, add_bos=False), 1]
            tokens[row, :start], tokens[row, start : start + len(answer)] = self.question, answer
            weight[row, start : start + len(answer)] = 1
        return Captions(tokens, weight, images, codes)

    def pictures(self, scenes, codes, rng) -> Pictures:
        """A tenth of the prompts without their words."""
        tokens, segments = (
            np.full((len(scenes), self.longest), 2, np.int32),
            np.zeros((len(scenes), self.longest), np.int32),
        )
        for row, scene in enumerate(scenes):
            prompt = self.writer.to_draw(scene.caption)
            if rng.random() < 0.1:
                prompt[1:-1] = [self.writer.pad_id] * (len(prompt) - 2)
            tokens[row, -len(prompt) :], segments[row, -len(prompt) :] = prompt, 1
        return Pictures(tokens, segments, codes)


def train(variant: str, seed: int, vq, words, cfg: JanusConfig, budget: Budget):
    """The model, and its loss every 50 steps."""
    stage, rows, rng = STAGES["janus-pro-3"], Rows(words, cfg), np.random.default_rng(seed)
    model = init(cfg, jax.random.key(seed))
    model.vq = jax.tree.map(jnp.array, vq)
    scenes, images = drawn_set(budget.pictures, seed=1000 + seed)
    encode = jax.jit(lambda vq, x: vq.encode(x))
    codes = np.concatenate([np.asarray(encode(vq, part)) for part in np.split(images, max(1, len(images) // 72))])
    training, told = begin(model, stage), []
    for i in range(budget.steps):
        shown, drawn = rng.integers(0, len(images), (2, budget.rows))
        batch = (
            rows.captions([scenes[j] for j in shown], images[shown], codes[shown]),
            rows.pictures([scenes[j] for j in drawn], codes[drawn], rng),
        )
        rate = budget.rate * min(1, (i + 1) / budget.warmup) * (1 - 0.9 * i / budget.steps)
        training, value = step(training, batch, np.float32(rate), stage=stage, objective=OBJECTIVES[variant])
        if i % 50 == 0:
            told.append(round(float(value), 4))
            print(f"{variant}-{seed} step {i}: {told[-1]}", flush=True)
    return training.model, told


# --- Figures ----------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("variant", "new"))
def described(model, tokens, images, codes, variant: str, new: int):
    """int32 [B, new]: the likeliest words after the question, all rows alike long."""
    x, T = embedded(model, tokens, images, codes, variant), tokens.shape[1]
    out = model.language(tokens, cache=model.init_cache(len(tokens), T + new), logits="last", embeddings=x)

    def word(carry, _):
        cache, logits = carry
        token = jnp.argmax(logits[:, -1], -1)[:, None]
        out = model.language(token, cache=cache)
        return (out.cache, out.logits), token[:, 0]

    return jax.lax.scan(word, (out.cache, out.logits), None, length=new)[1].T


def caption_scores(texts: list[str], scenes: list[Scene]) -> dict[str, float]:
    """The share of captions that say each attribute right, "all" of them, and the "mean"."""
    right = np.zeros((len(texts), len(ATTRIBUTES)), bool)
    for row, (text, scene) in enumerate(zip(texts, scenes, strict=True)):
        said = text.split()
        place = " ".join(said[-2:])
        found = {
            "count": said[:1],
            "colour": said[1:2],
            "form": [w.removesuffix("s") for w in said[2:3]],
            "place": [place],
        }
        right[row] = [found[name] == [getattr(scene, name)] for name in ATTRIBUTES]
    shares = dict(zip(ATTRIBUTES, right.mean(0).tolist(), strict=True))
    return shares | {"all": float(right.all(1).mean()), "mean": float(right.mean())}


def measure(model, variant: str, seed: int, words, budget: Budget) -> dict:
    """The figures on held-out pictures."""
    rows = Rows(words, model.cfg)
    scenes, images = drawn_set(budget.held_out, seed=10**6 + seed)
    codes = np.asarray(jax.jit(lambda vq, x: vq.encode(x))(model.vq, images))
    tokens = np.tile(np.asarray(rows.question, np.int32), (len(scenes), 1))
    answers = np.asarray(described(model, tokens, images, codes, variant, rows.answer))
    texts = [" ".join(words.backend.id_to_token(int(i)) for i in row[: [*row, 1].index(1)]) for row in answers]
    decode = jax.jit(lambda vq, c: vq.decode(c))
    decoded = np.concatenate([np.asarray(decode(model.vq, codes[i : i + 1])) for i in range(len(codes))])
    found = {"captions": caption_scores(texts, scenes), "reader_on_decoded": matches(decoded, scenes)}
    prompts = [rows.writer.to_draw(scene.caption) for scene in scenes]
    for weight in WEIGHTS:
        drawn = draw_pictures(model, prompts, rows.writer.pad_id, weight=weight, seed=seed)
        found[f"drawn_w{weight:g}"] = matches(drawn.images / 127.5 - 1, scenes)
    return found


def run(variant: str, seed: int, vq, words, cfg: JanusConfig, budget: Budget) -> tuple[dict, object]:
    began = time.monotonic()
    model, told = train(variant, seed, vq, words, cfg, budget)
    found = measure(model, variant, seed, words, budget)
    minutes = round((time.monotonic() - began) / 60, 1)
    return {"variant": variant, "seed": seed, "minutes": minutes, "loss": told, **found, **provenance()}, model


def verdicts(runs: list[dict]) -> dict:
    """The rules of this file's docstring on the seeds that are there for both variants."""
    by = {(r["variant"], r["seed"]): r for r in runs}
    seeds = [s for s in SEEDS if all((variant, s) in by for variant in VARIANTS)]

    def values(name: str) -> dict[str, np.ndarray]:
        return {v: np.array([by[v, s][name]["mean"] for s in seeds]) for v in VARIANTS}

    weights = {w: np.array([by["two", s][f"drawn_{w}"]["mean"] for s in seeds]) for w in ("w1", "w5")}
    told = {"seeds": seeds, "w1": weights["w1"].tolist(), "w5": weights["w5"].tolist()}
    told |= {name: {v: a.tolist() for v, a in values(name).items()} for name in ("captions", "drawn_w5")}
    if len(seeds) < len(SEEDS):
        return told | {"verdict": f"open: {len(seeds)} of {len(SEEDS)} seeds are there"}
    # A rule asks whether a value is higher by too much; captions and pictures should not have fewer right.
    wrong = {name: {v: 1 - a for v, a in values(name).items()} for name in ("captions", "drawn_w5")}
    judged = {
        "C1": Ordering("match", low="w1", high="w5").judge(weights),
        "C2": NoWorse("wrong", variant="two", control="one", margin=0.25).judge(wrong["captions"]),
        "C3": NoWorse("wrong", variant="two", control="one", margin=0.25).judge(wrong["drawn_w5"]),
    }
    return told | {"verdict": {claim: {"word": v.word, "why": v.why} for claim, v in judged.items()}}


def write(path: Path, record: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def keep(model, words) -> None:
    """The model in bfloat16 with its tokenizer."""
    with tempfile.TemporaryDirectory() as temporary:
        save_tokenizer(words.backend, Path(temporary), version=__version__)
        shutil.rmtree(HERE / "checkpoint", ignore_errors=True)
        save_pretrained(model, HERE / "checkpoint", dtype=jnp.bfloat16, tokenizer=temporary)


def draw_sheet(model, words, path: Path) -> list[str]:
    """Pictures of eight held-out captions, which it returns, four times as large as drawn, a row a weight."""
    writer = Rows(words, model.cfg).writer
    captions = [scene.caption for scene in drawn_set(8, seed=10**6)[0]]
    prompts = [writer.to_draw(caption) for caption in captions]
    rows = [draw_pictures(model, prompts, writer.pad_id, weight=weight, seed=0).images for weight in WEIGHTS]
    grid = np.stack([np.concatenate(list(row), axis=1) for row in rows]).reshape(-1, len(prompts) * SIDE, 3)
    write_png(path, grid.repeat(4, axis=0).repeat(4, axis=1))
    return captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the seeds, so many")
    parser.add_argument("--sheet", action="store_true", help="only draw pictures.png, with the model that is kept")
    parser.add_argument("--smoke", action="store_true", help="one run of a few steps, to --out")
    parser.add_argument("--out", type=Path, help="with --smoke: the record's file")
    args = parser.parse_args()
    if args.sheet:
        model = load_pretrained(HERE / "checkpoint", dtype=jnp.float32)
        print(*draw_sheet(model, dsj.load_tokenizer(HERE / "checkpoint"), HERE / "pictures.png"), sep="\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        made = tokenizer()
        save_tokenizer(made, Path(folder), version=__version__)
        words = dsj.load_tokenizer(folder)
        cfg = config(-(-words.vocab_size // 16) * 16, made.token_to_id(PLACEHOLDER))
        if args.smoke:
            vq = train_vq(init(cfg, jax.random.key(0)), SMOKE)
            record, _ = run("one", 0, vq, words, cfg, SMOKE)
            args.out.write_text(json.dumps(record, indent=1) + "\n")
            return
        budget, store = Budget(), HERE / "vq"
        if not store.exists():
            model = init(cfg, jax.random.key(0))
            model.vq = train_vq(model, budget)
            save_pretrained(model, store)
        vq = load_pretrained(store, dtype=jnp.float32).vq
        (HERE / "runs").mkdir(exist_ok=True)
        for seed in SEEDS[: args.seeds]:
            for variant in VARIANTS:
                path = HERE / "runs" / f"{variant}-{seed}.json"
                if not path.exists():
                    record, model = run(variant, seed, vq, words, cfg, budget)
                    if (variant, seed) == ("two", 0):
                        keep(model, words)
                        draw_sheet(model, words, HERE / "pictures.png")
                    write(path, record)
    runs = [json.loads(path.read_text()) for path in sorted((HERE / "runs").glob("*.json"))]
    latest = max(runs, key=lambda run: run["date"])
    origin = {name: latest[name] for name in ("commit", "date", "machine")}
    write(HERE / "results.json", origin | verdicts(runs))
    print(json.dumps(verdicts(runs), indent=1))


if __name__ == "__main__":
    main()
