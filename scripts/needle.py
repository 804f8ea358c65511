"""Looks for a needle in a haystack: python -m scripts.needle --checkpoint DIR [--lengths 512 1024 2048] [--chat] [...]

A sentence with a secret number stands somewhere in a long text, and the model is asked for the number. For every length
and depth, as a table and a picture: in how many trials the greedy answer holds the number, and by how many nats the
number is likelier there than another one, which says something about a model that is too small to answer, too.

It asks in words, for models that were trained on language. A run of any size can look for needles of its own tokens at
every validation (`train.eval_needle`).
"""

import bisect
import dataclasses
import itertools
import logging
import random
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from ling_jax.cli import run_main
from ling_jax.config.text import columns
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.tokenizer import ends_of, tokenizer_of
from ling_jax.convert.weights import model_config_of
from ling_jax.data.made import FILLER
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.evaluate import read_text
from ling_jax.generate.engine import Engine, Request
from ling_jax.generate.sampling import Sampling
from ling_jax.train.needle import heat_map

log = logging.getLogger("needle")

SHORTEST = 512  # tokens; the first length by default
NAMES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Nairobi", "Prague", "Havana", "Athens")
BACK = 100  # tokens; how far before the asked place the needle may stand to be between two sentences
FORCED = 1e9  # added to the logit of a token that is to be drawn
HAYSTACK = "[the text]"  # where the chat template gets it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    checkpoint: str
    """A run folder, its checkpoints/, one step of it, or a HF folder."""
    lengths: tuple[int, ...] = ()
    """Tokens of prompt and answer together; by default 512 and its doubles, as far as the model has positions."""
    depths: int = 5
    """Places of the needle, from the beginning of the text to its end."""
    trials: int = 5
    """Needles for every length and depth, each with a number of its own."""
    haystack: str | None = None
    """A UTF-8 text file to hide the needle in, repeated if it is too short; by default built-in sentences."""
    chat: bool = False
    """Ask in the chat template instead of leaving a sentence to be completed."""
    max_new_tokens: int = 24
    """Most tokens of an answer."""
    batch_size: int = 4
    """Requests that are run side by side, each with a cache of the longest length."""
    seed: int = 0
    """Of the names, the numbers and the order of the built-in sentences."""
    out: Path = Path("needle.png")
    """The picture."""


class Haystack:
    """A text as tokens, and the places between its sentences."""

    def __init__(self, tokenizer: Tokenizer, text: str, size: int):
        """Repeats `text` up to `size` tokens."""
        ids = tokenizer.encode(" " + text.strip())  # a needle may stand before it
        self.ids: list[int] = list(itertools.islice(itertools.cycle(ids), size))
        texts = {token: tokenizer.decode([token]) for token in set(ids)}

        def between(left: int, right: int) -> bool:
            return texts[left].endswith("\n") or (texts[left].endswith((".", "!", "?")) and texts[right][:1].isspace())

        self.ends = [0, *(i for i, pair in enumerate(itertools.pairwise(self.ids), 1) if between(*pair))]

    def with_needle(self, needle: Sequence[int], size: int, depth: float) -> list[int]:
        """Its first `size` tokens and the needle among them, at the last end of a sentence before `depth` (0 to 1);
        right there if that end is more than BACK tokens away."""
        wanted = round(depth * size)
        place = self.ends[bisect.bisect_right(self.ends, wanted) - 1]
        place = place if wanted - place <= BACK else wanted
        return [*self.ids[:place], *needle, *self.ids[place:size]]


class Trial(NamedTuple):
    """One needle to be found."""

    length: int  # tokens
    depth: float
    number: str
    prompt: list[int]
    opener: list[int]  # what an answer says before the number; nothing where the prompt ends with it
    right: tuple[int, ...]  # the number's tokens
    wrong: tuple[int, ...]  # of a number that stands nowhere


class Reply(NamedTuple):
    """A model's answer to a trial."""

    text: str  # its greedy answer
    right: float  # log-probability of the number, nats
    wrong: float  # of the other


class Result(NamedTuple):
    """The outcome of a trial."""

    found: float  # 1 if the greedy answer holds the number
    nats: float  # by which it is likelier than the other


def frame(tokenizer: Tokenizer, name: str, chat: bool) -> tuple[list[int], list[int], list[int]]:
    """Tokens before the haystack, those after it, which ask, and those with which an answer begins."""
    said = f"The secret number of {name} is"
    if not chat:
        return tokenizer.prefix_ids, tokenizer.encode(f"\n\n{said}"), []
    question = f"{HAYSTACK}\n\nWhat is the secret number of {name}? Answer from the text above."
    text = tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": question}]))
    before, after = (tokenizer.encode(part, parse_special=True) for part in text.split(HAYSTACK))
    return before, after, tokenizer.encode(said)


def make_trial(
    tokenizer: Tokenizer, haystack: Haystack, length: int, depth: float, draw: random.Random, command: Command
) -> Trial:
    """A prompt that, with room for the answer, has exactly `length` tokens.

    Raises:
      ValueError: if so few tokens leave no place for a haystack.
    """
    name, (number, other) = draw.choice(NAMES), map(str, draw.sample(range(10_000, 100_000), 2))
    before, after, opener = frame(tokenizer, name, command.chat)
    needle = tokenizer.encode(f" The secret number of {name} is {number}.")
    right, wrong = (tuple(tokenizer.encode(f" {n}")) for n in (number, other))
    answer = max(command.max_new_tokens, len(opener) + max(len(right), len(wrong)))
    size = length - len(before) - len(needle) - len(after) - answer
    if size < 1:
        raise ValueError(f"length = {length} is too short: needle, question and answer alone take {length - size}")
    prompt = [*before, *haystack.with_needle(needle, size, depth), *after]
    return Trial(length, depth, number, prompt, opener, right, wrong)


def make_trials(tokenizer: Tokenizer, lengths: Sequence[int], command: Command) -> list[Trial]:
    """All of them. Those of one length and depth follow each other, and their prompts begin alike."""
    draw = random.Random(command.seed)
    text = " ".join(draw.choices(FILLER, k=max(lengths) // 8))
    if command.haystack is not None:
        text = read_text(command.haystack)
    haystack = Haystack(tokenizer, text, max(lengths))
    depths = np.linspace(0, 1, command.depths).tolist()
    cells = itertools.product(lengths, depths, range(command.trials))
    return [make_trial(tokenizer, haystack, length, depth, draw, command) for length, depth, _ in cells]


def requests_of(trial: Trial, max_new_tokens: int, ends: Sequence[int]) -> dict[tuple[int, ...], Request]:
    """Requests whose answers make a result: for every beginning of either number one that draws its last token after
    the others, for its log-probability; and for () the answer. All but the first find the prompt in a cache."""
    found = {}
    for tokens in (trial.right, trial.wrong):
        for start in (tokens[: i + 1] for i in range(len(tokens))):
            prompt, forced = [*trial.prompt, *trial.opener, *start[:-1]], Sampling(logit_bias={start[-1]: FORCED})
            found[start] = Request(prompt=prompt, max_new_tokens=1, sampling=forced)
    return found | {(): Request(prompt=trial.prompt, max_new_tokens=max_new_tokens, stop_ids=ends)}


def ask(
    engine: Engine, tokenizer: Tokenizer, trials: Sequence[Trial], command: Command, ends: Sequence[int]
) -> Iterator[tuple[Trial, Reply]]:
    """Yields the model's answer to each trial as it comes."""
    waiting, running = deque(trials), {}
    while waiting or running:
        if waiting and len(running) <= command.batch_size:  # more would only wait
            trial, answers = waiting.popleft(), {}
            for start, request in requests_of(trial, command.max_new_tokens, ends).items():
                answers[start] = None
                running[engine.submit(request)] = (trial, answers, start)
        for update in engine.step():
            if update.answer.end is None:
                continue
            trial, answers, start = running.pop(update.ticket)
            answers[start] = update.answer
            if None in answers.values():
                continue
            right, wrong = (
                sum(answers[number[: i + 1]].model_logprobs[0] for i in range(len(number)))
                for number in (trial.right, trial.wrong)
            )
            yield trial, Reply(tokenizer.decode(answers[()].ids), right, wrong)


Cells = dict[tuple[int, float], list[Result]]  # by length and depth


def standard_error(results: Sequence[Result]) -> Result:
    """The standard error of the mean: numbers differ in how likely they are anyway, so single trials say little."""
    found, nats = np.std(results, axis=0) / len(results) ** 0.5
    return Result(found, nats)


def mean(results: Sequence[Result]) -> Result:
    """The share that was found, and the mean of the nats."""
    found, nats = np.mean(results, axis=0)
    return Result(found, nats)


def table(cells: Cells) -> str:
    """Means, a row for each depth; over all depths also the standard error."""
    lengths, depths = (sorted(set(keys)) for keys in zip(*cells, strict=True))

    def row(name: str, results: Sequence[Sequence[Result]]) -> list[str]:
        return [name, *(f"{found:.0%} {nats:+.2f}" for found, nats in map(mean, results))]

    rows = [row(f"{depth:.0%}", [cells[length, depth] for length in lengths]) for depth in depths]
    of_lengths = [[result for depth in depths for result in cells[length, depth]] for length in lengths]
    errors = ["std. error", *(f"{found:.0%}  {nats:.2f}" for found, nats in map(standard_error, of_lengths))]
    heads = ["depth", *(f"{length:,} tokens" for length in lengths)]
    return columns([heads, *rows, row("all", of_lengths), errors], numbers=True)


def draw_figure(cells: Cells, title: str, path: Path) -> None:
    """Two heat maps, length by depth: answers that hold the number, and the nats."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths, depths = (sorted(set(keys)) for keys in zip(*cells, strict=True))
    means_DLR = np.array([[mean(cells[length, depth]) for length in lengths] for depth in depths])
    width, height = 2.4 + 1.5 * max(len(lengths), 2), 1.6 + 0.45 * max(len(depths), 3)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    most = max(float(np.abs(means_DLR[..., 1]).max()), 1.0)
    found, nats = figure.subplots(1, 2)
    heat_map(found, means_DLR[..., 0], "{:.0%}", cmap="YlGnBu", vmin=0, vmax=1)
    heat_map(nats, means_DLR[..., 1], "{:+.1f}", cmap="RdBu", vmin=-most, vmax=most)
    for axes, name in ((found, "answers with the number"), (nats, "nats over another number")):
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        axes.set_xlabel("tokens", fontsize=8)
        axes.set_ylabel("depth of the needle", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def check(command: Command, lengths: Sequence[int], limit: int) -> None:
    """Raises ValueError for what can't be run."""
    for name, least in {"depths": 2, "trials": 1, "max_new_tokens": 1, "batch_size": 1}.items():
        if (value := getattr(command, name)) < least:
            raise ValueError(f"{name} = {value} must be at least {least}")
    if max(lengths) > limit:
        raise ValueError(
            f"length = {max(lengths)} exceeds the model's {limit} positions; leave it out of --lengths, or set "
            "rope_scaling (YaRN) in its config"
        )


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.needle", description=__doc__)
    config, tokenizer = model_config_of(command.checkpoint), tokenizer_of(command.checkpoint)
    limit = config.max_positions
    doubles = itertools.takewhile(lambda length: length <= limit, (SHORTEST << i for i in itertools.count()))
    lengths = sorted(set(command.lengths)) or list(doubles) or [limit]
    check(command, lengths, limit)
    tokenizer.check_fits(config.vocab_size)
    trials = make_trials(tokenizer, lengths, command)
    ends = ends_of(command.checkpoint, tokenizer)
    model = load_pretrained(command.checkpoint)
    engine = Engine(model, rows=command.batch_size, slots=max(lengths), stops=max(len(ends), 1))
    cells: Cells = {(trial.length, trial.depth): [] for trial in trials}
    done = 0
    for trial, reply in ask(engine, tokenizer, trials, command, ends):
        results = cells[trial.length, trial.depth]
        results.append(Result(float(trial.number in reply.text), reply.right - reply.wrong))
        if len(results) == command.trials:
            done += 1
            found, nats = mean(results)
            what = f"{trial.length:,} tokens, depth {trial.depth:.0%}: {found:.0%} found, {nats:+.2f} nats"
            log.info("%d of %d: %s", done, len(cells), what)
    print(table(cells))
    how = "chat" if command.chat else "completion"
    draw_figure(cells, f"{Path(command.checkpoint).resolve().name}, {how}, {command.trials} trials", command.out)
    log.info("wrote %s", command.out)


if __name__ == "__main__":
    run_main(main)
