"""How well a chat model does a task: the share of its answers that are right, and how long they are, in each mode."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ling_jax.data.tokenizer import Tokenizer
from ling_jax.generate.engine import Engine, bucket
from ling_jax.generate.requests import Request
from ling_jax.generate.sampling import Sampling
from ling_jax.generate.text import Asker
from ling_jax.model.model import Ling
from ling_jax.post.tasks import Problem, Task, answer_of

log = logging.getLogger(__name__)

LOG_SECONDS = 10.0
GREEDY = 0.0


class Attempt(NamedTuple):
    """One answer of a model.

    Attributes:
      text: of its turn, the token that ends it left out.
      answer: what counts of it.
      tokens: ids of the turn, its end included.
      thinks: whether a think tag is in it.
      truncated: whether the limit ended it; it is then wrong.
    """

    text: str
    answer: str
    tokens: int
    thinks: bool
    truncated: bool
    right: bool


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Problems to ask a model, and how they are asked."""

    problems: Sequence[Problem]
    thinking: bool | None  # None: as the chat template has it
    samples: int  # drawn answers to each problem, beside a greedy one
    temperature: float = 1.0
    max_new_tokens: int = 256
    answer_tags: bool = False  # only what stands in <answer> tags counts
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """The answers to `Questions`: one greedy, and some drawn, to each problem."""

    questions: Questions
    greedy: list[Attempt]
    drawn: list[list[Attempt]]

    def summary(self) -> dict[str, float]:
        """The figures of a table: shares are of all answers; `..._stderr` are standard errors over problems."""
        samples = self.questions.samples
        right_P = np.array([sum(attempt.right for attempt in tries) for tries in self.drawn])
        best_P = np.array([attempt.right for attempt in self.greedy], float)
        every = [attempt for tries in self.drawn for attempt in tries]
        return {
            "pass@1": float(right_P.mean() / samples),
            "pass@1_stderr": _standard_error(right_P / samples),
            "pass@1_greedy": float(best_P.mean()),
            "pass@1_greedy_stderr": _standard_error(best_P),
            "pass@k": float(np.mean([pass_at(samples, int(right), samples) for right in right_P])),
            "k": samples,
            "mean_length": float(np.mean([attempt.tokens for attempt in every])),
            "mean_length_greedy": float(np.mean([attempt.tokens for attempt in self.greedy])),
            "truncated": float(np.mean([attempt.truncated for attempt in every])),
            "thinks": float(np.mean([attempt.thinks for attempt in every])),
            "thinks_greedy": float(np.mean([attempt.thinks for attempt in self.greedy])),
        }

    def records(self) -> Iterator[dict[str, Any]]:
        """Each answer as a JSON object."""
        for problem, greedy, drawn in zip(self.questions.problems, self.greedy, self.drawn, strict=True):
            asked = {"question": problem.question, "expected": problem.answer, "thinking": self.questions.thinking}
            yield {**asked, "temperature": GREEDY, **greedy._asdict()}
            for attempt in drawn:
                yield {**asked, "temperature": self.questions.temperature, **attempt._asdict()}


def pass_at(tries: int, right: int, k: int) -> float:
    """The chance that one of k answers is right, out of `tries` answers of which some were (Chen et al., arXiv
    2107.03374, eq. 1)."""
    return 1.0 - math.comb(tries - right, k) / math.comb(tries, k)


def _standard_error(values_P: np.ndarray) -> float:
    return float(values_P.std(ddof=1) / math.sqrt(len(values_P))) if len(values_P) > 1 else 0.0


def measure(
    model: Ling, tokenizer: Tokenizer, ends: Sequence[int], task: Task, questions: Questions, rows: int
) -> Result:
    """Asks all problems, and judges the answers.

    Args:
      ends: tokens that end an answer.
      rows: answers that are drawn side by side.
    Raises:
      ValueError: if a prompt and its answer are longer than the model has positions.
    """
    mode = questions.thinking
    if mode is not None and not tokenizer.switches_thinking:
        raise ValueError(f"the chat template of {tokenizer.name} has no switch for thinking: leave --thinking out")
    asked = [[{"role": "user", "content": problem.question}] for problem in questions.problems]
    prompts = [tokenizer.encode_chat(messages, thinking=mode) for messages in asked]
    longest = max(map(len, prompts))
    slots = min(bucket(longest + questions.max_new_tokens), model.config.max_positions)
    room = min(questions.max_new_tokens, slots - longest)
    if room < 1:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the model's {slots} positions")
    rows = min(rows, len(prompts) * questions.samples)
    engine = Engine(model, rows=rows, slots=slots, stops=max(len(ends), 1), least=min(bucket(longest), 512))

    def answers(temperature: float, samples: int) -> list[list[Attempt]]:
        sampling = Sampling(temperature=temperature)
        request = Request(prompt=(), max_new_tokens=room, sampling=sampling, seed=questions.seed, stop_ids=tuple(ends))
        return _answers(Asker(engine, tokenizer, request), task, questions, prompts, samples)

    greedy = [tries[0] for tries in answers(GREEDY, 1)]
    return Result(questions, greedy, answers(questions.temperature, questions.samples))


def _answers(
    asker: Asker, task: Task, questions: Questions, prompts: list[list[int]], samples: int
) -> list[list[Attempt]]:
    found: list[dict[int, Attempt]] = [{} for _ in prompts]
    said, done = time.monotonic(), 0
    for number, sample, text, answer in asker.complete(prompts, samples, apart=samples):
        truncated, counted = answer.end == "length", answer_of(text, questions.answer_tags)
        right = not truncated and task.is_right(questions.problems[number], counted)
        thinks = "<think>" in text or "</think>" in text
        found[number][sample] = Attempt(text, counted, len(answer.ids), thinks, truncated, right)
        done += 1
        if time.monotonic() - said > LOG_SECONDS:
            said = time.monotonic()
            log.info("%d of %d answers", done, len(prompts) * samples)
    return [[tries[sample] for sample in range(samples)] for tries in found]
