"""The draw command, and generate with pictures: files and text of a tiny Janus, one line for bad input."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import fill_randomly

import deepseek_jax as dsj
from deepseek_jax.cli.main import main
from deepseek_jax.configs.multimodal import VQ, JanusConfig, Vision
from deepseek_jax.configs.schema import GQA, ModelConfig
from deepseek_jax.convert.save import save_pretrained as save_language_model
from deepseek_jax.multimodal.checkpoint import load_pretrained, save_pretrained
from deepseek_jax.multimodal.draw import draw_pictures
from deepseek_jax.multimodal.janus import abstract
from deepseek_jax.multimodal.pictures import shown, write_png
from deepseek_jax.multimodal.prompts import BEGIN, END, PAD, PLACEHOLDER, PromptWriter, conversation
from deepseek_jax.multimodal.understand import generate
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.version import __version__

TEXT = "a red circle and two blue squares, above one another\n"
NEW = 4


def config() -> JanusConfig:
    """Four tokens shown, sixteen codes drawn, room for a system prompt in bytes."""
    language = ModelConfig(
        name="tiny",
        vocab_size=288,
        dim=32,
        n_layers=1,
        n_dense_layers=1,
        ffn_dim=48,
        attention=GQA(2, 2, 16),
        moe=None,
        max_length=512,
        model_type="llama",
        bos_id=0,
        eos_ids=(1,),
    )
    vision = Vision(image_size=4, patch=2, dim=16, n_layers=1, n_heads=2, ffn_dim=16)
    vq = VQ(n_codes=16, code_dim=4, z_dim=8, channels=32, multipliers=(1,), n_blocks=1)
    return JanusConfig("tiny-janus", language, vision, vq, head_dim=32, image_id=287)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draw") / "janus"
    save_pretrained(fill_randomly(abstract(config()), seed=5), folder)
    tokenizer = train_tokenizer([TEXT], 280)
    tokenizer.add_special_tokens([BEGIN, END, PLACEHOLDER])
    save_tokenizer(tokenizer, folder, version=__version__)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("draw") / "in.png"
    write_png(file, np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    return file


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_pictures_are_what_the_library_draws(folder, tmp_path, capsys):
    out, record = tmp_path / "a.png", tmp_path / "a.json"
    settings = ("--dtype", "float32", "--json", record, "--seed", 3)
    code, printed, err = run(capsys, "draw", folder, "--prompt", "a red circle", out, "--count", 2, *settings)
    assert code == 0, err
    assert printed.split() == [str(tmp_path / "a-1.png"), str(tmp_path / "a-2.png")]
    assert "32 codes in" in err
    model, writer = load_pretrained(folder, dtype=np.float32), PromptWriter(dsj.load_tokenizer(folder), config())
    drawn = draw_pictures(model, [writer.to_draw("a red circle")] * 2, writer.pad_id, seed=3)
    told = json.loads(record.read_text())
    for i, row in enumerate(told["pictures"]):
        np.testing.assert_array_equal(np.asarray(Image.open(row["file"])), drawn.images[i])
        assert (row["codes"], row["seed"]) == (drawn.codes[i].tolist(), drawn.seed[i])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-1.png", "a-2.png", "a.json"]


@pytest.mark.slow
def test_text_about_pictures_is_what_the_library_writes(folder, picture, tmp_path, capsys):
    record = tmp_path / "a.json"
    settings = ("--dtype", "float32", "--max-new-tokens", NEW, "--json", record)
    code, _, err = run(capsys, "generate", folder, "--image", picture, picture, "--prompt", "which?", "how?", *settings)
    assert code == 0, err
    model, tokenizer = load_pretrained(folder, dtype=np.float32), dsj.load_tokenizer(folder)
    writer, image = PromptWriter(tokenizer, config()), shown(Image.open(picture), 4)
    prompts = [writer.about_pictures(text, 2) for text in ("which?", "how?")]
    expected = generate(model, prompts, [[image] * 2] * 2, NEW)[0]
    rows = json.loads(record.read_text())["rows"]
    assert [row["ids"] for row in rows] == expected
    assert [row["prompt_ids"] for row in rows] == prompts


@pytest.mark.slow
def test_without_pictures_the_language_model_goes_on(folder, tmp_path, capsys):
    record = tmp_path / "a.json"
    settings = ("--dtype", "float32", "--max-new-tokens", NEW, "--json", record)
    code, _, err = run(capsys, "generate", folder, "--prompt", "a red", *settings)
    assert code == 0, err
    model, tokenizer = dsj.load_pretrained(folder, dtype=np.float32), dsj.load_tokenizer(folder)
    (row,) = json.loads(record.read_text())["rows"]
    assert row["prompt_ids"] == tokenizer.encode("a red")
    assert row["ids"] == dsj.generate(model.language, [row["prompt_ids"]], NEW)[0][0]
    (tmp_path / "text").write_text("a red circle")
    code, out, err = run(capsys, "score", folder, tmp_path / "text", "--dtype", "float32")
    assert code == 0, err
    assert "nats" in out


@pytest.mark.slow
def test_in_bfloat16_and_as_stored(folder, picture, tmp_path, capsys):
    """On a mesh, of one device here, and without."""
    for dtype, *mesh in (("bfloat16",), ("stored", "--mesh", "fsdp=1")):
        out = tmp_path / f"{dtype}.png"
        code, _, err = run(capsys, "draw", folder, "--prompt", "a red circle", out, "--dtype", dtype, *mesh)
        assert code == 0, err
        assert np.asarray(Image.open(out)).std() > 0
        arguments = ("--image", picture, "--prompt", "which?", "--max-new-tokens", NEW, "--dtype", dtype, *mesh)
        code, text, err = run(capsys, "generate", folder, *arguments)
        assert code == 0, err
        assert text


def test_prompts(folder):
    tokenizer = dsj.load_tokenizer(folder)
    writer = PromptWriter(tokenizer, config())
    begin, end, pad = (tokenizer.backend.token_to_id(t) for t in (BEGIN, END, PAD))
    assert writer.pad_id == pad
    ids = writer.to_draw("a red circle")
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, begin)
    assert tokenizer.decode(ids[1:-1]) == "<|User|>: a red circle\n\n<|Assistant|>:"
    ids = writer.about_pictures(f"{PLACEHOLDER} or {PLACEHOLDER}?", 2, system="S")
    cut = [i for i, token in enumerate(ids) if token == begin]
    assert len(cut) == 2
    for i in cut:
        assert ids[i : i + 6] == [begin, *[287] * 4, end]
    assert tokenizer.decode(ids[1 : cut[0]]) == "S\n\n<|User|>: "
    assert tokenizer.decode(ids[cut[0] + 6 : cut[1]]) == " or "
    assert tokenizer.decode(ids[cut[1] + 6 :]) == "?\n\n<|Assistant|>:"
    with pytest.raises(ValueError, match="has 1 places <image_placeholder> for 2 pictures"):
        writer.about_pictures(PLACEHOLDER, 2)
    turns = [("<|User|>", " a "), ("<|Assistant|>", "b"), ("<|User|>", "c"), ("<|Assistant|>", "")]
    sentence_end = "<｜end▁of▁sentence｜>"
    assert conversation(turns) == f"<|User|>: a\n\n<|Assistant|>: b{sentence_end}<|User|>: c\n\n<|Assistant|>:"


def test_convert_writes_another_dtype(folder, tmp_path, capsys):
    code, out, err = run(capsys, "convert", folder, tmp_path / "half", "--dtype", "float16")
    assert code == 0, err
    assert "published layout, float16" in out
    half, whole = (jax.tree.leaves(load_pretrained(f, dtype=None)) for f in (tmp_path / "half", folder))
    for a, b in zip(half, whole, strict=True):
        np.testing.assert_array_equal(a, np.asarray(b).astype(np.float16))
    assert dsj.load_tokenizer(tmp_path / "half").bos_id is not None


def test_bad_input_is_one_line_and_leaves_nothing(folder, picture, tmp_path, capsys):
    save_language_model(dsj.init(config().language, jax.random.key(0)), tmp_path / "language")
    out = tmp_path / "a.png"
    for arguments, message in (
        (("draw", folder, "--prompt", "x", tmp_path / "a.jpg"), "give a name that ends in .png"),
        (("draw", folder, "--prompt", "x", tmp_path / "none/a.png"), f"there is no folder {tmp_path / 'none'}"),
        (("draw", folder, "--prompt", "x", out, "--count", 0), "--count must be at least 1, not 0"),
        (("draw", folder, "--prompt", "x", out, "--temperature", -1), "temperature=-1"),
        (("draw", tmp_path / "language", "--prompt", "x", out), "holds no Janus, and no other model here draws"),
        (("draw", tmp_path / "nowhere", "--prompt", "x", out), "is not a folder"),
        (("generate", tmp_path / "language", "--prompt-ids", 1, "--image", picture), "holds no Janus"),
        (("generate", folder, "--prompt", "x", "--image", folder / "config.json"), "is no picture that Pillow reads"),
        (("generate", folder, "--prompt", "x", "--use-mtp", "--image", picture), "--use-mtp: "),
        (("generate", folder, "--prompt", "x", "--image", tmp_path / "b.png"), "No such file"),
        (("train", tmp_path / "run", "--model", "tiny-janus"), "is a Janus; this command takes language models"),
        (("convert", folder, tmp_path / "orbax"), "holds a Janus, which is neither kept in Orbax nor in FP8"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code in (1, 2), arguments
        assert message in err, (arguments, err)
        assert err.count("\n") == 1, err
    assert [p.name for p in tmp_path.iterdir()] == ["language"]
