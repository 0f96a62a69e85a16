"""Loading a checkpoint's tokenizer, against transformers on the same folder; streaming."""

import inspect
import json
import textwrap

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.notes import CheckpointWarning
from deepseek_jax.text import bpe
from deepseek_jax.text.stream import KEPT, WINDOW, Stream
from deepseek_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer

SAMPLE = 'def f(x):\n\treturn "naïve 你好 🙂" * 1234  # <｜User｜>\r\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save_tokenizer(bpe.train_tokenizer([inspect.getsource(textwrap)], 400), folder, version="0")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def changed(folder, target, **entries):
    """A copy of the folder whose configuration has these entries, None meaning left out."""
    target.mkdir()
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | entries
    config = {key: value for key, value in config.items() if value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def test_ids_equal_those_of_transformers(folder, tokenizer):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(SAMPLE) == reference(SAMPLE)["input_ids"]
    assert tokenizer.encode(SAMPLE, add_bos=False) == reference(SAMPLE, add_special_tokens=False)["input_ids"]
    assert tokenizer.vocab_size == len(reference) == 400
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)


def test_what_is_no_text_or_no_id_is_refused(tokenizer):
    """A list's ids, or those of a text's characters, would come without a word."""
    for call, message in (
        (lambda: tokenizer.encode(["a", "b"]), r"must be a string, not \['a', 'b'\]; encode_batch takes a list"),
        (lambda: tokenizer.encode(5), "must be a string, not 5"),
        (lambda: tokenizer.encode(None), "must be a string, not None"),
        (lambda: tokenizer.encode_batch("text"), "encode takes a single one"),
        (lambda: tokenizer.encode_batch([b"a"]), "must be a string, not b'a'"),
        (lambda: tokenizer.decode("12"), "must be a list of integers, not '12'"),
        (lambda: tokenizer.decode([1.5]), "must be a list of integers"),
        (lambda: tokenizer.decode(3), "must be a list of integers, not 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert tokenizer.decode(np.asarray(tokenizer.encode("ab"))) == tokenizer.decode(tokenizer.encode("ab"))


def test_bos_follows_the_configuration_and_the_argument(folder, tokenizer, tmp_path):
    plain = load_tokenizer(changed(folder, tmp_path / "plain", add_bos_token=False))
    assert tokenizer.encode("a")[0] == 0
    assert plain.encode("a") == tokenizer.encode("a", add_bos=False) == tokenizer.encode("a")[1:]
    assert plain.encode("a", add_bos=True) == tokenizer.encode("a")


def test_bos_follows_the_post_processor_where_the_configuration_does_not_say(folder, tmp_path):
    target = changed(folder, tmp_path / "silent", add_bos_token=None)
    assert load_tokenizer(target).encode("a")[0] == 0
    backend = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.ByteLevel()
    backend.save(str(target / "tokenizer.json"))
    assert load_tokenizer(target).encode("a")[0] != 0


def test_bos_is_added_where_only_the_configuration_says_so(folder, tmp_path):
    # The published DeepSeek-V3 tokenizer.json is of this kind.
    target = changed(folder, tmp_path / "published")
    backend = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.ByteLevel()
    backend.save(str(target / "tokenizer.json"))
    tokenizer = load_tokenizer(target)
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.encode("a", add_bos=False)[0] != 0


def test_a_token_written_as_an_object_is_understood(folder, tmp_path):
    target = changed(folder, tmp_path / "old", bos_token={"__type": "AddedToken", "content": bpe.BOS})
    assert load_tokenizer(target).bos_id == 0


def test_decode_is_the_inverse(tokenizer):
    assert tokenizer.decode(tokenizer.encode(SAMPLE, add_bos=False)) == SAMPLE
    assert tokenizer.decode(tokenizer.encode("a b"), skip_special_tokens=True) == "a b"
    assert tokenizer.decode(tokenizer.encode("a b")) == bpe.BOS + "a b"


def test_an_id_without_a_token_shows_as_a_replacement_character(tokenizer):
    ids = tokenizer.encode("ab", add_bos=False)
    assert tokenizer.decode([*ids, 400, 70_000, *ids]) == "ab\ufffd\ufffdab"
    assert [tokenizer.has(i) for i in (0, 399, 400, -1)] == [True, True, False, False]


def test_special_tokens_can_be_read_as_text(tokenizer):
    (ids,) = tokenizer.encode_batch([bpe.EOS], add_bos=False, special_tokens=False)
    assert 1 not in ids
    assert tokenizer.decode(ids) == bpe.EOS
    assert tokenizer.encode(bpe.EOS, add_bos=False) == [1]


def edited(folder, target, change):
    """A copy of the folder whose tokenizer.json is changed."""
    file = changed(folder, target) / "tokenizer.json"
    described = json.loads(file.read_text())
    change(described)
    file.write_text(json.dumps(described))
    return target


def test_truncation_and_padding_that_a_training_tool_left_are_not_applied(folder, tokenizer, tmp_path):
    def leave(j):
        j["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        j["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": bpe.PAD,
        }

    left = load_tokenizer(edited(folder, tmp_path / "left", leave))
    for special_tokens in (True, False):
        for text in (SAMPLE, "a"):
            expected = tokenizer.encode(text, special_tokens=special_tokens)
            assert left.encode(text, special_tokens=special_tokens) == expected
    assert left.chat([{"role": "user", "content": SAMPLE}]) == tokenizer.chat([{"role": "user", "content": SAMPLE}])


def test_dropout_that_a_training_tool_left_is_named_and_left_out(folder, tokenizer, tmp_path):
    target = edited(folder, tmp_path / "left", lambda j: j["model"].update(dropout=0.9))
    with pytest.warns(CheckpointWarning, match=r"dropout of 0\.9 is left out"):
        left = load_tokenizer(target)
    assert left.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert left.encode(SAMPLE, special_tokens=False) == tokenizer.encode(SAMPLE, special_tokens=False)


@pytest.mark.parametrize("special", [True, False])
def test_a_control_tokens_name_in_plain_text_is_text_whatever_the_file_marks(folder, tmp_path, special):
    def mark(j):
        for added in j["added_tokens"]:
            added["special"] = special
        # One that takes white space along, and one that is found in normalised text only.
        for i, more in enumerate(({"lstrip": True, "rstrip": True}, {"normalized": True})):
            j["added_tokens"].append(
                {**j["added_tokens"][0], "id": 400 + i, "content": f"<t{i}>", "special": special, **more}
            )

    ours = load_tokenizer(edited(folder, tmp_path / "marked", mark))
    for text in (f"say {bpe.USER}", " <t0> x", "<t1>\n", f"{bpe.BOS}{bpe.USER} a{bpe.EOS}"):
        ids = ours.encode(text, add_bos=False, special_tokens=False)
        assert ids == ours.encode_batch([text], add_bos=False, special_tokens=False)[0]
        assert not set(ids) & set(ours.backend.get_added_tokens_decoder())
        assert ours.decode(ids) == text
        control = ours.encode(text, add_bos=False)
        assert set(control) & set(ours.backend.get_added_tokens_decoder())


def test_plain_text_is_normalised_and_cut_as_the_tokenizer_does(folder, tmp_path):
    target = edited(folder, tmp_path / "lower", lambda j: j.update(normalizer={"type": "Lowercase"}))
    ours = load_tokenizer(target)
    assert ours.encode("NAÏVE Words 12345", special_tokens=False) == ours.encode("naïve words 12345")


def test_ids_beyond_the_models_rows_are_refused_by_name(folder, tokenizer, tmp_path):
    tokenizer.check_fits(400)
    tokenizer.check_fits(129_280)
    with pytest.raises(
        TokenizerError, match=r"token '.*' has the id 398, beyond the model's vocab_size of 398 \(2 such"
    ):
        tokenizer.check_fits(398)
    gap = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7}, unk_token="a")))
    assert gap.vocab_size == 8
    with pytest.raises(TokenizerError, match=r"'b' has the id 7, beyond the model's vocab_size of 7: take"):
        gap.check_fits(7)


def test_bytes_of_tokens_add_up_to_the_text(tokenizer):
    text = SAMPLE.replace(bpe.USER, "")
    size_V = tokenizer.token_bytes()
    assert size_V.shape == (400,)
    assert size_V[:5].tolist() == [0] * 5
    assert size_V[tokenizer.encode(text)].sum() == len(text.encode())


def test_bytes_of_tokens_need_a_byte_level_tokenizer():
    words = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(ValueError, match="byte-level"):
        words.token_bytes()


@given(st.lists(st.integers(0, 402), max_size=120), st.integers(1, 50), st.booleans())
def test_stream_gives_the_text_of_any_ids(tokenizer, ids, step, skip):
    stream = Stream(tokenizer, skip_special_tokens=skip)
    parts = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "".join([*parts, stream.finish()]) == tokenizer.decode(ids, skip)


@given(st.text())
def test_stream_gives_whole_characters_only(tokenizer, text):
    stream = Stream(tokenizer)
    (ids,) = tokenizer.encode_batch([text], add_bos=False, special_tokens=False)
    seen = ""
    for i in ids:
        seen += stream.push([i])
        assert text.startswith(seen)
    assert seen + stream.finish() == text


@pytest.mark.parametrize("text", ["naïve 🙂", "a"])
def test_stream_decodes_a_few_tokens_at_a_time(tokenizer, text):
    """And not the text so far, whatever its length; bytes that are no text at all included."""
    stream, sizes = Stream(tokenizer), []
    decode = tokenizer.decode
    ids = tokenizer.encode(text * 60, add_bos=False) + tokenizer.encode("🙂", add_bos=False)[:3] * 60
    seen = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "decode", lambda ids, skip: sizes.append(len(ids)) or decode(ids, skip))
        for i in ids:
            seen += stream.push([i])
        seen += stream.finish()
    assert seen == decode(ids)
    assert KEPT < max(sizes) <= 2 * WINDOW


def test_stream_of_emoji_waits_for_its_last_byte(tokenizer):
    ids = tokenizer.encode("🙂", add_bos=False)
    stream = Stream(tokenizer)
    assert [stream.push([i]) for i in ids] == ["", "", "", "🙂"]
    assert np.unique(ids).size == 4


def test_missing_tokenizer_says_that_ids_still_work(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json; .* token ids"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_named(folder, tmp_path, name):
    target = changed(folder, tmp_path / "damaged")
    (target / name).write_text('{"model": ')
    with pytest.raises(ValueError, match=name):
        load_tokenizer(target)


def test_deeply_nested_files_are_named(folder, tmp_path):
    target = changed(folder, tmp_path / "deep")
    (target / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(target)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bos_token", 0),
        ("eos_token", ["x"]),
        ("pad_token", {"content": 3}),
        ("unk_token", 1.5),
        ("add_bos_token", "yes"),
    ],
)
def test_entries_of_another_type_are_named(folder, tmp_path, name, value):
    with pytest.raises(TokenizerError, match=rf"{name} must be"):
        load_tokenizer(changed(folder, tmp_path / "odd", **{name: value}))


def test_configuration_that_names_an_unknown_bos_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="bos_token '<s>'"):
        load_tokenizer(changed(folder, tmp_path / "other", bos_token="<s>"))
    with pytest.raises(ValueError, match="names no bos_token"):
        load_tokenizer(changed(folder, tmp_path / "none", bos_token=None))
