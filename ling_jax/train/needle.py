"""The needle test of a run: whether what stands far back in a row is still found, by length and depth.

A row is a document of the corpus `retrieval` made anew, in the tokenizer's own vocabulary, as long as is wanted. The
right answers stand behind its questions; one is found where each of its tokens is the likeliest after those before it.

Legend: B rows, T tokens, N = B*T, Q questions of a row, by the depth of their needles.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ling_jax.config import NEEDLE_TOKENS, RunConfig
from ling_jax.data.made import FILLER, KEYS, VALUES, retrieval
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.kernels.cross_entropy import target_scores
from ling_jax.parallel.mesh import BATCH_AXES, psum
from ling_jax.parallel.processes import CompiledTogether
from ling_jax.train.compute import Compute
from ling_jax.train.figures import INK, Drawing, MetricsRecord, Run
from ling_jax.train.fp8 import with_codes
from ling_jax.train.loss import IGNORE
from ling_jax.train.objective import MODEL_FIELDS, document_sums, vocab_axis
from ling_jax.train.validate import batches

log = logging.getLogger(__name__)

GROWTH = 4  # from one length to the next
DEPTHS = len(KEYS)
Needles = dict[int, dict[str, np.ndarray]]  # rows by their length
NeedleScorer = Callable[[dict, dict, Mapping[str, np.ndarray]], jax.Array]


def needle_lengths(limit: int) -> list[int]:
    """Lengths at which a model of `limit` positions is asked, in tokens."""
    lengths = [NEEDLE_TOKENS]
    while lengths[-1] * GROWTH <= limit:
        lengths.append(lengths[-1] * GROWTH)
    return lengths


def prepare_needles(tokenizer: Tokenizer, config: RunConfig) -> Needles:
    """The rows of every length that the model of `config` has positions for; the same at every stage and process."""
    if not config.train.eval_needle:
        return {}
    found = {}
    for length in needle_lengths(config.model.max_positions):
        if (room := _room(tokenizer, length)) < 0:
            log.warning("no needles in rows of %d tokens: with this tokenizer they take %d", length, length - room)
            continue
        rows = [_row(tokenizer, length, random.Random(f"{length} {n}")) for n in range(config.train.eval_needle)]
        found[length] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return found


def _room(tokenizer: Tokenizer, length: int) -> int:
    """Tokens of a row that the lines without a needle may have: the row looks one token further."""
    words = (f"{sign}{key}{value}" for sign in "-?" for key in KEYS for value in ("", *VALUES))
    most = max(map(len, tokenizer.encode_batch([f"{word}\n" for word in words])))
    return length + 1 - len(tokenizer.scoring_prefix) - 4 * len(KEYS) * most


def _row(tokenizer: Tokenizer, length: int, draw: random.Random) -> dict[str, np.ndarray]:
    """tokens, targets, positions, segment_ids and answers, int32 [length]: a target is a token of an answer, and
    `answers` has the number of its question, from 1 on; 0 elsewhere."""
    sizes = list(map(len, tokenizer.encode_batch([f"{line}\n" for line in FILLER])))
    room, filler = _room(tokenizer, length), []
    while sizes[line := draw.randrange(len(FILLER))] <= room:
        filler.append(FILLER[line])
        room -= sizes[line]
    lines, questions = retrieval(draw, filler)
    asked = list(enumerate(questions, 1))
    draw.shuffle(asked)
    parts = [(text, 0) for text in lines]
    for number, question in asked:
        parts += [(question.asked, 0), (question.answer, number), ("\n", 0)]
    pieces = tokenizer.encode_batch([text for text, _ in parts])
    answers = np.concatenate([np.full(len(ids), of) for ids, (_, of) in zip(pieces, parts, strict=True)])
    prefix = tokenizer.scoring_prefix
    ids = np.array([*prefix, *(token for piece in pieces for token in piece)])
    answers = np.pad(answers, (len(prefix) - 1, 0))
    row = {
        "tokens": ids[:-1],
        "targets": np.where(answers > 0, ids[1:], IGNORE),
        "positions": np.arange(len(answers)),
        "segment_ids": np.ones(len(answers)),
        "answers": answers,
    }
    fill = {"targets": IGNORE}
    return {
        name: np.pad(values, (0, length - len(values)), constant_values=fill.get(name, 0)).astype(np.int32)
        for name, values in row.items()
    }


def make_needle_scorer(compute: Compute) -> NeedleScorer:
    """Returns scorer(params, bias, batch) -> int32 [Q], how many rows of the batch have each question's answer right.
    `batch` is the whole one, the same on every process; a length is compiled when it first comes."""

    def right(params, bias, batch):
        model = compute.model(with_codes(params, compute.quantise(params), {}), bias)
        hidden_BTD = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], mtp=False).hidden_BTD
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        targets_N = batch["targets"].reshape(-1)
        _, best_N = target_scores(hidden_ND, *model.head(hidden_ND.dtype), targets_N, vocab_axis())
        best_BT = best_N.reshape(batch["targets"].shape)
        wanted_BQ = document_sums(jnp.ones_like(best_BT, jnp.int32), batch["answers"], DEPTHS)
        found_BQ = document_sums(best_BT.astype(jnp.int32), batch["answers"], DEPTHS)
        return psum(((found_BQ == wanted_BQ) & (wanted_BQ > 0)).sum(0, dtype=jnp.int32), *BATCH_AXES)

    fields = {**MODEL_FIELDS, "targets": "BT", "answers": "BT"}
    program = jax.jit(compute.on_shards(right, fields, PartitionSpec()))
    compiled: dict[tuple[int, ...], CompiledTogether] = {}

    def scorer(params: dict, bias: dict, batch: Mapping[str, np.ndarray]) -> jax.Array:
        shape = batch["tokens"].shape
        if shape not in compiled:
            compiled[shape] = CompiledTogether(f"the needle test of {shape[1]} tokens", program)
        return compiled[shape](params, bias, batch)

    return scorer


def needle_metrics(
    scorer: NeedleScorer, params: dict, bias: dict, needles: Needles, config: RunConfig
) -> dict[str, Any]:
    """The `eval/needle/...` metrics of a step: shares of right answers."""
    metrics = {}
    for length, rows in needles.items():
        shards = config.mesh.batch_shards
        together = shards * max(1, config.data.global_batch_size * config.data.sequence_length // (length * shards))
        together = min(together, -(-len(rows["tokens"]) // shards) * shards)
        right_Q = np.sum([np.asarray(scorer(params, bias, batch)) for batch in batches(rows, together)], axis=0)
        share_Q = right_Q / len(rows["tokens"])
        metrics[f"eval/needle/{length}/accuracy"] = float(share_Q.mean())
        metrics[f"eval/needle/{length}/accuracy_per_depth"] = share_Q
    return metrics


# ---------------------------------------------------------------------------------------------------
# The picture.


def _draw_needle(figure: Any, run: Run) -> str | None:
    """Depth by length, at the end of each stage."""
    tested = [record for record in run.records if any(key.startswith("eval/needle/") for key in record)]
    ends = {name: step for name, step in (run.stages or {"": run.last_step}).items()}
    last = {name: _last_up_to(tested, step) for name, step in ends.items()}
    panels = {name: record for name, record in last.items() if record is not None}
    before = [None, *panels.values()]
    panels = {n: record for (n, record), earlier in zip(panels.items(), before, strict=False) if record is not earlier}
    if not panels:
        return None
    said = []
    widths = [1 + len(_lengths(record)) for record in panels.values()]
    every = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for number, (axes, (name, record)) in enumerate(zip(every, panels.items(), strict=True)):
        lengths = _lengths(record)
        values_DL = np.array([record[f"eval/needle/{length}/accuracy_per_depth"] for length in lengths]).T
        heat_map(axes, values_DL, "{:.0%}", cmap="YlGnBu", vmin=0, vmax=1)
        axes.set_title(name or f"step {record['step']:,}", fontsize=9, color=INK)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        depths = [f"{(place + 0.5) / len(values_DL):.0%}" for place in range(len(values_DL))]
        axes.set_yticks(range(len(depths)), depths if number == 0 else [], fontsize=8)
        axes.set_xlabel("tokens", fontsize=8, color=INK)
        means = ", ".join(
            f"{mean:.0%} at {length:,} tokens" for mean, length in zip(values_DL.mean(0), lengths, strict=True)
        )
        said.append(f"{name} {means}".strip())
    every[0].set_ylabel("depth of the needle", fontsize=8, color=INK)
    return "Right answers by depth and length, in the mean over depths: " + "; ".join(said) + "."


def _last_up_to(records: Sequence[MetricsRecord], step: int) -> MetricsRecord | None:
    return next((record for record in reversed(records) if record["step"] <= step), None)


def _lengths(record: MetricsRecord) -> list[int]:
    return sorted(int(key.split("/")[2]) for key in record if key.startswith("eval/needle/") and key.endswith("_depth"))


def heat_map(axes: Any, values_DL: np.ndarray, form: str, **style: Any) -> None:
    """Coloured cells with their numbers in them."""
    image = axes.imshow(values_DL, aspect="auto", **style)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values_DL):
        color = "white" if np.mean(image.cmap(image.norm(value))[:3]) < 0.5 else "black"
        axes.text(column, row, form.format(value), ha="center", va="center", size=8, color=color)


NEEDLE = Drawing(
    "needle", "Needles found", 3.7, _draw_needle,
    f"Of {DEPTHS} keys, each given two values in a text, the share whose last value is found; guessing gives "
    f"{1 / len(VALUES):.0%}, either of the two values 50%.",
)  # fmt: skip
