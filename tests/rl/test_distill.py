"""Distillation and rejection sampling: what is made small, which answers are kept, what cannot be compared."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.rl.distill import ReverseKl, check_teacher, teacher_logits
from deepseek_jax.rl.reject import chosen
from deepseek_jax.rl.tasks import Carry
from deepseek_jax.rl.traces import byte_tokenizer, write_traces

CFG = tiny_config(n_layers=1, n_dense_layers=0, mtp_depth=0, vocab_size=24)


def test_the_reverse_kl_is_the_sum_over_the_whole_vocabulary_of_each_answer_token():
    """Enumerated, of a batch in two parts: at the position before each token that counts, divided once by their number;
    a pad's distribution and a prompt's are in none of it."""
    student, teacher = random_model(CFG), random_model(CFG, seed=1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 24, (4, 9)).astype(np.int32)
    segments, answer = np.ones((4, 9), np.int32), np.zeros((4, 9), np.float32)
    segments[1, 7:] = segments[3, 5:] = 0
    answer[:, 3:] = 1
    answer[2] = 0
    rows = {"tokens": tokens, "segments": segments, "answer": answer}
    ours, theirs = (np.asarray(teacher_logits(model, rows), np.float64) / 0.7 for model in (student, teacher))
    log_s, log_t = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (ours, theirs))
    expected, count = 0.0, 0
    for b in range(4):
        for t in range(1, 9):
            if answer[b, t] and segments[b, t]:
                expected += sum(
                    np.exp(log_s[b, t - 1, v]) * (log_s[b, t - 1, v] - log_t[b, t - 1, v]) for v in range(24)
                )
                count += 1
    objective, rows = ReverseKl(0.7), {**rows, "teacher": np.asarray(teacher_logits(teacher, rows))}
    counts = objective.counts({name: a.reshape(2, 2, *a.shape[1:]) for name, a in rows.items()})
    parts = [{name: a[i : i + 2] for name, a in rows.items()} for i in (0, 2)]
    assert float(counts[0]) == count == 6 + 4 + 2
    kl = jax.jit(lambda part: objective(student, part, counts, None, DEFAULT)[0])
    found = sum(float(kl(part)) for part in parts)
    assert found == pytest.approx(expected / count, rel=1e-5)
    same = {**parts[0], "teacher": np.asarray(teacher_logits(student, parts[0]))}
    assert float(kl(same)) == pytest.approx(0, abs=1e-6)


def test_the_shortest_right_answers_are_kept_once():
    task = Carry()
    first, second = task.held_out(2)

    def said(problem, thought, gold=None):
        return f"<think>{thought}</think><answer>{problem.gold if gold is None else gold}</answer>"

    asked = [first] * 5 + [second] * 2 + [first]
    texts = [
        said(first, "a long thought"),
        said(first, "short"),
        said(first, "short"),
        said(first, "x", gold="-1"),
        f"<answer>{first.gold}</answer>",
        said(second, "", gold="0"),
        said(second, "wrong form") + "!",
        said(first, ""),
    ]
    assert chosen(task, asked, texts, 1) == [(first, said(first, ""))]
    assert chosen(task, asked, texts, 2) == [(first, said(first, "")), (first, said(first, "short"))]
    # The prompt has opened the thought.
    assert chosen(task, [first], [said(first, "a").removeprefix("<think>")], 1, opened=True) != []
    with pytest.raises(ValueError, match="keep must be"):
        chosen(task, asked, texts, 0)


def test_a_task_writes_its_solutions_and_a_tokenizer_with_its_tags(tmp_path):
    task = Carry(documents=5)
    write_traces(task, tmp_path / "traces")
    words = dsj.load_tokenizer(tmp_path / "traces/tokenizer")
    lines = [json.loads(line) for line in (tmp_path / "traces/traces.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == list(task.training())
    assert ["".join(m["content"] for m in line["messages"]) for line in lines] == list(task.training())
    for text in (lines[0]["text"], "<think>é\U0001f600</think><answer"):
        # As text to train on, where control tokens have no names, and as a prompt.
        ids = words.encode(text, add_bos=False, special_tokens=False)
        assert words.decode(ids) == text
        assert words.encode(text) == [words.bos_id, *ids]
        assert sum(words.token_bytes()[ids]) == len(text.encode())
    assert words.encode("<think>", add_bos=False) == [264]
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_traces(task, tmp_path / "traces")


def test_a_teacher_of_other_tokens_is_refused(tmp_path):
    for name, cfg in (("a", CFG), ("b", CFG), ("c", replace(CFG, vocab_size=25))):
        dsj.save_pretrained(random_model(cfg), tmp_path / name)
        byte_tokenizer().save(str(tmp_path / name / "tokenizer.json"))
    check_teacher(tmp_path / "a", tmp_path / "b", CFG)
    with pytest.raises(ValueError, match="vocabulary of 25 tokens"):
        check_teacher(tmp_path / "c", tmp_path / "a", CFG)
    (tmp_path / "b/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="one id is another token"):
        check_teacher(tmp_path / "b", tmp_path / "a", CFG)
