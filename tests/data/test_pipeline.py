"""Batches: every token once an epoch, the same for any workers and hosts, resumable, counted; held-out by domain."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.data import readers
from deepseek_jax.data.config import DataConfig, SourceSpec, parse_source
from deepseek_jax.data.damage import DamagedSource
from deepseek_jax.data.pipeline import load_data, training_texts
from deepseek_jax.data.readers import open_source
from deepseek_jax.data.split import find_split
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.text.tokenizer import load_tokenizer

CODE = {f"c{i}.py": f"def f_{i}(x):\n    return x + {i}\n" * (i % 7 + 1) for i in range(60)}
PROSE = {f"p{i}.txt": f"Sentence {i} of the text, naïvely. " * (i % 11 + 1) for i in range(90)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("pipeline")
    for folder, texts in (("code", CODE), ("prose", PROSE)):
        (home / folder).mkdir()
        for name, text in texts.items():
            (home / folder / name).write_text(text)
    return home


@pytest.fixture(scope="module")
def tokenizer(home):
    save_tokenizer(train_tokenizer([*CODE.values(), *PROSE.values()], 300), home / "tokenizer", version="0")
    return load_tokenizer(home / "tokenizer")


@pytest.fixture(scope="module")
def load(home, tokenizer):
    both = (f"code={home / 'code'}@1", f"prose={home / 'prose'}@3")

    def load(data=both, **changes):
        return load_data(DataConfig(data=data, **{"workers": 0, **changes}), tokenizer, home / "tokens")

    return load


def take(batches, count):
    return [next(batches) for _ in range(count)]


def equal(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True)
    )


def stored(data, label, tokenizer):
    """The training documents of a source, as lists of ids."""
    file = data.files[data.labels.index(label)]
    ends = [0, *file.documents_D["end"].tolist()]
    return [
        file.read(a, b).tolist()
        for a, b, held_out in zip(ends, ends[1:], file.documents_D["held_out"], strict=False)
        if not held_out
    ]


def restored(documents, fim):
    """Documents with FIM undone; each as a tuple."""
    found = []
    for ids in documents:
        if fim.begin in ids:
            hole, end = ids.index(fim.hole), ids.index(fim.end)
            assert ids[1] == fim.begin < fim.hole
            ids = [ids[0], *ids[2:hole], *ids[end + 1 : -1], *ids[hole + 1 : end], ids[-1]]
        found.append(tuple(ids))
    return found


def held_out_texts(home, label, texts, share):
    """Of each held-out document its key and text."""
    split = find_split(open_source(parse_source(str(home / label))), share)
    found = zip(split.keys_D.tolist(), (texts[name] for name in sorted(texts)), split.held_out_D, strict=True)
    return [(key, text) for key, text, held_out in found if held_out]


def split_at_eos(stream, eos):
    documents, document = [], []
    for token in stream:
        document.append(token)
        if token == eos:
            documents.append(document)
            document = []
    return documents, document


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_every_document_comes_once_an_epoch_without_masks(load, tokenizer, home, fim_rate):
    data = load((str(home / "prose"),), fim_rate=fim_rate)
    source = data.batches(length=37, rows=1, seed=3)._sources[0]
    expected = sorted(map(tuple, stored(data, "prose", tokenizer)))
    stream, orders = [], []
    for epoch in range(3):
        source.locate(source._first[-1])  # so that the next epoch's first row is known
        first = source._first[epoch]
        _, order_R = source._layouts[epoch]
        place = {int(row): index for index, row in enumerate(order_R)}
        for row in range(len(order_R)):
            stream += source[first + place[row]]["tokens"].tolist()
    documents, _ = split_at_eos(stream, tokenizer.eos_id)
    for epoch in range(3):
        part = documents[epoch * len(expected) : (epoch + 1) * len(expected)]
        turned = sum(data.fim.begin in ids for ids in part) if fim_rate else 0
        assert abs(turned / len(part) - fim_rate) < 0.2
        orders.append(restored(part, data.fim))
        assert sorted(orders[-1]) == expected
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_every_document_comes_once_an_epoch_with_masks(load, tokenizer, home, fim_rate):
    data = load((str(home / "prose"),), fim_rate=fim_rate, sample_masks=True)
    source = data.batches(length=64, rows=1, seed=3)._sources[0]
    expected = stored(data, "prose", tokenizer)
    for epoch in range(2):
        source.locate(source._first[-1])
        pieces, whole = [], []
        for index in range(source._first[epoch], source._first[epoch + 1]):
            row = source[index]
            tokens_T, segments_T = row["tokens"], row["segments"]
            assert np.all(np.diff(segments_T[segments_T > 0]) >= 0)
            assert np.all(tokens_T[segments_T == 0] == 0)
            assert sorted(set(segments_T.tolist()) - {0}) == list(range(1, segments_T.max() + 1))
            for segment in range(1, segments_T.max() + 1):
                ids = tokens_T[segments_T == segment].tolist()
                complete = ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
                (whole if complete else pieces).append(ids)
        shorter = sorted(tuple(ids) for ids in expected if len(ids) + 3 <= 64)
        assert set(shorter) <= set(restored(whole, data.fim))
        # Pieces of longer documents are in rows of their own; joined, they have every token of theirs.
        longer = [ids for ids in map(tuple, expected) if ids not in restored(whole, data.fim)]
        counted = Counter(t for ids in pieces for t in ids if t not in (data.fim.begin, data.fim.hole, data.fim.end))
        assert counted == Counter(t for ids in longer for t in ids)
        assert bool(longer)


def test_documents_are_turned_alike_whatever_else_is_in_the_source(load, tokenizer, home, tmp_path):
    part = tmp_path / "prose"
    part.mkdir()
    for name in list(PROSE)[::2]:
        (part / name).write_text(PROSE[name])

    def turned(data):
        source = data.batches(length=32, rows=1, seed=5)._sources[0]
        keys, epoch = source._keys_D, source._documents[1]
        return dict(zip(keys[epoch.order_D].tolist(), epoch.turned_D.tolist(), strict=True))

    every = turned(load((str(home / "prose"),), fim_rate=0.5))
    some = turned(load((str(part),), fim_rate=0.5, token_folder=tmp_path / "tokens"))
    assert len(some) > 30
    assert some.items() <= every.items()


@pytest.mark.parametrize("masks", [False, True])
def test_batches_do_not_depend_on_workers_or_hosts(load, masks):
    options = {"length": 24, "seed": 1}
    expected = take(load(sample_masks=masks).batches(rows=6, **options), 40)
    assert expected[0]["tokens"].shape == (6, 24)
    assert expected[0]["tokens"].dtype == np.int32
    assert ("segments" in expected[0]) == masks
    for workers in (1, 3):
        batches = load(sample_masks=masks, workers=workers).batches(rows=6, **options)
        assert equal(take(batches, 40), expected)
        batches.close()
    for count in (2, 3):
        hosts = [load(sample_masks=masks).batches(rows=6, shard=(i, count), **options) for i in range(count)]
        parts = [take(host, 40) for host in hosts]
        together = [{k: np.concatenate([p[k] for p in part]) for k in part[0]} for part in zip(*parts, strict=True)]
        assert equal(together, expected)
        assert len({json.dumps(host.get_state()) for host in hosts}) == 1
    assert not equal(take(load(sample_masks=masks).batches(rows=6, length=24, seed=2), 40), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_from_a_saved_state(load, workers):
    whole = load(workers=workers).batches(length=24, rows=6, seed=1)
    expected = take(whole, 200)
    assert whole.drawn()["code"]["epochs"] > 1.5
    whole.close()
    for at in (0, 1, 7, 61, 190):
        batches = load(workers=workers).batches(length=24, rows=6, seed=1)
        take(batches, at)
        state = json.loads(json.dumps(batches.get_state()))
        # Going back is the same iterator's business too.
        take(batches, 5)
        batches.set_state(state)
        assert equal(take(batches, 3), expected[at : at + 3])
        # Another host count, worker count and batch size than the one that saved.
        other = load(workers=2 - workers).batches(length=24, rows=3, seed=1, shard=(2, 3))
        other.set_state(state)
        assert np.array_equal(next(other)["tokens"], expected[at]["tokens"][2:3])
        for b in (batches, other):
            b.close()


def test_a_state_of_something_else_is_refused_by_name(load):
    state = load().batches(length=24, rows=6, seed=1).get_state()
    with pytest.raises(ValueError, match="seed was 1 and is 2"):
        load().batches(length=24, rows=6, seed=2).set_state(state)
    with pytest.raises(ValueError, match=r"length was 24 and is 25; fim_rate was 0\.1 and is 0\.0"):
        load(fim_rate=0.0).batches(length=25, rows=6, seed=1).set_state(state)
    data = load()
    with pytest.raises(ValueError, match="sources was"):
        replace(data, weights=(1.0, 4.0)).batches(length=24, rows=6, seed=1).set_state(state)
    with pytest.raises(ValueError, match="rows is None"):
        load().batches(length=24, rows=6, seed=1).set_state({**state, "rows": None})


def test_sources_are_drawn_by_weight_and_counted(load, home):
    data = load(fim_rate=0.0)
    batches = data.batches(length=24, rows=8, seed=0)
    texts = [set(map(tuple, (s[i]["tokens"].tolist() for i in range(s.locate(0)[0], 300)))) for s in batches._sources]
    rows = [tuple(row) for batch in take(batches, 10) for row in batch["tokens"].tolist()]
    assert sum(row in texts[0] for row in rows) == 20
    assert sum(row in texts[1] for row in rows) == 60
    drawn = batches.drawn()
    assert {label: entry["rows"] for label, entry in drawn.items()} == {"code": 20, "prose": 60}
    assert drawn["prose"]["tokens"] == 60 * 24
    assert drawn["code"]["epochs"] == pytest.approx(20 * 24 / data.files[0].manifest["train"]["tokens"], rel=0.1)
    by_size = load((str(home / "code"), str(home / "prose")))
    assert by_size.weights == tuple(float(f.manifest["train"]["tokens"]) for f in by_size.files)


def test_rows_seen_are_the_different_rows_of_the_batches(load):
    batches = load(workers=1).batches(length=24, rows=6, seed=1)
    assert batches.rows_seen().shape == (0, 24)
    drawn = np.concatenate([batch["tokens"] for batch in take(batches, 4)])
    assert sorted(batches.rows_seen().tolist()) == sorted(drawn.tolist())
    take(batches, 200)
    assert len(batches.rows_seen()) == sum(source._first[1] for source in batches._sources)
    batches.close()


def test_held_out_text_has_a_domain_for_each_source(load, tokenizer, home):
    data = load(held_out_share=0.2, token_folder=home / "fifth")
    held_out = data.held_out(32)
    assert held_out.domains == ("code", "prose")
    texts = {
        name: [text for _, text in held_out_texts(home, name, texts, 0.2)]
        for name, texts in (("code", CODE), ("prose", PROSE))
    }
    for index, name in enumerate(held_out.domains):
        stream = held_out.stream_n[held_out.domain_n == index].tolist()
        documents, rest = split_at_eos(stream, tokenizer.eos_id)
        assert not rest
        assert sorted(tokenizer.decode(ids[1:-1]) for ids in documents) == sorted(texts[name])
    # A nat for every token of one domain and none for the other.
    nats_n1 = (held_out.domain_n[1:] == 1).astype(float)
    size = sum(len(text.encode()) for text in texts["prose"])
    expected = (held_out.domain_n == 1).sum() / np.log(2) / size
    assert held_out.bits_by_domain(nats_n1) == {"code": 0.0, "prose": pytest.approx(expected)}
    total = sum(len(text.encode()) for texts in texts.values() for text in texts)
    assert held_out.bits_per_byte(nats_n1) == pytest.approx(expected * size / total)


def test_held_out_text_is_never_trained_on(load, tokenizer, home):
    config = DataConfig(data=(str(home / "code"), str(home / "prose")))
    learned = list(training_texts(config))
    data = load()
    assert len(learned) == sum(file.manifest["train"]["documents"] for file in data.files) < len({**CODE, **PROSE})
    held_out, _ = split_at_eos(data.held_out(32).stream_n.tolist(), tokenizer.eos_id)
    for label in data.labels:
        assert not {tuple(ids) for ids in held_out} & {tuple(ids) for ids in stored(data, label, tokenizer)}
    assert not {tokenizer.decode(ids[1:-1]) for ids in held_out} & set(learned)


def test_measured_text_is_bounded_by_the_lowest_hashes(load, tokenizer, home):
    data = load((str(home / "prose"),), held_out_share=0.5, held_out_bytes=1000, token_folder=home / "half")
    documents, _ = split_at_eos(data.held_out(32).stream_n.tolist(), tokenizer.eos_id)
    expected, size = [], 0
    for _, text in sorted(held_out_texts(home, "prose", PROSE, 0.5)):
        if size < 1000:
            expected.append(text)
        size += len(text.encode())
    assert size > 5000
    assert sorted(tokenizer.decode(ids[1:-1]) for ids in documents) == sorted(expected)


def test_the_standard_library_is_measured_by_package(tokenizer, tmp_path, monkeypatch):
    root, rng = tmp_path / "library", np.random.default_rng(0)
    for package, count, size in ((".", 30, 3000), ("large", 30, 3000), ("small", 8, 300), ("tiny", 8, 30)):
        (root / package).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / package / f"m{i}.py").write_text("".join(f"x{rng.integers(10**9)}\n" for _ in range(size // 10)))
    monkeypatch.setattr(readers.sysconfig, "get_path", lambda name: str(root))
    data = load_data(DataConfig(held_out_share=0.5), tokenizer, tmp_path / "tokens")
    held_out = data.held_out(512)
    assert held_out.domains == ("large", "modules", "other")
    sizes = np.bincount(held_out.domain_n[1:], held_out.bytes_WT1[held_out.segments_WT[:, 1:] != 0])
    assert sizes.sum() == data.files[0].manifest["held_out"]["bytes"]
    assert np.all(sizes[:-1] >= 20_000)
    assert 0 < sizes[-1] < 20_000
    nats_n1 = np.random.default_rng(0).random(len(held_out.stream_n) - 1)
    by_domain = held_out.bits_by_domain(nats_n1)
    mean = sum(by_domain[name] * size for name, size in zip(held_out.domains, sizes, strict=True)) / sizes.sum()
    assert mean == pytest.approx(held_out.bits_per_byte(nats_n1))


def test_masked_windows_follow_the_documents(load, tokenizer, home):
    data = load((str(home / "prose"),), sample_masks=True, held_out_share=0.5, token_folder=home / "half")
    held_out = data.held_out(32)
    begins_WT = held_out.windows_WT == tokenizer.bos_id
    changes_WT1 = np.diff(held_out.segments_WT, axis=1) == 1
    real_WT1 = held_out.segments_WT[:, 1:] != 0
    assert np.array_equal(changes_WT1 & real_WT1, (begins_WT & (held_out.segments_WT != 0))[:, 1:])
    assert np.all(held_out.segments_WT[:, 0] == 1)
    # A document's first token is not scored.
    assert np.array_equal(held_out.scored_n1, held_out.stream_n[1:] != tokenizer.bos_id)


def test_the_record_is_plain_and_names_all(load):
    record = json.loads(json.dumps(load().record()))
    assert record["sources"]["prose"]["weight"] == 3
    assert record["sources"]["code"]["train"]["documents"] > 50
    assert record["sources"]["code"]["damage"]["damaged"] == 0
    assert record["fim_rate"] == 0.1


def test_damage_is_reported(home, tokenizer, tmp_path):
    lines = [json.dumps({"text": text}) for text in PROSE.values()]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{broken", *lines]))
    told = []
    config = DataConfig(data=(str(tmp_path / "a.jsonl"),))
    load_data(config, tokenizer, tmp_path / "tokens", told.append)
    assert "a: 1 of 181 records are damaged and left out" in told
    assert any(line.startswith("a: damaged: a.jsonl#91: not JSON") for line in told)
    with pytest.raises(DamagedSource, match=r"1 of 181 records are damaged: a\.jsonl#91: not JSON"):
        list(training_texts(replace(config, damaged_share=0.001)))


def test_fim_needs_its_tokens(home, load, tokenizer, tmp_path):
    other = json.loads((home / "tokenizer" / "tokenizer.json").read_text().replace("fim▁hole", "fim▁gap"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "tokenizer_config.json").write_text((home / "tokenizer" / "tokenizer_config.json").read_text())
    config = DataConfig(data=(str(home / "code"),))
    with pytest.raises(ValueError, match=r"FIM at rate 0\.1 needs tokens that this tokenizer lacks: <｜fim▁hole｜>"):
        load_data(config, load_tokenizer(tmp_path), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()
    assert load_data(replace(config, fim_rate=0), load_tokenizer(tmp_path), tmp_path / "tokens").fim.rate == 0


def test_a_host_may_have_several_groups_of_rows(load):
    expected = take(load().batches(length=24, rows=6, seed=1), 5)
    batches = load().batches(length=24, rows=6, seed=1, shard=((0, 2), 3))
    assert equal(take(batches, 5), [{"tokens": batch["tokens"][[0, 1, 4, 5]]} for batch in expected])
    assert batches.rows_taken == 30


def test_bad_settings_are_refused(load):
    data = load()
    with pytest.raises(ValueError, match="too few for one batch of 1000 x 30"):
        data.batches(length=30, rows=1000, seed=0)
    with pytest.raises(ValueError, match="too few for one row of 6000"):
        data.batches(length=6000, rows=1, seed=0)
    with pytest.raises(ValueError, match="2 tokens or more, not 1"):
        data.batches(length=1, rows=2, seed=0)
    for rows, shard in ((5, (0, 2)), (4, (2, 2)), (0, (0, 1)), (4, ((), 2)), (4, ((0, 2), 2))):
        with pytest.raises(ValueError, match="cannot be dealt to host"):
            data.batches(length=8, rows=rows, seed=0, shard=shard)
    for bad in (
        {"fim_rate": 1.5},
        {"held_out_share": 0},
        {"damaged_share": -1},
        {"workers": -1},
        {"held_out_bytes": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DataConfig(**bad)


def test_sources_are_spelled_with_label_and_weight(tmp_path):
    odd = tmp_path / "a=b@2"
    odd.mkdir()
    assert parse_source(str(odd)) == SourceSpec("a-b-2", odd, None)
    assert parse_source("web=text/a.jsonl.zst@0.25") == SourceSpec("web", Path("text/a.jsonl.zst"), 0.25)
    assert parse_source("stdlib@2") == SourceSpec("stdlib", None, 2.0)
    assert DataConfig().sources() == (SourceSpec("stdlib", None, None),)
    (tmp_path / "book.v2.txt").touch()
    assert parse_source(str(tmp_path / "book.v2.txt")).label == "book"
    assert DataConfig(data=("x", "y", "x")).data == ("x", "y")
    with pytest.raises(ValueError, match="Two sources are called a"):
        DataConfig(data=("x/a", "y/a"))
    with pytest.raises(ValueError, match="b has none"):
        DataConfig(data=("a=x@1", "b=y"))
    with pytest.raises(ValueError, match="must be above 0"):
        DataConfig(data=("a=x@0",))
    with pytest.raises(ValueError, match="names no source"):
        DataConfig(data=("",))
