"""Tokenizes a data source once, to a folder that training reads in place of the text (`ling_jax.data.shards`).

The text is cut into portions, runs of small files or some lines of a large one. `make_shard` turns one of them into one
shard, whose bytes follow from the portion, the tokenizer and the source's settings alone: so any process on any machine
may make it, twice even, and a preparation that was killed goes on with the shards that are not there.
"""

import functools
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from etils import epath

from ling_jax.config import DataSource
from ling_jax.data.built_in import BUILT_IN, read_built_in
from ling_jax.data.made import MADE
from ling_jax.data.packing import LAYOUT, tokenize
from ling_jax.data.reading import Document, LineRange, Listing, few, line_ranges, read_file, stamp
from ling_jax.data.remote import openers
from ling_jax.data.shards import DOCUMENTS, PLACES, PLAN, TABLE, TOKENIZER, Prepared, shard_key
from ling_jax.data.store import Columns, keep, parts, read_entry, read_index
from ling_jax.data.survey import FORMAT, SETTLED, list_source, tabulate, with_text
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import paths
from ling_jax.files.progress import ByteProgress
from ling_jax.files.whole import checksum, read_sealed, sealed

log = logging.getLogger(__name__)

PORTION = 128 << 20  # bytes of files, packed or not, that make a shard
LENGTHS = (512, 2048, 4096, 8192, 32768, 131072)  # tokens up to which documents are counted together
ONE_CORE = {"TOKENIZERS_PARALLELISM": "false"}  # of a process that makes shards
RETRIES = 20  # of a shard on a cluster whose workers die


@dataclass(frozen=True)
class FilePart:
    """A file below a source's root, or some lines of it.

    Attributes:
      stamp: see `Listing`; it begins with the file's bytes.
      lines: None for all of the file.
    """

    name: str
    stamp: str
    lines: LineRange | None = None

    @property
    def size(self) -> int:
        return self.file_size if self.lines is None else self.lines.end - self.lines.begin

    @property
    def file_size(self) -> int:
        return int(self.stamp.split()[0])


Portion = list[FilePart]


@dataclass(frozen=True)
class Preparation:
    """All that a shard depends on besides its portion.

    Attributes:
      folder: the prepared source's.
      name: the source's.
      root: the folder that the portions' files are below.
    """

    folder: str
    name: str
    source: DataSource
    root: str


# Makes all shards that are not there, and yields the number of each that is.
ShardEngine = Callable[[Preparation, Sequence[Portion]], Iterator[int]]


# ---------------------------------------------------------------------------------------------------
# One shard.


def make_shard(job: Preparation, number: int, portion: Portion) -> int:
    """Makes a shard, unless it is there whole; returns its number.

    Its columns are those of a source's table, `tokens`, and PLACES, as if the shard were the whole source.

    Raises:
      ValueError: as `read_file`, and for a file that is not the one that was planned.
    """

    def build(columns: Columns) -> dict[str, Any]:
        _check_stamps(job, portion)
        facts = tabulate(with_text(_read(job, portion)), columns)
        for name, dtype in PLACES.items():
            columns.append(name, np.empty(0, dtype))
        tokenizer, lost = _tokenizer(job.folder), 0

        def note(text: str, ids: Sequence[int], at: int, begins: bool) -> None:
            nonlocal lost
            if not begins:
                columns.append("pieces", np.array([at]))
            if tokenizer.decode(ids) != text:
                data = np.frombuffer(text.encode(), np.uint8)
                lost += len(data)
                for name, values in (("lossy", np.array([at])), ("lossy_ends", np.array([lost])), ("lossy_text", data)):
                    columns.append(name, values)

        tokenize(with_text(_read(job, portion)), tokenizer, columns, note)
        _check_stamps(job, portion)
        return facts

    keep(paths.at(job.folder), shard_key(number), f"{job.name}: shard {number}", build)
    return number


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(str(paths.at(folder) / TOKENIZER))


def _read(job: Preparation, portion: Portion) -> Iterator[Document]:
    root, names = paths.at(job.root), [part.name for part in portion]
    if job.source.path in BUILT_IN:
        yield from read_built_in(job.source.path, Listing(root, names, [], 0.0, []))
        return
    remote = paths.is_bucket(root)
    begun = openers(root, names, [part.file_size for part in portion]) if remote else itertools.repeat(None)
    for part, opener in zip(portion, begun, strict=False):
        yield from read_file(root / part.name, part.name, job.name, job.source, opener, part.lines)


def _check_stamps(job: Preparation, portion: Portion) -> None:
    if job.source.path in MADE:  # no files
        return
    root = paths.at(job.root)
    for part in portion:
        file = root / part.name
        found = paths.entry(file).stamp if paths.is_bucket(file) else (stamp(file) or ("", 0.0))[0]
        if found != part.stamp:
            raise _changed([str(file)], job.folder)


def _changed(files: list[str], folder: str) -> ValueError:
    return ValueError(
        f"{few(files)}: changed, added or removed since the preparation into {folder} began: bring the files back as "
        "they were, or prepare into another --target"
    )


# ---------------------------------------------------------------------------------------------------
# All of them.


def prepare(name: str, source: DataSource, folder: epath.Path, tokenizer: Tokenizer, engine: ShardEngine) -> Prepared:
    """Makes all shards of a source that are not there whole, then the index.

    Args:
      name: the source's, as `source_names` says.
      folder: for this process alone meanwhile (`OneWriter`).
      engine: runs `make_shard`; see `in_processes`.
    Raises:
      ValueError: for text or a tokenizer other than those that an earlier preparation into `folder` began with; for
        text that cannot be read; naming the file.
    """
    files = list_source(name, source)
    time.sleep(max(0.0, min(SETTLED, SETTLED - (time.time() - files.newest))))
    job = Preparation(os.fspath(folder), name, source, os.fspath(files.root))
    folder.mkdir(parents=True, exist_ok=True)
    portions = _plan(job, files, tokenizer)
    tokenizer.save(str(folder / TOKENIZER))
    with ByteProgress(sum(part.size for portion in portions for part in portion)) as progress:
        for number in engine(job, portions):
            progress.advance(sum(part.size for part in portions[number]))
    keep(folder, DOCUMENTS, f"{name}: the index", lambda columns: _index(folder, len(portions), tokenizer, columns))
    return Prepared(folder)


def _plan(job: Preparation, files: Listing, tokenizer: Tokenizer) -> list[Portion]:
    """The portions; those of an earlier preparation into this folder, if there was one."""
    file = paths.at(job.folder) / PLAN
    settings = {
        "format": f"{FORMAT}, {LAYOUT}",
        "tokenizer": tokenizer.fingerprint,
        "text_field": job.source.text_field,
    }
    if not file.exists():
        portions = list(_portions(job, files))
        told = [[astuple(part) for part in portion] for portion in portions]
        paths.write_whole(file, json.dumps(sealed({"settings": settings, "portions": told})))
        return portions
    plan = read_sealed(file)
    portions = [
        [FilePart(name, mark, lines and LineRange(*lines)) for name, mark, lines in told] for told in plan["portions"]
    ]
    begun = {part.name: part.stamp for portion in portions for part in portion}
    now = dict(zip(files.names, files.stamps, strict=True))
    if changed := sorted(name for name in begun.keys() | now.keys() if begun.get(name) != now.get(name)):
        raise _changed([str(files.root / name) for name in changed], job.folder)
    if told := [f"{key}: {old} -> {settings[key]}" for key, old in plan["settings"].items() if old != settings[key]]:
        raise ValueError(
            f"{job.folder} holds a preparation that began with other settings ({'; '.join(told)}): give those, or "
            "another --target"
        )
    return portions


def _portions(job: Preparation, files: Listing) -> Iterator[Portion]:
    """All files in their order, in runs of about PORTION bytes; a built-in corpus is one of them."""
    every = [FilePart(name, mark) for name, mark in zip(files.names, files.stamps, strict=True)]
    if job.source.path in BUILT_IN:
        yield every
        return
    portion, size = [], 0
    for part in every:
        if portion and size + part.size > PORTION:
            yield portion
            portion, size = [], 0
        if part.size > PORTION and part.name.lower().endswith(".jsonl"):
            yield from ([replace(part, lines=lines)] for lines in line_ranges(files.root / part.name, PORTION))
        else:
            portion.append(part)
            size += part.size
    if portion:
        yield portion


def _index(folder: epath.Path, count: int, tokenizer: Tokenizer, columns: Columns) -> dict[str, Any]:
    """Fills the columns of TABLE and PLACES from those of all shards."""
    tokens = lost = 0
    every: list[dict[str, Any]] = []
    lengths = {limit: [0, 0] for limit in (*LENGTHS, 0)}
    shards: list[dict[str, Any]] = []
    for name, dtype in {**TABLE, **PLACES}.items():
        columns.append(name, np.empty(0, dtype))
    for number in range(count):
        shard = read_entry(folder, shard_key(number))
        if not shard.facts["documents"]:
            continue
        every.append(shard.facts)
        shards.append({"number": number, **read_index(folder, shard_key(number))["columns"]["tokens"]})
        size = len(shard.columns["tokens"])
        _count_lengths(np.diff(shard["starts"], append=size), lengths)
        before = {"starts": tokens, "pieces": tokens, "lossy": tokens, "lossy_ends": lost}
        for name in (*TABLE, *PLACES):
            for part in parts(len(shard.columns[name])):
                values = shard.columns[name][part]
                columns.append(name, values + before[name] if name in before else values)
        tokens, lost = tokens + size, lost + len(shard.columns["lossy_text"])
    if not every:
        raise ValueError(f"there are no documents with text to prepare into {folder}")
    total = {key: sum(facts[key] for facts in every) for key in ("documents", "bytes", "characters")}
    ends = {"least": min(facts["least"] for facts in every), "most": max(facts["most"] for facts in every)}
    content = checksum(json.dumps([facts["content"] for facts in every]).encode())
    told = {"tokens": tokens, "lengths": [[limit, *counts] for limit, counts in lengths.items()], "shards": shards}
    return {**total, **ends, "content": content, "tokenizer": tokenizer.fingerprint, **told}


def _count_lengths(sizes_D: np.ndarray, lengths: dict[int, list[int]]) -> None:
    """Adds documents and their tokens to the count of their length; 0 stands for all that are longer."""
    least = 0
    for limit, counts in lengths.items():
        here = (sizes_D > least) & ((sizes_D <= limit) | (limit == 0))
        counts[0] += int(here.sum())
        counts[1] += int(sizes_D[here].sum())
        least = limit


# ---------------------------------------------------------------------------------------------------
# Engines.


def in_processes(count: int) -> ShardEngine:
    """An engine of so many processes of this machine, each on one core."""

    def engine(job: Preparation, portions: Sequence[Portion]) -> Iterator[int]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(count, len(portions)), context, _begin_worker) as pool:
            try:
                futures = [pool.submit(make_shard, job, number, portion) for number, portion in enumerate(portions)]
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool as error:
                raise ValueError(
                    "a process was killed while it made a shard, perhaps for its memory: the same command goes on, if "
                    "need be with fewer --processes"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    return engine


def on_ray(job: Preparation, portions: Sequence[Portion]) -> Iterator[int]:
    """The engine of a Ray cluster: the one that this machine belongs to, else one of this machine alone. Another worker
    makes the shard of one that dies; all of them see the text and the folder at the same paths."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ValueError('--engine ray needs Ray: pip install "ling-jax[ray]"') from None
    ray.init(ignore_reinit_error=True, log_to_driver=False, runtime_env={"env_vars": ONE_CORE})
    task = ray.remote(max_retries=RETRIES)(make_shard)
    waiting = [task.remote(job, number, portion) for number, portion in enumerate(portions)]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        for one in waiting:
            ray.cancel(one, force=True)


def _begin_worker() -> None:
    """Each process has a core; none outlives the one that started it."""
    os.environ.update(ONE_CORE)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
