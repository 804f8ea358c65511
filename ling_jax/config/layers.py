"""Which kinds of layers a model has, and in which order they run: the one place that makes kinds and reads their names.

A kind's `key` names its stack in a checkpoint: all layers of that kind, in layer order.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ling_jax.config.model import ModelConfig


class LayerKind(NamedTuple):
    """A kind of layer: what its two halves are.

    Attributes:
      mixer: what mixes the tokens of a row, "softmax" or "linear" attention.
      routed: whether its FFN is a mixture of experts, or one dense FFN.
    """

    mixer: str
    routed: bool

    @property
    def key(self) -> str:
        """Its name in parameters' paths and on disk, such as "softmax_moe"."""
        return f"{self.mixer}_{'moe' if self.routed else 'dense'}"


SOFTMAX = "softmax"  # the mixer of every layer that no other has
MTP_KIND = LayerKind(SOFTMAX, routed=True)


def _inside_a_group(config: ModelConfig, layer: int) -> bool:
    """Whether a layer of Ring-linear is linear: the last of each group, and those of an incomplete last group, are
    softmax (spec 1.5)."""
    size = config.layer_group_size
    whole_groups = config.num_hidden_layers // size * size if size else 0
    return layer < whole_groups and (layer + 1) % size != 0


# Which trunk layers have a mixer, by its name.
LAYERS_WITH: dict[str, Callable[[ModelConfig, int], bool]] = {"linear": _inside_a_group}


class LayerRun(NamedTuple):
    """Layers of one kind that follow one another."""

    kind: LayerKind
    first: int  # its first layer's place in the kind's stack
    count: int
    routed_before: int  # layers before it that have a router
    layer: int  # its first layer's place among all layers of the trunk


class LayerGroup(NamedTuple):
    """Runs of layers that follow one another and may come again: one scan at run time over the repeats, which are
    compiled once however many there are."""

    runs: tuple[LayerRun, ...]  # of the first time
    repeats: int

    @property
    def layers(self) -> int:
        """How many layers it has each time."""
        return sum(run.count for run in self.runs)

    @property
    def routed(self) -> int:
        """How many of them have a router."""
        return sum(run.count for run in self.runs if run.kind.routed)


def layer_kinds(config: ModelConfig) -> tuple[LayerKind, ...]:
    """The kind of every trunk layer, in layer order (the MTP layer is not of the trunk)."""

    def kind(layer: int) -> LayerKind:
        mixer = next((name for name, has in LAYERS_WITH.items() if has(config, layer)), SOFTMAX)
        return LayerKind(mixer, layer >= config.first_k_dense_replace)

    return tuple(map(kind, range(config.num_hidden_layers)))


def kinds_of(config: ModelConfig) -> list[LayerKind]:
    """Every kind of layer that a model has, its MTP layer's too, each once."""
    return list(dict.fromkeys((*layer_kinds(config), *[MTP_KIND] * config.num_nextn_predict_layers)))


def layers_of(config: ModelConfig, key: str) -> list[int]:
    """The trunk layers whose kind has this key, in order."""
    return [layer for layer, kind in enumerate(layer_kinds(config)) if kind.key == key]


def routed_layers(config: ModelConfig, mtp: bool) -> int:
    """How many layers have a router: those of the trunk, and if asked the MTP layer, if there is one."""
    trunk = sum(kind.routed for kind in layer_kinds(config))
    return trunk + (config.num_nextn_predict_layers if mtp else 0)


def routers_of(config: ModelConfig, key: str) -> list[int]:
    """The places of a kind's layers among all trunk layers that have a router."""
    routed = [kind for kind in layer_kinds(config) if kind.routed]
    return [place for place, kind in enumerate(routed) if kind.key == key]


def layer_runs(config: ModelConfig, first: int = 0, last: int | None = None) -> tuple[LayerRun, ...]:
    """The trunk layers from `first` to before `last` (all that follow), cut where the kind changes."""
    kinds = layer_kinds(config)
    seen, routed, runs = Counter(kinds[:first]), sum(kind.routed for kind in kinds[:first]), []
    layer = first
    for kind, layers in itertools.groupby(kinds[first:last]):
        count = len(list(layers))
        runs.append(LayerRun(kind, seen[kind], count, routed, layer))
        seen[kind] += count
        routed += count * kind.routed
        layer += count
    return tuple(runs)


def layer_groups(runs: Sequence[LayerRun]) -> tuple[LayerGroup, ...]:
    """Runs that follow one another, those that come again in the same order put together: each time the pattern that
    takes in most, and of those the shortest."""
    shapes, groups, at = [(run.kind, run.count) for run in runs], [], 0
    while at < len(runs):
        found = 1, 1
        for size in range(1, (len(runs) - at) // 2 + 1):
            pattern, repeats = shapes[at : at + size], 1
            while shapes[at + repeats * size : at + (repeats + 1) * size] == pattern:
                repeats += 1
            if repeats > 1 and size * repeats > found[0] * found[1]:
                found = size, repeats
        size, repeats = found
        groups.append(LayerGroup(tuple(runs[at : at + size]), repeats))
        at += size * repeats
    return tuple(groups)
