"""Tasks: problems with answers that can be checked, to learn from, to be rewarded for and to be measured by.

A made task draws its problems from a seed and works them out itself, so that it can write an instant answer and one
that thinks first. Each problem belongs to one split, told by a hash of its text: what is trained on, reinforced or
evaluated can never be the same problem, whatever the seeds.
"""

import hashlib
import importlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ling_jax.data.reading import read_records
from ling_jax.files.paths import at
from ling_jax.post.rows import Conversation

SPLITS = {"train": range(0, 80), "reinforce": range(80, 90), "evaluate": range(90, 100)}  # of 100 hashes
DRAWS = 1000  # in a row that gave nothing new, after which a task has no more problems
GYM = "reasoning-gym:"
THINK_END, ANSWER_TAG = "</think>", "answer"
TERMS, LARGEST = (3, 5), 99  # of a sum
LETTERS, WORD = "abcdefgh", (5, 9)


class Problem(NamedTuple):
    """A problem to ask.

    Attributes:
      question, answer: texts; whoever asks gives nothing but the question.
      steps: sentences that lead to the answer.
      jump: one sentence that has the answer without a step.
      data: what a scorer of somebody else's needs.
    """

    question: str
    answer: str
    steps: tuple[str, ...] = ()
    jump: str = ""
    data: Any = None


class Task(Protocol):
    """Problems, and whether an answer to one is right."""

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """Up to `count` problems of a split, no two alike."""
        ...

    def is_right(self, problem: Problem, answer: str) -> bool:
        """Whether the text of an answer, without reasoning and tags, is right."""
        ...


def split_of(question: str) -> str:
    """The split that a problem belongs to, by its text."""
    number = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % 100
    return next(split for split, numbers in SPLITS.items() if number in numbers)


@dataclass(frozen=True)
class MadeTask:
    """A task whose problems are drawn.

    Attributes:
      draw: makes a problem of random numbers.
      stamp: changes when the problems do.
    """

    name: str
    draw: Callable[[random.Random], Problem]
    stamp: str

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        found: dict[str, Problem] = {}
        draw, idle = random.Random(f"{self.stamp} {split} {seed}"), 0
        while len(found) < count and idle < DRAWS:
            problem = self.draw(draw)
            new = problem.question not in found and split_of(problem.question) == split
            idle = 0 if new else idle + 1
            if new:
                found[problem.question] = problem
        return list(found.values())

    def is_right(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer


def _sum(draw: random.Random) -> Problem:
    """17+8+40: three to five numbers of one or two digits, added one after the other."""
    numbers = [draw.randint(1, LARGEST) for _ in range(draw.randint(*TERMS))]
    question, total, steps = "+".join(map(str, numbers)), numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}.")
        total += number
    return Problem(question, str(total), tuple(steps), f"{question}={total}.")


def _letters(draw: random.Random) -> Problem:
    """How often a letter is in a word, counted letter by letter."""
    word = "".join(draw.choice(LETTERS) for _ in range(draw.randint(*WORD)))
    letter, count, steps = draw.choice(sorted(set(word))), 0, []
    for at_hand in word:
        count += at_hand == letter
        steps.append(f"{at_hand} {count}.")
    return Problem(f"{letter} in {' '.join(word)}", str(count), tuple(steps), f"{letter} is there {count} times.")


TASKS = {
    "sums": MadeTask("sums", _sum, "sums 1"),
    "letters": MadeTask("letters", _letters, "letters 1"),
}


class TaskRows(NamedTuple):
    """How conversations are made of a task.

    Attributes:
      count: of them, half instant and half thinking answers, to the same problems.
      worked: share of the thinking answers that show each step; the others jump to the result.
    """

    count: int
    worked: float
    seed: int


def task_conversations(task: MadeTask, rows: TaskRows, answer_tags: bool) -> Iterator[Conversation]:
    """Conversations of a task's training split: to each problem an instant answer and one that thinks first."""
    draw = random.Random(f"{task.stamp} styles {rows.seed}")
    for number, problem in enumerate(task.problems("train", -(-rows.count // 2), rows.seed)):
        worked = draw.random() < rows.worked
        for thinking in (False, True):
            if 2 * number + thinking < rows.count:
                answer = {"role": "assistant", "content": problem.answer}
                if thinking:
                    answer["reasoning_content"] = " ".join(problem.steps) if worked else problem.jump
                    answer["content"] = f"<answer>{problem.answer}</answer>" if answer_tags else problem.answer
                asked = {"role": "user", "content": problem.question}
                yield Conversation([asked, answer], None, thinking, f"{task.name}:{2 * number + thinking}")


def answer_of(text: str, tags: bool = False) -> str:
    """The text that counts as the answer: all behind the last `</think>`, stripped, and with `tags` what stands in the
    last pair of `<answer>` tags there. Without a think tag it is the whole text; without the pair, "".

    Args:
      text: of the assistant's turn, without the token that ends it.
    """
    answer = text.rpartition(THINK_END)[2]
    if tags:
        _, begun, rest = answer.rpartition(f"<{ANSWER_TAG}>")
        inside, ended, _ = rest.partition(f"</{ANSWER_TAG}>")
        answer = inside if begun and ended else ""
    return answer.strip()


class FileTask:
    """The rows of a file: a text `question` (or `prompt`), and the `answer` that the model's is compared with."""

    def __init__(self, path: str):
        self._rows = []
        for _, line, row in read_records(at(path)):
            row = row if isinstance(row, dict) else {}
            question, answer = row.get("question", row.get("prompt")), row.get("answer")
            if not isinstance(question, str) or isinstance(answer, bool) or not isinstance(answer, str | int | float):
                raise ValueError(f"{path}:{line}: a task's row has a text 'question' and an 'answer', not {row}")
            self._rows.append(Problem(question, str(answer).strip()))

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        return random.Random(seed).sample(self._rows, min(count, len(self._rows)))

    def is_right(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer


class GymTask:
    """A data set of reasoning-gym, an extra. Its scorers give some points to wrong answers, so that only full marks
    count here; where one fails, the answer is wrong and `failed` counts it."""

    def __init__(self, name: str):
        try:
            self._library = importlib.import_module("reasoning_gym")
        except ModuleNotFoundError:
            raise ValueError(
                f"task {GYM}{name} needs reasoning-gym, which is not installed: pip install 'ling-jax[gym]'"
            ) from None
        self._name, self.failed = name, 0
        self._data: Any = None

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        found: dict[str, Problem] = {}
        try:
            self._data = self._library.create_dataset(self._name, size=count * len(SPLITS) * 20, seed=seed)
        except ValueError as error:
            raise ValueError(f"task {GYM}{self._name}: {error}") from error
        for entry in self._data:
            if len(found) == count:
                break
            if split_of(entry["question"]) == split:
                found[entry["question"]] = Problem(entry["question"], str(entry["answer"]), data=entry)
        return list(found.values())

    def is_right(self, problem: Problem, answer: str) -> bool:
        try:
            return self._data.score_answer(answer, problem.data) >= 1
        except Exception:  # a scorer is a program of somebody's: it may fail in any way on what a model writes
            self.failed += 1
            return False


def task_of(name: str) -> Task:
    """The task of a name, `reasoning-gym:NAME`, or a file of rows; ValueError, with what there is, for none."""
    if name in TASKS:
        return TASKS[name]
    if name.startswith(GYM):
        return GymTask(name.removeprefix(GYM))
    if at(name).is_file():
        return FileTask(name)
    raise ValueError(f"no task {name!r}: there are {', '.join(TASKS)}, {GYM}NAME, and .jsonl or .parquet files")
