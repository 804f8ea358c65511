"""Whether a stage of longer rows extends the context: python -m scripts.context_extension [--figure FILE]

A model of two layers learns to find needles in rows of 512 tokens: each of 16 keys is given two of 16 values, of which
the last one counts. Then come 20 steps in rows of 2,048 with a larger RoPE base, and YaRN on top, beside the same
without the base, without the steps and without YaRN. Prints the share of right answers, in the mean over seeds and from
least to most, and draws it by depth and length; exit code 1 if one of BARS does not hold.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from ling_jax.cli import run_main
from ling_jax.config import DataConfig, ModelConfig, RopeScaling, RunConfig, ScheduleConfig, TrainConfig
from ling_jax.config.text import columns
from ling_jax.train.figures import new_figure, png
from ling_jax.train.loss import IGNORE
from ling_jax.train.needle import heat_map
from ling_jax.train.state import Trainer, make_trainer
from ling_jax.train.step import make_train_step

KEYS = VALUES = 16
DEPTHS = 5  # of the picture
QUERY = KEYS * VALUES  # the first of the tokens that ask for a key; below it lie keys with their values
FILLER = (QUERY + KEYS, 512)  # tokens
SHORT, LONG, LONGEST = 512, 2048, 8192
BASE, LARGER_BASE = 1e4, 1.6e5
STAGE_STEPS = 20
MODEL = ModelConfig(
    vocab_size=FILLER[1], hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, num_experts=8, num_experts_per_tok=2, n_group=2, topk_group=2,
    moe_intermediate_size=32, first_k_dense_replace=1, rope_theta=BASE, max_position_embeddings=LONGEST,
    pad_token_id=FILLER[1] - 1, eos_token_id=FILLER[1] - 1,
)  # fmt: skip
EXTENDED = dataclasses.replace(MODEL, rope_theta=LARGER_BASE)
YARN = dataclasses.replace(EXTENDED, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=LONG))
AS_TRAINED, BASE_ALONE = "trained at 512", "base x16, no steps"
STEPS_ALONE, EXTENSION = "20 steps at 2,048, base unchanged", "20 steps at 2,048 with the base"
WITH_YARN = f"{EXTENSION}, YaRN x4"

Weights = tuple[dict, dict]  # parameters and expert biases
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and rows."""
    queries: int = 1000
    """Questions that a share of right answers is of, at least."""
    figure: Path | None = None
    """Where to draw it."""


class Bar(NamedTuple):
    """A condition on the mean over seeds, and how it is told."""

    told: str
    holds: Callable[[Mapping[tuple[str, int], float]], bool]


BARS = (
    Bar("512 is learnt: over 93%", lambda mean: mean[AS_TRAINED, SHORT] > 0.93),
    Bar("2,048 is not, before the stage: at most 75%", lambda mean: mean[AS_TRAINED, LONG] <= 0.75),
    Bar("2,048 after the stage: over 90%", lambda mean: mean[EXTENSION, LONG] > 0.9),
    Bar("and above the steps alone", lambda mean: mean[EXTENSION, LONG] > mean[STEPS_ALONE, LONG]),
    Bar("8,192 with YaRN: over 85%", lambda mean: mean[WITH_YARN, LONGEST] > 0.85),
    Bar("and 15 points above the same without", lambda m: m[WITH_YARN, LONGEST] >= m[EXTENSION, LONGEST] + 0.15),
    Bar("512 never below 88%", lambda mean: min(x for (_, length), x in mean.items() if length == SHORT) >= 0.88),
)


def rows(rng: np.random.Generator, count: int, length: int) -> tuple[Batch, np.ndarray]:
    """(batch, depths): rows whose last tokens ask for every key in turn; and [count, KEYS], where in a row, from 0 to
    1, the last value of the key stands."""
    text, keys = length - KEYS, np.arange(KEYS)
    places = np.argsort(rng.random((count, text)), axis=1)[:, : 2 * KEYS].reshape(count, 2, KEYS)
    tokens = rng.integers(*FILLER, (count, length), np.int32)
    values = rng.integers(VALUES, size=(2, count, KEYS))
    for place, value in zip((places.min(1), places.max(1)), values, strict=True):
        np.put_along_axis(tokens, place, (keys * VALUES + value).astype(np.int32), axis=1)
    asked = np.argsort(rng.random((count, KEYS)), axis=1)
    tokens[:, text:] = QUERY + asked
    targets = np.full((count, length), IGNORE, np.int32)
    targets[:, text:] = asked * VALUES + np.take_along_axis(values[1], asked, axis=1)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones_like(tokens),
    }
    return batch, np.take_along_axis(places.max(1), asked, axis=1) / text


def trainer_of(model: ModelConfig, length: int, count: int, peak_lr: float, warmup: int, seed: int) -> Trainer:
    return make_trainer(
        RunConfig(
            model=model,
            data=DataConfig(sequence_length=length, global_batch_size=count),
            schedule=ScheduleConfig(peak_lr=peak_lr, warmup_steps=warmup),
            train=TrainConfig(remat="none", init_std=0.02, seed=seed),
        )
    )


def train(trainer: Trainer, weights: Weights | None, steps: int) -> Iterator[tuple[int, Weights]]:
    """Trains for so many steps; gives the step and copies of the weights after every 50 of them, and at the end."""
    data, seed = trainer.config.data, trainer.config.train.seed
    rng = np.random.default_rng([seed, data.sequence_length])
    state = trainer.new_state() if weights is None else trainer.new_state_from(*weights)
    step = make_train_step(trainer)
    for done in range(1, steps + 1):
        state, _ = step(state, rows(rng, data.global_batch_size, data.sequence_length)[0])
        if done % 50 == 0 or done == steps:
            yield done, jax.tree.map(np.array, (state.params, state.bias))


def learn(weights: Weights | None, length: int, count: int, enough: float, seed: int) -> Weights:
    """Trains in rows of a length until so many answers are right, for 600 steps at most."""
    trainer, answers = trainer_of(MODEL, length, count, 3e-3, 20 if weights is None else 5, seed), reader(MODEL, length)
    for step, learnt in train(trainer, weights, 600):
        share = answers(learnt, 256, seed).share
        print(f"seed {seed}, rows of {length}: step {step}, {share:.0%} right", flush=True)
        if share > enough:
            return learnt
    raise ValueError(f"seed {seed}: {share:.0%} right in rows of {length} after 600 steps, {enough:.0%} are needed")


class Answers(NamedTuple):
    """How many questions were asked, and answered right, by depth: int [DEPTHS]."""

    right: np.ndarray
    asked: np.ndarray

    @property
    def share(self) -> float:
        return float(self.right.sum() / self.asked.sum())


def reader(model: ModelConfig, length: int) -> Callable[[Weights, int, int], Answers]:
    """Returns f(weights, queries, seed) -> the answers to so many questions, or a few more, of rows not trained on."""
    compute, together = trainer_of(model, length, 1, 1e-3, 1, 0).compute, max(16384 // length, 1)

    @jax.jit
    def best(weights: Weights, batch: Batch) -> jax.Array:
        ling = compute.model(*weights)
        hidden_BTD = ling.hidden(batch["tokens"], batch["positions"], batch["segment_ids"]).hidden_BTD
        return ling.logits(hidden_BTD[:, -KEYS:]).argmax(-1)

    def answers(weights: Weights, queries: int, seed: int) -> Answers:
        rng, found = np.random.default_rng([seed, length, 1]), Answers(*np.zeros((2, DEPTHS), int))
        while found.asked.sum() < queries:
            batch, depths = rows(rng, together, length)
            hits = np.asarray(best(weights, batch)) == batch["targets"][:, -KEYS:]
            where = (depths * DEPTHS).astype(int)
            counts = (np.bincount(w, minlength=DEPTHS) for w in (where[hits], where.ravel()))
            found = Answers(*(a + b for a, b in zip(found, counts, strict=True)))
        return found

    return answers


def measure(seed: int, queries: int) -> dict[tuple[str, int], Answers]:
    """The answers of one seed's models, by what was done to them and the length of rows."""
    weights = learn(learn(None, 128, 32, 0.9, seed), SHORT, 16, 0.97, seed)
    staged = {
        model: list(train(trainer_of(model, LONG, 4, 1e-3, 5, seed), weights, STAGE_STEPS))[-1][1]
        for model in (MODEL, EXTENDED)
    }
    asked = {
        AS_TRAINED: (MODEL, weights, (SHORT, LONG, LONGEST)),
        BASE_ALONE: (EXTENDED, weights, (SHORT, LONG)),
        STEPS_ALONE: (MODEL, staged[MODEL], (SHORT, LONG)),
        EXTENSION: (EXTENDED, staged[EXTENDED], (SHORT, LONG, LONGEST)),
        WITH_YARN: (YARN, staged[EXTENDED], (SHORT, LONG, LONGEST)),
    }
    found = {}
    for name, (model, kept, lengths) in asked.items():
        for length in lengths:
            found[name, length] = reader(model, length)(kept, queries, seed)
            print(f"seed {seed}, {name}, rows of {length:,}: {found[name, length].share:.1%} right", flush=True)
    return found


def draw(path: Path, found: Sequence[Mapping[tuple[str, int], Answers]]) -> None:
    """Right answers by depth and length, over all seeds."""
    names = list(dict.fromkeys(name for name, _ in found[0]))
    figure = new_figure()
    figure.set_size_inches(11, 3.4)
    every = figure.subplots(1, len(names))
    for axes, name in zip(every, names, strict=True):
        lengths = [length for key, length in found[0] if key == name]
        cells = [[np.sum([one[name, length][i] for one in found], axis=0) for length in lengths] for i in (0, 1)]
        heat_map(axes, (np.array(cells[0]) / np.array(cells[1])).T, "{:.0%}", cmap="YlGnBu", vmin=0, vmax=1)
        axes.set_title(name.replace(", ", ",\n").replace(" with", "\nwith"), fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        depths = [f"{(depth + 0.5) / DEPTHS:.0%}" for depth in range(DEPTHS)]
        axes.set_yticks(range(DEPTHS), depths if axes is every[0] else [], fontsize=8)
        axes.set_xlabel("tokens", fontsize=8)
    every[0].set_ylabel("depth of the needle", fontsize=8)
    path.write_bytes(png(figure))


def main(argv: Sequence[str]) -> int:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.context_extension", description=__doc__)
    begun, found = time.monotonic(), []
    for seed in command.seeds:
        found.append(measure(seed, command.queries))
    shares = {key: [one[key].share for one in found] for key in found[0]}
    table: list[tuple[str, ...]] = [("right answers", *(f"{n:,} tokens" for n in (SHORT, LONG, LONGEST)))]
    for name in dict.fromkeys(name for name, _ in shares):
        cells = (shares.get((name, length)) for length in (SHORT, LONG, LONGEST))
        told = [f"{np.mean(c):.1%} ({min(c):.1%} to {max(c):.1%})" if c else "" for c in cells]
        table.append((name, *told))
    print(columns(table))
    mean: Any = {key: float(np.mean(values)) for key, values in shares.items()}
    held = [bar.holds(mean) for bar in BARS]
    for bar, holds in zip(BARS, held, strict=True):
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {bar.told}")
    seconds = round(time.monotonic() - begun)
    print(json.dumps({"seconds": seconds, **{f"{name}, {n}": values for (name, n), values in shares.items()}}))
    if command.figure is not None:
        draw(command.figure, found)
    return int(not all(held))


if __name__ == "__main__":
    run_main(main)
