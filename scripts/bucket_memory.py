"""Converts a HF folder from a bucket to a bucket and back, and measures memory, disk and traffic.

Run it as python -m scripts.bucket_memory --bucket gs://NAME [--size-gb 9], with the variables that lead to a server. It
makes a HF folder of random numbers in the bucket, runs convert.py to-jax and to-hf, and compares every tensor that came
back by its checksum. It prints a table, and ends with 1 if a conversion took more anonymous memory (RssAnon) than 1.2
GB, wrote more than 1 MB to local disks, or lost a byte.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tyro
import xxhash
from etils import epath

from configs.ling_mini_2_0 import config as ling_mini
from ling_jax.cli import run_main
from ling_jax.config import ModelConfig, count_params
from ling_jax.config.text import columns
from ling_jax.convert.mapping import layout
from ling_jax.convert.tensorfile import DTYPES, TensorFile, write_tensors
from ling_jax.files.paths import at, entries

MEMORY_LIMIT, DISK_LIMIT = 1.2e9, 1e6  # bytes
SHARD = 500  # MB of a file: servers on loopback hold an object that is being uploaded in memory
SAMPLE_SECONDS = 0.01
ROWS = 8192  # of a tensor, read at a time
REPO = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    bucket: str
    """gs://NAME or s3://NAME: an empty folder in it is made, filled and removed."""
    size_gb: float = 9.0
    """Of the HF folder."""


@dataclasses.dataclass(frozen=True)
class Measured:
    seconds: float
    anonymous: int  # bytes at most
    written: int  # bytes to local disks

    @property
    def good(self) -> bool:
        return self.anonymous <= MEMORY_LIMIT and self.written <= DISK_LIMIT


def model_of(size: float) -> ModelConfig:
    """Ling-mini with fewer experts, and as many layers as make `size` bytes in bfloat16."""
    vocab = 157_184 if size >= 4e9 else 16_384
    ids = dict(vocab_size=vocab, pad_token_id=0, eos_token_id=0)
    small = dataclasses.replace(ling_mini().model, num_experts=32, num_hidden_layers=2, **ids)
    one, two = (2 * count_params(dataclasses.replace(small, num_hidden_layers=n)).total for n in (2, 3))
    return dataclasses.replace(small, num_hidden_layers=2 + max(round((size - one) / (two - one)), 0))


def make_source(folder: epath.Path, model: ModelConfig) -> None:
    """A HF folder of random finite bfloat16 numbers, in files of some SHARD."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path, stack in layout(model).items():
        tensors |= {str(name): ("F32" if path[0] == "bias" else "BF16", stack.shape) for name in stack.names.flat}
    draw = np.random.default_rng(0)

    def rows(names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            dtype, (count, *inner) = tensors[name]
            for start in range(0, count, ROWS):
                shape = (min(ROWS, count - start), *inner)
                bits = draw.integers(0, 1 << 16, (*shape, DTYPES[dtype].itemsize // 2), np.uint16)
                yield name, (bits & np.uint16(0xBFFF)).view(DTYPES[dtype])[..., 0]  # no exponent of all ones

    weight_map: dict[str, str] = {}
    count = max(2 * count_params(model).total // (SHARD * 1_000_000), 2)
    for i in range(count):
        file, mine = f"model-{i + 1:05}-of-{count:05}.safetensors", list(tensors)[i::count]
        write_tensors(folder / file, {name: tensors[name] for name in mine}, {"format": "pt"}, rows(mine))
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(model.to_hf()))


def checksums(folder: epath.Path) -> dict[str, str]:
    """Checksums of every tensor of a HF folder, read a few rows at a time."""
    found = {}
    for one in entries(folder):
        if not one.name.endswith(".safetensors"):
            continue
        file = TensorFile(folder / one.name, one.size)
        for name, tensor in file.tensors.items():
            hashed = xxhash.xxh3_64(f"{tensor.dtype} {tensor.shape}".encode())
            for start in range(0, tensor.shape[0], ROWS):
                part = file.read(name, (slice(start, min(start + ROWS, tensor.shape[0])),))
                hashed.update(np.ascontiguousarray(part).view(np.uint8).data)
            found[name] = hashed.hexdigest()
    return found


def measure(*arguments: str) -> Measured:
    """Runs convert.py; ValueError with its last line if it fails."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    started, peak = time.perf_counter(), 0
    command = [sys.executable, "convert.py", *arguments]
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        peak = max(peak, 1024 * _number(process.pid, "status", "RssAnon"))
        time.sleep(SAMPLE_SECONDS)
    seconds, written = time.perf_counter() - started, _number(process.pid, "io", "write_bytes")
    output, _ = process.communicate()
    if process.returncode:
        raise ValueError(f"convert.py {' '.join(arguments)}: {output.decode().strip().splitlines()[-1]}")
    return Measured(seconds, peak, written)


def _number(process: int, file: str, key: str) -> int:
    """A number that the kernel tells of a process; 0 where it has none, as of one that has just begun or ended."""
    lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def main(argv: Sequence[str]) -> int:
    command = tyro.cli(Command, args=list(argv), prog="python -m scripts.bucket_memory", description=__doc__)
    root = at(command.bucket) / f"bucket_memory-{os.getpid()}"
    source, ours, back = (os.fspath(root / name) for name in ("source", "ours", "back"))
    try:
        make_source(at(source), model_of(command.size_gb * 1e9))
        size = sum(one.size for one in entries(at(source)))
        found = {
            "to-jax": measure("to-jax", "--source", source, "--target", ours),
            "to-hf": measure("to-hf", "--source", ours, "--target", back, "--max-shard-size", f"{SHARD}MB"),
        }
        same = checksums(at(source)) == checksums(at(back))
    finally:
        root.rmtree(missing_ok=True)
    rows: list[tuple[str, ...]] = [("", "MB", "seconds", "MB/s", "peak RssAnon, MB", "written to local disks, kB", "")]
    for name, one in found.items():
        rate, told = size / one.seconds / 1e6, "" if one.good else "TOO MUCH"
        numbers = (size / 1e6, one.seconds, rate, one.anonymous / 1e6, one.written / 1e3)
        rows.append((name, *(f"{number:,.1f}" for number in numbers), told))
    print(columns(rows))
    print("\nevery byte came back" if same else "\nNOT every byte came back")
    return 0 if same and all(one.good for one in found.values()) else 1


if __name__ == "__main__":
    run_main(main)
