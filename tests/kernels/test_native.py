"""The C++ grouped products equal XLA's form and sums in float64, wherever they run, and nothing depends on them.

Legend: R rows, E groups, I inputs, O outputs.
"""

import ctypes
import logging
import subprocess
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.kernels import native
from ling_jax.kernels.grouped import grouped_product, grouped_weight_gradient
from tests.support.helpers import QUICK, assert_close, assert_gradient_close
from tests.support.native import finish, start
from tests.tiny_run import REPO

EMULATED = f'-DLING_AMX_EMULATED="{REPO / "tests" / "support" / "amx_emulated.h"}"'
# (R, E, I, O). Few rows and many; one column; more than one packed block of every dim; what no vector divides.
SHAPES = ((1, 3, 5, 1), (8, 6, 64, 32), (37, 5, 33, 70), (300, 4, 256, 128), (530, 2, 40, 21), (40, 3, 515, 290))
SHAPES += ((300, 1, 70, 290),)  # one group alone
DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))


@pytest.fixture
def library():
    if not any(map(native.shutil.which, native.COMPILERS)):
        pytest.skip("this machine has no C++ compiler")
    assert native.available()


@partial(jax.jit, static_argnums=(4, 5), compiler_options=QUICK)
def run(x_RI, w_EOI, sizes_E, g_RO, block: int, implementation: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y, dx, dw."""
    product = partial(grouped_product, block=block, implementation=implementation)
    y = product(x_RI, w_EOI, sizes_E, out_dim=1)
    return (
        y,
        product(g_RO, w_EOI, sizes_E, out_dim=2),
        grouped_weight_gradient(g_RO, x_RI, sizes_E, block, implementation),
    )


def arrays(shape, dtypes=("float32", "float32"), seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w, g as whole numbers / 8 of a few bits: bfloat16 holds them, and float32 their sums, exactly."""
    rows, groups, inputs, outputs = shape
    rng = np.random.default_rng([seed, *shape])
    x, w, g = (rng.integers(-15, 16, dims) / 8 for dims in ((rows, inputs), (groups, outputs, inputs), (rows, outputs)))
    return jnp.asarray(x, dtypes[0]), jnp.asarray(w, dtypes[1]), jnp.asarray(g, dtypes[0])


def by_hand(x, w, g, sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, dx, dw in float64, from rows inside groups only."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    y, dx, dw = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    ends = np.cumsum(sizes)
    for group, end in enumerate(ends):
        rows = slice(end - sizes[group], end)
        y[rows], dx[rows], dw[group] = x[rows] @ w[group].T, g[rows] @ w[group], g[rows].T @ x[rows]
    return y, dx, dw


def check(shape, dtypes, sizes, implementation: str = "native") -> None:
    """Equal to the last bit: all sums are exact. NaN lies past the last group."""
    x, w, g = arrays(shape, dtypes)
    inside = (np.arange(shape[0]) < sum(sizes))[:, None]
    hostile = [jnp.where(inside, a, jnp.nan) for a in (x, g)]
    results = run(hostile[0], w, np.array(sizes, np.int32), hostile[1], 1, implementation)
    assert [a.dtype for a in results] == [x.dtype, x.dtype, jnp.float32]
    for got, want in zip(results, by_hand(x, w, g, sizes), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(jnp.asarray(want, jnp.float32).astype(got.dtype)))


def hostile_sizes(rows: int, groups: int) -> list[list[int]]:
    """All in the first group, all in the last, none, one row each from the end, and halves that leave rows over."""
    first, last, none = [rows] + [0] * (groups - 1), [0] * (groups - 1) + [rows], [0] * groups
    single = [int(groups - e <= rows) for e in range(groups)]
    return [first, last, none, single, [rows // 2 // groups] * groups]


def check_few() -> None:
    """Groups of 1 to 40 rows, which are multiplied in ways of their own: outputs that end inside a vector."""
    for sizes, shape in ((range(1, 10), (50, 9, 41, 37)), ((16, 17, 33, 1, 40), (110, 5, 300, 75))):
        for dtypes in DTYPES:
            check(shape, dtypes, list(sizes))


def check_all(shapes=SHAPES) -> None:
    for shape in shapes:
        for dtypes in DTYPES:
            for sizes in hostile_sizes(*shape[:2]):
                check(shape, dtypes, sizes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def check_random_sizes(data) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), min_size=shape[1], max_size=shape[1])))
    check(shape, data.draw(st.sampled_from(DTYPES)), np.diff([0, *cuts]).tolist())


def test_every_hostile_layout_gives_exact_sums(library):
    check_all()


def test_few_rows_of_each_number_give_exact_sums(library):
    check_few()


def test_random_layouts_give_exact_sums(library):
    check_random_sizes()


@pytest.mark.parametrize("first", [0, 2, 3, 9, -1])
def test_groups_weights_may_begin_anywhere_in_a_longer_stack(first, library):
    """And never outside it."""
    x, w, g = arrays((20, 5, 48, 33))
    sizes = np.array([3, 17], np.int32)
    begin = min(max(first, 0), 3)
    want = by_hand(x, w[begin : begin + 2], g, sizes)
    for out_dim, rows in ((1, x), (2, g)):
        got = jax.jit(partial(native.product, out_dim=out_dim))(rows, w, sizes, jnp.int32(first))
        np.testing.assert_array_equal(got, np.float32(want[out_dim - 1]))


def test_short_work_of_eight_devices_at_once_is_done_whoever_waits_for_it(library):
    """Threads of the pool wait for the next work; each device's has to come back right from every one of 300 turns."""
    mesh = jax.make_mesh((8,), ("expert",))
    x, w, _ = arrays((64, 6, 64, 64))
    w = w.at[:].set(jnp.eye(64)[::-1])  # turns a row round

    def turns(x, w):
        sizes = jnp.array([1, 2, 3, 0, 1, 1])
        return jax.lax.fori_loop(0, 300, lambda i, x: native.product(x, w, sizes, out_dim=1), x)

    spec = jax.P("expert")
    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(turns, in_specs=(spec, jax.P()), out_specs=spec, check_vma=False))
        for _ in range(5):
            got = np.asarray(run(jax.device_put(x, jax.NamedSharding(mesh, spec)), w))
            np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_numbers_give_what_xla_gives(dtype, library):
    rng = np.random.default_rng(0)
    sizes = np.array([128, 0, 16, 8, 240], np.int32)
    x, g = (jnp.asarray(rng.normal(size=(400, width)), dtype) for width in (200, 72))
    w = jnp.asarray(rng.normal(size=(5, 72, 200)), jnp.float32)  # rounded to bfloat16 by both
    tolerance = 1e-6 if dtype == "float32" else 2**-8
    got, want = (run(x, w, sizes, g, 8, name) for name in ("native", "blocked"))
    assert_close(got[0], want[0], tolerance)
    assert_close(got[1], want[1], tolerance)
    assert_gradient_close(got[2], want[2], 1e-6)


def test_nan_and_infinity_stay_what_they_are(library):
    x, w, g = arrays((40, 2, 48, 33), ("bfloat16", "float32"))
    w = w.at[0, 3, 7].set(jnp.nan).at[1, 5, 9].set(3.4e38)  # the second is infinite in bfloat16
    x = x.at[:, 9].set(1)
    y = np.asarray(run(x, w, np.array([20, 20], np.int32), g, 1, "native")[0], np.float32)
    assert np.isnan(y[:20, 3]).all() and np.isposinf(y[20:, 5]).all()
    assert np.isfinite(np.delete(y[:20], 3, axis=1)).all() and np.isfinite(np.delete(y[20:], 5, axis=1)).all()


def test_sizes_that_promise_more_rows_than_there_are_touch_nothing_else(library):
    x, w, g = arrays((16, 3, 8, 8))
    got = run(x, w, np.array([10, 2**31 - 1, 5], np.int32), g, 1, "native")
    for a, want in zip(got, by_hand(x, w, g, [10, 6, 0]), strict=True):
        np.testing.assert_array_equal(a, want.astype(np.float32))


def test_xlas_threads_may_be_turned_off(library):
    x, w, g = arrays((1300, 2, 64, 40))
    options = {"xla_cpu_multi_thread_eigen": False}
    alone = jax.jit(run.__wrapped__, static_argnums=(4, 5), compiler_options=options)
    got = alone(x, w, np.array([700, 600], np.int32), g, 1, "native")
    for a, want in zip(got, by_hand(x, w, g, [700, 600]), strict=True):
        np.testing.assert_array_equal(a, want.astype(np.float32))


def test_eight_devices_at_once_in_shard_map(library):
    shape, sizes = (400, 3, 128, 96), np.array([[100 + 10 * i, 0, 300 - 10 * i] for i in range(8)], np.int32)
    devices = [arrays(shape, seed=i) for i in range(8)]
    x, w, g = (jnp.stack(column) for column in zip(*devices, strict=True))
    mesh = jax.make_mesh((8,), ("expert",))

    def one(x, w, sizes, g):
        return tuple(a[None] for a in run.__wrapped__(x[0], w[0], sizes[0], g[0], 1, "native"))

    spec = jax.P("expert")
    with jax.set_mesh(mesh):
        results = jax.jit(jax.shard_map(one, in_specs=spec, out_specs=spec, check_vma=False))(
            *(jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (x, w, sizes, g))
        )
    for i, device in enumerate(devices):
        for got, want in zip(results, by_hand(*device, sizes[i]), strict=True):
            np.testing.assert_array_equal(np.asarray(got)[i], want.astype(np.float32))


def lowered(platform: str, **options) -> str:
    x, w, g = arrays((8, 2, 16, 4))
    # A function of its own: what `run` was traced to is kept.
    traced = jax.jit(lambda *args: run.__wrapped__(*args, 1, "auto"), **options).trace(x, w, np.array([5, 3]), g)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_what_is_lowered_for_other_platforms_builds_nothing(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: pytest.fail("asked for the library"))
    assert "ling_grouped" not in lowered("cuda")


def test_on_cpu_the_native_product_is_chosen_unless_the_environment_says_no(monkeypatch, library):
    assert "ling_grouped_product" in lowered("cpu") and "ling_grouped_weight_gradient" in lowered("cpu")
    monkeypatch.setenv("LING_JAX_NATIVE", "0")
    assert "ling_grouped" not in lowered("cpu")


def test_other_dtypes_are_left_to_xla():
    x, w, g = arrays((8, 2, 16, 4), ("float16", "float32"))
    for got, want in zip(run(x, w, np.array([5, 3]), g, 1, "native"), by_hand(x, w, g, [5, 3]), strict=True):
        assert_close(got, want, 2**-10)


# Other processes: the library's cache is empty in each.


FALLBACK = """
from tests.kernels.test_native import check
for sizes in ([5, 0, 3], [0, 8, 0]):
    check((8, 3, 16, 4), ("float32", "float32"), sizes)
    check((8, 3, 16, 4), ("float32", "bfloat16"), sizes)
assert not native.available()
"""


def test_without_a_compiler_results_are_the_same_and_one_warning_says_so(tmp_path):
    said = finish(start(FALLBACK, tmp_path, CXX="", PATH=""))
    warnings = [line for line in said.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1 and "no C++ compiler" in warnings[0] and "apt install g++" in warnings[0]


@pytest.fixture
def fresh(monkeypatch, tmp_path, library) -> Path:
    """Nothing is loaded in this process nor in its cache, whose folder this is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_loaded", native.functools.cache(native._loaded.__wrapped__))
    return tmp_path


@pytest.mark.parametrize(
    ("compiler", "flags", "reason"),
    [
        ("/nonexistent/c++", (), "cannot run the C++ compiler"),
        ("", ("-fno-such-option",), "-fno-such-option"),
        ("false", (), "`false --version` failed"),
    ],
    ids=["no such compiler", "what the compiler said", "not a compiler"],
)
def test_a_build_that_fails_is_one_warning_with_its_reason(compiler, flags, reason, monkeypatch, caplog, fresh):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *flags))
    with caplog.at_level(logging.WARNING):
        assert not native.available() and not native.available()
    assert len(caplog.records) == 1 and reason in caplog.text
    assert not [path for path in fresh.rglob("*") if path.is_file()]


def test_processes_may_build_at_once_and_leave_one_library(monkeypatch, caplog, fresh):
    source = fresh / "small.cc"
    source.write_text("int f() { return 1; }")
    code = f"native.SOURCE = native.Path({str(source)!r})\n"
    code += "native.Path.exists = lambda path: False  # the other's library is not there yet\nnative._library()"
    processes = [start(code, fresh) for _ in range(2)]
    for process in processes:
        assert "INFO:ling_jax.kernels.native:built" in finish(process)
    (library,) = [path for path in fresh.rglob("*") if path.is_file() and path != source]
    monkeypatch.setattr(native, "SOURCE", source)
    with caplog.at_level(logging.INFO):
        assert native._library() == library and not caplog.records  # found, not built


# Vectors of other widths than this machine's own, which the compiler makes of narrower ones or of fewer lanes.


def has_amx() -> bool:
    """Whether this machine's library multiplies in AMX tiles: its compiler and Linux both allow it."""
    command = *native._compiler(), native._machine_flag(), "-dM", "-E", "-xc++", "/dev/null"
    # arch_prctl, as native_amx.h asks
    return "__AMX_BF16__" in native._output(*command) and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


WIDTHS = {
    "4 lanes": ("-DLING_LANES=4",),
    "8 lanes": ("-DLING_LANES=8",),
    "16 lanes": ("-DLING_LANES=16", "-DLING_NO_AMX"),
    "16 lanes and AMX": ("-DLING_LANES=16",),
}
CHECKS = """
from tests.kernels import test_fp8, test_lightning, test_native, test_native_attention, test_native_cached
from tests.kernels import test_native_experts
from tests.model import test_router
test_native.check_all(test_native.SHAPES[2::3])
test_native.check_few()
test_router.check_choice()
test_fp8.check_blocks()
test_native_attention.check_few()
test_native_cached.check_few()
test_lightning.check_few()
test_native_experts.check_all(test_native_experts.SHAPES[1:2], test_native_experts.DTYPES[:2])
test_native_experts.check_adamw()
"""


@pytest.mark.parametrize("width", WIDTHS)
def test_vectors_of_every_width_give_what_the_formulas_give(width, tmp_path, library):
    """AMX's tiles are emulated on machines without them."""
    flags = *WIDTHS[width], *((EMULATED,) if "AMX" in width and not has_amx() else ())
    code = f"native.FLAGS = (*native.FLAGS, '-Og', *{flags!r})\n" + CHECKS
    assert "WARNING" not in finish(start(code, tmp_path))


@pytest.mark.parametrize("width", WIDTHS)
def test_vectors_of_every_width_compile_for_a_processor_with_amx(width, library):
    command = [*native._compiler(), *native.FLAGS, "-march=sapphirerapids", "-fsyntax-only"]
    if subprocess.run([*command, "-xc++", "/dev/null"], capture_output=True).returncode:
        pytest.skip("this compiler does not know such a processor")
    native._output(*command, *WIDTHS[width], f"-I{jax.ffi.include_dir()}", str(native.SOURCE))
