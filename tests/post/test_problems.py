"""Tasks: problems that no two splits share, answers that are right, and what counts of a model's answer."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_jax.post.measure import pass_at
from ling_jax.post.tasks import SPLITS, TASKS, TaskRows, answer_of, split_of, task_conversations, task_of


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_problem_whatever_the_seeds(name):
    task = TASKS[name]
    found = {split: {p.question for seed in (0, 1) for p in task.problems(split, 300, seed)} for split in SPLITS}
    assert all(len(questions) > 400 for questions in found.values())
    assert not found["train"] & found["evaluate"] and not found["train"] & found["reinforce"]
    assert all(split_of(question) == split for split, questions in found.items() for question in questions)
    assert [p.question for p in task.problems("train", 5, 0)] == [p.question for p in task.problems("train", 5, 0)]


def test_sums_are_worked_out_step_by_step():
    for problem in TASKS["sums"].problems("train", 50, 0):
        assert eval(problem.question) == int(problem.answer)
        assert (
            problem.steps[-1].endswith(f"={problem.answer}.")
            and problem.jump == f"{problem.question}={problem.answer}."
        )
        assert len(problem.steps) == problem.question.count("+")
        assert all(eval(step.rstrip(".").replace("=", "==")) for step in problem.steps)


def test_letters_are_counted_one_by_one():
    for problem in TASKS["letters"].problems("train", 50, 0):
        letter, word = problem.question.split(" in ")
        assert word.split().count(letter) == int(problem.answer) > 0
        assert problem.steps[-1].split()[1] == f"{problem.answer}." and len(problem.steps) == len(word.split())


def test_each_problem_is_answered_in_both_modes():
    rows = list(task_conversations(TASKS["sums"], TaskRows(20, 1.0, 0), answer_tags=False))
    assert len(rows) == 20 and [row.thinking for row in rows] == [False, True] * 10
    for instant, thinking in zip(rows[::2], rows[1::2], strict=True):
        assert instant.messages[0] == thinking.messages[0]
        assert instant.messages[1]["content"] == thinking.messages[1]["content"]
        assert "reasoning_content" in thinking.messages[1] and "reasoning_content" not in instant.messages[1]


def test_the_share_of_worked_answers_is_a_setting():
    def worked(share: float) -> float:
        rows = list(task_conversations(TASKS["sums"], TaskRows(800, share, 0), answer_tags=True))[1::2]
        assert all(row.messages[1]["content"].startswith("<answer>") for row in rows)
        return sum(row.messages[1]["reasoning_content"].count(".") > 1 for row in rows) / len(rows)

    assert worked(1.0) == 1 and worked(0.0) == 0 and abs(worked(0.4) - 0.4) < 0.06


@pytest.mark.parametrize(
    ("text", "tags", "answer"),
    [
        ("42", False, "42"),
        (" 42\n", False, "42"),
        ("\n<think>\n1+1=2.\n</think>\n\n42", False, "42"),
        ("<think>a</think>b</think> c ", False, "c"),
        ("<think>\nnever ends", False, "<think>\nnever ends"),
        ("<think>a</think><answer> 42 </answer>", True, "42"),
        ("<answer>1</answer> or <answer>2</answer>", True, "2"),
        ("<answer>1</answer><think>x</think>2", True, ""),
        ("<answer>42", True, ""),
        ("", False, ""),
    ],
)
def test_what_counts_as_the_answer(text, tags, answer):
    assert answer_of(text, tags) == answer


@given(st.integers(1, 12), st.data())
def test_pass_at_k_is_the_chance_that_one_of_k_is_right(tries, data):
    right, k = data.draw(st.integers(0, tries)), data.draw(st.integers(1, tries))
    wrong = math.prod((tries - right - i) / (tries - i) for i in range(k))
    assert pass_at(tries, right, k) == pytest.approx(1 - wrong)


def test_a_file_of_rows_is_a_task(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": 4}\n{"prompt": "b", "answer": " five "}\n')
    task = task_of(str(file))
    problems = {p.question: p for p in task.problems("evaluate", 10, 0)}
    assert task.is_right(problems["a"], "4") and task.is_right(problems["b"], "five")
    assert not task.is_right(problems["a"], "5")
    file.write_text(json.dumps({"question": "a"}))
    with pytest.raises(ValueError, match="rows.jsonl:1: a task's row has a text 'question' and an 'answer'"):
        task_of(str(file))


def test_an_unknown_task_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="no task 'sum': there are sums, letters, reasoning-gym:NAME, and"):
        task_of("sum")


def gym(monkeypatch) -> None:
    """A library as reasoning-gym is: entries with a question and an answer, a scorer that gives points for trying."""

    class DataSet(list):
        def score_answer(self, answer: str, entry: dict) -> float:
            if answer == "junk":
                raise KeyError("junk")
            return 1.0 if answer == entry["answer"] else 0.05

    def create_dataset(name: str, size: int, seed: int) -> DataSet:
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        return DataSet({"question": f"{seed} + {i}?", "answer": str(seed + i), "metadata": {}} for i in range(size))

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))


def test_reasoning_gym_counts_full_marks_and_failures_alone(monkeypatch):
    gym(monkeypatch)
    task = task_of("reasoning-gym:chain_sum")
    problems = task.problems("evaluate", 20, 7)
    assert len(problems) == 20 and all(split_of(p.question) == "evaluate" for p in problems)
    assert task.is_right(problems[0], problems[0].answer) and not task.is_right(problems[0], "nearly")
    assert not task.is_right(problems[0], "junk") and task.failed == 1
    with pytest.raises(ValueError, match="task reasoning-gym:other: Dataset 'other' not registered"):
        task_of("reasoning-gym:other").problems("evaluate", 1, 0)


def test_without_reasoning_gym_there_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"needs reasoning-gym, which is not installed: pip install 'ling-jax\[gym\]'"):
        task_of("reasoning-gym:chain_sum")
