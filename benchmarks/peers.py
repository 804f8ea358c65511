"""Our train step and greedy decoding beside transformers' Glm4Moe: python -m benchmarks.peers [--what train] [...]

Both sides run bench_moe on CPU, in turns, a process for each measurement, with the same allocator options and threads.
The peer needs a Python of its own (torch's builds for CPU only are those for 3.11); once:

    python3.11 -m venv .venv-peers
    .venv-peers/bin/pip install -r requirements-peers.txt

A table comes first; the last line of standard output is one JSON object. Figures are medians over the rounds, `ratio`
is ours over the peer's, of the medians and of each round. On a busy machine they mean nothing: the peer's threads wait
for one another at every operation, so that other load slows it several times. `other_cpus` tells what others used.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from ling_jax.cli import named_config, run_main
from ling_jax.config import count_params
from ling_jax.config.text import columns

log = logging.getLogger("peers")

ROOT = Path(__file__).parents[1]
CONFIG = "bench_moe"
BUSY = 0.1  # CPUs
PROMPT_LEN, NEW_TOKENS = 128, 128
# As in the Makefile: without huge pages a step spends its time in page faults, on both sides.
MALLOC = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 100_000_000_000, "top_pad": 268_435_456, "arena_max": 1}
# The peer's ways to use bfloat16.
PEER_DTYPES = {
    ("train", "float32"): ("float32",),
    ("train", "bfloat16"): ("autocast", "bfloat16"),
    ("decode", "float32"): ("float32",),
    ("decode", "bfloat16"): ("bfloat16",),
}

What = Literal["train", "decode"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    what: tuple[What, ...] = ("train", "decode")
    """What to compare."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    """Ours; the peer trains in bfloat16 by autocast and with everything in bfloat16."""
    batch: tuple[int, ...] = (1, 8)
    """Prompts decoded together."""
    rounds: int = 3
    """Each measures all once, ours and the peer's in turns."""
    steps: int = 8
    """Train steps timed in a process, after two to warm up."""
    runs: int = 3
    """Answers timed in a process, after at least one to warm up."""
    threads: int = 2
    """Of each side, on as many CPUs."""
    peer_python: str = ".venv-peers/bin/python"
    """A Python 3.11 with requirements-peers.txt."""


class Kind(NamedTuple):
    """A thing that one process measures, and whose it is."""

    side: Literal["ours", "peer"]
    what: What
    dtype: str
    batch: int

    def __str__(self) -> str:
        return f"{self.what} {self.dtype}" + f" batch {self.batch}" * (self.what == "decode")


def check(command: Command) -> None:
    """Raises ValueError for what cannot be run."""
    for name in ("what", "dtypes", "batch"):
        if not getattr(command, name):
            raise ValueError(f"--{name} names nothing to compare")
    sizes = {name: getattr(command, name) for name in ("rounds", "steps", "runs", "threads")}
    for name, value in [*sizes.items(), *(("batch", batch) for batch in command.batch)]:
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if shutil.which(command.peer_python) is None:
        raise ValueError(
            f"--peer-python {command.peer_python} is no program; these two commands make the peer's Python:\n"
            "  python3.11 -m venv .venv-peers\n"
            "  .venv-peers/bin/pip install -r requirements-peers.txt"
        )


def kinds_of(command: Command) -> list[Kind]:
    """All that a round measures, in order: what is compared is measured one after the other."""
    train_batch = named_config(CONFIG).data.global_batch_size
    found: list[Kind] = []
    for what in dict.fromkeys(command.what):
        for batch in dict.fromkeys(command.batch) if what == "decode" else [train_batch]:
            for dtype in dict.fromkeys(command.dtypes):
                found.append(Kind("ours", what, dtype, batch))
                found += [Kind("peer", what, theirs, batch) for theirs in PEER_DTYPES[what, dtype]]
    return found


def peer_spec(kind: Kind, command: Command) -> dict[str, Any]:
    """The numbers of one measurement of the peer."""
    config = named_config(CONFIG)
    schedule = {"peak_lr": config.schedule.peak_lr, "warmup_steps": config.schedule.warmup_steps}
    return {
        "what": kind.what,
        "dtype": kind.dtype,
        "batch": kind.batch,
        "threads": command.threads,
        "steps": command.steps,
        "runs": command.runs,
        "sequence_length": config.data.sequence_length,
        "prompt_len": PROMPT_LEN,
        "new_tokens": NEW_TOKENS,
        "init_std": config.train.init_std,
        "optimizer": dataclasses.asdict(config.optimizer) | schedule,
        "parameters": count_params(config.model).total,
        "model": config.model.to_hf(),
    }


def arguments(kind: Kind, command: Command) -> list[str]:
    """The command line that measures it."""
    if kind.side == "peer":
        # -P: this folder's convert.py and others are no modules of the peer's libraries.
        script, spec = Path(__file__).with_name("peer_glm4_moe.py"), json.dumps(peer_spec(kind, command))
        return [os.path.abspath(str(shutil.which(command.peer_python))), "-P", str(script), spec]
    ours = {"train": "train_step", "decode": "decode"}[kind.what]
    flags = {"--config": CONFIG, "--dtype": kind.dtype}
    if kind.what == "train":
        flags["--steps"] = str(command.steps)
    else:
        sizes = {"--batch": kind.batch, "--prompt-len": PROMPT_LEN, "--new-tokens": NEW_TOKENS, "--runs": command.runs}
        flags |= {name: str(value) for name, value in sizes.items()}
    return [sys.executable, "-m", f"benchmarks.{ours}", *(word for pair in flags.items() for word in pair)]


def environment(threads: int) -> dict[str, str]:
    """The same for both sides."""
    return os.environ | {
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items()),
        "OMP_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }


@contextlib.contextmanager
def confined(threads: int) -> Iterator[None]:
    """Programs started meanwhile run on `threads` CPUs: XLA makes a thread for each CPU that it may use.

    Raises:
      ValueError: if this process may use fewer, or the system cannot confine and there are more.
    """
    can_confine = hasattr(os, "sched_setaffinity")
    before = os.sched_getaffinity(0) if can_confine else set(range(os.cpu_count() or 1))
    if len(before) < threads or (len(before) > threads and not can_confine):
        raise ValueError(f"threads = {threads}, but the programs would have {len(before)} CPUs; give --threads")
    if not can_confine:
        yield
        return
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Clocks(NamedTuple):
    """Seconds until now."""

    wall: float
    busy: float  # of all CPUs together, those that another machine took away too
    mine: float  # of them, by programs started here that have ended

    @classmethod
    def read(cls) -> "Clocks":
        times, busy = os.times(), 0.0
        if (stat := Path("/proc/stat")).exists():
            user, nice, system, _, _, *others = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
            busy = sum((user, nice, system, *others)) / os.sysconf("SC_CLK_TCK")
        return cls(time.perf_counter(), busy, times.children_user + times.children_system)

    def other_cpus(self) -> float:
        """How many CPUs all other programs have used since, on average; 0 where the system does not tell."""
        wall, busy, mine = (now - then for now, then in zip(Clocks.read(), self, strict=True))
        return max(busy - mine, 0.0) / wall


def measure(kind: Kind, command: Command) -> dict[str, Any]:
    """The JSON object that one process prints last, and `other_cpus` while it ran.

    Raises:
      ValueError: if it fails, with the end of what it said.
    """
    words, before = arguments(kind, command), Clocks.read()
    done = subprocess.run(words, env=environment(command.threads), cwd=ROOT, capture_output=True, text=True)
    try:
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (IndexError, json.JSONDecodeError):
        result = None
    if not isinstance(result, dict):
        said = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-12:])
        program = shlex.join(words[:3])
        raise ValueError(f"{kind.side}, {kind}: {program} ended with code {done.returncode} and no JSON:\n{said}")
    return result | {"other_cpus": before.other_cpus()}


def summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One kind's figures: medians over the rounds, and the rate of each."""
    rates = [one["tokens_per_second"] for one in rounds]
    figures: dict[str, Any] = {"tokens_per_second": statistics.median(rates), "of_each_round": rates}
    for name in ("step_ms", "roofline_fraction", "compile_s"):
        if name in rounds[0]:
            figures[name] = statistics.median(one[name] for one in rounds)
    if "setting" in rounds[0]:
        figures["settings"] = list(dict.fromkeys(one["setting"] for one in rounds))
    return figures


def comparisons(results: Mapping[Kind, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Ours against each peer of its dtype and, where that is another, the fastest peer of any."""
    rates = {kind: [one["tokens_per_second"] for one in rounds] for kind, rounds in results.items()}
    found = []
    for ours in (kind for kind in results if kind.side == "ours"):
        peers = [kind for kind in results if kind.side == "peer" and (kind.what, kind.batch) == (ours.what, ours.batch)]
        fastest = max(peers, key=lambda kind: statistics.median(rates[kind]))
        same = [kind for kind in peers if kind.dtype in PEER_DTYPES[ours.what, ours.dtype]]
        for peer in dict.fromkeys([*same, fastest]):
            each = [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
            ratio = statistics.median(rates[ours]) / statistics.median(rates[peer])
            of = {"ours": str(ours), "peer": str(peer), "fastest_peer": peer == fastest}
            found.append(of | {"ratio": ratio, "ratio_of_each_round": each})
    return found


def figures(command: Command, results: Mapping[Kind, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The result, from every round of every kind."""
    sides: dict[str, dict[str, Any]] = {"ours": {}, "peer": {}}
    versions: dict[str, Any] = {}
    for kind, rounds in results.items():
        sides[kind.side][str(kind)] = summary(rounds)
        versions[kind.side] = rounds[0]["versions"]
    matmul = [one["matmul_gflops"] for kind, rounds in results.items() if kind.side == "ours" for one in rounds]
    others = [one["other_cpus"] for rounds in results.values() for one in rounds]
    return {
        "benchmark": "peers",
        "config": CONFIG,
        "parameters": count_params(named_config(CONFIG).model).total,
        **{name: getattr(command, name) for name in ("rounds", "steps", "runs", "threads")},
        "prompt_len": PROMPT_LEN,
        "new_tokens": NEW_TOKENS,
        **sides,
        "comparisons": comparisons(results),
        "matmul_gflops": statistics.median(matmul),
        "matmul_gflops_range": [min(matmul), max(matmul)],
        "other_cpus": statistics.median(others),
        "other_cpus_max": max(others),
        "versions": versions,
    }


def table(result: Mapping[str, Any]) -> str:
    """Tokens per second of both and their ratios; a star marks the fastest peer of any dtype."""
    rows = [("ours", "peer", "tokens/s", "peer's", "ratio", "of each round")]
    for one in result["comparisons"]:
        ours, peers = (f"{result[side][one[side]]['tokens_per_second']:,.0f}" for side in ("ours", "peer"))
        each = " ".join(f"{ratio:.2f}" for ratio in one["ratio_of_each_round"])
        peer = one["peer"] + " *" * one["fastest_peer"]
        rows.append((one["ours"], peer, ours, peers, f"{one['ratio']:.2f}", each))
    low, high = result["matmul_gflops_range"]
    notes = [
        f"* the fastest peer of any dtype; {result['parameters']:,} parameters on both sides",
        f"float32 products of 2048^3: {low:,.0f} to {high:,.0f} GFLOP/s",
        f"CPUs that other programs used meanwhile: {result['other_cpus']:.2f}, at most {result['other_cpus_max']:.2f}",
    ]
    if result["other_cpus_max"] > BUSY:
        notes.append("NOT COMPARABLE: the machine was busy; run this on an idle one")
    return "\n".join([columns(rows, numbers=True), "", *notes])


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(Command, args=list(argv), prog="python -m benchmarks.peers", description=__doc__)
    check(command)
    results: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in kinds_of(command)}
    with confined(command.threads):
        for count in range(1, command.rounds + 1):
            for kind, rounds in results.items():
                rounds.append(measure(kind, command))
                rate, others = rounds[-1]["tokens_per_second"], rounds[-1]["other_cpus"]
                told = (count, command.rounds, kind.side, kind, rate, others)
                log.info("round %d of %d: %s, %s: %.1f tokens/s; others used %.2f CPUs", *told)
    result = figures(command, results)
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
