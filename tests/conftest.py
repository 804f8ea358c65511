"""The setting of every test: the CPU as eight devices, a cache of compiled programs, and the golden cases' place."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before the first import of jax. Commands that a test starts inherit the platform and the cache, which a second run
# finds filled, but not the eight devices: they run as they would for a user. `pytest --cache-clear` empties the cache.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is the compiler's, and a program that runs once need not be fast: the seeded weights of a run
# take 2 seconds to compile for 10. Only LLVM's part is left out, so TPU programs are as ever.
# And XLA ends a process whose devices have waited 40 seconds for one another, which on a busy machine they may.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level=0 {PATIENT}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Where an operation was written is of no use to a test, and to find it takes a twentieth of a trace's time; looking for
# cycles among all the objects of a trace, as often as Python does by itself, takes as much again.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
gc.set_threshold(100_000, 20, 100)
# A closed terminal's signal is as it is for a user, also where nohup started the suite.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_plugins = ("tests.support.buckets",)


def pytest_configure():
    import jax

    jax.config.update("jax_num_cpu_devices", 8)


# Every program that XLA compiles for the CPU keeps three mappings of memory. A process may have 65,530 (Linux's
# vm.max_map_count), and one that reaches them ends with a segmentation fault.
MOST_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    """Forgets compiled programs after a file of tests that has left many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()


# The files that take longest, longest first, so that both processes of pytest-xdist end at about the same time. `make
# test-fast` leaves them out: commands in processes of their own, buckets, meshes, and compilers of other machines.
SLOW = (
    "parallel", "processes", "resume", "surroundings", "smoke", "topology", "gpu_topology", "generate", "plan",
    "objectives", "one_writer", "data_buckets", "convert_buckets", "bucket_runs", "bucket_faults", "native",
    "sanitizers", "toy_mixer", "session", "dispatch", "bf16_params", "damage", "origin", "replay", "installed", "adam8",
    "fp8_training", "same_bits", "earlier_run", "hub", "balance_run", "fp8_tpu", "context", "going_on", "errors",
    "clusters_docs", "checkpoint_buckets", "bucket_servers", "speculation_benchmark", "needle", "store", "adapter",
    "extending", "native_experts", "fp8", "score", "gpu_kernels", "h100", "linear_mesh", "linear_decoding",
    "native_cached", "long_cache", "lightning_benchmark", "merge", "merge_memory", "harness", "tasks", "prepare",
    "snapshots", "sft", "pack", "chat_evaluation", "rl", "policy_objective",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]):
    place = {f"test_{name}": i for i, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in place:
            item.add_marker("slow")
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_sessionfinish(session: pytest.Session):
    """Nothing may have taken a bucket's address for a local path. The first process looks, when all have ended."""
    if hasattr(session.config, "workerinput"):
        return
    from tests.support.buckets import stray_folders

    roots = (session.config.rootpath, Path.cwd(), session.config._tmp_path_factory.getbasetemp())
    if found := stray_folders(*roots):
        print(f"\nERROR: made by a bucket's address taken for a local path: {', '.join(found)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_addoption(parser: pytest.Parser):
    parser.addoption(
        "--rewrite-golden-configs",
        action="store_true",
        help="write tests/config/golden_configs anew from configs/ instead of comparing; look at the diff",
    )


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden cases: $LING_GOLDEN_DIR, or the repository's own copy."""
    return Path(os.environ.get("LING_GOLDEN_DIR") or Path(__file__).parent / "golden")
