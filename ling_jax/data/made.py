"""Text that a laptop makes: sums and products with their steps, and lines in which something is to be found again.

A document follows from its corpus and its number alone, so it is made when it is read, and the text is the same
everywhere.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

ARITHMETIC = "worked-arithmetic"
RETRIEVAL = "retrieval"
VERSION = 1  # change it when a document changes: it is what tells caches and prepared text of other text
ROUNDS = 4  # of questions on all keys of a retrieval document, at most
LONGEST = 320  # lines of filler
KEYS = ("Red", "Blue", "Green", "White", "Black", "Brown", "Golden", "Silver")
VALUES = ("Horse", "Tiger", "Eagle", "Rabbit", "Salmon", "Spider", "Turtle", "Monkey")
FILLER = (  # in any order
    "The morning train was late again, and nobody on the platform seemed to mind.",
    "A good soup needs time more than it needs salt.",
    "She left the window open so that the smell of rain could come in.",
    "Most of the old maps in the library had been drawn by people who never travelled.",
    "The river runs slower in autumn, when the mills upstream are closed.",
    "He mended the chair with glue, patience and a piece of string.",
    "It is easier to plant a tree than to keep it alive.",
    "The dog slept by the stove and woke only when the door opened.",
    "In the valley below, the bells rang for no reason that anyone could remember.",
    "Bread was baked before sunrise and sold before noon.",
    "Every wall of the house leaned a little towards the sea.",
    "The children counted the boats and quarrelled about the colour of the sails.",
    "An empty bottle stood on the table next to a letter without a stamp.",
    "Snow had covered the road, the fence and most of the barn.",
    "The teacher wrote a long word on the board and asked who could read it.",
    "There was a small market behind the church where farmers sold honey and wool.",
    "Wind moved through the tall grass like a slow thought.",
    "He always read the last page of a book first.",
    "The clock in the hall was wrong, but everyone had grown used to it.",
    "They painted the kitchen yellow and regretted it within a week.",
)


class Question(NamedTuple):
    """A key that is asked for, and what follows it where the answer is right."""

    key: str
    asked: str
    answer: str


def retrieval(
    draw: random.Random, filler: Sequence[str], keys: Sequence[str] = KEYS
) -> tuple[list[str], list[Question]]:
    """(lines, questions) of a document: each key is given two values among the lines of filler, of which the last one
    counts. The last value of question i lies in the i-th of as many equal parts of the lines.

    A key and its value are one word, which a tokenizer trained on such text has as one token. Found again in one step
    of attention, it can be learnt in minutes; a value that follows its key takes two, which can't.
    """
    placed = [((number + 0.5) / max(len(filler), 1), line) for number, line in enumerate(filler)]
    questions = []
    for part, key in enumerate(draw.sample(keys, len(keys))):
        last = (part + draw.random()) / len(keys)
        for place in (last * draw.random(), last):
            needle = f"-{key}{draw.choice(VALUES)}"
            placed.append((place, needle))
        questions.append(Question(key, f"?{key}", needle))
    return [f"{line}\n" for _, line in sorted(placed)], questions


def _retrieval(draw: random.Random) -> str:
    """A document of two keys and nothing else, for the half of them, up to one of all keys and LONGEST lines of filler.

    The short ones teach: what little a model attends to at first is among few lines there, and a key that is asked for
    again has been answered before.
    """
    size = 1 / (1 - draw.random() * (1 - 1 / (4 * LONGEST)))  # larger than x for one in x
    keys = draw.sample(KEYS, min(1 + int(size), len(KEYS)))
    lines, questions = retrieval(draw, draw.choices(FILLER, k=int(size / 4)), keys)
    for _ in range(draw.randint(1, ROUNDS)):
        lines += [f"{asked}{answer}\n" for _, asked, answer in draw.sample(questions, len(questions))]
    return "".join(lines)


def _arithmetic(draw: random.Random) -> str:
    problems = (draw.choice((_sum, _product))(draw) for _ in range(draw.randint(2, 24)))
    return "\n".join("".join(f"{line}\n" for line in problem) for problem in problems)


def _sum(draw: random.Random) -> Iterator[str]:
    a, b = (draw.randrange(10 ** draw.randint(1, 4)) for _ in range(2))
    yield f"{a} + {b} = ?"
    carry = 0
    for place in range(max(len(str(a)), len(str(b)))):
        one, two = (number // 10**place % 10 for number in (a, b))
        total = one + two + carry
        terms = f"{one} + {two} + {carry}" if carry else f"{one} + {two}"
        carry = total // 10
        yield f"{terms} = {total}: write {total % 10}" + (f", carry {carry}" if carry else "")
    yield f"{a} + {b} = {a + b}"


def _product(draw: random.Random) -> Iterator[str]:
    a, b = (draw.randrange(1, 10 ** draw.randint(1, 2)) for _ in range(2))
    yield f"{a} * {b} = ?"
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(b))) if digit != "0"]
    total = 0
    for part in parts:
        yield f"{a} * {part} = {a * part}"
        if total:
            yield f"{total} + {a * part} = {total + a * part}"
        total += a * part
    if len(parts) > 1:
        yield f"{a} * {b} = {total}"


class Made(NamedTuple):
    """A corpus that is made: how many documents it has, and each of them from random numbers of its own."""

    count: int
    document: Callable[[random.Random], str]


MADE = {ARITHMETIC: Made(2500, _arithmetic), RETRIEVAL: Made(16000, _retrieval)}


def documents(name: str) -> Iterator[str]:
    """The texts of a corpus, one after the other."""
    for number in range(MADE[name].count):
        yield MADE[name].document(random.Random(f"{name} {number}"))
