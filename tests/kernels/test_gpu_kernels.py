"""The GPU's kernels, interpreted on CPU, equal plain formulas for the layouts that could trip them.

Legend: R rows, E groups, I inputs, O outputs, B rows, T queries, S keys, H query heads, G kv heads, C head_dim.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.test_kernels import LAYOUTS, bf16, by_hand, normal, run_grouped
from tests.support.helpers import assert_close, assert_gradient_close

# grouped products


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_products_skip_rows_past_the_last_group_which_hold_nan(layout):
    """Outputs and inputs need masks: no tile divides them."""
    sizes = np.array(LAYOUTS[layout], np.int32) * 16
    x, w, g = normal(12 * 16, 7), normal(5, 35, 7), normal(12 * 16, 35)
    x[sizes.sum() :] = g[sizes.sum() :] = np.nan
    results, wants = run_grouped(x, w, sizes, g, 16, "triton"), by_hand(x, w, sizes, g)
    for got, want in zip(results, wants, strict=True):
        assert_close(got, want)
        assert not np.asarray(got)[want == 0].any()


SHAPES = {  # rows a block, inputs, outputs
    "tiles divide every dim": (64, 64, 128),
    "many tiles with tails": (32, 130, 200),
    "blocks of two tiles and more": (384, 32, 32),
    "blocks that are no power of two": (48, 40, 24),
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


@pytest.mark.parametrize("block", [1, 8])
def test_few_rows_a_block_take_xlas_form(block):
    """A kernel's tile would be mostly padding; XLA reads the chosen groups' weights alone."""
    sizes = np.array((0, 2, 1), np.int32) * block
    args = normal(4 * block, 40), normal(3, 24, 40), sizes, normal(4 * block, 24)
    text = str(run_grouped.trace(*args, block, "triton").jaxpr)
    assert "pallas_call" not in text
    for got, want in zip(run_grouped(*args, block, "triton"), by_hand(*args), strict=True):
        assert_close(got, want)
