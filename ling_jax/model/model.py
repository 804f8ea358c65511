"""Ling: embedding, the layer plan run as scans, final norm, head, MTP.

Legend: B rows, T tokens, D hidden, V vocabulary, L layers, K experts per token, E experts.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from ling_jax.config import ONE_DEVICE, LayerKind, LayerRun, MeshConfig, ModelConfig, layer_kinds, layer_runs
from ling_jax.config.text import columns
from ling_jax.kernels.linear import linear_in_float32
from ling_jax.kernels.precision import under_own_switches
from ling_jax.model.attention import Context
from ling_jax.model.block import Block, LayerOutput
from ling_jax.model.inputs import check_names, checked_batch
from ling_jax.model.linear import Init, Linear
from ling_jax.model.mtp import MTP, next_tokens
from ling_jax.model.norm import RMSNorm
from ling_jax.model.rope import rope_tables
from ling_jax.model.router import ExpertBias, Routing, replayed
from ling_jax.model.stack import How, rematerialised, run_layers
from ling_jax.parallel.mesh import all_gather, axis_index, axis_size, psum
from ling_jax.parallel.rules import gather, look_up, spec_of

# What may be named in `capture`. "hidden_states" is the input of each trunk layer and the last one's output;
# per-layer entries are stacked in layer order, the MTP layer last; "linear_raw" and "linear_state" are those of linear
# attention, before its norm and after the last token.
CAPTURES = ("hidden_states", "attn_out", "router_logits", "linear_raw", "linear_state", "final_norm", "mtp_hidden")


class Hidden(NamedTuple):
    """A call without the head."""

    hidden_BTD: jax.Array  # after the final norm
    mtp_hidden_BTD: jax.Array | None  # after the MTP layer's final norm
    routing: Routing | None  # stacked over the MoE layers in order, the MTP layer's last; None without any
    captured: dict[str, jax.Array]
    cache: Any


class Output(NamedTuple):
    logits_BTV: jax.Array  # float32
    mtp_logits_BTV: jax.Array | None  # float32
    routing: Routing | None
    captured: dict[str, jax.Array]


class Embedding(nnx.Module):
    """Table [V, D]; looking up the padding id passes no gradient (spec 2.9)."""

    def __init__(self, config: ModelConfig, init: Init):
        self.weight = init.normal((config.vocab_size, config.hidden_size), ("vocab", "hidden"))
        self.padding_id, self.mesh = config.pad_token_id, init.mesh

    def __call__(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        table_VD = self.weight.get_value()
        first = axis_index("tensor") * table_VD.shape[0]  # of this device's part of the vocabulary
        local_BT = jnp.where(tokens_BT >= first, tokens_BT - first, table_VD.shape[0])
        with jax.named_scope("embedding"):
            rows = psum(look_up(table_VD, local_BT, self.weight.split, dtype, self.mesh.reduce_dtype), "tensor")
        if self.padding_id is None:
            return rows
        return jnp.where((tokens_BT == self.padding_id)[..., None], jax.lax.stop_gradient(rows), rows)


def _block_maker(config: ModelConfig, kind: LayerKind, init: Init) -> Callable[[nnx.Rngs], Block]:
    return lambda rngs: Block(config, kind, dataclasses.replace(init, rngs=rngs))


def _stack_outputs(per_layer: list[LayerOutput], capture: Sequence[str]) -> tuple[Routing | None, dict]:
    """Layer outputs in order -> routing and captures stacked along a new leading dim."""
    routings = [out.routing for out in per_layer if out.routing is not None]
    routing = jax.tree.map(lambda *a: jnp.stack(a), *routings) if routings else None
    captured = {}
    for name in capture:
        values = [out.captured[name] for out in per_layer if name in out.captured]
        if values:
            captured[name] = jnp.stack(values)
    return routing, captured


class Ling(nnx.Module):
    """The Ling 2.0 language model (arXiv 2510.22115; spec section 2).

    Args:
      config: the architecture.
      rngs: `nnx.Rngs(seed)` for the initial weights.
      dtype: of activations and products.  param_dtype: of the weights.
      init_std: standard deviation of the initial matrices; None takes `config.initializer_range`.
      remat: what the backward pass keeps of a layer, see `REMAT_POLICIES`.
      unroll: run layers as straight code instead of a scan.
      mesh: how weights are split; the split is used inside a `parallel.mesh.manual` region.
      serving: weights are split as they are computed with (see `generate.serving`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        init_std: float | None = None,
        remat: str = "none",
        unroll: bool = False,
        mesh: MeshConfig = ONE_DEVICE,
        serving: bool = False,
    ):
        self.config, self.dtype, self.remat, self.unroll = config, jnp.dtype(dtype), remat, unroll
        std = config.initializer_range if init_std is None else init_std
        self.mesh = mesh
        init = Init(rngs, std, jnp.dtype(param_dtype), mesh, serving)
        self.word_embeddings = Embedding(config, init)
        stacks = {}
        for kind, count in Counter(layer_kinds(config)).items():
            stacks[kind.key] = nnx.vmap(_block_maker(config, kind, init))(rngs.split(count))
        self.layers = nnx.Dict(stacks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, init.dtype)
        head = (config.hidden_size, config.vocab_size, ("vocab", "hidden"))
        self.lm_head = None if config.tie_word_embeddings else Linear(*head, init)
        self.mtp = MTP(config, init) if config.num_nextn_predict_layers else None

    def head(self, dtype: DTypeLike) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """The output projection [V, D] (the embedding table when they are tied), and what makes some of its rows whole.
        Inside a manual region it is this device's shard, and rows are gathered, sent as `dtype`."""
        weight = (self.word_embeddings if self.lm_head is None else self.lm_head).weight
        options = dict(wire_dtype=jnp.dtype(dtype), reduce_dtype=self.mesh.reduce_dtype)
        return weight.get_value(), partial(gather, names=weight.axes, split=weight.split, **options)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits of hidden states [..., D], not rounded to the compute dtype on the way; those of the whole
        vocabulary on each device."""
        w_VD, whole_rows = self.head(hidden.dtype)
        with jax.named_scope("head"):
            return all_gather(linear_in_float32(hidden, whole_rows(w_VD)), "tensor", axis=-1)

    @under_own_switches
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        capture: Sequence[str] = (),
        routing_ids: jax.Array | None = None,
        mtp: bool = True,
    ) -> Output:
        """Logits of every token, compiled once per shape; arguments as in `hidden`, lists taken too.

        Raises:
          ValueError: for tokens that are no [B, T] of ids of the vocabulary, or more than the model has positions.
        """
        inputs = checked_batch(self.config, tokens_BT, positions_BT, segment_ids_BT)
        if routing_ids is not None:  # once it is traced, its values cannot be checked
            with_mtp = mtp and self.mtp is not None
            routing_ids = replayed(routing_ids, self.config, inputs[0].shape, with_mtp)
        graph, params, bias = split_model(self)
        return _apply(graph, check_names("capture", capture), mtp, params, bias, *inputs, routing_ids)

    @under_own_switches
    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        capture: Sequence[str] = (),
        routing_ids: jax.Array | None = None,
        cache: Any = None,
        mtp: bool = True,
    ) -> Hidden:
        """The network without its head: what losses, log-probabilities and decoding use.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32 RoPE positions; by default they count from 0 in each segment.
          segment_ids_BT: int32 document of each token, 0 for padding; documents don't see each other.
            By default each row is one document.
          capture: names out of CAPTURES.
          routing_ids: a routing to replay, [MoE layers, B, T, K], as `model.router.replayed` takes it: that of another
            call (`Hidden.routing.ids`), or what `generate.engine.replay_ids` makes of an engine's answers.
          cache: a `generate.cache.Cache`, which knows the positions; the MTP layer does not run with one.
          mtp: False leaves the MTP layer out, and what it costs: a layer, and in a call a second head.
        """
        with_mtp = mtp and self.mtp is not None and cache is None
        unknown = sorted(set(capture) - set(CAPTURES))
        if unknown:
            raise ValueError(f"cannot capture {', '.join(unknown)}; choose from {', '.join(CAPTURES)}")
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        if routing_ids is not None:
            routing_ids = replayed(routing_ids, self.config, tokens_BT.shape, with_mtp)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        places_BT = positions_BT
        if cache is not None:
            places_BT, cache = cache.positions(segment_ids_BT > 0), cache.extend(segment_ids_BT > 0)
        elif places_BT is None:
            if axis_size("context") > 1:
                raise ValueError("positions_BT must be given where rows are split over the context axis")
            places_BT = segment_positions(segment_ids_BT)
        assert places_BT is not None
        context = Context(rope_tables(self.config, places_BT, self.dtype), places_BT, segment_ids_BT)
        x_BTD = self.embed(tokens_BT)
        how = self._how(capture, cache)
        x_BTD, per_layer, cache = self.run(layer_runs(self.config), x_BTD, context, routing_ids, cache, how)
        final_BTD, mtp_out = self.finish(x_BTD, tokens_BT, context, routing_ids, mtp=with_mtp)
        if mtp_out is not None:
            per_layer.append(mtp_out._replace(captured=_without(mtp_out.captured, "hidden_states")))
        routing, captured = _stack_outputs(per_layer, capture)
        if "hidden_states" in capture:
            captured["hidden_states"] = jnp.concatenate([captured["hidden_states"], x_BTD[None]])
        if "final_norm" in capture:
            captured["final_norm"] = final_BTD
        if "mtp_hidden" in capture and mtp_out is not None:
            captured["mtp_hidden"] = mtp_out.hidden_BTD
        return Hidden(final_BTD, None if mtp_out is None else mtp_out.hidden_BTD, routing, captured, cache)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """The input of the first layer: [B, T, D]."""
        return self.word_embeddings(tokens_BT, self.dtype)

    def run(
        self,
        runs: Sequence[LayerRun],
        x_BTD: jax.Array,
        context: Context,
        routing_ids: jax.Array | None = None,
        cache: Any = None,
        how: How | None = None,
    ) -> tuple[jax.Array, list[LayerOutput], Any]:
        """The output of some of the trunk's layers that follow one another, each layer's outputs, and the cache.

        Args:
          runs: of `config.layer_runs`, which layers.
          routing_ids, cache: as in `hidden`, of the whole model.
        """
        how = self._how((), cache) if how is None else how
        return run_layers(self.layers, runs, x_BTD, context, routing_ids, cache, how)

    def finish(
        self,
        x_BTD: jax.Array,
        tokens_BT: jax.Array,
        context: Context,
        routing_ids: jax.Array | None = None,
        *,
        mtp: bool = True,
    ) -> tuple[jax.Array, LayerOutput | None]:
        """Runs what follows the last layer: returns [B, T, D] after the final norm, and the output of the MTP layer,
        which the model must have if `mtp`. Arguments as in `run` and `hidden`."""
        final_BTD = self.norm(x_BTD)
        if not mtp:
            return final_BTD, None
        with jax.named_scope("mtp"):
            return final_BTD, self._run_mtp(tokens_BT, final_BTD, context, routing_ids)

    def draft(
        self, next_BT: jax.Array, trunk_BTD: jax.Array, positions_BT: jax.Array, valid_BT: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """The MTP layer over a cache (spec 2.6): speculative decoding predicts tokens with it.

        Args:
          next_BT: int32 token that follows each.  trunk_BTD: `Hidden.hidden_BTD` at each, or this call's own result
            one position earlier, to predict further.
          positions_BT: int32.  valid_BT: bool, False where nothing is to be written.
          cache: a `generate.cache.Cache` with a place for the MTP layer.
        Returns:
          [B, T, D], whose logits are of the token after next, and the cache.
        """
        assert self.mtp is not None
        rope = rope_tables(self.config, positions_BT, self.dtype)
        context = Context(rope, positions_BT, valid_BT.astype(jnp.int32))
        with jax.named_scope("mtp"):
            out = self.mtp(self.embed(next_BT), trunk_BTD, context, None, cache.layer("mtp", 0))
        return out.hidden_BTD, cache.with_layer("mtp", out.cache)

    def _run_mtp(
        self, tokens_BT: jax.Array, final_BTD: jax.Array, context: Context, routing_ids: jax.Array | None
    ) -> LayerOutput:
        assert self.mtp is not None
        graph, params = nnx.split(self.mtp)
        embedded_BTD = self.embed(next_tokens(tokens_BT, context.segments_BT))
        ids_BTK = None if routing_ids is None else routing_ids[-1]

        def run(params, embedded_BTD, final_BTD, ids_BTK):
            return nnx.merge(graph, params)(embedded_BTD, final_BTD, context, ids_BTK)

        return rematerialised(run, self._how((), None))(params, embedded_BTD, final_BTD, ids_BTK)

    def _how(self, capture: Sequence[str], cache: Any) -> How:
        alone = cache is None and math.prod(self.mesh.shape) == 1
        return How(capture, self.remat, self.unroll, alone, self.config.num_experts_per_tok)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _apply(graph, capture, mtp, params, bias, tokens_BT, positions_BT, segment_ids_BT, routing_ids) -> Output:
    model: Ling = nnx.merge(graph, params, bias)
    out = model.hidden(tokens_BT, positions_BT, segment_ids_BT, capture=capture, routing_ids=routing_ids, mtp=mtp)
    mtp_logits_BTV = None if out.mtp_hidden_BTD is None else model.logits(out.mtp_hidden_BTD)
    return Output(model.logits(out.hidden_BTD), mtp_logits_BTV, out.routing, out.captured)


def split_model(model: Ling) -> tuple[nnx.GraphDef, dict, dict]:
    """(graph, params, bias): the weights and the expert biases as plain nested dicts of arrays, named as
    in HF's files with layers stacked per kind. `nnx.merge(graph, params, bias)` is the inverse."""
    graph, params, bias = nnx.split(model, nnx.Param, ExpertBias)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(bias)


def abstract_model(config: ModelConfig, **options: Any) -> Ling:
    """A `Ling` whose arrays are shapes only: nothing is allocated."""
    return nnx.eval_shape(lambda: Ling(config, rngs=nnx.Rngs(0), **options))


def param_specs(model: Ling) -> dict:
    """How each parameter in `split_model`'s nested dict is split over the mesh that the model was made for."""

    def spec(variable: nnx.Variable) -> PartitionSpec:
        return spec_of(variable.get_metadata()["split"], variable.get_value().ndim)

    specs = jax.tree.map(spec, nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(specs)


def device_bytes(model: Ling) -> dict[tuple[Any, ...], float]:
    """Bytes of each parameter on one device of the mesh that the model was made for."""

    def of(variable: nnx.Variable) -> float:
        value, split = variable.get_value(), variable.get_metadata()["split"]
        shards = math.prod(getattr(model.mesh, axis) for axes in split for axis in axes)
        return value.size * value.dtype.itemsize / shards

    return {path: of(variable) for path, variable in nnx.state(model, nnx.Param).flat_state()}


def sharding_table(config: ModelConfig, mesh: MeshConfig, param_dtype: DTypeLike) -> str:
    """How every parameter is split over a mesh, as text; needs no devices."""
    model = abstract_model(config, param_dtype=param_dtype, mesh=mesh)
    params = nnx.state(model, nnx.Param).flat_state()
    rows = [("parameter", "shape", "dims", "split over", "MB per device")]
    sizes = device_bytes(model)
    for path, variable in params:
        value, names, split = variable.get_value(), variable.get_metadata()["axes"], variable.get_metadata()["split"]
        where = ", ".join(f"{name} {'*'.join(axes)}" for name, axes in zip(names, split, strict=True) if axes) or "-"
        shape = "x".join(map(str, value.shape))
        rows.append((".".join(map(str, path)), shape, " ".join(names), where, f"{sizes[path] / 1e6:,.3f}"))
    rows.append(("total", "", "", "", f"{sum(sizes.values()) / 1e6:,.3f}"))
    return columns(rows)


def _without(values: dict, name: str) -> dict:
    return {key: value for key, value in values.items() if key != name}


def segment_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: positions that count from 0 in each run of equal segment ids."""
    index_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    starts_BT = jnp.concatenate(
        [jnp.ones_like(segment_ids_BT[:, :1], bool), segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1
    )
    return index_BT - jax.lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)
