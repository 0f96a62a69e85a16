"""`tiktoken.model` as Moonlight and Kimi-K2 publish it: the ids of the package that their own code calls."""

import base64
import inspect
import json
import random
import textwrap

import pytest
import tiktoken
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from deepseek_jax.text.chat import TokenizerError
from deepseek_jax.text.tiktoken import PATTERN, byte_alphabet
from deepseek_jax.text.tokenizer import load_tokenizer

HAN = "你好，世界！汉字𠀀〇々 naïve Ünïcödé don't WE'LL I've 日本語のテキスト 한국어 １２３ ٣٤ Ⅷ½\r\n\t  \n"
TEXT = inspect.getsource(textwrap) + HAN * 30
POOL = HAN + "ab \n'sSſtTd\x00\x85ﬁK👍🏽\u200d\u0301֑ञ्" + "".join(map(chr, range(32, 127)))
NAMES = {0: "[BOS]", 1: "[EOS]", 3: "<think>"}
CODE = """import tiktoken
class TikTokenTokenizer:
    num_reserved_special_tokens = {reserved}
    pat_str = "|".join([r\'\'\'[a-z]+\'\'\', r"[^a-z]"])
    def apply_chat_template(self, tools): return {sort}(tools)
raise SystemExit("this code is read, and never run")
"""


def learned(size):
    """Ranks of a vocabulary learned from text, as published ones are."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    byte = {character: i for i, character in enumerate(byte_alphabet())}
    return {bytes(byte[c] for c in word): i for word, i in made.get_vocab().items()}


def repetitive(seed):
    """Ranks over few letters in no order: many ways to make a token, some that no merges make."""
    rng, tokens = random.Random(seed), {bytes([i]): None for i in range(256)}
    while len(tokens) < 310:
        tokens[bytes(rng.choice(b"ab ") for _ in range(rng.randint(2, 6)))] = None
    return {token: rank for rank, token in enumerate(tokens)}


def publish(folder, ranks, **config):
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    decoder = {len(ranks) + i: {"content": name, "special": i < 3} for i, name in NAMES.items()}
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": decoder, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def reference(ranks, pattern=PATTERN, reserved=256):
    first = len(ranks)
    control = {NAMES.get(i, f"<|reserved_token_{first + i}|>"): first + i for i in range(reserved + 2)}
    return tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens=control)


def texts(count, seed=0):
    rng = random.Random(seed)
    for i in range(count):
        size, kind = rng.randint(0, 40), i % 3
        if kind == 0:
            yield "".join(rng.choice("ab ") for _ in range(size))
        elif kind == 1:
            yield "".join(rng.choice(POOL) for _ in range(size)) + rng.choice(["", "[EOS]", "<think>", "[BOS"])
        else:
            codes = (rng.randrange(0x110000) for _ in range(size))
            yield "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


@pytest.mark.parametrize(("make", "of"), [(learned, 1200), *((repetitive, seed) for seed in range(6))])
def test_ids_are_those_of_tiktoken(tmp_path, make, of):
    ranks = make(of)
    ours, theirs = load_tokenizer(publish(tmp_path, ranks)), reference(ranks)
    many = [TEXT, *texts(300)]
    for text, ids, plain in zip(
        many, ours.encode_batch(many), ours.encode_batch(many, special_tokens=False), strict=True
    ):
        assert ids == theirs.encode(text, allowed_special="all")
        assert plain == theirs.encode(text, disallowed_special=())
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode([*ids[:-1], ranks[b"\xe4"]]) == theirs.decode([*ids[:-1], ranks[b"\xe4"]])
    assert (ours.bos_id, ours.eos_id, ours.add_bos) == (len(ranks), len(ranks) + 1, False)


@pytest.mark.slow
def test_every_character_is_cut_as_tiktoken_cuts_it(tmp_path):
    ranks = learned(300)
    ours, theirs = load_tokenizer(publish(tmp_path, ranks)), reference(ranks)
    codes = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    many = [f"a{c}A {c}1{c}汉{c} " for c in codes]
    for part in [many[i : i + 50_000] for i in range(0, len(many), 50_000)]:
        for text, ids in zip(part, ours.encode_batch(part), strict=True):
            # No control tokens are among these, and without a search for them theirs is ten times as fast.
            assert ids == theirs.encode_ordinary(text)


def test_reserved_ids_have_the_names_of_the_code_as_far_as_the_model_has_rows(tmp_path):
    ranks = repetitive(0)
    folder = publish(tmp_path, ranks)
    for rows, size in ((310 + 300, 310 + 258), (310 + 100, 310 + 100), (300, 310 + 4)):
        (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
        assert load_tokenizer(folder).vocab_size == size
    # As a run keeps it, without a config.
    (folder / "config.json").unlink()
    ours = load_tokenizer(folder)
    assert ours.vocab_size == 310 + 256
    assert ours.encode("<|reserved_token_312|><|reserved_token_565|>") == [312, 565]
    assert 566 not in ours.encode("<|reserved_token_566|>")


def test_pattern_reserved_ids_and_sorted_tools_are_read_from_the_releases_code(tmp_path):
    ranks = repetitive(1)
    folder = publish(tmp_path, ranks, chat_template="{{ tools | tojson }}")
    chat, tools = [{"role": "user", "content": "x"}], [{"b": {"d": 1, "c": [2]}, "a": 3}]
    as_given = '[{"b": {"d": 1, "c": [2]}, "a": 3}]'
    assert load_tokenizer(folder).render(chat, tools=tools) == as_given
    (folder / "tokenization_x.py").write_text(CODE.format(reserved=7, sort="deep_sort_dict"))
    ours, theirs = load_tokenizer(folder), reference(ranks, "[a-z]+|[^a-z]", 7)
    assert ours.vocab_size == 310 + 7
    assert ours.render(chat, tools=tools) == '[{"a": 3, "b": {"c": [2], "d": 1}}]'
    for text in texts(100):
        assert ours.encode(text) == theirs.encode(text, allowed_special="all")
    (folder / "tokenization_x.py").write_text(CODE.format(reserved=7, sort="list"))
    assert load_tokenizer(folder).render(chat, tools=tools) == as_given


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"YQ==", "line 311 is not a token in base64"),
        (b"YQ== x", "line 311 is not a token"),
        (b"%%% 310", "line 311 is not a token"),
        (b"YWJjZGVm 400", "the ranks of its 311 tokens are not 0 to 310"),
        (b"W0JPU10= 310", r"token '\[BOS\]' that tokenizer_config\.json names as id 311"),
    ],
)
def test_lines_that_are_no_ranks_are_refused_by_number(tmp_path, line, match):
    folder = publish(tmp_path, repetitive(2))
    with (folder / "tiktoken.model").open("ab") as file:
        file.write(line + b"\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(int(i) + 1): token for i, token in config["added_tokens_decoder"].items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=match):
        load_tokenizer(folder)


def test_ranks_without_a_byte_and_control_tokens_out_of_place_are_refused(tmp_path):
    ranks = repetitive(3)
    with pytest.raises(TokenizerError, match="no token for the byte 0x07"):
        load_tokenizer(publish(tmp_path, {token: rank for token, rank in ranks.items() if token != b"\x07"}))
    for decoder, match in (
        ({"9": {"content": "[BOS]"}}, r"names '\[BOS\]' as id 9, outside 310 to 567"),
        ({"310": {"content": "[BOS]"}, "311": {"content": "[BOS]"}}, "names a token twice"),
        ({"310": "[BOS]"}, "must give ids objects with content"),
    ):
        with pytest.raises(TokenizerError, match=match):
            load_tokenizer(publish(tmp_path, ranks, added_tokens_decoder=decoder, eos_token=None))


@pytest.mark.parametrize("line", ["pat_str = make()", "pat_str = 7", "pat_str = (", "pat_str = '('"])
def test_code_that_does_not_state_a_pattern_is_refused(tmp_path, line):
    folder = publish(tmp_path, repetitive(4))
    (folder / "tokenization_x.py").write_text(line)
    with pytest.raises(TokenizerError, match=r"does not state a pattern|cannot be compiled"):
        load_tokenizer(folder)
