"""The golden comparison is no rubber stamp: it notices a change of 1% in any one weight, and a permuted expert bias."""

from collections.abc import Iterator

import numpy as np
import pytest
from flax import nnx

from ling_jax import Ling, load_pretrained
from ling_jax.convert.mapping import hf_names
from ling_jax.model.model import split_model
from tests import test_golden as golden
from tests.tiny_run import REPO

CASE = REPO / "tests" / "golden" / "tiny-ling"
SCENARIOS = ("fwd", "b1", "pos")


def changed(model: Ling) -> Iterator[tuple[str, Ling]]:
    """(name in HF's file, the model with that one tensor changed) for every tensor."""
    graph, params, bias = split_model(model)
    flat = nnx.traversals.flatten_mapping({"params": params, "bias": bias})
    for path, value in flat.items():
        names = hf_names(model.config, path[1:])
        for index in np.ndindex(names.shape):
            new = np.array(value)
            new[index] = new[index] * 1.01 if path[0] == "params" else np.roll(new[index], 1)
            tree = nnx.traversals.unflatten_mapping({**flat, path: new})
            yield str(names[index]), nnx.merge(graph, tree["params"], tree["bias"])


def failing_scenarios(model: Ling) -> Iterator[str]:
    """The scenarios in which the model's outputs differ from the official ones."""
    expected = golden.scenarios_of(CASE)
    for name in SCENARIOS:
        compare = golden.Comparison()
        data = {key: value for key, value in expected[name].items() if key not in golden.LOSSES}
        golden.compare_scenario(compare, model, name, data, meta={})
        assert compare.count > 0
        if compare.problems:
            yield name


@pytest.mark.nightly
def test_a_change_of_one_percent_in_any_weight_or_a_permuted_expert_bias_fails_the_golden_test():
    model = load_pretrained(CASE)
    assert not list(failing_scenarios(model)), "the unchanged model must pass"
    stored = set(golden.load_file(CASE / "model.safetensors"))
    tried = {name: next(failing_scenarios(other), None) for name, other in changed(model)}
    assert tried.keys() == stored
    unnoticed = [name for name, scenario in tried.items() if scenario is None]
    print(f"{len(tried)} tensors changed, one at a time; {len(unnoticed)} changes went unnoticed")
    assert not unnoticed, unnoticed


def test_gradients_are_those_of_float32_weights_whatever_the_file_has():
    """A case whose file is in bfloat16, in which gradients would be rounded to it."""
    model = load_pretrained(CASE.parent / "tiny-ling-sharded")
    tokens = np.arange(24).reshape(2, 12)
    found = golden.gradients(model, {"input_ids": tokens, "labels": tokens})
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    rounded = [name for name, value in found.items() if value.any() and not (value.view(np.uint32) & 0xFFFF).any()]
    assert not rounded
