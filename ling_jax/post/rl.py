"""Answers that the model draws, judged and learned from: what a run of reinforcement learning is trained on.

A version of the policy draws a group of answers to each of some problems. Their rewards become advantages, and the
answers, packed into rows, the minibatches of one or more epochs: the batches of the optimizer's next updates. They are
kept in the run's folder until those are done, so a run that is killed between two of them goes on with the same ones.

Legend: B rows of a minibatch, T tokens of a row, G answers of a group.
"""

import hashlib
import io
import json
import logging
import random
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ling_jax.config import PRESETS, RLRun, RunConfig
from ling_jax.data.mixture import DataState
from ling_jax.data.packing import IGNORE, ROW
from ling_jax.data.pipeline import ANEW, DataBatch, Earlier, run_tokenizer
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files.paths import write_whole
from ling_jax.files.whole import checksum
from ling_jax.generate.engine import Engine, bucket
from ling_jax.generate.requests import Request
from ling_jax.generate.sampling import Sampling
from ling_jax.post.advantage import advantages, token_weights
from ling_jax.post.measure import Questions, measure
from ling_jax.post.objective import PolicyObjective
from ling_jax.post.pack import best_fit
from ling_jax.post.tasks import Problem, Task, answer_of, task_of
from ling_jax.post.units import unit_ids
from ling_jax.train.feed import Reading
from ling_jax.train.session import Session

log = logging.getLogger(__name__)

ROLLOUTS = "rollouts"  # of a run's folder: what a version drew, by the step after which it did
VALUES = ("weights", "advantages", "old")  # float32, of the token that a place predicts
ARRAYS = (*ROW, "units", *VALUES)
MODES = {"on": True, "off": False, "template": None}
MOST_DRAWS = 4  # as many groups are drawn for each that is wanted, at most, where few have a signal


class Drawn(NamedTuple):
    """An answer that was drawn, and what it is worth."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    text: str
    truncated: bool
    reward: float


def objective_of(config: RLRun) -> PolicyObjective:
    """The objective that a run optimises, as its preset has it."""
    preset, rl = PRESETS[config.rl.preset], config.rl
    return PolicyObjective(preset.low, preset.high, temperature=rl.temperature)


def open_rollouts(
    config: RLRun, tokenizer: str | None, run_dir: epath.Path, trained_with: str | None, earlier: Earlier | None
) -> "RolloutFeed":
    """Opens the task of a run; arguments and errors as in `data.pipeline.open_data`."""

    def new() -> Tokenizer:
        raise ValueError("reinforcement learning starts from a model that answers: give --init-from, or data.tokenizer")

    found = run_tokenizer(tokenizer, config.model.vocab_size, str(run_dir / "tokenizer"), trained_with, new)
    feed = RolloutFeed(config, found, run_dir)
    if earlier is not None:
        feed.go_on(earlier)
    return feed


class RolloutFeed:
    """Answers of the model itself; a `train.feed.Feed`."""

    def __init__(self, config: RLRun, tokenizer: Tokenizer, run_dir: epath.Path):
        [source] = config.data.sources
        self.tokenizer, self.state, self._folder = tokenizer, None, run_dir / ROLLOUTS
        self.task: Task = task_of(source.path)
        self.problems = self.task.problems("reinforce", config.rl.problems, config.data.seed)
        if not self.problems:
            raise ValueError(f"task {source.path} has no problems to learn from")
        self.thinking = MODES[config.rl.thinking]
        self.prompts = [self.asked(problem, self.thinking) for problem in self.problems]
        self.longest = max(map(len, self.prompts))
        if (most := self.longest + config.rl.max_new_tokens - 1) > config.data.sequence_length:
            raise ValueError(
                f"a prompt and an answer may have {most} tokens, more than data.sequence_length = "
                f"{config.data.sequence_length}: raise it, or lower rl.max_new_tokens"
            )
        preset = PRESETS[config.rl.preset]
        log.info("%s: units are %ss, ratios within 1 - %g and 1 + %g; %s",
                 config.rl.preset, preset.unit, preset.low, preset.high, preset.source)  # fmt: skip
        texts = json.dumps([[problem.question, problem.answer] for problem in self.problems])
        told = {"name": source.path, "problems": len(self.problems), "checksum": checksum(texts.encode())}
        self.facts = {"task": told}

    def go_on(self, earlier: Earlier) -> None:
        """Goes on where a run was; ValueError if that was with other problems."""
        known = earlier.state.get("text", {}).get("task")
        if known != self.facts["task"]:
            raise ValueError(f"the run has learned from {known}, not {self.facts['task']}: bring it back, or {ANEW}")
        self.state = DataState(**earlier.state["read"])

    def fingerprint(self) -> int:
        return int(checksum(json.dumps([self.tokenizer.to_json(), self.facts]).encode())[:8], 16) >> 1

    def settled(self, config: RunConfig, step: int) -> RunConfig:
        return config

    def baselines(self) -> dict[str, float]:
        return {}

    def prompt(self) -> tuple[str, list[int]]:
        ids = self.asked(self.problems[0], None)
        return self.tokenizer.decode(ids), ids

    def asked(self, problem: Problem, thinking: bool | None) -> list[int]:
        """The ids of a problem's prompt."""
        mode = thinking if self.tokenizer.switches_thinking else None
        return self.tokenizer.encode_chat([{"role": "user", "content": problem.question}], thinking=mode)

    def reading(self, config: RunConfig, step: int, read: DataState | None, here: Sequence[int]) -> Reading:
        assert isinstance(config, RLRun)
        begin = DataState(0, 0, config.data.sequence_length, {}, {}, {}) if read is None else read
        return Reading(begin, lambda session: self._batches(session, config, step, begin, here), {}, {})

    # ---------------------------------------------------------------------------------------------
    # One version after the other.

    def _batches(
        self, session: Session, config: RLRun, step: int, read: DataState, here: Sequence[int]
    ) -> Iterator[DataBatch]:
        """The minibatches of each version of the policy, from the step after `step` on. `DataState.rows` counts the
        problems that have been asked."""
        updates, problems, drawer = config.rl.updates, read.rows, None
        while True:
            version = step // updates
            file = self._folder / f"{version * updates}.npz"
            if step % updates and file.exists():
                minibatches, problems = _load(file)
                metrics: dict[str, Any] = {}
            else:
                if step % updates:
                    log.warning("%s is missing: the answers for the updates that are left of it are drawn anew", file)
                drawer = drawer or _Drawer(self, session, config)
                drawer.load(session)
                metrics = drawer.measured(version)
                minibatches, more, problems = drawer.version(version, problems)
                metrics |= more
                _save(file, minibatches, problems)
                for old in self._folder.glob("*.npz"):
                    if int(old.stem) < (version - config.checkpoint.keep_last) * updates - config.checkpoint.every:
                        old.unlink()
            state = DataState(problems, problems, read.block, {}, {}, {})
            for number in range(step % updates, updates):
                arrays = minibatches[number % config.rl.minibatches]
                yield DataBatch({name: values[list(here)] for name, values in arrays.items()}, state, metrics)
                metrics, step = {}, step + 1


class _Drawer:
    """Draws answers with the weights of the moment, and makes minibatches of them."""

    def __init__(self, feed: RolloutFeed, session: Session, config: RLRun):
        self.feed, self.config, self.tokenizer = feed, config, feed.tokenizer
        ends = (feed.tokenizer.eod_id, feed.tokenizer.eos_id, feed.tokenizer.role_end_id)
        self.ends = [end for end in dict.fromkeys(ends) if end is not None]
        self.thinking, self.prompts, longest = feed.thinking, feed.prompts, feed.longest
        slots = bucket(longest + config.rl.max_new_tokens)
        rows = min(config.rl.rows, config.rl.prompts * config.rl.group)
        self.model = session.trainer.compute.model(*session.weights)
        self.engine = Engine(
            self.model, rows=rows, slots=min(slots, config.model.max_positions), stops=len(self.ends),
            least=min(bucket(longest), 512),
        )  # fmt: skip

    def load(self, session: Session) -> None:
        self.model = session.trainer.compute.model(*session.weights)
        self.engine.load(self.model)

    def measured(self, version: int) -> dict[str, float]:
        """How good a version is on problems that are never learned from, where one is due."""
        rl = self.config.rl
        if not rl.eval_every or not rl.eval_problems or version % rl.eval_every:
            return {}
        problems = self.feed.task.problems("evaluate", rl.eval_problems, self.config.data.seed)
        questions = Questions(
            problems=problems, thinking=self.thinking, samples=1, temperature=rl.temperature,
            max_new_tokens=rl.max_new_tokens, answer_tags=rl.answer_tags, seed=self.config.data.seed,
        )  # fmt: skip
        figures = measure(self.model, self.tokenizer, self.ends, self.feed.task, questions, rl.rows).summary()
        names = ("pass@1", "pass@1_greedy", "mean_length", "truncated")
        return {f"eval/{name}": figures[name] for name in names}

    def version(self, version: int, asked: int) -> tuple[list[dict[str, np.ndarray]], dict[str, float], int]:
        """(minibatches, metrics, problems asked so far): groups that have a signal, drawn until there are enough."""
        rl, groups, every, begun = self.config.rl, [], [], time.perf_counter()
        while len(groups) < rl.prompts and len(every) < MOST_DRAWS * rl.prompts:
            wanted = rl.prompts - len(groups)
            drawn = self._draw(asked, wanted)
            asked += wanted
            every += drawn
            groups += [group for group in drawn if len({one.reward for one in group}) > 1]
        while len(groups) < rl.prompts:
            groups.append(every[len(groups)])  # without a signal: they weigh nothing
        seconds = time.perf_counter() - begun
        order = random.Random(f"{self.config.data.seed} {version}").sample(range(rl.prompts), rl.prompts)
        size = rl.prompts // rl.minibatches
        parts = [[groups[i] for i in order[first : first + size]] for first in range(0, rl.prompts, size)]
        metrics = _metrics(every) | {"time/rollout": seconds}
        return [self._minibatch(part) for part in parts], metrics, asked

    def _draw(self, first: int, count: int) -> list[list[Drawn]]:
        """Groups of answers to the next problems."""
        rl, feed = self.config.rl, self.feed
        numbers = [self._number(first + i) for i in range(count)]
        requests = [
            Request(
                prompt=self.prompts[number], max_new_tokens=rl.max_new_tokens, stop_ids=tuple(self.ends),
                sampling=Sampling(temperature=rl.temperature), seed=_seed(self.config.data.seed, first + i, sample),
            )
            for i, number in enumerate(numbers) for sample in range(rl.group)
        ]  # fmt: skip
        answers = dict(self.engine.run(requests))
        found = []
        for place, number in enumerate(numbers):
            group = []
            for sample in range(rl.group):
                answer = answers[place * rl.group + sample]
                ids = answer.ids[:-1] if answer.end == "stop" else answer.ids
                text = self.tokenizer.decode(ids)
                truncated = answer.end == "length"
                counted = answer_of(text, rl.answer_tags and self.thinking is not False)
                right = not truncated and feed.task.is_right(feed.problems[number], counted)
                group.append(Drawn(self.prompts[number], answer.ids, answer.logprobs, text, truncated, float(right)))
            found.append(group)
        return found

    def _number(self, asked: int) -> int:
        """Which problem comes after so many: all of them in a new order, again and again."""
        epoch, place = divmod(asked, len(self.prompts))
        order = np.random.default_rng([self.config.data.seed, epoch]).permutation(len(self.prompts))
        return int(order[place])

    def _minibatch(self, groups: list[list[Drawn]]) -> dict[str, np.ndarray]:
        """The arrays of an update: [B, T] each."""
        preset, rl = PRESETS[self.config.rl.preset], self.config.rl
        lengths = [[len(one.ids) for one in group] for group in groups]
        weights = token_weights(lengths, preset.normalise, rl.max_new_tokens)
        examples = []
        for group, of_group in zip(groups, weights, strict=True):
            gains = advantages([one.reward for one in group], spread=preset.spread)
            for one, gain, weight in zip(group, gains, of_group, strict=True):
                if gain:
                    examples.append(self._example(one, float(gain), weight))
        return self._rows(examples)

    def _example(self, one: Drawn, gain: float, weight: float) -> dict[str, np.ndarray]:
        """The arrays of an answer behind its prompt, one place for each token but the last."""
        ids = np.array([*one.prompt, *one.ids], np.int32)
        prompt, count = len(one.prompt) - 1, len(one.ids)
        units = unit_ids(one.ids, PRESETS[self.config.rl.preset].unit, self.tokenizer)

        def behind(values: Any) -> np.ndarray:
            return np.concatenate((np.zeros(prompt), values))

        return {
            "tokens": ids[:-1],
            "targets": np.where(np.arange(len(ids) - 1) >= prompt, ids[1:], IGNORE),
            "positions": np.arange(len(ids) - 1),
            "units": behind(units),
            "weights": behind(np.full(count, weight)),
            "advantages": behind(np.full(count, gain)),
            "old": behind(one.logprobs),
        }

    def _rows(self, examples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        length, most = self.config.data.sequence_length, self.config.data.global_batch_size
        rows = best_fit([len(one["tokens"]) for one in examples], length, self.config.data.seed)
        if len(rows) > most:
            raise ValueError(
                f"a minibatch takes {len(rows)} rows of data.sequence_length = {length} tokens, more than "
                f"data.global_batch_size = {most}: raise either, or rl.minibatches"
            )
        out = {name: np.zeros((most, length), np.float32 if name in VALUES else np.int32) for name in ARRAYS}
        out["targets"][:] = IGNORE
        for number, row in enumerate(rows):
            start = unit = 0
            for segment, place in enumerate(row, 1):
                one, end = examples[place], start + len(examples[place]["tokens"])
                for name in ("tokens", "targets", "positions", *VALUES):
                    out[name][number, start:end] = one[name]
                out["segment_ids"][number, start:end] = segment
                out["units"][number, start:end] = np.where(one["units"] > 0, one["units"] + unit, 0)
                start, unit = end, unit + int(one["units"].max())
        return out


def _seed(seed: int, asked: int, sample: int) -> int:
    """The seed of a sample, which follows from what is asked and not from where it is decoded."""
    return int.from_bytes(hashlib.sha256(f"{seed} {asked} {sample}".encode()).digest()[:4])


def _metrics(groups: list[list[Drawn]]) -> dict[str, float]:
    answers = [one for group in groups for one in group]
    rewards, lengths = np.array([one.reward for one in answers]), np.array([len(one.ids) for one in answers])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "group/without_signal": float(np.mean([len({one.reward for one in group}) == 1 for group in groups])),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated": float(np.mean([one.truncated for one in answers])),
    }


def _save(file: epath.Path, minibatches: list[dict[str, np.ndarray]], problems: int) -> None:
    """Keeps what a version drew, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"problems": problems}
    for number, one in enumerate(minibatches):
        arrays |= {f"{number} {name}": values for name, values in one.items()}
    data = io.BytesIO()
    np.savez(data, **arrays)
    write_whole(file, data.getvalue())


def _load(file: epath.Path) -> tuple[list[dict[str, np.ndarray]], int]:
    """The minibatches that `_save` kept, and how many problems had been asked; ValueError for a damaged file, whose
    arrays each have a checksum."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as kept:
            arrays = {key: kept[key] for key in kept.files}
        problems = int(arrays.pop("problems"))
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged ({error}): move it away, and its answers are drawn anew") from error
    found: dict[int, dict[str, np.ndarray]] = {}
    for key, values in arrays.items():
        number, name = key.split(" ")
        found.setdefault(int(number), {})[name] = values
    return [found[number] for number in sorted(found)], problems
