"""Whether fine-tuning gives a model two modes: python -m scripts.sft_sums [--seeds 0 1 2] [--figure FILE]

Fine-tunes `sft_tiny` from random weights with each seed (or --init-from, a run), then asks 512 sums that no run was
trained on, at once and with thinking, greedily and at temperature 1; the model before it is asked too. A run that is
there already is not trained again. Prints a table; exit code 1 if one of the bars, which were written before the runs,
does not hold.
"""

import dataclasses
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro

from ling_jax.cli import run_main
from ling_jax.commands.chat_evaluation import ChatEvaluationCommand, evaluate, table
from ling_jax.post.measure import Attempt, Result
from ling_jax.post.tasks import TASKS
from ling_jax.train.figures import bars_figure

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
MINUTES = 15
SHORTEST = 5  # tokens of an instant answer, at most
FORM, RIGHT, ABOVE = 0.99, 0.60, 0.30
STEP = re.compile(r"\d+\+\d+=\d+\.")
Results = Mapping[bool | None, Result]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, problems and order."""
    problems: int = 512
    """Sums that are asked."""
    runs_dir: Path = ROOT / "runs"
    """Folder of the runs, sft_sums_SEED."""
    init_from: str | None = None
    """A run or HF folder to start from instead of random weights; it is asked first."""
    bars: bool = True
    """Judge the figures."""
    figure: Path | None = None
    """Where to draw them."""
    samples: Path | None = None
    """Where to write ten answers."""


def train(command: Command, seed: int, name: str, *flags: str) -> float:
    """Fine-tunes with a seed; returns the seconds that the command took, or 0 for a run that was there."""
    if (command.runs_dir / name / "report.html").exists():
        return 0.0
    begun = time.monotonic()
    args = ["--run", name, "--runs-dir", str(command.runs_dir), "--train.seed", str(seed), "--data.seed", str(seed)]
    args += ["--init-from", command.init_from] if command.init_from else []
    subprocess.run([sys.executable, "post.py", "sft", "sft_tiny", *args, *flags], cwd=ROOT, check=True)
    return time.monotonic() - begun


def ask(command: Command, checkpoint: str) -> Results:
    asked = ChatEvaluationCommand(checkpoint=(checkpoint,), task="sums", problems=command.problems, max_new_tokens=128)
    return evaluate(asked, checkpoint, TASKS["sums"])


def short(attempt: Attempt) -> bool:
    """Whether an instant answer is a number and the turn's end."""
    return attempt.tokens <= SHORTEST and not attempt.thinks and attempt.text.strip().isdigit()


def worked(attempt: Attempt, question: str) -> bool:
    """Whether a thinking answer has a step for each plus sign in think tags, and then a number."""
    _, _, rest = attempt.text.partition("<think>")
    inside, ended, answer = rest.partition("</think>")
    return bool(ended) and len(STEP.findall(inside)) >= question.count("+") and answer.strip().isdigit()


def judge(name: str, results: Results) -> dict[str, bool]:
    """The bars, by what they say, and whether each holds."""
    at_once, thinking = results[False], results[True]
    asked = [problem.question for problem in thinking.questions.problems]
    every = {"greedily": [[one] for one in at_once.greedy], "drawn": at_once.drawn}
    shares = {how: sum(short(t[0]) for t in tries) / len(tries) for how, tries in every.items()}
    found = {f"{name}: at once, a number alone in {s:.1%} ({how})": s >= FORM for how, s in shares.items()}
    every = {"greedily": [[one] for one in thinking.greedy], "drawn": thinking.drawn}
    for how, tries in every.items():
        share = sum(worked(t[0], question) for t, question in zip(tries, asked, strict=True)) / len(asked)
        found[f"{name}: thinking, a step for each sign in {share:.1%} ({how})"] = share >= FORM
    for key in ("pass@1_greedy", "pass@1"):
        one, other = thinking.summary()[key], at_once.summary()[key]
        found[f"{name}: {key} {one:.1%}, {other:.1%} at once"] = one >= RIGHT and one >= other + ABOVE
    return found


def write_samples(path: Path, results: Results) -> None:
    """Ten answers, five in each mode, as Markdown."""
    texts = []
    for mode, result in results.items():
        for problem, attempt in list(zip(result.questions.problems, result.greedy, strict=True))[:5]:
            verdict = "right" if attempt.right else f"wrong, it is {problem.answer}"
            text = " ".join(attempt.text.split())
            texts.append(f"| {'thinking' if mode else 'at once'} | {problem.question} | {text} | {verdict} |")
    path.write_text("\n".join(["| mode | question | answer | |", "|---|---|---|---|", *texts]) + "\n")


def main(argv: Sequence[str]) -> int:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.sft_sums", description=__doc__)
    found: dict[str, Results] = {}
    bars: dict[str, bool] = {}
    prefix = "sft_sums" if command.init_from is None else f"sft_sums_of_{Path(command.init_from).name}"
    if command.init_from is None:
        train(command, command.seeds[0], f"{prefix}_before", "--sft.epochs", "0", "--train.steps", "1")
    before = command.init_from or str(command.runs_dir / f"{prefix}_before")
    found["before"] = ask(command, before)
    for seed in command.seeds:
        name = f"{prefix}_{seed}"
        seconds = train(command, seed, name)
        found[f"seed {seed}"] = results = ask(command, str(command.runs_dir / name))
        bars |= judge(f"seed {seed}", results)
        if seconds:
            bars[f"seed {seed}: {seconds / 60:.1f} minutes"] = seconds <= 60 * MINUTES
            log.info("seed %d: %.0f s", seed, seconds)
    print(table(found))
    if command.figure is not None:
        modes = {False: "asked at once", True: "asked to think"}
        parts = {told: {n: 100 * r[mode].summary()["pass@1"] for n, r in found.items()} for mode, told in modes.items()}
        bars_figure(parts, f"right of {command.problems} new sums, %", command.figure, sharey=True)
    if command.samples is not None:
        write_samples(command.samples, found[f"seed {command.seeds[0]}"])
    if not command.bars:
        return 0
    print("\n".join(f"{'holds' if holds else 'DOES NOT HOLD'}: {told}" for told, holds in bars.items()))
    print(json.dumps({name: {str(m): r.summary() for m, r in results.items()} for name, results in found.items()}))
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    run_main(main)
