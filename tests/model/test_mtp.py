"""The multi-token-prediction layer sees one token ahead, predicts two, and never leaves its document.

What it computes is compared with the specification in test_model.py, its loss with full logits in test_loss.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from ling_jax.model.mtp import next_tokens
from ling_jax.train.loss import IGNORE, shift_targets
from tests.support.helpers import documents, make_model, pack, probe, small

# The MTP layer is the only one with experts.
DENSE = small(first_k_dense_replace=2, num_nextn_predict_layers=1, num_key_value_heads=1)
DOCUMENTS = documents([7, 4, 3, 9, 2])
PACKED = pack([DOCUMENTS[:3], DOCUMENTS[3:], [], [], [], []], 15)
# Rows of three documents, the last padded; of one document and no padding; with padding in front of and inside.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [4, 4, 4, 4, 4, 4, 4], [0, 0, 1, 1, 0, 2, 2]], np.int32)


@pytest.fixture(scope="module")
def model():
    return make_model(DENSE)


def test_the_next_token_is_id_0_where_the_document_or_the_row_ends():
    """But padding counts as no other document, as in the reference, which rolls whole rows (spec 2.6)."""
    tokens = np.arange(10, 31).reshape(3, 7)
    np.testing.assert_array_equal(
        next_tokens(jnp.array(tokens), jnp.array(SEGMENTS)),
        [[11, 12, 0, 14, 15, 16, 0], [18, 19, 20, 21, 22, 23, 0], [25, 0, 27, 28, 0, 30, 0]],
    )


def test_targets_are_two_tokens_ahead_in_the_same_document_or_none():
    """Also in a row that one document fills: what follows its end is not its beginning."""
    batch = pack([[[1, 2, 3], [4, 5], [6]], [[7, 8, 9, 10]], [[11, 12, 13, 14, 15, 16, 17]]], 7)
    none = IGNORE
    np.testing.assert_array_equal(
        shift_targets(jnp.array(batch["targets"]), jnp.array(batch["segment_ids"])),
        [[3, *[none] * 6], [9, 10, *[none] * 5], [13, 14, 15, 16, 17, none, none]],
    )


def test_it_sees_the_next_token_and_none_after_it(model):
    before, changed = probe(model, PACKED), dict(PACKED, tokens=PACKED["tokens"].copy())
    changed["tokens"][1, 5] += 1  # of the first document in the second row
    after = probe(model, changed)
    moved = np.abs(after.out.mtp_hidden_BTD - before.out.mtp_hidden_BTD).max(-1) > 1e-3
    np.testing.assert_array_equal(np.flatnonzero(moved[1]), np.arange(4, 9))
    assert not moved[0, :14].any()


def test_its_router_is_the_last_in_the_routing(model):
    out = probe(model, PACKED).out
    assert out.routing.ids.shape == (1, 6, 15, 3)
    np.testing.assert_array_equal(out.routing.counts.sum(-1), [3 * 25])


def test_without_the_layer_there_is_no_mtp_output():
    out = probe(make_model(small(first_k_dense_replace=2)), PACKED).out
    assert out.mtp_hidden_BTD is None and out.routing is None  # nor any other router
