"""Converting a synthetic checkpoint of Ling-mini's shapes both ways, against a bare loop that reads the same arrays and
writes them through the same store, and `cp`: python -m benchmarks.convert [--layers 6]; JSON on the last line.

Before each part what it reads is read once, and what was written before is on the disk, so all start alike. Memory is
anonymous memory (RssAnon of /proc/self/status), beyond what the process had after its imports.
"""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from etils import epath

from configs.ling_mini_2_0 import config as ling_mini
from ling_jax.checkpoint import make_checkpoint
from ling_jax.cli import run_main
from ling_jax.convert.mapping import layout
from ling_jax.convert.tensorfile import DTYPES, TensorFile, write_tensors
from ling_jax.convert.to_hf import Export, tensors_of, to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.convert.transfer import pieces, strides, tensors_in
from ling_jax.convert.weights import INDEX, HFFolder, StoredWeights
from ling_jax.files.arrays import Layout

SHARDS = 12
SAMPLE_SECONDS = 0.005


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    layers: int = 6
    """Of which the first is dense; 6 make 9.7 GB."""
    folder: str = "/tmp/ling_jax_convert"
    """Needs room for four copies; removed at the end."""
    step: str | None = None
    """One measured part, in a process of its own: used by the benchmark itself."""


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("RssAnon")).split()[1])


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, and the peak of anonymous memory over what there was before."""
    before, peak, ended = anonymous_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    ended.set()
    thread.join()
    return {"seconds": seconds, "peak_anonymous_bytes": max(peak - before, 0)}


def make_source(folder: Path, layers: int) -> None:
    """A HF folder of random finite bf16 numbers, in SHARDS files."""
    model = dataclasses.replace(ling_mini().model, num_hidden_layers=layers)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path, stack in layout(model).items():
        tensors |= {str(name): ("F32" if path[0] == "bias" else "BF16", stack.shape) for name in stack.names.flat}
    folder.mkdir(parents=True)
    names, draw, weight_map = list(tensors), np.random.default_rng(0), {}
    for i in range(SHARDS):
        file, mine = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors", names[i::SHARDS]
        parts = ((name, numbers(draw, *tensors[name])) for name in mine)
        write_tensors(epath.Path(folder / file), {name: tensors[name] for name in mine}, {"format": "pt"}, parts)
        weight_map |= dict.fromkeys(mine, file)
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def numbers(draw: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    bits = draw.integers(0, 1 << 16, math.prod(shape) * DTYPES[dtype].itemsize // 2, np.uint16)
    return (bits & np.uint16(0xBFFF)).view(DTYPES[dtype]).reshape(shape)  # no exponent of all ones


def bare_arrays(source: str, made: str, target: Path) -> Callable[[], None]:
    """Reads the arrays of the HF folder `source` and writes them through the same store, in the pieces of the
    checkpoint `made`: no checks, no checksums, no journal, one thread."""
    weights, sizes = HFFolder(epath.Path(source)), StoredWeights(made)
    arrays = {
        path: Layout(stack.full_shape, weights.dtype(path), sizes.chunk(path)) for path, stack in weights.stacks.items()
    }

    def work() -> None:
        opened = make_checkpoint(epath.Path(target), arrays)
        for path, new in arrays.items():
            for piece in pieces(
                path, weights.stacks[path], strides(weights.stacks[path], new.chunk, new.dtype.itemsize)
            ):
                for part in piece.parts:
                    opened[path][part].write(weights.read(path, part)).result()

    return work


def bare_files(source: str, made: str, target: Path) -> Callable[[], None]:
    """Reads the arrays of the checkpoint `source` and writes their tensors to files like those of the HF folder `made`,
    through the same writer: no checks, no checksums, no journal, one thread."""
    weights = StoredWeights(source)
    export = Export(weights, tensors_of(weights, "keep"), None)

    def parts(names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        for (path, part), _ in export.jobs(names):
            yield from tensors_in(weights.stacks[path], part, weights.read(path, part))

    def work() -> None:
        target.mkdir()
        for file in sorted(Path(made).glob("*.safetensors")):
            tensors = TensorFile(epath.Path(file)).tensors
            entries = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
            write_tensors(epath.Path(target / file.name), entries, {}, parts(list(tensors)))

    return work


def copied(source: Path, target: Path) -> Callable[[], None]:
    def work() -> None:
        subprocess.run(["cp", "-r", source, target], check=True)
        subprocess.run(["sync", "-f", target], check=True)

    return work


def steps(folder: Path) -> dict[str, Callable[[], None]]:
    source, ours, back = folder / "source", folder / "ours", folder / "back"
    return {
        "to_jax": lambda: None if to_jax(str(source), str(ours)) else None,
        "bare_arrays": lambda: bare_arrays(str(source), str(ours), folder / "bare_arrays")(),
        "cp_source": copied(source, folder / "cp_source"),
        "to_hf": lambda: None if to_hf(str(ours), str(back)) else None,
        "bare_files": lambda: bare_files(str(ours), str(back), folder / "bare_files")(),
        "cp_ours": copied(ours, folder / "cp_ours"),
    }


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.convert", description=__doc__)
    folder = Path(command.folder)
    if command.step is not None:
        jax.config.update("jax_platforms", "cpu")
        print(json.dumps(measured(steps(folder)[command.step])))
        return
    if folder.exists():
        raise ValueError(f"{folder} exists: remove it, or choose another --folder")
    try:
        make_source(folder / "source", command.layers)
        size = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
        result: dict[str, Any] = {"benchmark": "convert", "bytes": size}
        for name in steps(folder):
            reads = folder / ("source" if name in ("to_jax", "bare_arrays", "cp_source") else "ours")
            subprocess.run(f"sync; find {reads} -type f | xargs cat > /dev/null", shell=True, check=True)
            again = [sys.executable, "-m", "benchmarks.convert", "--folder", folder, "--step", name]
            done = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True)
            result[name] = json.loads(done.stdout.splitlines()[-1])
            result[name]["bytes_per_second"] = size / result[name]["seconds"]
            if name.startswith(("bare", "cp")):
                shutil.rmtree(folder / name)
        for name, bare, cp in (("to_jax", "bare_arrays", "cp_source"), ("to_hf", "bare_files", "cp_ours")):
            own = result[name]["bytes_per_second"]
            result[name] |= {f"of_{other}": own / result[other]["bytes_per_second"] for other in (bare, cp)}
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)
