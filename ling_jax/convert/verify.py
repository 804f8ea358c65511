"""Whether two folders hold the same weights: `convert.py verify`."""

import dataclasses
import gc
import os
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ling_jax.config import architecture_diff, count_params, model_settings_diff
from ling_jax.config.text import columns
from ling_jax.convert.fp8 import FP8, quantise
from ling_jax.convert.load import load_pretrained
from ling_jax.convert.mapping import SCALE, ArrayPath, TensorStack
from ling_jax.convert.tensorfile import NAMES
from ling_jax.convert.transfer import ByteProgress, pieces, strides, tensors_in
from ling_jax.convert.weights import F32, Weights, narrow, open_weights, some
from ling_jax.files.arrays import Index

PROMPTS = (2, 24)  # rows and tokens, random ids
MEMORY_SHARE = 0.3  # of the machine's: a model that takes more in float32 is not run


class Difference(NamedTuple):
    """A tensor's greatest absolute difference, and how many of its numbers differ."""

    greatest: float
    count: int


@dataclasses.dataclass(frozen=True)
class Verification:
    """The findings of a comparison of two folders."""

    equal: int  # tensors, byte for byte
    cast: dict[str, int]  # "F32 -> BF16": tensors of B that are those of A, cast
    different: dict[str, Difference]
    only: tuple[list[str], list[str]]  # tensors that only A, only B has
    settings: list[str]  # of the model, that differ
    logits: str  # how far the logits are apart, or why they were not computed

    @property
    def good(self) -> bool:
        return not self.different and not any(self.only)

    def render(self) -> str:
        facts = {
            "equal byte for byte": f"{self.equal:,} tensors",
            "equal after a cast": ", ".join(f"{count:,} {cast}" for cast, count in self.cast.items()) or "none",
            "different": f"{len(self.different):,}",
            "only in A, only in B": ", ".join(f"{len(names):,} {some(names)}".strip() for names in self.only),
            "other settings": "; ".join(self.settings) or "none",
            "logits": self.logits,
        }
        rows = [("different tensor", "numbers", "greatest difference")]
        rows += [(name, f"{d.count:,}", f"{d.greatest:.3g}") for name, d in list(self.different.items())[:20]]
        table = "\n\n" + columns(rows) if self.different else ""
        return (
            columns(list(facts.items())) + table + f"\n\n{'the same weights' if self.good else 'NOT the same weights'}"
        )


def verify(source: str, target: str, logits: bool = True) -> Verification:
    """Compares every tensor of B, `target`, with A's, `source`: exactly, or with A's cast to B's dtype (for FP8,
    quantised by the official rule); then both models' `logits`, where their float32 weights fit in memory.

    Raises:
      ValueError: for a folder that is not whole, or two architectures.
    """
    a, b = open_weights(source), open_weights(target)
    if diff := architecture_diff(a.config, b.config):
        raise ValueError(f"{source} and {target} are of two architectures: {'; '.join(diff)}")
    names = [{name for name in w.dtypes if not name.endswith(SCALE)} for w in (a, b)]
    only = (sorted(names[0] - names[1]), sorted(names[1] - names[0]))
    equal, cast, different = 0, Counter[str](), dict[str, Difference]()
    with ByteProgress(count_params(a.config).total * 2) as bar:
        for path, stack in a.stacks.items():
            if path[0] == "scales":
                continue
            for name, difference in _compare_array(a, b, path, stack, bar).items():
                if difference.count:
                    different[name] = difference
                elif a.dtypes[name] == b.dtypes[name]:
                    equal += 1
                else:
                    cast[f"{NAMES[a.dtypes[name]]} -> {NAMES[b.dtypes[name]]}"] += 1
    told = _compare_logits(source, target, a) if logits else "not asked for"
    return Verification(equal, dict(cast), different, only, model_settings_diff(a.config, b.config), told)


def _compare_array(
    a: Weights, b: Weights, path: ArrayPath, stack: TensorStack, bar: ByteProgress
) -> dict[str, Difference]:
    found: dict[str, Difference] = {}
    for piece in pieces(path, stack, strides(stack, b.chunk(path), b.dtype(path).itemsize, b.block[0])):
        for part in piece.parts:
            for name, difference in _compare_part(a, b, path, stack, part).items():
                before = found.get(name, Difference(0.0, 0))
                greatest = max(before.greatest, difference.greatest)
                found[name] = Difference(greatest, before.count + difference.count)
        bar.advance(piece.nbytes(2))
    return found


def _compare_part(a: Weights, b: Weights, path: ArrayPath, stack: TensorStack, part: Index) -> dict[str, Difference]:
    raw = [w.read(path, part) for w in (a, b)]
    numbers = [w.decode(path, part, r, F32) for w, r in zip((a, b), raw, strict=True)]
    scales = [w.scales(path, part) for w in (a, b)]
    found = {}
    views = [tensors_in(stack, part, values) for values in (*raw, *numbers)]
    for i, ((name, raw_a), (_, raw_b), (_, a_f32), (_, b_f32)) in enumerate(zip(*views, strict=True)):
        if name not in a.dtypes or name not in b.dtypes:
            continue
        own = a.dtypes[name], b.dtypes[name]
        own_scales = [None if s is None else s[i] for s in scales]
        if own[0] == own[1]:
            same = _same(raw_a, raw_b) and (own[0] != FP8 or _same(*own_scales))
        elif own[1] == FP8:
            want = quantise(np.ascontiguousarray(a_f32), stack.rule or "ordinary", b.block)
            same = _same(want.codes, narrow(raw_b, FP8)) and _same(want.scales, own_scales[1])
        else:
            same = _same(narrow(a_f32, own[1]), narrow(raw_b, own[1]))
        found[name] = Difference(0.0, 0) if same else _difference(a_f32, b_f32)
    return found


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b))


def _bits(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def _difference(a: np.ndarray, b: np.ndarray) -> Difference:
    apart = np.abs(a - b)
    return Difference(float(np.nanmax(apart, initial=0.0)), max(int((apart != 0).sum()), 1))


def _compare_logits(source: str, target: str, weights: Weights) -> str:
    size, memory = 4 * count_params(weights.config).total, _memory()
    if size > MEMORY_SHARE * memory:
        return f"not computed: the weights take {size / 1e9:.1f} GB in float32, this machine has {memory / 1e9:.1f} GB"
    a, b = (_logits(path) for path in (source, target))
    log_p, log_q = (jax.nn.log_softmax(logits) for logits in (a, b))
    kl = float((jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    return f"greatest difference {float(jnp.abs(a - b).max()):.3g}, mean KL divergence {kl:.3g} nats"


def _logits(path: str) -> jax.Array:
    model = load_pretrained(path, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPTS)
    logits = jax.block_until_ready(model(jnp.asarray(tokens)).logits_BTV)
    del model
    gc.collect()
    return logits


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
