"""The split follows from what documents say: names and order are nothing to it, near-duplicates stay together."""

import random
import shutil

import numpy as np
import pytest

from deepseek_jax.data.config import DataConfig, parse_source
from deepseek_jax.data.families import RUN, SIMILAR, families, sketch
from deepseek_jax.data.readers import open_source
from deepseek_jax.data.shuffle import text_key
from deepseek_jax.data.split import find_split

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("ra", "ti", "nos")]


def texts(count, words=120, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]


def with_changes(text, every, seed=0):
    """A text of which every so-manieth word is another."""
    draw, words = random.Random(seed), text.split()
    return " ".join(draw.choice(WORDS) if (i + seed) % every == 0 else word for i, word in enumerate(words))


def split(folder, said, share=0.2, names=None):
    folder.mkdir(parents=True)
    for i, text in enumerate(said):
        (folder / (names[i] if names else f"{i:04}.txt")).write_text(text)
    return find_split(open_source(parse_source(str(folder))), share)


def jaccard(a, b):
    a, b = ({text.encode()[i : i + RUN] for i in range(len(text) - RUN + 1)} for text in (a, b))
    return len(a & b) / len(a | b)


def test_sketches_estimate_the_similarity():
    one, other = texts(2, words=400)
    pairs = [(one, with_changes(one, every)) for every in (4, 8, 16, 64)] + [(one, other), (one, one)]
    for a, b in pairs:
        assert abs((sketch(a) == sketch(b)).mean() - jaccard(a, b)) < 0.08
    assert np.array_equal(sketch(one), sketch("\n  ".join(one.split())))  # white space is nothing
    assert sketch("").shape == sketch("short").shape == sketch(one * 50).shape


def test_families_are_joined_by_near_duplicates_whatever_the_order():
    said = texts(200)
    chain = [said[0]]
    for seed in range(6):  # each near the one before it, the ends far from each other
        chain.append(with_changes(chain[-1], 5, seed))
    assert jaccard(chain[0], chain[-1]) < SIMILAR < jaccard(chain[0], chain[1])
    said += [*chain[1:], said[7], with_changes(said[9], 10)]
    sketches, keys = np.stack([sketch(t) for t in said]), np.array([text_key(t) for t in said], np.uint64)
    found = families(sketches, keys)
    assert found[:200].tolist() == list(range(200))
    assert found[200:].tolist() == [0] * 6 + [7, 9]
    order = np.random.default_rng(0).permutation(len(said))
    again = families(sketches[order], keys[order])
    assert len(set(zip(found[order].tolist(), again.tolist(), strict=True))) == 200


def test_names_and_folders_are_nothing_to_the_split(tmp_path):
    said = texts(60)
    first = split(tmp_path / "a", said)
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "deeper" / "a")
    moved = find_split(open_source(parse_source(f"label={tmp_path / 'b'}")), 0.2)
    renamed = split(tmp_path / "c", said, names=[f"{len(said) - i:04}.md" for i in range(len(said))])
    lines = tmp_path / "all.jsonl"
    lines.write_text("".join(f'{{"text": "{text}"}}\n' for text in said))
    for other in (moved, renamed, find_split(open_source(parse_source(str(lines))), 0.2)):
        assert dict(zip(other.texts_D.tolist(), other.held_out_D.tolist(), strict=True)) == dict(
            zip(first.texts_D.tolist(), first.held_out_D.tolist(), strict=True)
        )
        assert sorted(other.keys_D.tolist()) == sorted(first.keys_D.tolist())
    assert 5 <= first.held_out_D.sum() <= 20


def test_families_stay_on_one_side_and_large_ones_are_trained_on(tmp_path):
    said = texts(100)
    pairs = [with_changes(text, 10) for text in said[:40]]
    large = [with_changes(said[99], 10, seed) for seed in range(20)]
    found = split(tmp_path / "a", said + pairs + large)
    assert np.array_equal(found.held_out_D[:40], found.held_out_D[100:140])
    assert 3 <= found.held_out_D[:40].sum() <= 20
    assert not found.held_out_D[[99, *range(140, 160)]].any()
    assert 0.1 < found.held_out_D.mean() < 0.3
    record = found.record
    assert (record["families"], record["in_families"], record["trained_for_size"], record["one_by_one"]) == (
        41,
        101,
        1,
        0,
    )
    assert record["largest"][0] == {"documents": 21, "first": "0099.txt"}
    assert "101 are in 41 families of near-duplicates, 1 of these too large to be held out" in found.line()


def test_text_of_one_form_is_split_one_by_one_and_says_so(tmp_path):
    said = [f"A template of some length that is always the same, filled with {i}." for i in range(100)]
    found = split(tmp_path / "a", [*said, said[0], *texts(1)])
    assert found.record["one_by_one"] == 101
    assert found.held_out_D[0] == found.held_out_D[100]  # the same text
    assert len(set(found.keys_D.tolist())) == 102
    assert 10 < found.held_out_D.sum() < 35
    assert "101 are near-duplicates of one another, nearly all there is" in found.line()


@pytest.mark.parametrize("share", [0.001, 0.29, 0.999])
@pytest.mark.parametrize("counts", [(2,), (1, 1), (2, 1), (2, 2), (5, 3, 2)])
def test_few_documents_still_have_both_splits(tmp_path, counts, share):
    said = [with_changes(text, 10, s) for text, n in zip(texts(3), counts, strict=False) for s in range(n)]
    found = split(tmp_path / "a", said, share)
    assert 0 < found.held_out_D.sum() < len(said)
    if len(counts) > 1 and share < 0.3:  # so that no family must be broken to fill the share
        assert len({*zip(found.families_D.tolist(), found.held_out_D.tolist(), strict=True)}) == len(counts)


def test_one_text_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match=r"3 document\(s\) of 1 different text"):
        split(tmp_path / "a", ["the same"] * 3)


def test_the_standard_librarys_tables_of_encodings_are_on_one_side():
    source = open_source(DataConfig().sources()[0])
    found = find_split(source, 0.05)
    names = [name for name in source.files if (source.root / name).stat().st_size]
    tables = np.array([name.startswith(("encodings/cp", "encodings/iso8859", "encodings/mac_")) for name in names])
    assert tables.sum() > 60
    assert not found.held_out_D[tables].any()
    assert found.record["largest"][0]["documents"] > 60
    sizes = np.array([(source.root / name).stat().st_size for name in names])
    assert 0.03 < found.held_out_D.mean() < 0.07
    assert 0.03 < sizes[found.held_out_D].sum() / sizes.sum() < 0.08
