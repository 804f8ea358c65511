"""Weights as products see them: one protocol, four forms.

A parameter is kept as an array (`PlainWeight`), as FP8 blocks to serve (`ServedWeight`), with codes beside it to train
in FP8 (`MasterWeight`), or, for the experts of one layer, as a place in the stack of all layers (`LayerWeight`).
`as_weight` is the only place that tells them apart.

Legend: R rows sorted by expert, E experts, I inputs, O outputs, L layers, N either of I and O.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from ling_jax.kernels import blockwise
from ling_jax.kernels.blockwise import deviation, quantise_tiles
from ling_jax.kernels.choose import for_cpu
from ling_jax.kernels.fp8 import BLOCK, FEW, FP8Weight
from ling_jax.kernels.grouped import block_rows, fp8_grouped_product, grouped_product, grouped_weight_gradient
from ling_jax.kernels.linear import linear, linear_of_layer


class Carrier(NamedTuple):
    """The arrays of a weight that trains in its stack, handed from layer to layer: on the way back each layer writes
    its part into one array, where a scan would stack copies. Every layer must be run, once.

    Attributes:
      stack_LEOI: the stack of weights once more: gradients go to it alone.
      kept_LRO: memory in which a product's results lie for the backward pass, to which they come as its cotangent; None
        where they are kept otherwise.
    """

    stack_LEOI: jax.Array
    kept_LRO: jax.Array | None


class StackedLayer(NamedTuple):
    """One layer of a stack of experts' weights, as a kernel takes it that reads them where they lie."""

    array_LEOI: jax.Array
    layer: jax.Array  # int32 []
    carrier: Carrier | None


class Weight:
    """A matrix [O, I], or one for each expert [E, O, I]; a pytree, whose cotangent has its own form."""

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that it is kept in."""
        raise NotImplementedError

    def linear(self, x: jax.Array) -> jax.Array:
        """x w^T, differentiable: [..., I] -> [..., O] in x's dtype, accumulated in float32."""
        raise NotImplementedError

    def product(self, x_RI: jax.Array, sizes_E: jax.Array, block: int, out_dim: int) -> jax.Array:
        """x_r w_e^T (`out_dim` 1) or x_r w_e (`out_dim` 2) of the rows r of each expert e, [R, N] in x's dtype; not
        differentiable. `sizes_E` and `block` as in `kernels.grouped.grouped_product`."""
        raise NotImplementedError

    def gradient(self, g_RO: jax.Array, x_RI: jax.Array, sizes_E: jax.Array, block: int) -> Any:
        """This weight's cotangent from its product's: the sum of g_r x_r^T over each expert's rows."""
        raise NotImplementedError

    def block(self, num_rows: int, num_experts: int) -> int:
        """Rows that an expert's rows are padded to a multiple of, see `kernels.grouped.block_rows`."""
        return block_rows(num_rows, num_experts)

    def moved(self, move: Callable[[jax.Array, Any], jax.Array], wire_dtype: Any) -> Self:
        """The weight of which arrays have been sent over the mesh: `move(array, dtype it travels in)`, a linear map
        that leaves its dims in their places."""
        raise NotImplementedError

    def rows_swapped(self, swap: Callable[[jax.Array], jax.Array], pick: Callable[[jax.Array], jax.Array]) -> Self:
        """The weight after `swap`, a linear map, of its rows; `pick` takes their blocks' rows from the scales."""
        raise NotImplementedError

    def pulled_back(self, f: Callable[[Self], Any]) -> tuple[Any, Callable[[Any], Any]]:
        """`f` of this weight, and what makes this weight's cotangent of its result's; `f` is a linear map."""
        weight, back = jax.vjp(f, self)
        return weight, lambda cotangent: back(cotangent)[0]

    def kept(self) -> Self:
        """The weight as the backward pass of a product needs it."""
        return self

    def in_stack(self) -> StackedLayer | None:
        """The layer of a stack that it is, if one kernel can read it there and write its gradient."""
        return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PlainWeight(Weight):
    """An array of any float dtype, cast to that of what it meets."""

    array: jax.Array

    @property
    def dtype(self) -> jnp.dtype:
        return self.array.dtype

    def linear(self, x: jax.Array) -> jax.Array:
        return linear(x, self.array)

    def product(self, x_RI: jax.Array, sizes_E: jax.Array, block: int, out_dim: int) -> jax.Array:
        return grouped_product(x_RI, self.array, sizes_E, block, out_dim)

    def gradient(self, g_RO: jax.Array, x_RI: jax.Array, sizes_E: jax.Array, block: int) -> "PlainWeight":
        return PlainWeight(grouped_weight_gradient(g_RO, x_RI, sizes_E, block).astype(self.dtype))

    def moved(self, move: Callable[[jax.Array, Any], jax.Array], wire_dtype: Any) -> "PlainWeight":
        return PlainWeight(move(self.array, wire_dtype))

    def rows_swapped(
        self, swap: Callable[[jax.Array], jax.Array], pick: Callable[[jax.Array], jax.Array]
    ) -> "PlainWeight":
        return PlainWeight(swap(self.array))

    def in_stack(self) -> StackedLayer | None:
        return StackedLayer(self.array[None], jnp.zeros((), jnp.int32), None)

    def linear_of_layer(self, layer: jax.Array, x: jax.Array) -> jax.Array:
        """`linear` with one layer of a stack [L, O, I]."""
        return linear_of_layer(x, self.array, layer)

    def product_of_layer(
        self, layer: jax.Array, x_RI: jax.Array, sizes_E: jax.Array, block: int, out_dim: int
    ) -> jax.Array:
        """`product` with one layer of a stack [L, E, O, I]: of all layers' experts in a row, only its have rows."""
        layers, experts = self.array.shape[:2]
        sizes = jnp.zeros(layers * experts, jnp.int32)
        sizes = jax.lax.dynamic_update_slice(sizes, sizes_E.astype(jnp.int32), (layer * experts,))
        return grouped_product(x_RI, self.array.reshape(-1, *self.array.shape[2:]), sizes, block, out_dim)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ServedWeight(Weight):
    """FP8 blocks, half of bfloat16's bytes to read; it has no gradient."""

    blocks: FP8Weight

    @property
    def dtype(self) -> jnp.dtype:
        return self.blocks.dtype

    def linear(self, x: jax.Array) -> jax.Array:
        return linear(x, self.blocks.astype(x.dtype))

    def product(self, x_RI: jax.Array, sizes_E: jax.Array, block: int, out_dim: int) -> jax.Array:
        stack: FP8Weight = jax.tree.map(lambda a: a[None], self.blocks)
        return ServedWeight(stack).product_of_layer(jnp.zeros((), jnp.int32), x_RI, sizes_E, block, out_dim)

    def moved(self, move: Callable[[jax.Array, Any], jax.Array], wire_dtype: Any) -> "ServedWeight":
        return ServedWeight(_codes_moved(self.blocks, move))

    def rows_swapped(
        self, swap: Callable[[jax.Array], jax.Array], pick: Callable[[jax.Array], jax.Array]
    ) -> "ServedWeight":
        return ServedWeight(FP8Weight(swap(self.blocks.codes), pick(self.blocks.scales)))

    def linear_of_layer(self, layer: jax.Array, x: jax.Array) -> jax.Array:
        """`linear` with one layer of a stack [L, O, I]."""
        rows = x.reshape(-1, x.shape[-1])
        if not for_cpu() or rows.shape[0] > FEW:
            one = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), self.blocks)
            return ServedWeight(one).linear(x)
        stack: FP8Weight = jax.tree.map(lambda a: a[:, None], self.blocks)  # of one expert in each layer
        sizes = jnp.full(1, rows.shape[0], jnp.int32)
        return fp8_grouped_product(rows, stack, layer, sizes, rows.shape[0]).reshape(*x.shape[:-1], -1)

    def product_of_layer(
        self, layer: jax.Array, x_RI: jax.Array, sizes_E: jax.Array, block: int, out_dim: int
    ) -> jax.Array:
        """`product` with one layer of a stack [L, E, O, I]."""
        assert out_dim == 1, "FP8 blocks are for inference"
        return fp8_grouped_product(x_RI, self.blocks, layer, sizes_E, block)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MasterWeight(Weight):
    """A weight in FP8 training: products read `quantised`, their gradient is that of `master`."""

    master: jax.Array
    quantised: FP8Weight
    watch: jax.Array | None = None  # float32 zeros [..., OPERANDS, SUMS], whose gradient is what was to be watched

    @property
    def dtype(self) -> jnp.dtype:
        return self.master.dtype

    def linear(self, x: jax.Array) -> jax.Array:
        return _fp8_linear(x, self)

    def product(self, x_RI: jax.Array, sizes_E: jax.Array | None, block: int, out_dim: int) -> jax.Array:
        return blockwise.product(quantise_tiles(x_RI, 1), self.quantised, sizes_E, out_dim, x_RI.dtype)

    def gradient(self, g_RO: jax.Array, x_RI: jax.Array, sizes_E: jax.Array | None, block: int) -> "MasterWeight":
        """The cotangent, with the sums that are watched of all four operands but the weight itself."""
        g, x = quantise_tiles(g_RO, 0), quantise_tiles(x_RI, 0)
        sums = None
        if self.watch is not None:
            rows = [(a, quantise_tiles(a, 1)) for a in (x_RI, g_RO)]
            pairs = (*rows, (g_RO, g), (x_RI, x))
            sums = jnp.stack([deviation(a, tiles.multiplied_out()) for a, tiles in pairs])
        return self._cotangent(blockwise.weight_gradient(g, x, sizes_E), sums)

    def block(self, num_rows: int, num_experts: int) -> int:
        """One tile of what is quantised along rows."""
        return BLOCK

    def moved(self, move: Callable[[jax.Array, Any], jax.Array], wire_dtype: Any) -> "MasterWeight":
        """No product reads the master: it sends nothing."""
        return MasterWeight(move(self.master, None), _codes_moved(self.quantised, move), self.watch)

    def rows_swapped(
        self, swap: Callable[[jax.Array], jax.Array], pick: Callable[[jax.Array], jax.Array]
    ) -> "MasterWeight":
        quantised = FP8Weight(swap(self.quantised.codes), pick(self.quantised.scales))
        return MasterWeight(swap(self.master), quantised, self.watch)

    def pulled_back(self, f: Callable[["MasterWeight"], Any]) -> tuple[Any, Callable[[Any], Any]]:
        back = jax.vjp(lambda master: f(dataclasses.replace(self, master=master)).master, self.master)[1]
        return f(self), lambda cotangent: self._cotangent(back(cotangent.master)[0], cotangent.watch)

    def kept(self) -> "MasterWeight":
        """A master that was gathered to be here is not kept, nor gathered again."""
        return MasterWeight(jnp.zeros((), self.dtype), self.quantised, self.watch)

    def _cotangent(self, of_master: jax.Array, watched: jax.Array | None) -> "MasterWeight":
        codes_have_none: Any = None
        return MasterWeight(of_master.astype(self.dtype), codes_have_none, watched)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerWeight(Weight):
    """One layer's weight [O, I], or its experts' [E, O, I], where it lies in the stack of all: a kernel's operand that
    is a part of an array would be copied, chosen experts or not.

    Attributes:
      stack: a weight [L, O, I] or [L, E, O, I].
      carrier: to train.
    """

    stack: PlainWeight | ServedWeight
    layer: jax.Array  # int32 []
    carrier: Carrier | None = None

    @classmethod
    def cotangent(cls, of_carrier: Carrier) -> "LayerWeight":
        """The cotangent whose only part is the carrier's."""
        nothing: Any = None  # for what is only read
        return cls(nothing, nothing, of_carrier)

    @property
    def dtype(self) -> jnp.dtype:
        return self.stack.dtype

    def linear(self, x: jax.Array) -> jax.Array:
        return self.stack.linear_of_layer(self.layer, x)

    def product(self, x_RI: jax.Array, sizes_E: jax.Array, block: int, out_dim: int) -> jax.Array:
        return self.stack.product_of_layer(self.layer, x_RI, sizes_E, block, out_dim)

    def moved(self, move: Callable[[jax.Array, Any], jax.Array], wire_dtype: Any) -> "LayerWeight":
        """Stacks lie as they are computed with: nothing is sent."""
        return self

    def in_stack(self) -> StackedLayer | None:
        if not isinstance(self.stack, PlainWeight) or (self.carrier is None and not for_cpu()):
            return None
        return StackedLayer(self.stack.array, self.layer, self.carrier)


def as_weight(value: Any) -> Any:
    """The `Weight` of what a parameter is kept as: an array, FP8 blocks, or a weight already."""
    if isinstance(value, Weight):
        return value
    return ServedWeight(value) if isinstance(value, FP8Weight) else PlainWeight(value)


def _codes_moved(blocks: FP8Weight, move: Callable[[jax.Array, Any], jax.Array]) -> FP8Weight:
    """Codes travel as they are; every device has all scales."""
    return FP8Weight(move(blocks.codes, blocks.dtype), blocks.scales)


@jax.custom_vjp
def _fp8_linear(x: jax.Array, w: MasterWeight) -> jax.Array:
    y_RO = w.product(x.reshape(-1, x.shape[-1]), None, BLOCK, 1)
    return y_RO.reshape(*x.shape[:-1], -1)


def _fp8_linear_fwd(x: jax.Array, w: MasterWeight) -> tuple[jax.Array, Any]:
    return _fp8_linear(x, w), (x, w.kept())


def _fp8_linear_bwd(saved: Any, g: jax.Array) -> tuple[jax.Array, MasterWeight]:
    x, w = saved
    g_RO, x_RI = (a.reshape(-1, a.shape[-1]) for a in (g, x))
    return w.product(g_RO, None, BLOCK, 2).reshape(x.shape), w.gradient(g_RO, x_RI, None, BLOCK)


_fp8_linear.defvjp(_fp8_linear_fwd, _fp8_linear_bwd)
