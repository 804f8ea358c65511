"""Measures chat models on a task: python -m ling_jax.post.evaluate --checkpoint DIR --task NAME

Each problem is asked in both modes, at once and with thinking: once greedily and --samples times at --temperature. An
answer is what follows the last </think>, up to the turn's end; one that the limit cuts off is wrong.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import tyro

from ling_jax.cli import program, run_main
from ling_jax.commands.harness import keep_record
from ling_jax.config import SFTRun
from ling_jax.config.text import columns
from ling_jax.convert.load import load_weights
from ling_jax.convert.tokenizer import ends_of, tokenizer_of
from ling_jax.convert.weights import StoredWeights, Weights, open_weights
from ling_jax.files.paths import at, write_whole
from ling_jax.post.measure import Questions, Result, measure
from ling_jax.post.tasks import GymTask, Task, task_of

MODES = {"on": True, "off": False}
HEADINGS = ("checkpoint", "thinking", "pass@1 greedy", "pass@1", "pass@k", "mean tokens", "cut off", "thinks")
KEPT_SAMPLES = 10  # answers that a run's report shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatEvaluationCommand:
    checkpoint: tuple[str, ...]
    """Runs, checkpoints, HF folders or hub ids; several are compared in one table."""
    task: str
    """sums, letters, reasoning-gym:NAME, or a file of rows with `question` and `answer`."""
    thinking: Literal["on", "off"] | None = None
    """One of the modes; by default both, where the chat template has a switch for them."""
    problems: int = 512
    """How many are asked."""
    samples: int = 1
    """Answers to each that are drawn, besides a greedy one; pass@k is of all of them."""
    temperature: float = 1.0
    """Of the drawn answers."""
    max_new_tokens: int = 256
    """Most tokens of an answer; one that reaches it is wrong."""
    answer_tags: bool | None = None
    """Count only what stands in <answer> tags; by default as the checkpoint's run was trained."""
    seed: int = 0
    """Of the problems and the draws."""
    batch_size: int = 64
    """Answers that are drawn side by side."""
    out: str | None = None
    """A file for all answers, a JSON object a line. Those of a run are kept in its folder anyway."""
    json: bool = False
    """End with one JSON object: pass@1, pass@k, mean_length and more."""


def check(command: ChatEvaluationCommand) -> None:
    """Raises ValueError for values that have no meaning."""
    for name in ("problems", "samples", "max_new_tokens", "batch_size"):
        if (value := getattr(command, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} = {value} must be at least 1")
    if command.temperature <= 0:
        raise ValueError(f"--temperature = {command.temperature} must be above 0: a greedy answer is given anyway")


def evaluate(command: ChatEvaluationCommand, checkpoint: str, task: Task) -> dict[bool | None, Result]:
    """The results of a checkpoint by mode; None is the template's own.

    Raises:
      ValueError: before weights are read, for what cannot be asked.
    """
    weights, tokenizer = open_weights(checkpoint), tokenizer_of(checkpoint)
    tokenizer.check_fits(weights.config.vocab_size)
    problems = task.problems("evaluate", command.problems, command.seed)
    if not problems:
        raise ValueError(f"task {command.task} has no problems")
    modes: list[bool | None] = [MODES[command.thinking]] if command.thinking else [False, True]
    if not tokenizer.switches_thinking:
        modes = [MODES[command.thinking] if command.thinking else None]
    run = weights.run if isinstance(weights, StoredWeights) else None
    tags = command.answer_tags
    if tags is None:
        tags = isinstance(run, SFTRun) and run.sft.answer_tags
    model, ends = load_weights(weights), ends_of(checkpoint, tokenizer)
    results = {}
    for mode in modes:
        questions = Questions(
            problems=problems, thinking=mode, samples=command.samples, temperature=command.temperature,
            max_new_tokens=command.max_new_tokens, answer_tags=tags and mode is not False, seed=command.seed,
        )  # fmt: skip
        results[mode] = measure(model, tokenizer, ends, task, questions, command.batch_size)
    _keep(weights, command, results)
    return results


def _keep(weights: Weights, command: ChatEvaluationCommand, results: dict[bool | None, Result]) -> None:
    """Keeps figures and answers in the run that the weights are a step of, and in its report."""
    name = re.sub(r"[^\w.+-]", "_", command.task)
    found, samples = {}, []
    for mode, result in results.items():
        figures = result.summary()
        shown = {"pass@1,greedy": figures["pass@1_greedy"], "pass@1_stderr,greedy": figures["pass@1_greedy_stderr"],
                 "pass@1,none": figures["pass@1"], "pass@1_stderr,none": figures["pass@1_stderr"],
                 f"pass@{command.samples},none": figures["pass@k"], "mean tokens,none": figures["mean_length"],
                 "cut off,none": figures["truncated"], "thinks,none": figures["thinks"]}  # fmt: skip
        found[f"{command.task} ({told(mode)})"] = shown
        samples += [record for record in result.records() if not record["temperature"]][:KEPT_SAMPLES]
    record = {
        "step": weights.step if isinstance(weights, StoredWeights) else None,
        "results": found,
        "n-samples": {
            task: {"effective": len(results[mode].greedy)} for task, mode in zip(found, results, strict=True)
        },
        "samples": samples,
        **{field: getattr(command, field) for field in ("task", "problems", "temperature", "max_new_tokens", "seed")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    path = keep_record(weights, f"{name}-{command.thinking}" if command.thinking else name, record)
    if path is not None:
        write_answers(str(path.parent / f"{path.stem}.jsonl"), results.values())


def write_answers(path: str, results: Iterable[Result]) -> None:
    """Writes every answer, a JSON object a line."""
    lines = (json.dumps(record, ensure_ascii=False) for result in results for record in result.records())
    write_whole(at(path), "\n".join(lines) + "\n")


def told(mode: bool | None) -> str:
    """A mode as it is called in tables."""
    return "as the template has it" if mode is None else "thinking" if mode else "at once"


def table(found: dict[str, dict[bool | None, Result]]) -> str:
    """The figures of all checkpoints and modes."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for checkpoint, results in found.items():
        for mode, result in results.items():
            f = result.summary()
            shares = [f"{f[n]:.1%} +- {f[f'{n}_stderr']:.1%}" for n in ("pass@1_greedy", "pass@1")]
            more = [f"{f['pass@k']:.1%} (k {f['k']:.0f})", f"{f['mean_length']:.1f}", f"{f['truncated']:.1%}"]
            rows.append((checkpoint, told(mode), *shares, *more, f"{f['thinks']:.1%}"))
    return columns(rows)


def as_json(command: ChatEvaluationCommand, checkpoint: str, results: dict[bool | None, Result]) -> dict[str, Any]:
    """One object for a checkpoint: the means over the modes that were asked in, and each mode's own figures."""
    figures = {told(mode): result.summary() for mode, result in results.items()}
    names = next(iter(figures.values()))
    means = {name: sum(one[name] for one in figures.values()) / len(figures) for name in names}
    return {
        "checkpoint": checkpoint, "task": command.task, "problems": len(next(iter(results.values())).greedy),
        "temperature": command.temperature, **means, "k": command.samples, "modes": figures,
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    prog = program("python -m ling_jax.post.evaluate")
    command = tyro.cli(ChatEvaluationCommand, args=list(argv), prog=prog, description=__doc__)
    check(command)
    task = task_of(command.task)
    found = {checkpoint: evaluate(command, checkpoint, task) for checkpoint in command.checkpoint}
    if command.out is not None:
        write_answers(command.out, [result for results in found.values() for result in results.values()])
    print(table(found))
    if isinstance(task, GymTask) and task.failed:
        print(f"the scorer failed on {task.failed} answers, which count as wrong")
    if command.json:
        objects = [as_json(command, checkpoint, results) for checkpoint, results in found.items()]
        print(json.dumps(objects[0] if len(objects) == 1 else {"checkpoints": objects}))


def run() -> None:
    """The command `ling-chat-evaluate`."""
    run_main(main)
