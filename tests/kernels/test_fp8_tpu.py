"""The FP8 kernels for TPU: interpreted here against float64, and compiled for a v7x that is not here.

Legend: R rows, E groups, I inputs, O outputs; lower case: their blocks of 128.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ling_jax.kernels.fp8_tpu import product, tiles, weight_gradient
from ling_jax.plan.plan import topology_devices

ROWS, OUTPUTS, INPUTS = 512, 256, 384
F32, BF16, F8 = (jnp.dtype(name) for name in ("float32", "bfloat16", "float8_e4m3fn"))
SIZES = [(128, 0, 256, 0), (0, 384, 128), (0, 0, 0), (512,), (384,), (0,)]


def codes(rng, *shape) -> jax.Array:
    return jnp.asarray(rng.normal(0, 100, shape).clip(-448, 448), F8)


def scales(rng, *shape) -> jax.Array:
    return jnp.asarray(10 ** rng.uniform(-6, 2, shape), F32)


def each(values, *axes) -> np.ndarray:
    """In float64, repeated for each element of a block along `axes`."""
    values = np.asarray(values).astype(np.float64)
    for axis in axes:
        values = values.repeat(128, axis)
    return values


def spans(sizes) -> list[slice]:
    return [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]


def assert_close(got, products, tolerance: float):
    """`products`: pairs of the factors, in float64, of each part of `got`.

    Against the greatest result of all, and each result against the magnitudes that were added up for it.
    """
    expected = np.concatenate([a @ b for a, b in products])
    magnitudes = np.concatenate([np.abs(a) @ np.abs(b) for a, b in products])
    error = np.abs(np.asarray(got).astype(np.float64) - expected)
    assert error.shape == magnitudes.shape
    assert error.max(initial=0) <= tolerance * np.abs(expected).max(initial=0)
    assert (error <= tolerance * magnitudes).all(), (error / magnitudes).max()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("out_dim", [1, 2])
def test_a_product_is_that_of_the_dequantised_operands(sizes, out_dim):
    rng = np.random.default_rng(0)
    inner = (INPUTS, OUTPUTS)[out_dim - 1]
    x, x_scales = codes(rng, ROWS, inner), scales(rng, ROWS, inner // 128)
    w, w_scales = codes(rng, len(sizes), OUTPUTS, INPUTS), scales(rng, len(sizes), OUTPUTS // 128, INPUTS // 128)
    arguments = (x, x_scales, w, w_scales, jnp.array(sizes))
    y = product(*arguments, out_dim=out_dim, dtype=F32, interpret=True)
    assert y.dtype == F32 and y.shape == (ROWS, (OUTPUTS, INPUTS)[out_dim - 1])
    x_f64, w_f64 = each(x) * each(x_scales, 1), each(w) * each(w_scales, 1, 2)
    factors = [(x_f64[rows], w_f64[e].T if out_dim == 1 else w_f64[e]) for e, rows in enumerate(spans(sizes))]
    assert_close(y[: sum(sizes)], factors, 2e-6)
    rounded = product(*arguments, out_dim=out_dim, dtype=BF16, interpret=True)[: sum(sizes)]
    assert rounded.dtype == BF16 and (rounded == y[: sum(sizes)].astype(BF16)).all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_weight_gradient_is_that_of_the_dequantised_operands_and_reads_no_further_rows(sizes):
    rng = np.random.default_rng(1)
    g, g_scales = codes(rng, ROWS, OUTPUTS), scales(rng, ROWS // 128, OUTPUTS)
    x, x_scales = codes(rng, ROWS, INPUTS), scales(rng, ROWS // 128, INPUTS)
    used = sum(sizes)
    past = jnp.arange(ROWS)[:, None] >= used
    g_nan, x_nan = (jnp.where(past, jnp.array(jnp.nan, a.dtype), a) for a in (g, x))
    dw = weight_gradient(g_nan, g_scales, x_nan, x_scales, jnp.array(sizes), interpret=True)
    assert dw.dtype == F32 and dw.shape == (len(sizes), OUTPUTS, INPUTS)
    g_f64, x_f64 = each(g) * each(g_scales, 0), each(x) * each(x_scales, 0)
    assert_close(dw.reshape(-1, INPUTS), [(g_f64[rows].T, x_f64[rows]) for rows in spans(sizes)], 2e-6)


def test_a_long_sum_takes_several_turns_of_the_loop():
    """34 blocks, of which 2 x 17 are no multiple of the 16 that are unrolled; and the codes' extremes."""
    rng = np.random.default_rng(2)
    inner = 34 * 128
    x, w = (jnp.asarray(rng.choice([-448, -0.0, 2**-9, 448], (128, inner)), F8) for _ in range(2))
    x_scales, w_scales = scales(rng, 128, 34), scales(rng, 1, 1, 34)
    y = product(x, x_scales, w[None], w_scales, jnp.array([128]), out_dim=1, dtype=F32, interpret=True)
    assert_close(y, [(each(x) * each(x_scales, 1), (each(w) * each(w_scales[0], 0, 1)).T)], 2e-6)


def test_a_single_group_takes_larger_tiles_of_rows():
    assert tiles(512, 1, 384, 256) == (256, 256)
    assert tiles(512, 4, 384, 256) == tiles(384, 1, 384, 256) == (128, 256)
    assert tiles(8192, 1, 18432, 8192) == (256, 256) and tiles(65536, 32, 512, 2048) == (128, 1024)


# Ling-mini on 8 ranks: what each receives of 1024 tokens of each rank, and its experts.
RECEIVED, HIDDEN, WIDTH, EXPERTS, RANKS = 8192, 2048, 512, 32, 8


def compiled_kernel(mesh: Mesh, kernel, shapes) -> tuple[str, int]:
    """The optimized program and the bytes of its temporaries; `kernel` is in a manual region, as each rank has rows and
    experts of its own."""
    along = PartitionSpec("rank")
    sharded = jax.shard_map(kernel, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)
    arguments = [
        jax.ShapeDtypeStruct((RANKS * size, *rest), dtype, sharding=NamedSharding(mesh, along))
        for (size, *rest), dtype in shapes
    ]
    compiled = jax.jit(sharded).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory
    return compiled.as_text() or "", memory.temp_size_in_bytes


def largest(text: str, dtype: str) -> int:
    """Elements of the largest array of `dtype` in a compiled program."""
    shapes = re.findall(rf"\b{dtype}\[([\d,]+)\]", text)
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


def operands(text: str, kernel: str) -> list[str]:
    """Operands of the one call of a Pallas kernel."""
    (call,) = re.findall(rf"%{kernel}[.\d]* = .*custom-call.*operand_layout_constraints={{(.*?}})}}", text)
    return re.findall(r"(\w+\[[\d,]*\])", call)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older versions compile it but cannot print the program")
def test_on_v7x_the_kernels_take_fp8_and_no_product_of_blocks_is_written_out():
    """Each of 8 devices with its part of Ling-mini's experts, whose projections have both orientations."""
    mesh = jax.make_mesh((RANKS,), ("rank",), devices=topology_devices("tpu7x:2x2x1", 1))
    sizes = ((EXPERTS,), "int32")
    for out_dim, inner, outputs in ((1, HIDDEN, WIDTH), (2, WIDTH, HIDDEN)):
        kernel = partial(product, out_dim=out_dim, dtype=BF16)
        rows = [((RECEIVED, inner), F8), ((RECEIVED, inner // 128), F32)]
        weights = [((EXPERTS, WIDTH, HIDDEN), F8), ((EXPERTS, WIDTH // 128, HIDDEN // 128), F32)]
        text, temporaries = compiled_kernel(mesh, kernel, [*rows, *weights, sizes])
        taken = operands(text, "fp8_product")
        assert f"f8e4m3fn[{RECEIVED},{inner}]" in taken and f"f8e4m3fn[{EXPERTS},{WIDTH},{HIDDEN}]" in taken
        assert largest(text, "f32") <= EXPERTS * (inner // 128) * outputs  # scales of weights
        assert temporaries < RECEIVED * inner / 2

    rows = [
        ((RECEIVED, WIDTH), F8),
        ((RECEIVED // 128, WIDTH), F32),
        ((RECEIVED, HIDDEN), F8),
        ((RECEIVED // 128, HIDDEN), F32),
    ]
    text, temporaries = compiled_kernel(mesh, weight_gradient, [*rows, sizes])
    taken = operands(text, "fp8_weight_gradient")
    assert f"f8e4m3fn[{RECEIVED},{WIDTH}]" in taken and f"f8e4m3fn[{RECEIVED},{HIDDEN}]" in taken
    assert largest(text, "f32") == EXPERTS * WIDTH * HIDDEN  # the result
    assert temporaries < RECEIVED * HIDDEN / 2
