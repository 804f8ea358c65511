"""The package as a user meets it first: its names, and one error for what cannot be meant.

Legend: B rows, T tokens.
"""

import re
import tomllib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ling_jax
from ling_jax import count_params, generate, load_pretrained, load_tokenizer, token_logprobs
from ling_jax.config import RunConfig
from ling_jax.evaluate import window_of
from ling_jax.generate.engine import Engine
from ling_jax.model.model import split_model
from ling_jax.train.loss import bucket, row_logprobs
from tests.support.helpers import assert_close, assert_gradients_close, jit, make_model, small, tiny
from tests.support.tokenizers import OWN
from tests.tiny_run import REPO

GOLDEN = REPO / "tests" / "golden" / "tiny-ling"


@pytest.fixture(scope="module")
def model():
    return make_model(small(num_hidden_layers=1, first_k_dense_replace=0, max_position_embeddings=24))


@pytest.fixture(scope="module")
def with_mtp():
    return make_model(tiny())


# Names.


def test_the_version_stands_in_one_place():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ling_jax.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", ling_jax.__version__)
    assert f'__version__ = "{ling_jax.__version__}"' in (REPO / "ling_jax" / "__init__.py").read_text()


def test_every_public_name_is_there():
    assert all(hasattr(ling_jax, name) for name in ling_jax.__all__)
    assert {"score", "load_tokenizer", "load_pretrained", "generate", "token_logprobs"} <= set(ling_jax.__all__)


def test_every_file_that_is_built_where_it_runs_is_installed():
    patterns = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ling_jax"]
    packed = {file for pattern in patterns for file in (REPO / "ling_jax").glob(pattern)}
    sources = {file for file in (REPO / "ling_jax").rglob("*") if file.suffix in (".cc", ".h")}
    assert packed == sources and sources


def test_a_tokenizer_is_loaded_by_the_name_of_its_model(tmp_path):
    OWN.save(str(tmp_path))
    assert load_tokenizer(str(tmp_path)).encode("abc") == OWN.encode("abc")
    with pytest.raises(ValueError, match="no tokenizer.json in or beside"):
        load_tokenizer(str(tmp_path / "none"))


def test_parameters_are_counted_of_a_model_or_a_configuration(model):
    arrays = jax.tree.leaves(split_model(model)[1:])
    assert count_params(model).total == sum(array.size for array in arrays) == count_params(model.config).total
    assert count_params(RunConfig(model=tiny())) == count_params(tiny())
    with pytest.raises(ValueError, match="count_params needs a model or a configuration, not dict"):
        count_params(split_model(model)[1])


@pytest.mark.parametrize("dtype", ["int8", "float16", "fp16", "bf16", "float64", jnp.float8_e4m3fn, float, 3])
def test_weights_of_another_dtype_are_refused_before_they_are_looked_for(dtype):
    with pytest.raises(ValueError, match="must be float32 or bfloat16") as error:
        load_pretrained("/nowhere", dtype=dtype)
    assert repr(dtype) in str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype("float32"), "float32"])
def test_weights_of_both_dtypes_are_loaded_by_any_of_their_names(dtype):
    model = load_pretrained(GOLDEN, dtype=dtype)
    assert model.dtype == model.norm.weight[...].dtype == jnp.dtype(dtype)


# Tokens.

WRONG = {
    "outside": ([[1, 61]], "tokens_BT holds token id 61, outside the vocabulary of 61"),
    "negative": ([[1, -1]], "tokens_BT holds token id -1"),
    "wide": (np.array([[2**40]]), "tokens_BT holds token id 1099511627776"),
    "floats": (np.ones((1, 2), np.float32), "tokens_BT is an array of float32; it must be of integers"),
    "whole-floats": ([[1.0, 2.0]], "tokens_BT is an array of float64"),
    "bools": (np.ones((1, 2), bool), "tokens_BT is an array of bool"),
    "text": ([["a"]], "tokens_BT is an array of"),
    "one-dim": ([1, 2], r"tokens_BT is of shape \(2,\); it must be \[B, T\]"),
    "three-dims": (np.ones((1, 2, 3), int), r"tokens_BT is of shape \(1, 2, 3\)"),
    "no-rows": (np.ones((0, 3), int), r"tokens_BT is of shape \(0, 3\)"),
    "no-tokens": (np.ones((2, 0), int), r"tokens_BT is of shape \(2, 0\)"),
    "unequal": ([[1], [2, 3]], r"tokens_BT is no \[B, T\] array"),
    "scalar": (5, r"tokens_BT is of shape \(\)"),
    "too-long": (np.ones((1, 25), int), "25 tokens in a row exceed the model's 24 positions"),
}


@pytest.mark.parametrize("call", [lambda model, tokens: model(tokens), token_logprobs], ids=["model", "token_logprobs"])
@pytest.mark.parametrize(("tokens", "words"), WRONG.values(), ids=WRONG.keys())
def test_tokens_that_are_none_are_one_error(model, call, tokens, words):
    with pytest.raises(ValueError, match=words):
        call(model, tokens)
    with pytest.raises(ValueError, match=words):
        call(model, jnp.asarray(tokens) if isinstance(tokens, np.ndarray) and tokens.max(initial=0) < 99 else tokens)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"positions_BT": np.full((1, 4), 24)}, "25 tokens in a row exceed the model's 24 positions"),
        ({"positions_BT": [[0, 1, -1, 2]]}, "positions_BT holds -1"),
        ({"positions_BT": [[0, 1]]}, r"positions_BT is of shape \(1, 2\) and tokens_BT of \(1, 4\)"),
        ({"segment_ids_BT": [1, 1, 1, 1]}, r"segment_ids_BT is of shape \(4,\)"),
        ({"segment_ids_BT": [[1.0, 1, 1, 1]]}, "segment_ids_BT is an array of float64"),
    ],
)
def test_positions_and_segments_are_checked_with_them(model, more, words):
    for call in (model, partial(token_logprobs, model)):
        with pytest.raises(ValueError, match=words):
            call([[1, 2, 3, 4]], **more)


def test_rows_longer_than_the_positions_may_hold_documents_that_are_not(model):
    tokens, segments = np.ones((1, 40), int), np.repeat([[1, 2, 0]], [20, 15, 5], axis=1)
    assert model(tokens, segment_ids_BT=segments).logits_BTV.shape == (1, 40, 61)
    positions = np.concatenate([np.arange(20), np.arange(15), np.arange(5)])[None]
    assert token_logprobs(model, tokens, positions, segments).shape == (1, 39)
    with pytest.raises(ValueError, match="25 tokens in a row exceed"):
        model(tokens, segment_ids_BT=np.repeat([[1, 0]], [25, 15], axis=1))


def test_inside_a_program_shapes_are_checked_and_values_are_not(model):
    graph, params, bias = split_model(model)

    @jax.jit
    def logits(params, tokens_BT):
        return nnx.merge(graph, params, bias)(tokens_BT).logits_BTV

    tokens = np.array([[1, 2, 3]], np.int32)
    assert_close(logits(params, tokens), model(tokens).logits_BTV)
    assert logits(params, tokens + 100).shape == (1, 3, 61)
    with pytest.raises(ValueError, match=r"tokens_BT is of shape \(3,\)"):
        logits(params, tokens[0])


@pytest.mark.parametrize("capture", ["hidden_states", 3, (3,), None])
def test_a_capture_that_is_no_tuple_of_names_is_refused(model, capture):
    with pytest.raises(ValueError, match="capture = .* must be a tuple of names"):
        model([[1, 2]], capture=capture)


# Log-probabilities.


PLAIN = jit(row_logprobs, static_argnums=0)


def test_log_probabilities_are_the_same_for_rows_of_any_length(model):
    """Padding to one of few lengths changes none: against the function without it."""
    tokens = np.random.default_rng(0).integers(0, 59, (2, 24))
    want = PLAIN(*split_model(model), tokens, None, None, None)
    for length in (1, 2, 15, 16, 17, 24):
        got = token_logprobs(model, tokens[:, :length])
        assert got.shape == (2, length - 1)
        assert_close(got, want[:, : length - 1])


def test_log_probabilities_of_packed_rows_with_a_routing_are_those_without_padding(model):
    tokens = np.arange(14).reshape(1, 14) + 3
    segments = np.repeat([[1, 2, 0]], [6, 5, 3], axis=1)
    positions = np.concatenate([np.arange(6), np.arange(5), np.arange(3)])[None]
    routing = np.random.default_rng(0).permuted(np.tile(np.arange(8), (1, 1, 14, 1)), axis=-1)[..., :3]
    given = tokens, positions, segments
    want = PLAIN(*split_model(model), *given, routing)
    assert_close(token_logprobs(model, *given, routing_ids=routing), want)
    assert np.abs(want - token_logprobs(model, *given)).max() > 1e-3  # the routing is another than the model's own


def test_gradients_go_through_padding(model):
    graph, params, bias = split_model(model)
    tokens = np.arange(11).reshape(1, 11) + 3

    def total(log_probabilities, params):
        return log_probabilities(nnx.merge(graph, params, bias)).sum()

    def plain(model):
        return row_logprobs(*split_model(model), tokens, None, None, None)

    got = jit(jax.grad(partial(total, lambda model: token_logprobs(model, tokens))))(params)
    assert_gradients_close(got, jit(jax.grad(partial(total, plain)))(params))


def test_lengths_are_padded_by_half_at_most_and_to_few():
    lengths = [bucket(length) for length in range(1, 4097)]
    assert all(length <= padded <= max(16, 1.5 * length) for length, padded in enumerate(lengths, 1))
    assert len(set(lengths)) == 17


def test_the_mtp_layer_runs_only_where_it_is_asked_for(with_mtp):
    tokens = np.arange(8).reshape(1, 8) + 3
    both, alone = with_mtp(tokens), with_mtp(tokens, mtp=False)
    assert alone.mtp_logits_BTV is None and both.mtp_logits_BTV is not None
    assert_close(alone.logits_BTV, both.logits_BTV)
    assert alone.routing.ids.shape[0] == both.routing.ids.shape[0] - 1


# Generation.


@pytest.mark.parametrize(
    "prompts",
    [
        np.array([[1, 2, 3], [4, 5, 6]]),
        jnp.array([[1, 2, 3], [4, 5, 6]], jnp.uint8),
        [np.array([1, 2, 3]), jnp.array([4, 5, 6])],
        ([1, 2, 3], (4, np.int64(5), 6)),
        iter([[1, 2, 3], [4, 5, 6]]),
    ],
    ids=["numpy", "jax", "list-of-arrays", "tuples", "iterator"],
)
def test_prompts_may_be_arrays(model, prompts):
    assert generate(model, prompts, np.int64(3), eos_ids=np.array([60])) == generate(
        model, [[1, 2, 3], [4, 5, 6]], 3, eos_ids=[60]
    )


def test_each_prompt_may_have_its_own_length(model):
    prompts = [[1, 2, 3], [4, 5, 6]]
    whole = generate(model, prompts, 5)
    assert generate(model, prompts, [5, 2]) == [whole[0], whole[1][:2]]
    with pytest.raises(ValueError, match="max_new_tokens holds 3 numbers for 2 prompts"):
        generate(model, prompts, [5, 2, 1])


ASKED = {
    "text": (("a prompt", 3), "prompts = 'a prompt' must be lists of token ids; text is encoded first"),
    "texts": ((["a"], 3), "prompt 0: the prompt is 'a'; it must be a list of token ids"),
    "flat": (([1, 2], 3), r"prompts is one flat list; give a list of prompts, such as \[\[1, ...\]\]"),
    "flat-array": ((np.array([1, 2]), 3), "prompts is one flat list"),
    "number": ((5, 3), "prompts = 5 must be lists of token ids"),
    "three-dims": ((np.ones((1, 2, 3), int), 3), "prompt 0: the prompt is an array of int64 of shape"),
    "floats": (([[1.0, 2.0]], 3), "prompt 0: the prompt holds 1.0, which is no token id"),
    "float-array": ((np.ones((2, 3)), 3), "prompt 0: the prompt is an array of float64"),
    "bools": (([[True, 2]], 3), "prompt 0: the prompt holds True, which is no token id"),
    "nothing": (([[1], None], 3), "prompt 1: the prompt is None"),
    "nested": (([[[1]]], 3), r"prompt 0: the prompt holds \[1\]"),
    "half-a-token": (([[1]], 2.5), "prompt 0: max_new_tokens = 2.5 must be a whole number"),
    "no-number": (([[1]], None), "prompt 0: max_new_tokens = None must be a whole number"),
    "one-is-wrong": (([[1], [2]], [3, 0]), "prompt 1: max_new_tokens = 0 must be at least 1"),
}
OPTIONS = {
    "one-end": ({"eos_ids": 1}, r"eos_ids = 1 must be a list of token ids, such as \[1\]"),
    "ends-in-words": ({"eos_ids": "</s>"}, "eos_ids = '</s>' must be a list of token ids"),
    "ends-in-floats": ({"eos_ids": [1.0]}, r"eos_ids = \[1.0\] must be a list of token ids"),
    "seed": ({"seed": 1.5}, "seed = 1.5 must be from 0 to"),
    "temperature": ({"temperature": "hot"}, "temperature = 'hot' must be a number"),
}


@pytest.mark.parametrize(("args", "words"), ASKED.values(), ids=ASKED.keys())
def test_what_is_no_prompt_is_one_error(model, args, words):
    with pytest.raises(ValueError, match=words):
        generate(model, *args)


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS.keys())
def test_what_is_no_option_is_one_error(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, [[1]], 3, **options)


@pytest.mark.parametrize("drafts", [9, 99, -1, 1.5])
def test_drafts_are_bounded(with_mtp, drafts):
    with pytest.raises(ValueError, match=f"drafts = {drafts} must be from 0 to 8; later ones hardly ever stand"):
        Engine(with_mtp, rows=1, slots=8, drafts=drafts)


def test_a_text_is_scored_in_windows_that_the_model_has_positions_for():
    assert window_of(str(GOLDEN)) == 256


def test_padding_on_the_left_shifts_nothing(model):
    alone = model([[5, 6, 7, 8]]).logits_BTV
    padded = model([[0, 0, 5, 6, 7, 8]], segment_ids_BT=[[0, 0, 1, 1, 1, 1]]).logits_BTV
    assert_close(padded[:, 2:], alone)
