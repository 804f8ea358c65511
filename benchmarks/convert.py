"""Converting a synthetic checkpoint of Ling-mini's shapes both ways, against a bare loop that writes the same arrays
through the same store, and `cp`: python -m benchmarks.convert [--layers 6] [--folder DIR]; JSON on the last line.

Memory is anonymous memory (RssAnon of /proc/self/status), beyond what the process had after its imports.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from etils import epath

from configs.ling_mini_2_0 import config as ling_mini
from ling_jax.checkpoint import NewArray, make_checkpoint, open_array
from ling_jax.cli import run_main
from ling_jax.convert.mapping import layout
from ling_jax.convert.tensorfile import DTYPES, TensorFile, TensorFileWriter
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.to_jax import to_jax
from ling_jax.convert.transfer import PIECE_BYTES, pieces
from ling_jax.convert.weights import INDEX, StoredWeights

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
        writer = TensorFileWriter(folder / file, {name: tensors[name] for name in mine}, {"format": "pt"})
        for name in mine:
            dtype, shape = tensors[name]
            if dtype == "F32":
                writer.write(name, 0, draw.standard_normal(shape, np.float32))
            else:
                bits = draw.integers(0, 1 << 16, shape, np.uint16) & np.uint16(0xBFFF)  # no exponent of all ones
                writer.write(name, 0, bits.view(DTYPES["BF16"]))
        writer.close()
        weight_map |= dict.fromkeys(mine, file)
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def bare_arrays(made: str, target: Path) -> Callable[[], None]:
    """Writes arrays of the shapes of the checkpoint `made`, from memory, through the same store in the same pieces."""
    weights = StoredWeights(made)
    arrays = {
        path: NewArray(stack.full_shape, weights.dtype(path), weights.chunk(path))
        for path, stack in weights.stacks.items()
    }
    noise = np.random.default_rng(0).integers(0, 255, 2 * PIECE_BYTES, np.uint8)

    def work() -> None:
        make_checkpoint(epath.Path(target), arrays, {})
        for path, new in arrays.items():
            array = open_array(epath.Path(target), path)
            for piece in pieces(path, weights.stacks[path], new.chunk, new.dtype.itemsize, 128):
                for part in piece.parts:
                    shape = tuple(s.stop - s.start for s in part)
                    count = int(np.prod(shape))
                    array[part].write(noise.view(new.dtype)[:count].reshape(shape)).result()

    return work


def bare_files(made: str, target: Path) -> Callable[[], None]:
    """Writes files with the tensors of the HF folder `made`, from memory, through the same writer."""
    noise = np.random.default_rng(0).integers(0, 255, 1 << 30, np.uint8)

    def work() -> None:
        target.mkdir()
        for file in sorted(Path(made).glob("*.safetensors")):
            tensors = TensorFile(file).tensors
            writer = TensorFileWriter(target / file.name, {n: (t.dtype, t.shape) for n, t in tensors.items()}, {})
            for name, tensor in tensors.items():
                writer.write(name, 0, noise[: tensor.nbytes])
            writer.close()

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
        "bare_arrays": lambda: bare_arrays(str(ours), folder / "bare_arrays")(),
        "cp_source": copied(source, folder / "cp_source"),
        "to_hf": lambda: None if to_hf(str(ours), str(back)) else None,
        "bare_files": lambda: bare_files(str(back), folder / "bare_files")(),
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
