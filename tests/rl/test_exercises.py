"""Generated problems: pinned, solved by their own solutions, and held-out ones that are never trained on."""

from dataclasses import replace

import numpy as np
import pytest

from deepseek_jax.data.tasks import Addition
from deepseek_jax.rl import traces
from deepseek_jax.rl.recipe import Rewards
from deepseek_jax.rl.reject import chosen
from deepseek_jax.rl.rewards import format_reward, parts, total, value_of
from deepseek_jax.rl.tasks import Carry, Countdown, Mixed, Parity, Reverse, Sort, Tags, parse_exercise, scored

TASKS = (Tags(), Sort(), Reverse(symbols=6), Carry(), Mixed(), Parity(bits=10), Countdown())
PINNED = [
    "iadf:<think><answer></think></answer>",
    "sort 08270=<think></think><answer>00278</answer>",
    "reverse icafgj=<think></think><answer>jgfaci</answer>",
    "51+91=<think>1+1+0=02 5+9+0=14</think><answer>142</answer>",
    "51+33=<think>b+d+a=ae f+d+a=ai</think><answer>84</answer>",
    "0111001101=<think></think><answer>0</answer>",
    "2 7 5>33=<think>7*5=35 35-2=33</think><answer>(7*5)-2</answer>",
]
each = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def test_the_formats():
    assert [task.held_out(1)[0].text for task in TASKS] == PINNED


@each
def test_solutions_are_right_and_what_is_changed_in_them_is_not(task):
    problems = task.held_out(40)
    columns = scored(task, problems, [p.solution for p in problems])
    assert set(columns) == {"accuracy", "format", "graded"} | ({"language"} if isinstance(task, Mixed) else set())
    for problem in problems:
        assert problem.text == problem.prompt + problem.solution
        assert problem.text[slice(*problem.answers[0][:2])] == problem.solution
    if isinstance(task, Tags):
        assert 0 <= columns["format"].mean() < 0.4
        np.testing.assert_array_equal(columns["accuracy"], columns["format"])
        assert scored(task, problems[:1], ["<think></think><answer></answer>"])["format"].tolist() == [1]
        return
    assert (columns["accuracy"] == 1).all()
    assert (columns["format"] == 1).all()
    # Another problem's answer, the right one outside its tags, none at all.
    other = "<think></think><answer>-1</answer>"
    for text in (other, problems[0].gold, f"<think>{problems[0].gold}</think>", ""):
        assert scored(task, problems[:1], [text])["accuracy"].tolist() == [0]
        assert task.graded(problems[0], None) == 0
    assert task.graded(problems[0], problems[0].gold) == 1


@each
def test_no_held_out_problem_is_ever_trained_on(task):
    held_out = task.held_out(25)
    asked = {problem.asked for problem in held_out}
    assert len({problem.prompt for problem in held_out}) == 25
    for seed in (0, 1):
        other = replace(task, seed=seed, documents=400)
        problems = list(other.training_items())
        assert [p.text for p in problems] == list(other.training())
        assert not asked & {p.asked for p in problems}
        assert not {p.prompt for p in held_out} & {p.prompt for p in problems}
    assert list(replace(task, documents=5).training_items()) == list(replace(task, documents=9).training_items())[:5]


def test_what_is_the_same_question_is_on_the_same_side():
    for task in (Sort(symbols=3), Reverse(symbols=3)):
        sides = {}
        for problem in [*replace(task, documents=600).training_items(), *task.held_out(20)]:
            word = problem.prompt.split()[1].removesuffix("=")
            key = "".join(sorted(word)) if isinstance(task, Sort) else min(word, word[::-1])
            sides.setdefault(key, set()).add(problem.is_held_out)
        assert all(len(found) == 1 for found in sides.values())
    # And carries' sides are addition's, whatever the text.
    asked = {item.asked for item in Addition(digits=2).held_out(100)}
    assert not asked & {problem.asked for problem in Carry(documents=500).training_items()}


def test_long_reasoning_is_rare_in_parity_and_right():
    problems = list(Parity(bits=8, long=20, documents=1000).training_items())
    thoughts = [parts(p.solution)[0] for p in problems]
    assert 0.16 < np.mean([bool(t) for t in thoughts]) < 0.24
    for problem, thought in zip(problems, thoughts, strict=True):
        bits = [int(c) for c in problem.prompt[:-1]]
        assert problem.gold == str(sum(bits) % 2)
        assert thought in ("", "".join(str(n) for n in np.cumsum(bits) % 2))
    assert all(not parts(p.solution)[0] for p in Parity(long=0, documents=50).training_items())
    assert all(parts(p.solution)[0] for p in Parity(long=100, documents=50).training_items())


def test_tags_are_in_order_as_often_as_asked():
    texts = [p.solution for p in Tags(ordered=10, documents=2000).training_items()]
    assert 0.08 < np.mean([format_reward(text) for text in texts]) < 0.12
    assert len(set(texts)) == 24


def test_countdown_takes_any_expression_of_its_numbers():
    task = Countdown()
    (problem,) = task.held_out(1)
    assert problem.prompt == "2 7 5>33="
    for answer in ("(7*5)-2", "5*7-2", " 7 * 5 - 2 "):
        assert task.right(problem, answer) == 1
    for answer in ("33", "7*5-2+0", "7*5-1-1", "(7+5)*2", "35-2", "", None, "7*5-2;"):
        assert task.right(problem, answer) == 0
    for found in replace(task, numbers=4, documents=100).training_items():
        assert 1 <= value_of(found.gold)[0] <= 99
        last = parts(found.solution)[0].split(" ")[-1]
        assert last.endswith(f"={value_of(found.gold)[0]}")


def test_tasks_are_spelled_as_others_are():
    assert parse_exercise("parity,bits=12,long=25") == Parity(bits=12, long=25)
    assert parse_exercise(Countdown(numbers=4).spelled) == Countdown(numbers=4)
    for spelled, message in (
        ("addition", "no task 'addition'; choose one of tags, sort, reverse, carry, mixed, parity, countdown"),
        ("parity,long=101", "at most 100"),
        ("sort,symbols=1", "at least 2"),
        ("countdown,largest=x", "must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_exercise(spelled)
    with pytest.raises(ValueError, match="too rarely solvable"):
        next(Countdown(numbers=2, largest=10**9, target=1).training_items())


def test_language_is_a_share_and_a_column_of_its_own():
    """The share of a thought's steps in digits, 0 without the form; it weighs nothing unless it is asked for."""
    task = Mixed(digits=2, foreign=50)
    steps = {p.solution: parts(p.solution)[0].split() for p in task.training_items()}
    problem = next(p for p in task.training_items() if len({s[0].isdigit() for s in steps[p.solution]}) == 2)
    whole = replace(task, foreign=0)
    texts = [problem.solution, problem.solution.replace("</answer>", ""), "<think>b+a=b</think><answer>1</answer>"]
    assert scored(task, [problem] * 3, texts)["language"].tolist() == [0.5, 0, 0]
    assert {t for p in whole.held_out(9) for t in scored(whole, [p], [p.solution])["language"]} == {1}
    assert chosen(task, [problem], [problem.solution], 1) == []
    digits = whole.held_out(1)[0]
    assert chosen(whole, [digits], [digits.solution], 1) == [(digits, digits.solution)]
    columns = scored(task, [problem], [problem.solution])
    weights = {name: getattr(Rewards(language=2.0), name) for name in columns}
    assert total(columns, weights).tolist() == [1 + 1 + 2 * 0.5]


def test_traces_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(traces, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            traces.write_traces(Sort(documents=4), tmp_path / "sort")
    assert list(tmp_path.iterdir()) == []
    traces.write_traces(Sort(documents=4), tmp_path / "sort")
    assert sorted(path.name for path in (tmp_path / "sort").iterdir()) == ["tokenizer", "traces.jsonl"]
    with pytest.raises(FileExistsError, match="not an empty folder"):
        traces.write_traces(Sort(documents=4), tmp_path / "sort")
