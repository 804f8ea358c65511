"""Tokenizes text once, for any number of runs and hosts: python -m ling_jax.data prepare NAME|DIR --target DIR

NAME is a configuration in configs/, whose sources and tokenizer are taken; DIR, a folder or file of text.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

import tyro

from ling_jax.cli import config_names, named_config, program, run_main
from ling_jax.config import DataConfig, DataSource
from ling_jax.config.text import columns
from ling_jax.data.pipeline import train_tokenizer
from ling_jax.data.prepare import in_processes, on_ray, prepare
from ling_jax.data.shards import PLAN, SUFFIX, TOKENIZER, Prepared
from ling_jax.data.sources import read_corpus, source_names
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files.one_writer import OneWriter
from ling_jax.files.paths import at, check_bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareCommand:
    """The command line of `python -m ling_jax.data prepare`."""

    target: str
    """The folder, here or in a bucket, in which each source gets one of its own, SOURCE.prepared."""
    data: DataConfig
    processes: int = os.cpu_count() or 1
    """Processes of this machine."""
    engine: Literal["local", "ray"] = "local"
    """ray: tasks on the Ray cluster that this machine belongs to, not --processes of it; needs `pip install ray`."""


def main(argv: Sequence[str]) -> int:
    prog = program("python -m ling_jax.data prepare")
    if not argv or argv[0].startswith("-"):
        print(f"usage: {prog} NAME|DIR --target DIR [--flags]   (NAME: {', '.join(config_names())}; DIR: text)")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    wanted, vocab_size = argv[0], None
    if wanted in config_names() or wanted.endswith(".py"):
        config = named_config(wanted)
        data, vocab_size = config.data, config.model.vocab_size
    else:
        data = DataConfig(sources=(DataSource(path=wanted),))
    command = tyro.cli(
        PrepareCommand,
        default=PrepareCommand(target=tyro.MISSING, data=data),
        args=list(argv[1:]),
        prog=f"{prog} {wanted}",
        description=__doc__,
    )
    run_prepare(command, vocab_size)
    return 0


def run_prepare(command: PrepareCommand, vocab_size: int | None) -> None:
    """Prepares every source of a configuration, and prints what there is.

    Args:
      vocab_size: entries of a tokenizer that is trained on the text where the configuration names none.
    Raises:
      ValueError: see `prepare`; for sources whose names no folder can have; where another process is at the target.
    """
    data, target = command.data, at(command.target)
    if command.processes < 1:
        raise ValueError(f"--processes = {command.processes} must be at least 1")
    check_bucket(target)
    names = source_names(data)
    if unfit := [name for name in names if "/" in name]:
        raise ValueError(f"sources {' and '.join(unfit)} are called alike: rename one's folder, or give a link to it")
    engine = on_ray if command.engine == "ray" else in_processes(command.processes)
    with OneWriter(target):
        folders = [target / f"{name}{SUFFIX}" for name in names]
        tokenizer = _tokenizer(command, str(folders[0]), vocab_size)
        made = [
            prepare(name, source, folder, tokenizer, engine)
            for name, source, folder in zip(names, data.sources, folders, strict=True)
        ]
    print(render(names, made))
    flags = " ".join(f"--data.sources.{i}.path {one.folder}" for i, one in enumerate(made))
    print(f"\nTo train on it: {flags}")


def _tokenizer(command: PrepareCommand, folder: str, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of the configuration, that of a preparation which goes on, or one as a run would train it."""
    if command.data.tokenizer is not None:
        return Tokenizer.load(command.data.tokenizer)
    if (at(folder) / PLAN).exists() and (at(folder) / TOKENIZER / "tokenizer.json").exists():
        return Tokenizer.load(f"{folder}/{TOKENIZER}")
    if vocab_size is None:
        raise ValueError("which tokenizer? give --data.tokenizer: a tokenizer.json, a folder with one, or a hub id")
    return train_tokenizer(read_corpus(command.data), vocab_size)


def render(names: Sequence[str], made: Sequence[Prepared]) -> str:
    """Tables of what each source has, and of how long its documents are."""
    rows = [("source", "documents", "MB of text", "tokens", "bytes per token", "shards")]
    for name, one in zip(names, made, strict=True):
        facts = one.facts
        per_token = f"{facts['bytes'] / facts['tokens']:.2f}"
        counts = (f"{facts['documents']:,}", f"{facts['bytes'] / 1e6:,.2f}", f"{facts['tokens']:,}", per_token)
        rows.append((name, *counts, str(len(facts["shards"]))))
    lengths = [("tokens of a document", *(f"{name}: documents, tokens" for name in names))]
    for i, (limit, *_) in enumerate(made[0].facts["lengths"]):
        counts = [f"{one.facts['lengths'][i][1]:,}, {one.facts['lengths'][i][2]:,}" for one in made]
        lengths.append((f"up to {limit:,}" if limit else "more", *counts))
    return f"{columns(rows)}\n\n{columns(lengths)}"


def run() -> None:
    """The command `ling-prepare`."""
    run_main(main)
