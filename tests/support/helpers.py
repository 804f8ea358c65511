"""Helpers of the numerical tests: a tiny model with nothing at its initial value, batches, comparisons, a quick jit.

Legend: B rows, T tokens, V vocabulary.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from ling_jax.config import ModelConfig, layer_kinds
from ling_jax.model.model import Hidden, Ling, abstract_model, split_model
from ling_jax.model.rope import frequencies
from ling_jax.train.loss import IGNORE, NextToken
from ling_jax.train.objective import Batch, StepSums, step_counts, step_sums, total_loss

# "At float32 rounding" (design.md, section 2).
VALUES = 2e-5  # of max(1, max|expected|)
GRADIENTS = 1e-5  # of a tensor's max; optimizer moments too

# Half the compile time of these tiny programs: LLVM leaves its optimisations out, XLA keeps its own.
QUICK = {"xla_backend_optimization_level": 0}


def jit(f: Callable, **options: Any) -> Callable:
    return jax.jit(f, compiler_options=QUICK, **options)


def output_and_gradients(f: Callable, args: Sequence[Any], cotangent: Any) -> tuple[Any, list]:
    """f(*args) and the leaves of its arguments' gradients, compiled as one program."""

    @jit
    def run(args, cotangent):
        output, vjp = jax.vjp(f, *args)
        return output, vjp(cotangent)

    output, gradients = run(args, cotangent)
    return output, jax.tree.leaves(gradients)


def tiny(**changes: Any) -> ModelConfig:
    """One dense and two MoE layers and an MTP layer; no two sizes are equal that could be taken for each other."""
    base = ModelConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        moe_intermediate_size=20, num_nextn_predict_layers=1, mtp_loss_scaling_factor=0.3, rope_theta=1e4,
        max_position_embeddings=512, pad_token_id=60, eos_token_id=59,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def small(**changes: Any) -> ModelConfig:
    """As `tiny`, but one dense and one MoE layer and no MTP layer: quick to compile."""
    return tiny(**{"num_hidden_layers": 2, "num_nextn_predict_layers": 0, **changes})


def random_weights(config: ModelConfig, seed: int = 0, **options: Any) -> tuple[nnx.GraphDef, dict, dict]:
    """(graph, params, bias) as `split_model` gives them. Matrices keep the size of what they multiply, so that
    every part of the network shows in its output; norms, vectors and expert biases are away from 1 and 0."""
    graph, params, bias = split_model(abstract_model(config, **options))
    rng = np.random.default_rng(seed)

    def weight(path, leaf):
        names = [key.key for key in path]
        noise = rng.normal(size=leaf.shape)
        if "norm" in names[-2]:
            noise = 1 + 0.2 * noise
        elif names[-1] == "bias":
            noise *= 0.2
        elif names[0] != "word_embeddings":
            noise /= np.sqrt(leaf.shape[-1])
        return jnp.asarray(noise, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(weight, params)
    bias = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), bias)
    return graph, params, bias


def make_model(config: ModelConfig, seed: int = 0, **options: Any) -> Ling:
    return nnx.merge(*random_weights(config, seed, **options))


def pack(rows: Sequence[Sequence[Sequence[int]]], length: int) -> Batch:
    """Rows of documents, packed from the left and padded on the right with id 0; next-token targets."""
    batch = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["targets"] = np.full((len(rows), length), IGNORE, np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, 1):
            place = slice(start, start + len(document))
            batch["tokens"][row, place] = document
            batch["positions"][row, place] = np.arange(len(document))
            batch["segment_ids"][row, place] = number
            batch["targets"][row, place] = [*document[1:], IGNORE]
            start += len(document)
        assert start <= length
    return batch


def documents(lengths: Sequence[int], vocab: int = 59, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab, length).tolist() for length in lengths]


def total(model: Ling, batch: Batch, z_loss_coefficient: float = 0.0) -> tuple[jax.Array, StepSums]:
    objective = NextToken(model.config)
    sums = step_sums(objective, model, batch)
    return total_loss(objective, sums, step_counts(objective, batch), z_loss_coefficient), sums


@partial(jit, static_argnums=0)
def _loss_and_grads(graph, params, bias, batch):
    return jax.value_and_grad(lambda p: total(nnx.merge(graph, p, bias), batch), has_aux=True)(params)


def loss_and_grads(model: Ling, batch: Batch) -> tuple[jax.Array, StepSums, dict]:
    """The loss of `train.loss`, its sums, and the gradient of every parameter."""
    (loss, sums), grads = _loss_and_grads(*split_model(model), batch)
    return loss, sums, grads


class Probe(NamedTuple):
    """A model's results for a batch."""

    out: Hidden
    logits_BTV: jax.Array
    grads: dict  # of sum((logits + MTP logits) * cotangent)


def cotangent_of(batch: Batch, vocab: int) -> np.ndarray:
    """[B, T, V] noise, 0 at padding."""
    noise = np.random.default_rng(7).normal(size=(*batch["tokens"].shape, vocab))
    return np.where(batch["segment_ids"][..., None] > 0, noise, 0).astype(np.float32)


@partial(jit, static_argnums=0)
def _probe(graph, params, bias, batch, cotangent_BTV, routing_ids):
    def objective(params):
        model = nnx.merge(graph, params, bias)
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        out = model.hidden(*inputs, routing_ids=routing_ids)
        logits_BTV = model.logits(out.hidden_BTD)
        both_BTV = logits_BTV if out.mtp_hidden_BTD is None else logits_BTV + model.logits(out.mtp_hidden_BTD)
        return (both_BTV * cotangent_BTV).sum(), (out, logits_BTV)

    grads, (out, logits_BTV) = jax.grad(objective, has_aux=True)(params)
    return Probe(out, logits_BTV, grads)


def probe(model: Ling, batch: Batch, routing_ids: Any = None) -> Probe:
    """Outputs and gradients without the losses of `train.loss`."""
    return jax.device_get(_probe(*split_model(model), batch, cotangent_of(batch, model.config.vocab_size), routing_ids))


# The specification once more, in float64 numpy: one document, token by token where that is plainest.


def sigmoid(x: Any) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def choose_experts(scores_E: np.ndarray, bias_E: np.ndarray, config: ModelConfig) -> list[int]:
    """The experts of one token, by sorting (spec 2.5)."""
    biased = scores_E + bias_E
    size = config.num_experts // config.n_group
    worth = [np.sort(biased[g * size : (g + 1) * size])[-2:].sum() for g in range(config.n_group)]
    open_groups = np.argsort(worth)[-config.topk_group :]
    allowed = [e for e in range(config.num_experts) if e // size in open_groups]
    return sorted(allowed, key=lambda e: biased[e])[-config.num_experts_per_tok :]


class Oracle:
    """The forward pass of one document, from the nested dicts of `split_model`."""

    def __init__(self, config: ModelConfig, params: dict, bias: dict):
        self.config = config
        self.params, self.bias = (jax.tree.map(lambda a: np.asarray(a, np.float64), tree) for tree in (params, bias))

    def norm(self, x, params):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps) * params["weight"]

    def linear(self, x, params):
        return x @ params["weight"].T + params.get("bias", 0)

    def rope(self, x_THC):
        inv_freq, magnitude = frequencies(self.config)
        angles = np.arange(len(x_THC))[:, None, None] * inv_freq.astype(np.float64)
        half = inv_freq.size
        turned = (x_THC[..., :half] + 1j * x_THC[..., half : 2 * half]) * np.exp(1j * angles) * magnitude
        return np.concatenate([turned.real, turned.imag, x_THC[..., 2 * half :]], axis=-1)

    def attention(self, x_TD, params):
        c, tokens = self.config, len(x_TD)
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        qkv = self.linear(x_TD, params["query_key_value"]).reshape(tokens, -1, c.head_dim)
        q, k, v = np.split(qkv, [heads, heads + groups], axis=1)
        if c.use_qk_norm:
            q, k = self.norm(q, params["query_layernorm"]), self.norm(k, params["key_layernorm"])
        q, k = self.rope(q), self.rope(k)
        out = np.zeros_like(q)
        for head in range(heads):
            mine = head // (heads // groups)
            for t in range(tokens):
                scores = k[: t + 1, mine] @ q[t, head] / np.sqrt(c.head_dim)
                weights = np.exp(scores - scores.max())
                out[t, head] = weights @ v[: t + 1, mine] / weights.sum()
        return self.linear(out.reshape(tokens, -1), params["dense"])

    def swiglu(self, x, params, expert=...):
        gate, up, down = (params[name]["weight"][expert] for name in ("gate_proj", "up_proj", "down_proj"))
        return (x @ gate.T * sigmoid(x @ gate.T) * (x @ up.T)) @ down.T

    def moe(self, x_TD, params, bias_E):
        c = self.config
        out = self.swiglu(x_TD, params["shared_experts"]) if c.num_shared_experts else np.zeros_like(x_TD)
        for x, y in zip(x_TD, out, strict=True):
            scores = sigmoid(params["gate"]["weight"] @ x)
            chosen = choose_experts(scores, bias_E, c)
            whole = scores[chosen].sum() if c.norm_topk_prob and len(chosen) > 1 else 1
            for e in chosen:
                y += c.routed_scaling_factor * scores[e] / whole * self.swiglu(x, params["experts"], e)
        return out

    def block(self, x, params, bias):
        x = x + self.attention(self.norm(x, params["input_layernorm"]), params["attention"])
        normed = self.norm(x, params["post_attention_layernorm"])
        if bias is None:
            return x + self.swiglu(normed, params["mlp"])
        return x + self.moe(normed, params["mlp"], bias["mlp"]["gate"]["expert_bias"])

    def hidden(self, tokens: Sequence[int]) -> np.ndarray:
        """[T, D], after the final norm."""
        x, used = self.params["word_embeddings"]["weight"][list(tokens)], Counter()
        for kind in layer_kinds(self.config):
            trees = (self.params["layers"].get(kind.key), self.bias.get("layers", {}).get(kind.key))
            x = self.block(x, *(jax.tree.map(itemgetter(used[kind]), tree) for tree in trees))
            used[kind] += 1
        return self.norm(x, self.params["norm"])

    def mtp_hidden(self, tokens: Sequence[int]) -> np.ndarray:
        """[T, D], after the MTP layer's final norm; the last token is followed by id 0 (spec 2.6)."""
        params = self.params["mtp"]
        embedded = self.params["word_embeddings"]["weight"][[*tokens[1:], 0]]
        joined = [self.norm(embedded, params["enorm"]), self.norm(self.hidden(tokens), params["hnorm"])]
        x = self.linear(np.concatenate(joined, axis=-1), params["eh_proj"])
        return self.norm(self.block(x, params["block"], self.bias["mtp"]["block"]), params["final_layernorm"])

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return hidden @ self.params["word_embeddings" if self.config.tie_word_embeddings else "lm_head"]["weight"].T


def _differences(got: Any, want: Any, limit: Callable[[np.ndarray], float]) -> str:
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    if not want.size:
        return ""
    error = np.abs(got - want)
    error = np.where(np.isfinite(error), error, np.inf)
    place = np.unravel_index(error.argmax(), error.shape)
    place, allowed = tuple(int(i) for i in place), limit(want)
    if error[place] <= allowed:
        return ""
    return f"max error {error[place]:.3g} at {place}: {got[place]:.8g} for {want[place]:.8g}; allowed {allowed:.3g}"


def assert_close(got: Any, want: Any, tolerance: float = VALUES) -> None:
    """max|got - want| <= tolerance * max(1, max|want|)."""
    problem = _differences(got, want, lambda a: tolerance * max(1.0, np.abs(a).max()))
    assert not problem, problem


def assert_gradient_close(got: Any, want: Any, tolerance: float = GRADIENTS) -> None:
    """max|got - want| <= tolerance * max|want|."""
    problem = _differences(got, want, lambda a: tolerance * np.abs(a).max())
    assert not problem, problem


def assert_gradients_close(got: dict, want: dict, tolerance: float = GRADIENTS) -> None:
    """`assert_gradient_close` of every leaf of two nested dicts; names all that differ."""
    got, want = flatten_dict(got, sep="/"), flatten_dict(want, sep="/")
    assert got.keys() == want.keys()
    problems = {name: _differences(got[name], want[name], lambda a: tolerance * np.abs(a).max()) for name in want}
    problems = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    assert not problems, "\n".join(problems)


def assert_trees_equal(got: Any, want: Any) -> None:
    """Bit for bit, NaN equal to NaN."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
