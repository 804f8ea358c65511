"""Measures what speculation gains: python -m benchmarks.speculation --checkpoint DIR [--drafts 1] [--prompts 50] [...]

Windows of held-out text are continued one at a time, plainly and with drafts of the MTP layer, in turns. Beside the
measured speedup stands the one that its parts predict: (tokens per step) * (a plain step) / (running 1 + k tokens, and
k drafts). The last line of standard output is one JSON object; times leave prefill out, and no token ends an answer.

Legend: N steps of an answer, S tokens of prompt and answer, T tokens run at once, k drafts, D hidden, V vocabulary.
"""

import dataclasses
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks.common import report
from ling_jax.cli import run_main
from ling_jax.config import DataConfig, count_params
from ling_jax.config.text import columns
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.tokenizer import tokenizer_of
from ling_jax.convert.weights import StoredWeights, open_weights
from ling_jax.data.sources import read_corpus
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.generate.cache import Cache, empty_cache
from ling_jax.generate.engine import Answer, Engine, Request, check_request
from ling_jax.generate.sampling import (
    Kinds,
    Options,
    Sampling,
    draw,
    empty_options,
    keys_at,
    log_distribution,
    logprob_of,
    with_option,
)
from ling_jax.model.model import Ling, split_model

log = logging.getLogger("speculation")

GRAM = 8  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    checkpoint: str
    """A run folder, its checkpoints/, one step of it, or a HF folder, with an MTP layer."""
    drafts: int = 1
    """Tokens that the MTP layer predicts at each step (k)."""
    prompts: int = 50
    """Windows of the run's held-out text; of the default text's for weights that no run here has made."""
    prompt_len: int = 64
    """Tokens of each."""
    new: int = 128
    """Tokens to add."""
    temperature: float = 0.0
    """0 is greedy: then both ways must give the same tokens."""


def held_out_windows(data: DataConfig, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` tokens, evenly from the held-out documents.

    Raises:
      ValueError: if there are not so many.
    """
    texts = [document.text for documents in read_corpus(data).heldout.values() for document in documents]
    windows = []
    for text_ids in tokenizer.encode_batch(texts):
        ids = [*tokenizer.prefix_ids, *text_ids]
        windows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(windows) < count:
        raise ValueError(f"prompts = {count} exceed the {len(windows)} windows of {length} tokens in the held-out text")
    return [windows[i] for i in np.linspace(0, len(windows) - 1, count).round().astype(int)]


def repeated_share(answers: Sequence[Sequence[int]], size: int = GRAM) -> float:
    """The share of all runs of `size` tokens that stood earlier in the same answer."""
    runs = [[tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)] for ids in answers]
    return sum(len(one) - len(set(one)) for one in runs) / max(sum(map(len, runs)), 1)


# The engine.


class Followed(NamedTuple):
    """An answer, and how it came."""

    answer: Answer
    counts: list[int]  # tokens of each step after the prompt's


def follow(engine: Engine, request: Request) -> Followed:
    """Answers a request step by step."""
    engine.submit(request)
    [update] = engine.step(1)
    counts = []
    while update.answer.end is None:
        [update] = engine.step(1)
        counts.append(len(update.new_ids))
    return Followed(update.answer, counts)


def seconds_of(engine: Engine, request: Request) -> float:
    """Time of all of an answer's steps after the prompt's."""
    engine.submit(request)
    engine.step(1)
    started = time.perf_counter()
    [update] = engine.step(request.max_new_tokens)
    assert update.answer.end is not None
    return time.perf_counter() - started


# The cost model: parts of the engine's steps, in the same shapes, along an answer that was given.


class Path(NamedTuple):
    """An answer's steps, to be made again."""

    tokens_S: jax.Array  # int32, prompt and answer
    known_S: jax.Array  # int32 tokens that are known before each step, padded
    added_S: jax.Array  # int32 tokens that it adds, padded
    steps: jax.Array  # int32 []


def path_of(prompt: Sequence[int], followed: Followed, drafts: int) -> Path:
    """Without the last steps, which run fewer tokens."""
    tokens_S = np.array([*prompt, *followed.answer.ids], np.int32)
    added_S = np.pad(np.array(followed.counts, np.int32), (0, len(tokens_S) - len(followed.counts)))
    known_S = len(prompt) + 1 + np.cumsum(added_S, dtype=np.int32) - added_S
    steps = ((added_S > 0) & (known_S + drafts + 1 <= len(tokens_S))).sum(dtype=np.int32)
    return Path(*map(jnp.asarray, (tokens_S, known_S, added_S, steps)))


def _part(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """[1, size, ...] of [S, ...]."""
    return jax.lax.dynamic_slice_in_dim(array, start, size)[None]


@partial(jax.jit, static_argnums=0)
def read(graph, params, bias, tokens_S: jax.Array) -> tuple[Cache, jax.Array]:
    """A cache that holds these tokens, and the trunk's output [S, D]."""
    model: Ling = nnx.merge(graph, params, bias)
    everywhere_1S, slots_1S = jnp.ones((1, tokens_S.size), jnp.int32), jnp.arange(tokens_S.size)[None]
    cache = empty_cache(model.config, 1, tokens_S.size, model.dtype, drafts=1)
    out = model.hidden(tokens_S[None], segment_ids_BT=everywhere_1S, cache=cache)
    next_1S = jnp.roll(tokens_S, -1)[None]
    _, cache = model.draft(next_1S, out.hidden_BTD, slots_1S, everywhere_1S > 0, out.cache)
    return cache, out.hidden_BTD[0]


@partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=3)
def run_trunk(graph, params, bias, cache: Cache, path: Path, options: Options, count: int, kinds: Kinds) -> Any:
    """At each step runs `count` tokens and draws after every one; returns the last step's draws and the cache."""
    model: Ling = nnx.merge(graph, params, bias)

    def step(i, carry):
        first = path.known_S[i] - 1
        tokens_1T = _part(path.tokens_S, first, count)
        out = model.hidden(tokens_1T, segment_ids_BT=jnp.ones_like(tokens_1T), cache=carry[1].of_length(first[None]))
        logits_1TV, drawn = model.logits(out.hidden_BTD), []
        for j in range(count):
            keys_1 = keys_at(options, (first + 1 + j)[None])
            token_1 = draw(log_distribution(logits_1TV[:, j], options, kinds), keys_1, kinds)
            drawn.append((token_1, logprob_of(jax.nn.log_softmax(logits_1TV[:, j], axis=-1), token_1)))
        return drawn, out.cache

    nothing = [(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.float32))] * count
    return jax.lax.fori_loop(0, path.steps, step, (nothing, cache))


@partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=3)
def run_drafts(
    graph, params, bias, cache: Cache, path: Path, hidden_SD: jax.Array, options: Options, count: int, kinds: Kinds
) -> Any:
    """At each step runs the MTP layer over the tokens that it added, and makes `count` drafts; returns the last step's
    drafts and the cache."""
    model: Ling = nnx.merge(graph, params, bias)

    def step(i, carry):
        cache, first, added = carry[1], path.known_S[i] - 1, path.added_S[i]
        slots_1T = first + jnp.arange(count + 1)[None]
        next_1T, trunk_1TD = _part(path.tokens_S, first + 1, count + 1), _part(hidden_SD, first, count + 1)
        here_1TD, cache = model.draft(next_1T, trunk_1TD, slots_1T, slots_1T < first + added, cache)
        here_11D, drafts = _part(here_1TD[0], added - 1, 1), []
        for j in range(count):
            at_1 = (first + 1 + added + j)[None]
            if j:
                inside_11 = jnp.ones((1, 1), bool)
                here_11D, cache = model.draft(drafts[-1][:, None], here_11D, at_1[None] - 2, inside_11, cache)
            logprobs_1V = log_distribution(model.logits(here_11D[:, 0]), options, kinds)
            drafts.append(draw(logprobs_1V, keys_at(options, at_1), kinds))
        return drafts, cache

    return jax.lax.fori_loop(0, path.steps, step, ([jnp.zeros(1, jnp.int32)] * count, cache))


class Times(NamedTuple):
    """Seconds; those of parts are of one step."""

    plain: float  # all steps of an answer
    speculative: float
    plain_step: float
    verify: float  # running 1 + k tokens
    draft: float  # k drafts


class Parts:
    """The parts of a step, each on a cache of its own."""

    def __init__(self, model: Ling, sampling: Sampling, drafts: int):
        self.weights, self.drafts, self.kinds = split_model(model), drafts, Kinds.of([sampling])
        self.options = with_option(empty_options(1), 0, sampling, 0, model.config.vocab_size)

    def plain_step(self, path: Path) -> float:
        return self._seconds(path, run_trunk, 1)

    def verify(self, path: Path) -> float:
        return self._seconds(path, run_trunk, self.drafts + 1)

    def draft(self, path: Path) -> float:
        return self._seconds(path, run_drafts, self.drafts)

    def _seconds(self, path: Path, run: Callable[..., Any], count: int) -> float:
        """Returns the seconds of one step."""
        cache, hidden_SD = read(*self.weights, path.tokens_S)
        given = (path, hidden_SD) if run is run_drafts else (path,)
        jax.block_until_ready(hidden_SD)
        started = time.perf_counter()
        jax.block_until_ready(run(*self.weights, cache, *given, self.options, count, self.kinds))
        return (time.perf_counter() - started) / int(path.steps)


def measure(model: Ling, prompts: Sequence[Sequence[int]], command: Command) -> dict[str, Any]:
    """All figures of the result."""
    sampling, drafts = Sampling(temperature=command.temperature), command.drafts
    slots = command.prompt_len + command.new
    engines = [Engine(model, rows=1, slots=slots, drafts=count) for count in (0, drafts)]
    parts = Parts(model, sampling, drafts)
    requests = [
        Request(prompt=prompt, max_new_tokens=command.new, sampling=sampling, seed=i)
        for i, prompt in enumerate(prompts)
    ]
    followed, times = [], []
    for i, request in enumerate(requests):
        both = [follow(engine, request) for engine in engines]  # compiles, the first time
        paths = [path_of(request.prompt, one, drafts) for one in both]
        todo: dict[str, Callable[[], float]] = {
            "plain": partial(seconds_of, engines[0], request),
            "speculative": partial(seconds_of, engines[1], request),
            "plain_step": partial(parts.plain_step, paths[0]),
            "verify": partial(parts.verify, paths[1]),
            "draft": partial(parts.draft, paths[1]),
        }
        if i == 0:
            for work in todo.values():
                work()
        names = deque(todo)
        names.rotate(i)  # each comes first in turn
        times.append(Times(**{name: todo[name]() for name in names}))
        followed.append(both)
        log.info("%d of %d prompts", i + 1, len(requests))
    return figures(followed, times, command)


def figures(followed: Sequence[Sequence[Followed]], times: Sequence[Times], command: Command) -> dict[str, Any]:
    """The result, from (plain, speculative) answers and times of every prompt."""
    plain, speculative = ([both[which] for both in followed] for which in (0, 1))
    tokens, steps = (sum(map(of, (one.counts for one in speculative))) for of in (sum, len))
    per_step = tokens / steps
    each = {name: [getattr(one, name) for one in times] for name in Times._fields}
    part = {name: statistics.median(each[name]) for name in ("plain_step", "verify", "draft")}
    predicted = per_step * part["plain_step"] / (part["verify"] + part["draft"])
    speedup = sum(each["plain"]) / sum(each["speculative"])
    answers = {"plain": plain, "speculative": speculative}
    drafted, accepted = (sum(getattr(one.answer, name) for one in speculative) for name in ("drafted", "accepted"))
    result = {
        "benchmark": "speculation",
        "checkpoint": command.checkpoint,
        **{name: getattr(command, name) for name in ("drafts", "prompts", "prompt_len", "temperature")},
        "new_tokens": command.new,
        "differing_answers": sum(a.answer.ids != b.answer.ids for a, b in zip(plain, speculative, strict=True)),
        "acceptance": accepted / drafted,
        "tokens_per_step": per_step,
        **{f"{name}_ms": 1e3 * seconds for name, seconds in part.items()},
        "predicted_speedup": predicted,
        "speedup": speedup,
        "speedup_over_predicted": speedup / predicted,
    }
    for name, its in answers.items():
        rates = [sum(one.counts) / seconds for one, seconds in zip(its, each[name], strict=True)]
        result[f"{name}_tokens_per_second"] = sum(sum(one.counts) for one in its) / sum(each[name])
        result[f"{name}_tokens_per_second_median"] = statistics.median(rates)
        result[f"{name}_engine_step_ms"] = 1e3 * sum(each[name]) / sum(len(one.counts) for one in its)
        result[f"{name}_repeated_{GRAM}_grams"] = repeated_share([one.answer.ids for one in its])
    return result


def table(result: dict[str, Any]) -> str:
    ways = ("plain", "speculative")
    forms = {"tokens_per_second": ",.1f", "tokens_per_second_median": ",.1f", "engine_step_ms": ".3f"}
    forms[f"repeated_{GRAM}_grams"] = ".1%"
    rows = [[name, *(format(result[f"{way}_{name}"], form) for way in ways)] for name, form in forms.items()]
    names = ("plain_step_ms", "verify_ms", "draft_ms", "acceptance", "tokens_per_step", "predicted_speedup")
    others = [(name, f"{result[name]:.3f}") for name in (*names, "speedup", "speedup_over_predicted")]
    return f"{columns([['', *ways], *rows], numbers=True)}\n\n{columns(others, numbers=True)}"


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.speculation", description=__doc__)
    for name, least in {"drafts": 1, "prompts": 1, "prompt_len": 1, "new": command.drafts + 2}.items():
        if (value := getattr(command, name)) < least:
            raise ValueError(f"{name} = {value} must be at least {least}")
    weights, tokenizer = open_weights(command.checkpoint), tokenizer_of(command.checkpoint)
    if not weights.config.num_nextn_predict_layers:
        raise ValueError(f"{command.checkpoint} has no MTP layer (num_nextn_predict_layers = 0) to make drafts with")
    tokenizer.check_fits(weights.config.vocab_size)
    data = weights.run.data if isinstance(weights, StoredWeights) else DataConfig()
    prompts = held_out_windows(data, tokenizer, command.prompts, command.prompt_len)
    longest = Request(prompt=prompts[0], max_new_tokens=command.new)
    check_request(weights.config, longest, command.prompt_len + command.new, stops=1)
    result = measure(load_pretrained(command.checkpoint), prompts, command)
    if command.temperature == 0:
        print(f"{result['differing_answers']} of {command.prompts} greedy answers differ with speculation\n")
    print(table(result))
    active = count_params(weights.config).active - weights.config.vocab_size * weights.config.hidden_size
    report(result, 2.0 * active, 1 / result["plain_tokens_per_second"])


if __name__ == "__main__":
    run_main(main)
