"""Every C++ kernel gives the same bits whichever threads take its parts.

Legend: R rows, E groups or experts, I inputs, O outputs, N tokens, K choices, D hidden, F expert width.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.kernels import native
from tests.support.native import finish, start

RULE = dict(b1=0.9, b2=0.95, eps=1e-8, decay=0.1)
SCALARS = np.array([0.7, 1e-3, 0.5, 0.1, 1], np.float32)
DTYPES = ("float32", "bfloat16")


@pytest.fixture
def library():
    if not any(map(native.shutil.which, native.COMPILERS)):
        pytest.skip("this machine has no C++ compiler")
    assert native.available()


def normal(rng: np.random.Generator, *shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


def adamw_arrays(rng: np.random.Generator, *shape: int) -> tuple[jax.Array, ...]:
    """Weights, gradients and both moments, of the sizes that they have in training."""
    weight, gradient, mean, square = (size * normal(rng, *shape) for size in (0.02, 1e-4, 1e-4, 1e-4))
    return weight, gradient, mean, square**2


class Case(NamedTuple):
    """A kernel, and how often it has work for all threads: in so many parts, where that tells two ways apart."""

    name: str
    kernel: Callable[..., Any]
    args: tuple[Any, ...]
    times: int
    parts: int | None = None


def product_cases(rng: np.random.Generator, dtype: str, weight_dtype: str) -> Iterator[Case]:
    """Groups of many rows, of some and of few, which are multiplied in three ways; one of all rows."""
    sizes_of = {"many": [350, 0, 277, 5], "some": [40, 0, 37, 200, 5], "few": [5, 8, 1, 4], "all": [900]}
    for (kind, sizes), width in zip(sizes_of.items(), (128, 128, 400, 96), strict=True):
        x_RI, sizes_E = normal(rng, sum(sizes) + 8, width, dtype=dtype), np.array(sizes, np.int32)
        w_EOI = normal(rng, len(sizes), width, width, dtype=weight_dtype)
        for out_dim in (1, 2):
            name = f"product, {kind} rows, out_dim {out_dim}"
            yield Case(name, partial(native.product, out_dim=out_dim), (x_RI, w_EOI, sizes_E), 1)


def experts_cases(rng: np.random.Generator, dtype: str, weight_dtype: str) -> Iterator[Case]:
    tokens, choices, experts, hidden, width = 300, 2, 5, 72, 100
    x_ND, g_ND = normal(rng, 2, tokens, hidden, dtype=dtype)
    scale_NK = normal(rng, tokens, choices)
    ids_NK = np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)]).astype(np.int32)
    dims = (1, experts, width, hidden), (1, experts, width, hidden), (1, experts, hidden, width)
    args = x_ND, scale_NK, ids_NK, *(normal(rng, *d, dtype=weight_dtype) / 8 for d in dims), np.int32(0)
    inner = normal(rng, 2, 1, ids_NK.size, width, dtype=dtype)
    yield Case("experts", native.experts, (*args, *inner), 2)
    yield Case("experts' gradients", native.experts_gradients, (*args, *inner, g_ND, *map(jnp.zeros, dims)), 3)


def attention_cases(rng: np.random.Generator, dtype: str) -> Iterator[Case]:
    """Gradients of enough rows and groups for all threads, and of one, whose blocks are shared."""
    options, tokens, width = dict(scale=0.2, causal=True), 300, 40
    for kind, rows, groups in (("wholes", 4, 2), ("blocks", 1, 1)):
        q, g = normal(rng, 2, rows, tokens, 4 * groups, width, dtype=dtype)
        k, v = normal(rng, 2, rows, tokens, groups, width, dtype=dtype)
        segments = np.sort(rng.integers(0, 3, (rows, tokens))).astype(np.int32)
        args = q, k, v, segments, segments
        yield Case(f"attention, {kind}", partial(native.attention, **options), args, 1)
        gradients, lse = partial(native.attention_gradients, **options), 3 + normal(rng, *q.shape[:3])
        for out_dtype in DTYPES:
            out, parts = normal(rng, *q.shape, dtype=out_dtype), rows * groups if kind == "wholes" else None
            yield Case(f"attention's gradients, {kind}, out {out_dtype}", gradients, (*args, out, lse, g), 1, parts)


def lightning_cases(rng: np.random.Generator, dtype: str) -> Iterator[Case]:
    """Parts are heads, and with gradients passes: pieces of documents with padding, columns that no vector divides."""
    rows, tokens, heads, widths = 2, 300, 3, (40, 72)
    q, k = normal(rng, 2, rows, tokens, heads, widths[0], dtype=dtype)
    v, g = normal(rng, rows, tokens, heads, widths[1], dtype=dtype), normal(rng, rows, tokens, heads, widths[1])
    state, dstate = normal(rng, 2, rows, heads, *widths)
    segments = np.sort(rng.integers(0, 4, (rows, tokens))).astype(np.int32)
    args = q, k, v, np.array([0.8, 0.1, 0.004], np.float32), segments, state
    yield Case("lightning", partial(native.lightning, scale=0.2), args, 1, rows * heads)
    gradients = partial(native.lightning_gradients, scale=0.2)
    yield Case("lightning's gradients", gradients, (*args, g, dstate), 1, 3 * rows * heads)


def cached_cases(rng: np.random.Generator, dtype: str) -> Iterator[Case]:
    """A step of decoding, one with drafts, and a piece of a prompt; rows end in different pieces of the cache. The
    pieces' answers are then put together."""
    run, layer = partial(native.cached_attention, scale=0.2), np.int32(1)
    for queries, pieces in ((1, 1 + 2 + 4), (5, 1 + 2 + 4), (100, 2 * (1 + 1 + 1))):
        q = normal(rng, 3, queries, 8, 40, dtype=dtype)
        k, v = normal(rng, 2, 2, 3, 1700, 2, 40, dtype=dtype)
        slots = np.maximum(np.array([[90], [1000], [1650]]) - np.arange(queries)[::-1], 0).astype(np.int32)
        blocks = 3 * (2 if queries == 100 else 1)
        yield Case(f"cached attention, {queries} queries", run, (q, k, v, layer, slots), 2, pieces + blocks)


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        for weight_dtype in DTYPES:
            for case in (*product_cases(rng, dtype, weight_dtype), *experts_cases(rng, dtype, weight_dtype)):
                yield case._replace(name=f"{case.name}, {dtype} with {weight_dtype}")
        rows = normal(rng, 400, 128, dtype=dtype), normal(rng, 400, 100, dtype=dtype)
        weights = [
            Case(f"weight gradient, {len(sizes)} groups", native.weight_gradient, (*rows, np.array(sizes)), 1)
            for sizes in ([190, 0, 7, 200], [399])
        ]
        of_attention = *attention_cases(rng, dtype), *cached_cases(rng, dtype), *lightning_cases(rng, dtype)
        for case in (*weights, *of_attention):
            yield case._replace(name=f"{case.name}, {dtype}")
    codes, scales = normal(rng, 3, 400, 300, dtype="float8_e4m3fn"), normal(rng, 2, 4, 3)
    args = normal(rng, 9, 300), codes, scales, np.array([2, 7], np.int32), np.int32(1)
    yield Case("product with blocks", native.fp8_product, args, 1)
    choose = partial(native.choose, groups=4, open_groups=2, choices=3)
    yield Case("choice of experts", choose, (normal(rng, 300, 16),), 1, 5)
    yield Case("adamw", partial(native.adamw, **RULE), (*adamw_arrays(rng, 150_001), SCALARS), 1)


class Turns(ctypes.Structure):
    """native.cc's `ling_turns`."""

    _fields_ = [(name, ctypes.c_int64) for name in ("who", "alone", "shared", "parts")]


def spoilt(a: Any) -> Any:
    return jnp.full_like(a, jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a


def check_all() -> None:
    """In a process whose library is the tests' build. The calling thread's memory is full of NaN before it works, the
    others' is fresh."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    assert native.available()
    turns = Turns.in_dll(ctypes.CDLL(str(native._library())), "ling_turns")
    different = []
    for case in cases():
        run, turns.who = jax.jit(case.kernel), 0
        run(*map(spoilt, case.args))
        results = set()
        for who in range(3):
            turns.who, turns.alone, turns.shared, turns.parts = who, 0, 0, 0
            arrays = [np.asarray(a) for a in jax.tree.leaves(run(*case.args))]
            assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in arrays), case.name
            results.add(b"".join(a.tobytes() for a in arrays))
            assert (turns.alone, turns.shared) == (0, case.times), f"{case.name} is too small for more threads"
            assert turns.parts > case.times and case.parts in (None, turns.parts), (case.name, turns.parts)
        different += [case.name] * (len(results) > 1)
    assert not different, different


def test_every_kernel_gives_the_same_bits_whoever_takes_its_parts(tmp_path, library):
    code = "native.FLAGS = (*native.FLAGS, '-DLING_TURNS')\n"
    code += "from tests.kernels.test_same_bits import check_all\ncheck_all()"
    assert "WARNING" not in finish(start(code, tmp_path, NPROC="4"))


def test_all_arithmetic_is_compiled_once_and_called_by_its_address(library):
    """Which holds whatever the numbers: two copies of a kernel may differ on another machine only."""
    if not shutil.which("objdump"):
        pytest.skip("this machine has no objdump")
    command = "objdump", "--disassemble", "--no-show-raw-insn", str(native._library())
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = dict(re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)*)", text, re.MULTILINE))
    multiplies = re.compile(r"\t(v?mulps|vfn?m(add|sub)\d+ps|fmul|fml[as])\s")
    busy = {name for name, body in functions.items() if multiplies.search(body)}
    of_kernels = {name for name in busy if "ThreadPool" in name}
    assert any("adamw" in name for name in of_kernels)
    assert not {name for name in of_kernels if not name.startswith("_ZN12_GLOBAL__N_14callI")}


def test_adamw_gives_the_same_bits_a_hundred_times(library):
    args = *adamw_arrays(np.random.default_rng(0), 3, 32, 96, 192), SCALARS
    run = jax.jit(partial(native.adamw, **RULE))
    assert len({b"".join(np.asarray(a).tobytes() for a in run(*args)) for _ in range(100)}) == 1
