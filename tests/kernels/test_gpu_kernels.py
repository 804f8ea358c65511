"""The GPU's kernels, interpreted on CPU, equal plain formulas for the layouts that could trip them.

Legend: R rows, E groups, I inputs, O outputs, B rows, T queries, S keys, H query heads, G kv heads, C head_dim.
"""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.kernels import gpu_fp8, gpu_tiles
from ling_jax.kernels.attention import attend, attend_bwd, cached_attention
from ling_jax.kernels.fp8 import quantise_weight
from ling_jax.kernels.gpu_attention import Job, _meetings, _turns
from ling_jax.kernels.grouped import groups_of_blocks
from ling_jax.kernels.work import KernelCall, cost_of
from tests.kernels.test_kernels import LAYOUTS, bf16, by_hand, normal, run_grouped
from tests.support.helpers import assert_close, assert_gradient_close, jit

# grouped products


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [2, 16])
def test_grouped_products_skip_rows_past_the_last_group_which_hold_nan(block, layout):
    """No tile divides outputs or inputs, nor, of blocks of 2, the rows."""
    sizes = np.array(LAYOUTS[layout], np.int32) * block
    x, w, g = normal(12 * block, 7), normal(5, 35, 7), normal(12 * block, 35)
    x[sizes.sum() :] = g[sizes.sum() :] = np.nan
    results, wants = run_grouped(x, w, sizes, g, block, "triton"), by_hand(x, w, sizes, g)
    for got, want in zip(results, wants, strict=True):
        assert_close(got, want)
        assert not np.asarray(got)[want == 0].any()


SHAPES = {  # rows a block, inputs, outputs
    "tiles divide every dim": (64, 64, 128),
    "many tiles with tails": (32, 130, 200),
    "blocks of two tiles and more": (384, 32, 32),
    "blocks that are no power of two": (48, 40, 24),
    "blocks of half a tile": (8, 40, 24),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_products_of_many_tiles_equal_the_loop(shape, dtype):
    block, inputs, outputs = SHAPES[shape]
    sizes = np.array((1, 0, 2), np.int32) * block
    x, w, g = normal(4 * block, inputs), normal(3, outputs, inputs), normal(4 * block, outputs)
    x[sizes.sum() :] = g[sizes.sum() :] = np.nan
    if dtype == "bfloat16":
        x, w, g = bf16(x), bf16(w), bf16(g)
    y, dx, dw = run_grouped(jnp.asarray(x, dtype), w, sizes, jnp.asarray(g, dtype), block, "triton")
    want_y, want_dx, want_dw = by_hand(x, w, sizes, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, np.float32)
    rounding = 2**-8 if dtype == "bfloat16" else 1e-5
    assert_gradient_close(y.astype("float32"), want_y, tolerance=rounding)
    assert_gradient_close(dx.astype("float32"), want_dx, tolerance=rounding)
    assert_gradient_close(dw, want_dw)


def test_products_of_single_rows_read_the_weights_of_chosen_groups_alone():
    """As in decoding. A tile's other rows are not there."""
    sizes = np.array((0, 2, 1), np.int32)
    x, w, g = normal(4, 40), normal(3, 24, 40), normal(4, 24)
    want = by_hand(x, w, sizes, g)
    w[0] = np.nan
    for got, expected in zip(run_grouped(x, w, sizes, g, 1, "triton"), want, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [1, 2, 16])
def test_few_rows_meet_the_codes_of_their_groups_alone(block, dtype):
    """The second layer of a stack, whose first, and whose experts without rows, hold NaN."""
    sizes = np.array((1, 0, 2), np.int32) * block
    w, x = normal(3, 256, 128), jnp.asarray(normal(4 * block, 128), dtype)
    weight = quantise_weight(w)
    codes = jnp.concatenate([jnp.full_like(weight.codes, jnp.nan), weight.codes]).at[4].set(jnp.nan)
    groups = groups_of_blocks(jnp.asarray(sizes), 4, block)
    got = jit(gpu_fp8.rows_product, static_argnames=("rows", "interpret"))(
        x, codes, weight.scales, 3, groups, rows=block, interpret=True
    )
    want = by_hand(np.asarray(x, np.float32), np.asarray(weight.astype(jnp.float32)), sizes, normal(4 * block, 256))[0]
    assert got.dtype == dtype and not np.asarray(got)[sizes.sum() :].any()
    assert_gradient_close(got.astype("float32"), want, tolerance=2**-8 if dtype == "bfloat16" else 1e-5)
    operands = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (groups, jnp.zeros(1), x, codes, weight.scales)]
    cost = cost_of(KernelCall(["gpu_fp8_rows"], "", operands, [got], lambda room: room / 2, 2.0))
    assert cost.flops == {dtype: 2 * 2 * block * 256 * 128}
    assert cost.bytes == 2 * block * (128 + 256) * x.dtype.itemsize + 2 * (256 * 128 + 4 * 2)


# attention


@partial(jit, static_argnums=(2, 3))
def run_both(args, g, causal, implementation):
    """Output, lse and gradients over these keys alone."""
    options = dict(scale=0.3, causal=causal, implementation=implementation)
    out, lse = attend(*args, **options)
    return out, lse, *attend_bwd(*args, out, lse, g, **options)


def attention_args(queries, keys, heads, groups, width, causal):
    """Rows of documents that start anywhere, are padded at their end and interrupted by padding."""
    rng = np.random.default_rng(queries)
    q, k, v = normal(2, queries, heads, width), normal(2, keys, groups, width), normal(2, keys, groups, width, seed=1)
    kv_segments = np.cumsum(rng.random((2, keys)) < 0.02, axis=1, dtype=np.int32) + 1
    kv_segments[0, -keys // 5 :] = kv_segments[1, keys // 3 : keys // 2] = 0
    q_segments = kv_segments if causal else rng.integers(0, 3, (2, queries), np.int32)
    return (q, k, v, q_segments, kv_segments), normal(2, queries, heads, width, seed=2)


ROWS = {  # queries, keys, query heads, kv heads, head_dim, causal
    "fewer tokens than a tile has": (5, 5, 2, 1, 8, True),
    "one group for all heads": (130, 130, 3, 1, 32, True),
    "a group for each head": (65, 65, 2, 2, 16, True),
    "an odd head": (100, 100, 4, 2, 6, True),
    "wider than the tiles are long": (40, 40, 2, 1, 128, True),
    "fewer queries than keys": (17, 150, 4, 2, 16, False),
    "fewer keys than queries": (150, 17, 4, 2, 16, False),
}


@pytest.mark.parametrize("row", ROWS)
def test_attention_and_its_gradients_equal_xlas(row):
    *sizes, causal = ROWS[row]
    args, g = attention_args(*sizes, causal)
    results, wants = (run_both(args, g, causal, name) for name in ("triton", "xla"))
    for got, want in zip(results[:2], wants[:2], strict=True):
        assert_close(got, want)
    for got, want in zip(results[2:], wants[2:], strict=True):
        assert_gradient_close(got, want)


CACHED = {  # queries, slots, query heads, kv heads, head_dim
    "one query, few slots": (1, 5, 4, 2, 8),
    "one query, many tiles of slots": (1, 700, 4, 1, 32),
    "queries of drafts": (5, 300, 6, 2, 16),
    "a chunk of a prompt": (150, 200, 3, 1, 6),
    "as many kv heads": (3, 130, 2, 2, 128),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CACHED)
def test_attention_over_a_cache_equals_xlas_and_reads_no_tile_after_the_last_slot(case, dtype):
    """Each row has its own number of slots in use; a slot beyond the cache counts as its last."""
    queries, keys, heads, groups, width = CACHED[case]
    q = jnp.asarray(normal(2, queries, heads, width), dtype)
    k, v = (jnp.asarray(normal(2, keys, groups, width, seed=seed), dtype) for seed in (1, 2))
    last = np.array([keys // 3, keys + 2])  # of the first row's slots only a third is in use
    slots = np.maximum(last[:, None] - np.arange(queries)[::-1], 0).astype(np.int32)
    want = cached_attention(q, k, v, slots, 0.3, "xla")
    unused = (np.arange(keys) >= (keys // 3 // 64 + 1) * 64)[:, None, None]  # tiles have 64 at most
    k, v = (a.at[0].set(jnp.where(unused, jnp.nan, a[0])) for a in (k, v))
    got = jit(cached_attention, static_argnums=(4, 5))(q, k, v, slots, 0.3, "triton")
    assert got.dtype == dtype
    assert_close(got.astype("float32"), want.astype("float32"), 2**-8 if dtype == "bfloat16" else 1e-5)


def test_tiles_of_other_documents_are_never_read():
    """Each of two documents fills whole tiles; the keys and cotangents of the other are NaN."""
    (q, k, v, _, _), g = attention_args(256, 256, 2, 1, 16, True)
    segments = np.repeat(np.array([[1, 2]] * 2, np.int32), 128, axis=1)
    clean = run_both((q, k, v, segments, segments), g, True, "triton")
    for mine, other in ((slice(0, 128), slice(128, 256)), (slice(128, 256), slice(0, 128))):
        dirty = [np.array(a) for a in (q, k, v, g)]
        for a in dirty:
            a[:, other] = np.nan
        *qkv, dirty_g = dirty
        for got, want in zip(run_both((*qkv, segments, segments), dirty_g, True, "triton"), clean, strict=True):
            np.testing.assert_array_equal(np.asarray(got)[:, mine], np.asarray(want)[:, mine])


def test_a_key_no_query_may_see_is_never_met():
    """The turns of a loop over tiles: from the first tile that can matter to the last."""
    job = Job(scale=1.0, causal=True, queries=4, keys=2)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 0]], np.int32)
    meet = _meetings(segments, segments, job)
    first, end = _turns(meet)
    assert first.tolist() == [[0, 0, 4, 6]] and end.tolist() == [[2, 4, 6, 7]]
    first, end = _turns(meet.swapaxes(1, 2))
    assert first.tolist() == [[0, 0, 1, 1, 2, 2, 3]] and end.tolist() == [[2, 2, 2, 2, 3, 3, 4]]
    nobody, everybody = np.full((1, 4), 9, np.int32), np.full((1, 4), 1, np.int32)
    assert _turns(_meetings(nobody, everybody, job._replace(causal=False)))[1].tolist() == [[0]]


def test_dtypes_the_kernels_lack_take_xlas_form():
    args, g = attention_args(8, 8, 2, 1, 8, True)
    halves = tuple(a.astype(np.float16) for a in args[:3])
    assert "pallas_call" not in str(run_both.trace((*halves, *args[3:]), g, True, "triton").jaxpr)


def test_costs_of_the_kernels_are_their_products():
    args, g = attention_args(64, 64, 4, 2, 16, True)
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
    call = KernelCall(["gpu_attention"], "attention/causal", arrays, [], lambda room: room, 1.0)
    scores = 2 * 2 * 4 * 64 * 64 * 16 / 2
    for name, products in (("gpu_attention", 2), ("gpu_attention_q", 3), ("gpu_attention_kv", 4)):
        assert cost_of(call._replace(names=[name])).flops == {"float32": products * scores}
    x, w, y = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((64, 32), (4, 16, 32), (64, 16)))
    rows = [jax.ShapeDtypeStruct((4,), "int32"), x, w]
    cost = cost_of(KernelCall(["gpu_grouped_product"], "", rows, [y], lambda room: room / 2, 2.0))
    assert cost.flops == {"bfloat16": 2 * 32 * 32 * 16}
    assert cost.bytes == 2 * (32 * 32 + 32 * 16 + 2 * 16 * 32)  # half of the rows, two of four experts
    gradient = KernelCall(["gpu_grouped_gradient"], "", [rows[0], y, x], [w.update(dtype="float32")], lambda r: r, 4.0)
    assert cost_of(gradient).flops == {"bfloat16": 2 * 64 * 32 * 16}


def test_costs_of_the_fp8_kernels_are_their_products_and_the_bytes_of_codes_and_scales():
    """Half of 512 rows, and two of four experts of 256 x 128."""
    shapes = {"codes": (512, 128), "scales": (1, 512), "w": (4, 256, 128), "w_scales": (4, 2, 1), "y": (512, 256)}
    dtypes = {"codes": "float8_e4m3fn", "w": "float8_e4m3fn", "y": "bfloat16"}
    a = {name: jax.ShapeDtypeStruct(shape, dtypes.get(name, "float32")) for name, shape in shapes.items()}
    operands = [jax.ShapeDtypeStruct((4,), "int32"), a["codes"], a["scales"], a["w"], a["w_scales"]]
    call = KernelCall(["gpu_fp8_product"], "", operands, [a["y"]], lambda room: room / 2, 2.0)
    cost = cost_of(call)
    assert cost.flops == {"float8_e4m3fn": 2 * 256 * 256 * 128}
    assert cost.bytes == 256 * (128 + 4 + 2 * 256) + 2 * (256 * 128 + 4 * 2)


def test_a_program_for_other_devices_has_no_trace_of_them():
    """Nor, lowered for CUDA from a mesh of CPUs, does it fail for not knowing the GPU."""
    args, g = attention_args(64, 64, 4, 2, 16, True)
    attention = run_both.trace(args, g, True, "auto")
    products = run_grouped.trace(
        normal(8, 40), normal(3, 24, 40), np.array((0, 8, 0), np.int32), normal(8, 24), 8, "auto"
    )
    for program, expected in ((attention, "dot_general"), (products, "ragged_dot")):
        assert "gpu_" not in str(program.jaxpr)
        text = program.lower(lowering_platforms=("cuda",)).as_text()
        assert expected in text and "triton" not in text


def test_without_the_backend_xlas_form_runs_with_one_warning(monkeypatch, caplog):
    gpu_tiles._triton.cache_clear()
    x = jnp.zeros(1)  # before: JAX imports its platforms so, too
    monkeypatch.setattr(importlib, "import_module", lambda name: raise_import_error(name))
    try:
        assert not gpu_tiles.takes(x) and not gpu_tiles.takes(x)
        assert [r.getMessage() for r in caplog.records] == [
            "experts and attention run in XLA's slower forms: this JAX has no Triton backend (gone)"
        ]
    finally:
        gpu_tiles._triton.cache_clear()


def test_on_gpus_older_than_the_backend_knows_xlas_form_runs_with_one_warning(monkeypatch, caplog):
    gpu_tiles._new_enough.cache_clear()
    for capability, products, fp8 in ((7.5, False, False), (7.5, False, False), (8.0, True, False), (8.9, True, True)):
        monkeypatch.setattr(gpu_tiles, "_capability", lambda capability=capability: capability)
        assert (gpu_tiles.takes(jnp.zeros(1)), gpu_tiles.take_fp8()) == (products, fp8)
    assert [r.getMessage() for r in caplog.records] == [
        "experts and attention run in XLA's slower forms: this GPU's compute capability is 7.5, and their kernels need "
        "8.0"
    ]


def raise_import_error(name: str):
    raise ImportError("gone")
