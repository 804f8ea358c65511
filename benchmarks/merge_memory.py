"""Memory of `convert.py merge` by the size of the weights: python -m benchmarks.merge_memory [--gigabytes 9]

Writes two checkpoints of random float32 weights, cut into files as a run's are, and gives each of eight steps one of
them by hard links. Their checksums tell of moments too, but no file of a moment is there: opening one is an error. Then
convert.py averages them in a process of its own, whose anonymous memory (RssAnon in /proc) is asked for 20 times a
second, and a corner of some arrays is compared with the float64 average. A table comes first; the last line is one JSON
object. Exit code 1 for more memory than 1.2 GB. The disk needs room for three times --gigabytes.
"""

import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from etils import epath

from benchmarks.corpus_memory import ROOT, measured
from configs.ling_mini_2_0 import config as ling_mini
from ling_jax.checkpoint import META, META_FILE, STATE, finish_checkpoint, make_checkpoint, open_arrays
from ling_jax.cli import run_main
from ling_jax.config import ModelConfig, RunConfig, count_params
from ling_jax.config.text import columns
from ling_jax.convert.mapping import layout
from ling_jax.files.arrays import ArrayPath, Layout, Part, chunk_of, write_chunks
from ling_jax.files.whole import sealed

LIMIT = 1.2e9  # bytes of RssAnon
LAST = 8  # checkpoints
F32 = np.dtype(np.float32)
POOL = 1 << 22  # random numbers, which are used again and again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    gigabytes: float = 9.0
    """Of the weights of each checkpoint, about."""
    folder: Path = Path(tempfile.gettempdir())
    """Where the checkpoints go meanwhile; a disk."""


def model_of(size: float) -> ModelConfig:
    """Ling-mini with two layers, a vocabulary that goes with the size, and as many experts as make `size` bytes."""
    small: dict[str, Any] = dict(intermediate_size=1024, num_hidden_layers=2, pad_token_id=0, eos_token_id=0)
    small |= dict(n_group=1, topk_group=1)
    vocab = 157_184 if size >= 4e9 else 2048
    model = dataclasses.replace(ling_mini().model, num_experts=8, vocab_size=vocab, **small)
    more = dataclasses.replace(model, num_experts=16)
    base, eight = count_params(model).total, count_params(more).total - count_params(model).total
    return dataclasses.replace(model, num_experts=8 + 8 * max(round((size / 4 - base) / eight), 0))


def write_step(folder: epath.Path, model: ModelConfig, seed: int) -> None:
    """One checkpoint with moments that have checksums, but no files."""
    arrays = {
        path: Layout(stack.full_shape, F32, chunk_of(stack.full_shape, F32.itemsize))
        for path, stack in layout(model).items()
    }
    moments = {("optimizer", kind, *path): array for path, array in arrays.items() for kind in ("mu", "nu")}
    targets = make_checkpoint(folder, arrays | moments)
    pool = np.random.default_rng(seed).standard_normal(POOL, F32)
    files: dict[ArrayPath, dict[str, str]] = {}
    for order, (path, array) in enumerate(arrays.items()):
        files[path] = {}
        for chunk in np.ndindex(*(size // step for size, step in zip(array.shape, array.chunk, strict=True))):
            values = np.resize(np.roll(pool, order), array.chunk)
            start = tuple(i * step for i, step in zip(chunk, array.chunk, strict=True))
            files[path] |= write_chunks(targets[path], array, Part(start, values))
    for path in moments:
        files[path] = dict.fromkeys(files[path[2:]], "0" * 16)
    finish_checkpoint(folder, arrays | moments, files, {})
    for path in moments:
        shutil.rmtree(folder / STATE / ".".join(path))


def link_step(made: Path, folder: Path, model: ModelConfig, step: int) -> None:
    shutil.copytree(made / STATE, folder / STATE, copy_function=os.link)
    (folder / META).mkdir()
    about = {"config": dataclasses.asdict(RunConfig(model=model)), "data": {"next_step": step, "next_row": 8 * step}}
    (folder / META / META_FILE).write_text(json.dumps(sealed(json.loads(json.dumps(about)))))


def greatest_error(target: Path, made: Sequence[Path]) -> float:
    """The greatest difference from the float64 average, relative to the largest number, in the last corner of every
    fourth array."""
    result, sources, worst = open_arrays(str(target)), [open_arrays(str(path)) for path in made], 0.0
    for path, array in itertools.islice(result.layouts.items(), 0, None, 4):
        corner = tuple(slice(size - min(size, 8), size) for size in array.shape)
        found = result.array(path).read(corner)
        want = np.mean([source.array(path).read(corner).astype(np.float64) for source in sources], axis=0)
        worst = max(worst, float(np.abs(found - want).max() / np.abs(want).max()))
    return worst


def measure(folder: Path, model: ModelConfig) -> Mapping[str, Any]:
    made = [folder / "a", folder / "b"]
    for seed, path in enumerate(made):
        write_step(epath.Path(path), model, seed)
    for step in range(1, LAST + 1):
        link_step(made[step % 2], folder / "run" / "checkpoints" / str(step), model, step)
    words = ["--source", folder / "run", "--last", LAST, "--target", folder / "merged"]
    os.sync()
    figures = measured(["convert.py", "merge", *map(str, words)], ROOT)
    steps = [folder / "run" / "checkpoints" / str(step) for step in (1, 2)]
    return {**figures, "error": greatest_error(folder / "merged", steps)}


def main(argv: Sequence[str]) -> int:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.merge_memory", description=__doc__)
    jax.config.update("jax_platforms", "cpu")
    model = model_of(command.gigabytes * 1e9)
    size = 4 * count_params(model).total
    with tempfile.TemporaryDirectory(dir=command.folder) as folder:
        figures = measure(Path(folder), model)
    rate = LAST * size / figures["wall_s"] / 1e6
    table = [["checkpoints", "MB each", "peak RssAnon MB", "CPU s", "wall s", "read MB/s", "error", "moments opened"]]
    numbers = (size / 1e6, figures["rss_anon_mb"], figures["cpu_s"], figures["wall_s"], rate)
    table.append([str(LAST), *(f"{number:,.0f}" for number in numbers), f"{figures['error']:.1e}", "none"])
    print(columns(table, numbers=True))
    print(json.dumps({"benchmark": "merge_memory", "checkpoints": LAST, "bytes": size, **figures}))
    return 0 if figures["rss_anon_mb"] * 1e6 < LIMIT and figures["error"] < 1e-6 else 1


if __name__ == "__main__":
    run_main(main)
