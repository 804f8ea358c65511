"""Grouped matrix product: rows sorted by group, each group with its own weight.

Legend: R rows, E groups (experts), I inputs, O outputs, J blocks of `block` rows.
"""

from functools import partial

import jax
import jax.numpy as jnp

from ling_jax.kernels import fp8, gpu_fp8, gpu_grouped, gpu_tiles, megablox, native
from ling_jax.kernels.choose import Kernel, by_platform, for_nvidia, pallas
from ling_jax.kernels.fp8 import FP8Weight
from ling_jax.kernels.precision import precision_of

MAX_BLOCK = 128
TILE = 512  # the most rows that a kernel takes at a time


def block_rows(num_rows: int, num_groups: int) -> int:
    """Rows per block: groups are padded to a multiple of it. Half the mean group, so that little of the
    work is padding, at most 128 (measured best on CPU for groups of 500 rows and more); 1 when decoding,
    so that only the chosen groups' weights are read."""
    half_mean = num_rows // (2 * num_groups)
    return min(MAX_BLOCK, 1 << (half_mean.bit_length() - 1)) if half_mean else 1


def padded_rows(num_rows: int, num_groups: int, block: int) -> int:
    """Rows that hold any `num_rows` rows once every non-empty group is padded to whole blocks. Many are whole
    accelerator tiles too, for less than a hundredth more, so that no kernel has to copy them to be so."""
    rows = block * ((num_rows + min(num_rows, num_groups) * (block - 1)) // block)
    return rows if rows < 100 * TILE else -(-rows // TILE) * TILE


def _blocked_dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def groups_of_blocks(group_sizes_E: jax.Array, num_blocks: int, block: int) -> jax.Array:
    """[J] int32: the group of each block; E for blocks past the last group."""
    ends_E = jnp.cumsum(group_sizes_E) // block
    # Compared with all ends at once: a search is a loop, whose turns take a GPU longer than a decoding product.
    return jnp.searchsorted(ends_E, jnp.arange(num_blocks), side="right", method="compare_all").astype(jnp.int32)


def _blocked(x_RI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array, block: int, out_dim: int):
    """Every block times a copy of its group's weight; blocks past the last group meet a zero weight."""
    groups_J = groups_of_blocks(group_sizes_E, x_RI.shape[0] // block, block)
    w_JOI = w_EOI.astype(x_RI.dtype).at[groups_J].get(mode="fill", fill_value=0)
    y = _blocked_dot(x_RI.reshape(groups_J.size, block, -1), w_JOI, (2, 3 - out_dim))
    return y.reshape(x_RI.shape[0], -1).astype(x_RI.dtype)


def _blocked_dw(g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array, block: int):
    num_groups, num_blocks = group_sizes_E.size, x_RI.shape[0] // block
    groups_J = groups_of_blocks(group_sizes_E, num_blocks, block)
    products_JOI = _blocked_dot(g_RO.reshape(num_blocks, block, -1), x_RI.reshape(num_blocks, block, -1), (1, 1))
    return jax.ops.segment_sum(products_JOI, groups_J, num_groups, indices_are_sorted=True)


def _inside(y_RO: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Zeros past the last group, where some implementations leave what they like, NaN included."""
    inside_R = jnp.arange(y_RO.shape[0]) < group_sizes_E.sum()
    return jnp.where(inside_R[:, None], y_RO, 0)


def _ragged(x_RI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array, block: int, out_dim: int):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (3 - out_dim,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    y = jax.lax.ragged_dot_general(
        x_RI,
        w_EOI.astype(x_RI.dtype),
        group_sizes_E,
        numbers,
        precision=precision_of(x_RI.dtype),
        preferred_element_type=jnp.float32,
    )
    return _inside(y, group_sizes_E).astype(x_RI.dtype)


def _ragged_dw(g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array, block: int):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(
        g_RO, x_RI, group_sizes_E, numbers, precision=precision_of(x_RI.dtype), preferred_element_type=jnp.float32
    )


def _megablox(x_RI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array, block: int, out_dim: int, interpret: bool):
    y_RO = megablox.product(x_RI, w_EOI, group_sizes_E, out_dim=out_dim, interpret=interpret)
    return _inside(y_RO, group_sizes_E)


def _megablox_dw(g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array, block: int, interpret: bool):
    return megablox.weight_gradient(g_RO, x_RI, group_sizes_E, interpret=interpret)


def _chosen_blocks(
    x_RI: jax.Array, codes: jax.Array, scales: jax.Array, first: jax.Array, group_sizes_E: jax.Array, *, block: int
) -> jax.Array:
    """A copy of each block's weight, multiplied out."""
    groups_J = groups_of_blocks(group_sizes_E, x_RI.shape[0] // block, block)
    at_J = jnp.where(groups_J < scales.shape[0], groups_J + first, codes.shape[0])
    taken = (a.at[index].get(mode="fill", fill_value=0) for a, index in ((codes, at_J), (scales, groups_J)))
    w_JOI = FP8Weight(*taken).astype(x_RI.dtype)
    y = _blocked_dot(x_RI.reshape(groups_J.size, block, -1), w_JOI, (2, 2))
    return y.reshape(x_RI.shape[0], -1).astype(x_RI.dtype)


def _native_blocks(
    x_RI: jax.Array, codes: jax.Array, scales: jax.Array, first: jax.Array, group_sizes_E: jax.Array, *, block: int
) -> jax.Array:
    return native.fp8_product(x_RI, codes, scales, group_sizes_E, first)


_cpu_chosen_blocks = native.or_else("fp8_product", _native_blocks, _chosen_blocks)


def fp8_grouped_product(
    x_RI: jax.Array, stack: FP8Weight, layer: jax.Array, group_sizes_E: jax.Array, block: int
) -> jax.Array:
    """`grouped_product` with `out_dim` 1 and one layer of a stack of FP8 blocks [L, E, O, I].

    Few rows read the chosen groups' codes; for many they are multiplied out first.
    """
    groups = stack.shape[1]
    scales = jax.lax.dynamic_index_in_dim(stack.scales, layer, keepdims=False)
    codes = stack.codes.reshape(-1, *stack.shape[2:])
    chosen = partial(_chosen_blocks, block=block)

    def multiplied_out(x_RI, codes, scales, first, group_sizes_E):
        mine = jax.lax.dynamic_slice_in_dim(codes, first, groups)
        return grouped_product(x_RI, FP8Weight(mine, scales).astype(x_RI.dtype), group_sizes_E, block)

    def kernel(x_RI, codes, scales, first, group_sizes_E):
        return _inside(fp8.rows_product(x_RI, codes, scales, first, group_sizes_E), group_sizes_E)

    def triton(x_RI, codes, scales, first, group_sizes_E):
        rows = gpu_grouped.row_tile(block)
        groups_J = groups_of_blocks(group_sizes_E, x_RI.shape[0] // rows, rows)
        return gpu_fp8.rows_product(x_RI, codes, scales, first, groups_J, rows=rows)

    args = (x_RI, codes, scales, layer * groups, group_sizes_E)
    if x_RI.shape[0] > fp8.FEW:
        return multiplied_out(*args)
    whole = all(size % fp8.BLOCK == 0 for size in stack.shape[2:])
    on_gpu = chosen if block == 1 else multiplied_out  # of longer blocks XLA would copy the weights first
    if whole and for_nvidia() and gpu_tiles.take_fp8():
        on_gpu = triton
    cpu = partial(_cpu_chosen_blocks, block=block) if x_RI.dtype in native.DTYPES else chosen
    return by_platform(*args, cpu=cpu, tpu=kernel if whole else multiplied_out, cuda=on_gpu, rest=multiplied_out)


def _native(x_RI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array, block: int, out_dim: int) -> jax.Array:
    return native.product(x_RI, w_EOI, group_sizes_E, out_dim=out_dim)


def _native_dw(g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array, block: int) -> jax.Array:
    return native.weight_gradient(g_RO, x_RI, group_sizes_E)


_native_product = native.or_else("grouped_product", _native, _blocked)
_native_weight_gradient = native.or_else("grouped_weight_gradient", _native_dw, _blocked_dw)


def _in_cpp(x_RI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array, *, block: int, out_dim: int) -> jax.Array:
    known = x_RI.dtype in native.DTYPES and w_EOI.dtype in native.DTYPES
    return (_native_product if known else _blocked)(x_RI, w_EOI, group_sizes_E, block=block, out_dim=out_dim)


def _in_cpp_dw(g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array, *, block: int) -> jax.Array:
    known = g_RO.dtype in native.DTYPES and x_RI.dtype in native.DTYPES
    return (_native_weight_gradient if known else _blocked_dw)(g_RO, x_RI, group_sizes_E, block=block)


def _triton(x_RI: jax.Array, w_EOI: jax.Array, group_sizes_E: jax.Array, block: int, out_dim: int, interpret: bool):
    if not gpu_tiles.takes(x_RI):
        return _blocked(x_RI, w_EOI, group_sizes_E, block, out_dim)
    rows, w = gpu_grouped.row_tile(block), w_EOI.astype(x_RI.dtype)
    groups_J = groups_of_blocks(group_sizes_E, x_RI.shape[0] // rows, rows)
    return gpu_grouped.product(x_RI, w, groups_J, rows=rows, out_dim=out_dim, interpret=interpret)


def _triton_dw(g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array, block: int, interpret: bool):
    if not gpu_tiles.takes(g_RO, x_RI):
        return _blocked_dw(g_RO, x_RI, group_sizes_E, block)
    return gpu_grouped.weight_gradient(g_RO, x_RI, group_sizes_E, block=block, interpret=interpret)


# XLA:CPU computes every group for every row of a ragged product, and so does XLA for GPUs and some TPUs.
_PRODUCT = Kernel(
    cpu=_in_cpp,
    tpu=partial(_megablox, interpret=False),
    nvidia=partial(_triton, interpret=False),
    rest=_ragged,
    named={
        "native": Kernel(cpu=_in_cpp, rest=_blocked),
        "blocked": _blocked,
        "megablox": pallas(_megablox),
        "triton": pallas(_triton),
        "ragged": _ragged,
    },
)
_WEIGHT_GRADIENT = Kernel(
    cpu=_in_cpp_dw,
    tpu=partial(_megablox_dw, interpret=False),
    nvidia=partial(_triton_dw, interpret=False),
    rest=_ragged_dw,
    named={
        "native": Kernel(cpu=_in_cpp_dw, rest=_blocked_dw),
        "blocked": _blocked_dw,
        "megablox": pallas(_megablox_dw),
        "triton": pallas(_triton_dw),
        "ragged": _ragged_dw,
    },
)


def grouped_product(
    x_RI: jax.Array,
    w_EOI: jax.Array,
    group_sizes_E: jax.Array,
    block: int,
    out_dim: int = 1,
    implementation: str = "auto",
) -> jax.Array:
    """x_r w_e^T (`out_dim` 1) or x_r w_e (`out_dim` 2) for the rows r of each group e; not differentiable.

    Args:
      x_RI: rows sorted by group, R a multiple of `block`; rows that only pad must be zero.
      w_EOI: any float dtype, cast to x's.
      group_sizes_E: int32 rows of each group, padding included, each a multiple of `block`.
      block: rows per block, see `block_rows`.
      implementation: "native" (C++, for CPU; "blocked" where it cannot be built), "blocked" (XLA), "megablox" (Pallas,
        for TPU) and "triton" (Pallas, for NVIDIA GPUs), both interpreted on CPU, "ragged" (lax.ragged_dot, for the
        rest) or "auto".
    Returns:
      [R, O] in x's dtype, accumulated in float32; rows past the last group are zero.
    """
    return _PRODUCT(x_RI, w_EOI, group_sizes_E, implementation=implementation, block=block, out_dim=out_dim)


def grouped_weight_gradient(
    g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array, block: int, implementation: str = "auto"
) -> jax.Array:
    """float32 [E, O, I]: the sum of g_r x_r^T over the rows r of each group, 0 for an empty one; see
    `grouped_product`."""
    return _WEIGHT_GRADIENT(g_RO, x_RI, group_sizes_E, implementation=implementation, block=block)
