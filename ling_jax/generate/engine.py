"""Continuous batching: requests wait for a row of the cache, and a row that has ended is given to the next.

A request whose beginning is in any row's cache (a shared system prompt, another sample of the same prompt, the chat so
far) takes over those states; only the rest is run. Keys and values can be cut anywhere; the state of linear attention
only where a prompt or an answer ended, so that a hybrid shares whole prompts and whole chats.
"""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from ling_jax.config import ONE_DEVICE, routed_layers
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.generate.reply import Reply
from ling_jax.generate.requests import (
    Request,
    check_drafts,
    check_request,
    checked_ends,
    checked_prompts,
    lengths_of,
)
from ling_jax.generate.rows import DecodingRows, Place, decode, empty_rows, place, prefill
from ling_jax.generate.sampling import Kinds, Sampling, empty_options, with_option
from ling_jax.generate.serving import row_specs, serve
from ling_jax.kernels.precision import under_own_switches
from ling_jax.model.inputs import is_whole
from ling_jax.model.model import Ling
from ling_jax.parallel.mesh import make_mesh

SHORTEST = 8  # tokens of a prompt run at once, at least
LONGEST = 2**31 - 1  # steps of a call that ends when all rows have
WATCHED = 16  # steps between looks for stop strings


@dataclass(kw_only=True)
class Answer:
    """The answer to a request, so far or whole."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each id, under the distribution it was drawn from
    model_logprobs: list[float] = field(default_factory=list)  # under softmax(logits)
    # int32 [tokens run, MoE layers, K] where the engine records: experts of prompt and answer but for its last token,
    # in the trunk's layers. `replay_ids` makes of it what a model replays.
    routing: np.ndarray | None = None
    drafted: int = 0  # tokens predicted by the MTP layer, and how many of them stood
    accepted: int = 0
    end: str | None = None  # "stop", "length", or None while it can go on


@dataclass(frozen=True)
class Update:
    """The news that a step brought for a request."""

    ticket: int
    new_ids: list[int]
    answer: Answer  # so far


@dataclass
class _Waiting:
    ticket: int
    request: Request
    answer: Answer
    tokens: np.ndarray  # prompt and answer so far
    counts: tuple[int, int]  # drafts and accepted ones of a half-finished answer


def replay_ids(rows: Sequence[Sequence[np.ndarray]], length: int) -> np.ndarray:
    """Turns what engines recorded into the `routing_ids` of a batch: int32 [MoE layers, rows, length, K].

    A document is a prompt with its answer. Its last token was never run, so that its experts, and those of padding and
    of the MTP layer, are for the router to choose: -1.

    Args:
      rows: `Answer.routing` of each row's documents, in order; documents lie one after the other from the row's start,
        with nothing between them.
      length: tokens of a row.
    Raises:
      ValueError: for a row whose documents do not fit, or where nothing was recorded.
    """
    recorded = [routing for row in rows for routing in row]
    if not recorded or any(routing is None for routing in recorded):
        raise ValueError("an answer without a routing: make the engine with routing=True")
    _, layers, choices = recorded[0].shape
    ids_LBTK = np.full((layers, len(rows), length, choices), -1, np.int32)
    for number, row in enumerate(rows):
        start = 0
        for routing in row:
            end = start + len(routing)
            if end > length:
                raise ValueError(f"row {number}: its documents run over {end} tokens, which exceeds length = {length}")
            ids_LBTK[:, number, start:end] = routing.transpose(1, 0, 2)
            start = end + 1
    return ids_LBTK


def bucket(count: int, least: int = 1) -> int:
    """The next power of two, so that few shapes are compiled."""
    return max(1 << (count - 1).bit_length(), least)


def in_common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common beginning."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if differ.size else size


def on_host(arrays: list[jax.Array | None]) -> list[np.ndarray]:
    """Whole arrays, on each of several processes, which run the same requests."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return multihost_utils.process_allgather(arrays, tiled=True)


class Engine:
    """Decodes many requests over one cache.

    Args:
      model: what its weights are at this moment; one that was loaded onto a mesh is decoded on it.
      rows: requests that are decoded side by side; on a mesh, rounded up to a multiple of its batch shards.
      slots: most tokens of a request, prompt and answer.
      chunk: most tokens of a prompt that are run at once.
      least: fewest; a shorter piece is padded. Shapes from one to the other are compiled as they come.
      stops: most `stop_ids` of a request.
      drafts: tokens that the MTP layer predicts at each step, for the next to verify; 0 decodes plainly.
      routing: record which experts each token went to.
      fp8: keep the matrices of attention and FFNs as FP8 blocks, with a copy of their own.
    """

    @under_own_switches
    def __init__(
        self,
        model: Ling,
        *,
        rows: int,
        slots: int,
        chunk: int = 512,
        least: int = SHORTEST,
        stops: int = 8,
        drafts: int = 0,
        routing: bool = False,
        fp8: bool = False,
    ) -> None:
        for name, value in {"rows": rows, "slots": slots, "chunk": chunk, "least": least, "stops": stops}.items():
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        check_drafts(model.config, drafts)
        if routing and not routed_layers(model.config, mtp=False):
            raise ValueError("routing = True needs a model with MoE layers, and this one has none")
        self.config, self.slots, self.chunk, self.least, self.stops = model.config, slots, chunk, least, stops
        self.mesh = None if model.mesh.shape == ONE_DEVICE.shape else make_mesh(model.mesh)
        self.fp8, self.weights = fp8, serve(model, self.mesh, fp8)
        rows = -(-rows // self.shards) * self.shards
        self.options = empty_options(rows)
        sizes = dict(batch=rows, slots=slots, stops=stops, drafts=drafts, tensor=model.mesh.tensor)
        make = partial(empty_rows, config=model.config, **sizes, dtype=model.dtype, routing=routing)
        shardings = None
        if self.mesh is not None:
            specs = row_specs(jax.eval_shape(make, self.options))
            shardings = jax.tree.map(partial(NamedSharding, self.mesh), specs)
        # Of `empty_rows` itself, so that engines of one kind share a program.
        jitted = jax.jit(empty_rows, static_argnames=tuple(make.keywords), out_shardings=shardings)
        self.rows: DecodingRows = jitted(self.options, **make.keywords)
        self.queue: deque[_Waiting] = deque()
        self.running: list[_Waiting | None] = [None] * rows
        self.held = [np.zeros(0, np.int32)] * rows  # tokens whose states are in each row
        self.prompts = [0] * rows  # how many of them are the prompt, where a state of it is kept
        self.tickets = 0

    @under_own_switches
    def load(self, model: Ling) -> None:
        """Takes new weights, without compiling anything again; keys and values of the old ones are forgotten.

        Requests that are running keep what they have drawn and go on with the new weights, which first run their
        tokens again; where the engine records, their `routing` is then the new weights' choice throughout.

        Raises:
          ValueError: for a model that was not made as the engine's was (configuration, dtypes, mesh).
        """
        program, params, bias = serve(model, self.mesh, self.fp8)
        if program != self.weights[0]:
            raise ValueError(
                "these weights are of a model that was not made as the engine's was: its configuration, dtypes or mesh "
                "differ; make a new Engine"
            )
        self.weights = program, params, bias
        self.held = [np.zeros(0, np.int32)] * len(self.held)
        running = [one for one in self.running if one is not None]
        for one in sorted(running, key=lambda one: one.ticket, reverse=True):
            answer = self.withdraw(one.ticket)
            counts = answer.drafted, answer.accepted
            self.queue.appendleft(_Waiting(one.ticket, one.request, answer, one.tokens, counts))

    @under_own_switches
    def submit(self, request: Request, answer: Answer | None = None) -> int:
        """Queues a request and returns its ticket; `answer` is what `withdraw` gave for it, to go on with."""
        check_request(self.config, request, self.slots, self.stops)
        answer = Answer() if answer is None else copy.deepcopy(answer)
        if len(answer.ids) >= request.max_new_tokens:
            raise ValueError(f"the answer has its {request.max_new_tokens} tokens already")
        self.tickets += 1
        tokens = np.array([*request.prompt, *answer.ids], np.int32)
        self.queue.append(_Waiting(self.tickets, request, answer, tokens, (answer.drafted, answer.accepted)))
        return self.tickets

    def withdraw(self, ticket: int) -> Answer:
        """Takes a request out, running or waiting; returns its answer so far, which `submit` takes."""
        for waiting in self.queue:
            if waiting.ticket == ticket:
                self.queue.remove(waiting)
                return waiting.answer
        for row, running in enumerate(self.running):
            if running is not None and running.ticket == ticket:
                self.running[row] = None
                self.rows = self.rows._replace(active_B=self.rows.active_B.at[row].set(False))
                return running.answer
        raise KeyError(f"no request has ticket {ticket}, or it has ended")

    @property
    def shards(self) -> int:
        """Parts of the mesh that rows are cut into."""
        return self.weights[0].batch_shards

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self.queue) or any(self.running)

    @under_own_switches
    def step(self, steps: int = 32) -> list[Update]:
        """Gives free rows to waiting requests, then draws up to `steps` tokens for every row, fewer if a row ends while
        requests wait."""
        left = steps
        while placed := self._place():
            self._prefill(placed)
            left = steps - 1  # a prompt's last chunk draws a token
        waiting = np.bool_(len(self.queue) > 0)
        self.rows = decode(*self.weights, self.rows, self._kinds(), np.int32(left), waiting)
        return self._collect()

    def run(self, requests: Iterable[Request], steps: int = 32) -> Iterator[tuple[int, Answer]]:
        """Submits all and yields (place in `requests`, answer) of each as it ends."""
        places = {self.submit(request): i for i, request in enumerate(requests)}
        while self.busy:
            for update in self.step(steps):
                if update.answer.end is not None:
                    yield places[update.ticket], update.answer

    def _kinds(self) -> Kinds:
        return Kinds.of([running.request.sampling for running in self.running if running is not None])

    def _place(self) -> list[int]:
        """Moves requests into free rows; returns those rows."""
        placed: list[int] = []
        for row in [row for row, running in enumerate(self.running) if running is None]:
            if not self.queue:
                break
            tokens = self.queue[0].tokens
            there = enumerate(zip(self.held, self.prompts, strict=True))
            ready = [0 if r in placed else self._usable(held, prompt, tokens) for r, (held, prompt) in there]
            ready = [n if self._shard(r) == self._shard(row) else 0 for r, n in enumerate(ready)]
            source = int(np.argmax(ready))
            soon = (self.running[r] for r in placed)
            soon = (other.tokens for other in soon if other is not None)
            if any(self._usable(other, len(other), tokens) > ready[source] for other in soon):
                break  # once those have been run, there is more to take over
            self._put(self.queue.popleft(), row, source if ready[source] else row, ready[source])
            placed.append(row)
        return placed

    def _shard(self, row: int) -> int:
        return row * self.shards // len(self.running)

    def _usable(self, held: np.ndarray, prompt: int, tokens: np.ndarray) -> int:
        """How many of the tokens that a row holds serve another: their common beginning, but for the last, which is run
        for its logits; the MTP layer's entry for a token depends on the next one too."""
        common = in_common(held, tokens[:-1])
        if self.rows.drafts_BP.shape[1]:
            common = max(common - 1, 0)
        return self.rows.cache.usable(common, len(held), prompt)

    def _put(self, waiting: _Waiting, row: int, source: int, shared: int) -> None:
        request, tokens = waiting.request, np.zeros(self.slots, np.int32)
        tokens[: len(waiting.tokens)] = waiting.tokens
        stops = np.full(self.stops, -1, np.int32)
        stops[: len(request.stop_ids)] = request.stop_ids
        self.options = with_option(self.options, row, request.sampling, request.seed, self.config.vocab_size)
        prompt = len(request.prompt)
        new = Place(row, source, shared, tokens, len(waiting.tokens), prompt, prompt + request.max_new_tokens, stops)
        self.rows = place(self.mesh, self.rows, new, self.options)
        self.running[row], self.held[row] = waiting, waiting.tokens[:shared]

    def _prefill(self, placed: list[int]) -> None:
        """Runs the prompts of these rows, in chunks."""
        known = {r: len(running.tokens) for r in placed if (running := self.running[r])}
        counts = {r: count - len(self.held[r]) for r, count in known.items()}
        while counts:
            count = min(self.chunk, bucket(max(counts.values()), self.least))
            here = len(self.running) // self.shards
            parts = [[row % here for row in counts if self._shard(row) == shard] for shard in range(self.shards)]
            most = bucket(max(map(len, parts)))
            rows_R = np.array([part + [here] * (most - len(part)) for part in parts], np.int32).reshape(-1)
            self.rows = prefill(*self.weights, self.rows, rows_R, count, Kinds(True, True, True))
            kept = self.rows.drafts_BP.shape[1] + 1  # a state is kept so many tokens before the prompt's end
            for row in counts:
                self.prompts[row] = known[row] if min(count - 1, known[row] - len(self.held[row])) >= kept else 0
            counts = {row: left - count for row, left in counts.items() if left > count}
        for row in placed:
            if running := self.running[row]:
                self.held[row] = running.tokens

    def _collect(self) -> list[Update]:
        """Brings new tokens to the host and frees the rows that have ended."""
        rows = self.rows
        names = ("tokens_BS", "logprobs_BS", "model_logprobs_BS", "known_B", "active_B", "routing_BSLK", "drafted_B")
        fetched = on_host([getattr(rows, name) for name in (*names, "accepted_B")])
        tokens_BS, logprobs_BS, model_BS, known_B, active_B, routing_BSLK, drafted_B, accepted_B = fetched
        updates = []
        for row, running in enumerate(self.running):
            if running is None:
                continue
            answer, known = running.answer, int(known_B[row])
            first = len(running.request.prompt) + len(answer.ids)
            new_ids = tokens_BS[row, first:known].tolist()
            answer.ids += new_ids
            answer.logprobs += logprobs_BS[row, first:known].tolist()
            answer.model_logprobs += model_BS[row, first:known].tolist()
            drafted, accepted = running.counts
            answer.drafted, answer.accepted = drafted + int(drafted_B[row]), accepted + int(accepted_B[row])
            running.tokens = np.array(tokens_BS[row, :known])
            self.held[row] = running.tokens[:-1]
            if not active_B[row]:
                answer.end = "stop" if answer.ids[-1] in running.request.stop_ids else "length"
                self.running[row] = None
            if routing_BSLK is not None:
                answer.routing = np.array(routing_BSLK[row, : known - 1])
            updates.append(Update(running.ticket, new_ids, answer))
        return updates


def stream(
    model: Ling,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    *,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    every: int = 1,
) -> Iterator[list[list[int]]]:
    """Yields the new ids of every row, `every` tokens at a time; arguments and errors as in `generate`."""
    rows, ends = checked_prompts(prompts), checked_ends("eos_ids", eos_ids)
    news = lengths_of(max_new_tokens, len(rows))
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed!r} must be from 0 to {2**32 - 1}")
    requests, stops = [], max(len(ends), 1)
    for row, (prompt, new) in enumerate(zip(rows, news, strict=True)):
        request = Request(prompt=prompt, max_new_tokens=new, sampling=sampling, stop_ids=ends)
        try:
            check_request(model.config, request, model.config.max_positions, stops)
        except ValueError as e:
            raise ValueError(f"prompt {row}: {e}") from None
        requests.append(replace(request, seed=(seed + row) % 2**32))
    slots = bucket(int(max(len(request.prompt) + request.max_new_tokens for request in requests)))
    if every < 1:
        raise ValueError(f"every = {every} must be at least 1")
    replies = _replies(stop, tokenizer, len(rows))
    return _stream(model, requests, replies, slots, stops, every)


def _replies(stop: Any, tokenizer: Tokenizer | None, rows: int) -> list[Reply | None]:
    """Makes a watcher of each row's text for stop strings, if there are any."""
    texts: Any = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"stop = {stop!r} must be a list of texts")
    if texts and tokenizer is None:
        raise ValueError("stop needs tokenizer, to know the text of ids: give that of the model (load_tokenizer)")
    return [Reply(tokenizer, texts) if texts and tokenizer is not None else None for _ in range(rows)]


def _stream(
    model: Ling, requests: list[Request], replies: list[Reply | None], slots: int, stops: int, every: int
) -> Iterator[list[list[int]]]:
    engine = Engine(model, rows=len(requests), slots=slots, stops=stops)
    tickets = [engine.submit(request) for request in requests]
    watching = dict(zip(tickets, replies, strict=True))
    while engine.busy:
        new = {update.ticket: _until_stop(engine, update, watching[update.ticket]) for update in engine.step(every)}
        yield [new.get(ticket, []) for ticket in tickets]


def _until_stop(engine: Engine, update: Update, reply: Reply | None) -> list[int]:
    """An update's new ids; where a stop string comes in their text, those up to its last, and the request ends."""
    for count, token in enumerate(update.new_ids if reply is not None else [], start=1):
        assert reply is not None
        reply.push([token])
        if reply.stopped:
            if update.answer.end is None:
                engine.withdraw(update.ticket)
            return update.new_ids[:count]
    return update.new_ids


@under_own_switches
def generate(
    model: Ling,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      prompts: token ids, of any lengths: lists or 1-D arrays, or one array [B, T].
      max_new_tokens: most ids to add, for all prompts or one number for each.
      temperature: 0 is greedy.  top_p, top_k: the part of the distribution to draw from.
      seed: same seed, same answers; prompt i is drawn with seed + i.
      eos_ids: ids that end a row; the end token is returned as its last.
      stop: texts that end a row, whose ids are returned as its last; they need `tokenizer`.
    Returns:
      The new ids of each prompt, the prompt excluded.
    Raises:
      ValueError: for ids outside the vocabulary, or more tokens than the model has positions; before compiling.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    chunks = stream(
        model,
        prompts,
        max_new_tokens,
        sampling,
        seed=seed,
        eos_ids=eos_ids,
        stop=stop,
        tokenizer=tokenizer,
        every=WATCHED if stop else LONGEST,
    )
    return [list(sum(rows, [])) for rows in zip(*chunks, strict=True)]
