"""Generated tasks: formats, answers that are where they are said to be, sides that never meet, use as a source."""

import re
from dataclasses import replace
from itertools import islice

import pytest

from deepseek_jax.data.config import DataConfig, parse_source
from deepseek_jax.data.manifest import TokenFileError
from deepseek_jax.data.pipeline import load_data
from deepseek_jax.data.tasks import FILLER, TASKS, Addition, Copy, Passkey, Recall, parse_task
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.text.tokenizer import load_tokenizer

SMALL = (Passkey(length=400), Recall(pairs=6, queries=4), Copy(symbols=6), Addition(), Addition(digits=2, steps=True))
PASSKEY = (
    "There is a pass key hidden in this text. Remember it.\nThe pass key is 56478. Remember it. 56478 is the pass key. "
    "\nWhat is the pass key? The pass key is 56478."
)
PINNED = [
    "da4 rd0 gu5 hu3 nt4 ni2\nnt4 ni2 rd0 da4",
    "xpobeb|xpobeb",
    "870+446=1316",
    "39+48=9+8+0=17 3+4+1=08 087",
]


def said(item) -> str:
    return "".join(item.text[answer.start : answer.stop] for answer in item.answers)


def test_the_formats():
    """Pinned: with a seed an item is the same in every Python."""
    passkey, recall, copy, plain, steps = (task.held_out(1)[0].text for task in SMALL)
    assert passkey.replace(FILLER, "") == PASSKEY
    assert [recall, copy, plain, steps] == PINNED


@pytest.mark.parametrize("task", SMALL, ids=lambda task: f"{task.name}{task.seed}")
def test_answers_stand_where_their_sources_say(task):
    items = task.held_out(50)
    assert len({len(item.answers) for item in items}) == 1
    for item in items:
        for answer in item.answers:
            if answer.source is not None:
                assert item.text[answer.source] == item.text[answer.start : answer.stop]
                assert answer.source < answer.start
        if isinstance(task, Recall):
            told, asked = item.text.split("\n")
            pairs = {pair[:2]: pair[2] for pair in told.split(" ")}
            assert (len(pairs), len(asked.split(" "))) == (6, 4)
            assert {pair[:2]: pair[2] for pair in asked.split(" ")}.items() <= pairs.items()
            assert [item.text[a.start - 2 : a.stop] for a in item.answers] == asked.split(" ")
        elif isinstance(task, Addition):
            a, b = re.match(r"(\d+)\+(\d+)=", item.text).groups()
            result = said(item)[-task.digits - 1 :]
            assert int(result) == int(a) + int(b)
            assert item.text == f"{a}+{b}={said(item)}"
            total = 0
            for place, step in enumerate(said(item).split(" ")[:-1]):
                left, right = step.split("=")
                assert eval(re.sub(r"0*(\d)", r"\1", left)) == int(right)
                total += int(right) % 10 * 10**place
            assert not task.steps or total == int(result) % 10**task.digits
        else:
            assert item.text.count(said(item)) == (3 if isinstance(task, Passkey) else 2)
            assert item.text.removesuffix(".").endswith(said(item))


@pytest.mark.parametrize("task", SMALL, ids=lambda task: f"{task.name}{task.seed}")
def test_no_held_out_item_is_ever_trained_on(task):
    held_out = task.held_out(40)
    assert len({item.text for item in held_out}) == 40
    assert task.held_out(10) == held_out[:10]
    asked = {item.asked for item in held_out}
    seen = set()
    for seed in (0, 1):
        other = replace(task, seed=seed, documents=1500)
        texts = list(other.training())
        assert texts[:5] == list(islice(replace(other, documents=5).training(), 5))
        seen |= set(texts)
        assert not any(key in text for key in asked for text in (texts if isinstance(task, Passkey) else ()))
    assert len(seen) > 1000
    assert not seen & {item.text for item in held_out}
    if isinstance(task, Addition):
        turned = {re.sub(r"(\d+)\+(\d+)", r"\2+\1", item.text.split("=")[0]) for item in held_out}
        assert not turned & {text.split("=")[0] for text in seen}


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("task:sum", "there is no task 'sum'; choose one of passkey, recall, copy, addition"),
        ("task:copy,digits=3", "the task copy has no 'digits=3'; it has documents=, seed=, symbols="),
        ("task:copy,symbols", "the task copy has no 'symbols'"),
        ("task:copy,symbols=many", "symbols of the task copy must be an integer, not 'many'"),
        ("task:copy,symbols=0", "symbols of the task copy must be an integer of at least 1, not 0"),
        ("task:copy,documents=1", "documents of the task copy must be an integer of at least 2, not 1"),
        ("task:addition,steps=yes", "steps of the task addition must be true or false, not 'yes'"),
        ("task:passkey,length=100", "length of the task passkey must be an integer of at least 2"),
        ("task:recall,pairs=3,queries=4", "queries=4 of pairs=3 cannot be"),
        ("task:recall,pairs=677", "has 676 keys"),
    ],
)
def test_what_is_no_task_is_refused(spelled, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(data=(spelled,))


def test_settings_of_another_type_are_refused():
    with pytest.raises(ValueError, match=r"digits of the task addition must be an integer of at least 1, not 2\.5"):
        Addition(digits=2.5)
    with pytest.raises(ValueError, match="steps of the task addition must be True or False, not 1"):
        Addition(steps=1)
    with pytest.raises(ValueError, match="seed of the task copy must be an integer of at least 0, not -1"):
        Copy(seed=-1)


def test_a_task_without_so_many_items_says_so():
    # Of 55 sums of two digits with the smaller first.
    with pytest.raises(ValueError, match=r"addition,.*digits=1.* no more than \d+ held-out items that differ"):
        Addition(digits=1).held_out(100)


def test_spelling():
    spec = parse_source("sums=task:addition,digits=4,steps=true,seed=2@3")
    assert (spec.label, spec.weight, spec.path) == ("sums", 3.0, None)
    assert spec.task == Addition(digits=4, steps=True, seed=2)
    assert parse_source("task:copy").label == "copy"
    for task in SMALL:
        assert parse_task(task.spelled) == task
    assert set(TASKS) == {"passkey", "recall", "copy", "addition"}


def test_a_task_is_a_source_as_any_other(tmp_path):
    save_tokenizer(train_tokenizer(Addition(documents=200).training(), 280), tmp_path / "words", version="0")
    words = load_tokenizer(tmp_path / "words")
    config = DataConfig(
        data=("task:addition,documents=300", "task:copy,documents=300,symbols=5"), workers=0, fim_rate=0
    )
    data = load_data(config, words, tmp_path / "tokens")
    held_out = data.held_out(32)
    assert held_out.domains == ("addition", "copy")
    batches = data.batches(length=64, rows=16, seed=0)
    text = words.decode(next(batches)["tokens"].reshape(-1).tolist())
    sums = re.findall(r"(?<!\d)(\d{3})\+(\d{3})=(\d{4})(?!\d)", text)
    assert len(sums) > 5
    assert all(int(a) + int(b) == int(c) for a, b, c in sums)
    trained = {text for task in (Addition(documents=300), Copy(documents=300, symbols=5)) for text in task.training()}
    assert {f"{a}+{b}={c}" for a, b, c in sums} <= trained
    other = replace(config, data=("task:addition,documents=301", config.data[1]))
    with pytest.raises(
        TokenFileError, match=r"read_as is task:addition,documents=300,.* there and task:addition,docume"
    ):
        load_data(other, words, tmp_path / "tokens")
