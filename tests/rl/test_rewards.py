"""Rewards by rules: anchored formats, the last box, exact numbers, shares of a language, LaTeX in its own process."""

import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest

from deepseek_jax.rl import latex
from deepseek_jax.rl.latex import Judge
from deepseek_jax.rl.rewards import (
    CHINESE,
    ENGLISH,
    Language,
    answer_of,
    boxed,
    correct_prefix,
    format_reward,
    language_consistency,
    parts,
    same_integer,
    total,
    value_of,
)

GOOD = "<think>1+1=2</think>\n<answer> 2 </answer>"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (GOOD, 1),
        (f"\n {GOOD} \n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a\nb</think><answer>c\nd</answer>", 1),
        (GOOD * 2, 0),
        (GOOD + "<answer>3</answer>", 0),
        ("<think>a</think>" + GOOD, 0),
        (f"So: {GOOD}", 0),
        (f"{GOOD} indeed", 0),
        ("<think>a</think> so <answer>2</answer>", 0),
        ("<answer>2</answer><think>a</think>", 0),
        ("<think>a<answer>2</answer></think>", 0),
        ("<think><think>a</think><answer>2</answer>", 0),
        ("<think>a</think><answer>2", 0),
        ("a</think><answer>2</answer>", 0),
        ("<THINK>a</THINK><ANSWER>2</ANSWER>", 0),
        ("", 0),
    ],
)
def test_the_format_is_one_thought_then_one_answer_and_nothing_else(text, form):
    assert format_reward(text) == form
    assert (answer_of(text) is not None) == form


def test_the_prompt_may_have_opened_the_thought():
    rest = GOOD.removeprefix("<think>")
    assert (format_reward(rest, opened=True), answer_of(rest, opened=True)) == (1, "2")
    assert (format_reward(GOOD, opened=True), format_reward(rest)) == (0, 0)
    assert parts(GOOD) == ("1+1=2", " 2 ")


def test_the_answer_is_read_from_its_tags_alone():
    assert answer_of("<think>the answer is 7</think><answer>8</answer>") == "8"
    assert answer_of("7") is None
    assert answer_of(r"\boxed{7}") is None


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{4}", "4"),
        (r"first \boxed{3}, no: \boxed{ 4 }.", "4"),
        (r"\boxed{3} then \fbox{4}", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{}", ""),
        (r"\boxed{3} and \boxed{4", None),
        (r"\boxed 4", None),
        ("4", None),
    ],
)
def test_the_last_box_with_its_braces_balanced(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("answer", "right"),
    [("42", 1), (" 042\n", 1), ("+42", 1), ("42.0", 0), ("4 2", 0), ("42,", 0), ("-42", 0),
     ("x", 0), ("", 0), (None, 0), ("٤٢", 0)],
)  # fmt: skip
def test_integers_are_compared_exactly(answer, right):
    assert same_integer(answer, 42) == right
    assert same_integer("9007199254740993", 9007199254740992) == 0


@pytest.mark.parametrize(
    ("expression", "value", "numbers"),
    [
        ("1+2*3", 7, [1, 2, 3]),
        ("(1+2)*3", 9, [1, 2, 3]),
        ("10-2-3", 5, [10, 2, 3]),
        ("12/5/2", Fraction(6, 5), [12, 5, 2]),
        (" ( (7 * 3) + 2 ) ", 23, [7, 3, 2]),
    ],
)
def test_expressions_have_exact_values(expression, value, numbers):
    assert value_of(expression) == (value, numbers)


@pytest.mark.parametrize(
    "expression",
    ["", "1+", "(1", "1)", "1 2", "-1", "2**3", "1//2", "1/0", "a",
     "__import__('os')", "1e3", "1.5", "9" * 31, "(" * 5000],
)  # fmt: skip
def test_what_is_no_expression_has_none(expression):
    assert value_of(expression) is None


def test_a_reward_that_rises_before_the_answer_is_right():
    assert [correct_prefix(a, "abcd") for a in ("abcd", "abxd", "ab", "", None, "xbcd", "abcdabcd")] == [
        1, 0.5, 0.5, 0, 0, 0, 0.5,
    ]  # fmt: skip


def test_language_consistency_is_the_share_of_words():
    digits, letters = Language("0123456789"), Language("abcdefghij")
    assert language_consistency("12 ab 34 cd", digits, (letters,)) == 0.5
    assert language_consistency("12 a4 + 34", digits, (letters,)) == pytest.approx(2 / 3)
    assert language_consistency("12 34", digits, (letters,)) == 1
    assert [language_consistency(text, digits, (letters,)) for text in ("", "+ = !", "ab")] == [0, 0, 0]
    assert language_consistency("We add 3 numbers, 然后 done.", ENGLISH, (CHINESE,)) == pytest.approx(4 / 6)
    assert language_consistency("We add 3 numbers, 然后 done.", CHINESE, (ENGLISH,)) == pytest.approx(2 / 6)
    assert language_consistency("naïve Straße", ENGLISH, (CHINESE,)) == 1
    with pytest.raises(ValueError, match="alphabet or a script"):
        Language()


def test_each_reward_is_a_column_and_their_sum_keeps_what_could_not_be_computed():
    columns = {"accuracy": np.array([1, 0, np.nan]), "format": np.array([1, 1, 0])}
    np.testing.assert_array_equal(total(columns), [2, 1, np.nan])
    np.testing.assert_array_equal(total(columns, {"accuracy": 1.0, "format": 0.5}), [1.5, 0.5, np.nan])
    with pytest.raises(ValueError, match="give one for each"):
        total(columns, {"accuracy": 1.0})


def test_latex_answers_are_compared_in_a_process_that_a_limit_ends():
    """Asked from a thread, where math-verify's own signals would fail."""
    found = {}

    def ask():
        with Judge(seconds=30) as judge:
            found["rewards"] = [
                judge.reward(answer, gold)
                for answer, gold in (
                    (r"\frac{1}{2}", "0.5"), ("x+1", "1+x"), ("3", "4"), (r"\frac{", "2"), ("", "2"), (None, "2"),
                )
            ]  # fmt: skip
            for gold in (r"\frac{", ""):
                with pytest.raises(ValueError, match="is not understood as LaTeX"):
                    judge.check_gold(gold)
            judge.check_gold(r"\frac{2}{3}")
            first, judge._seconds = judge._process, 0.5
            found["tower"] = judge.reward("9^{9^{9^{9}}}", "9^{9^{9^{8}}}")
            judge._seconds = 30
            found["after"] = judge.reward("2", "2.0")
            found["processes"] = first, judge._process
        found["ended"] = judge._process

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found["rewards"] == [1, 1, 0, 0, 0, 0]
    # Neither right nor wrong: its group is normalised without it.
    assert np.isnan(found["tower"])
    assert found["after"] == 1
    assert found["processes"][0] is not found["processes"][1]
    assert found["ended"] is None


def test_without_math_verify_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setattr(latex.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'deepseek-jax\[math\]'"):
        Judge()


def test_rewards_and_tasks_load_no_jax():
    code = "import sys, deepseek_jax.rl.tasks, deepseek_jax.rl.latex; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
