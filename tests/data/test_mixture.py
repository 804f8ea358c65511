"""The source of each row, and that no token of a source comes twice before its epoch ends."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.config import DataConfig, DataSource, by_tag
from ling_jax.data.mixture import MANY_EPOCHS, DataState, Mixture, long_blocks, mixture_of
from ling_jax.data.packing import IGNORE, Rows, Stream
from ling_jax.data.pipeline import _before_places, train_batches


def source_of(name: int, tokens: int, length: int) -> Rows:
    """A source whose tokens are all different, also from those of others: no document's beginning among them."""
    return Rows(Stream(np.arange(tokens + 1, dtype=np.uint32) + name * 10**6, np.zeros(1, np.int64)), length)


def config_of(weights: list[float], length: int, caps: list[float | None] | None = None, batch: int = 4) -> DataConfig:
    caps = caps or [None] * len(weights)
    sources = tuple(
        DataSource(path=f"/{i}", weight=w, max_epochs=c) for i, (w, c) in enumerate(zip(weights, caps, strict=True))
    )
    return DataConfig(sources=sources, sequence_length=length, global_batch_size=batch)


def mixture(sizes: list[int], weights: list[float], length: int, block: int = 0, **caps) -> tuple[Mixture, DataState]:
    rows = {str(i): source_of(i, size, length) for i, size in enumerate(sizes)}
    found = Mixture(rows, config_of(weights, length, **caps), block or length)
    return found, found.start()


@settings(deadline=None, max_examples=8)  # every epoch of a source as small as these is shuffled anew: that takes 4 ms
@given(st.data(), st.integers(2, 12), st.integers(2, 9))
def test_at_every_prefix_a_source_is_within_two_rows_of_its_share_padding_not_counted(data, count, length):
    weights = data.draw(st.lists(st.floats(0.001, 1.0), min_size=count, max_size=count))
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))  # most have a short last row
    drawing, state = mixture(sizes, weights, length)
    shares, drawn = np.array(weights) / sum(weights), np.zeros(count)
    for piece in drawing.draw(state, 150)[0]:
        drawn[int(piece.source)] += piece.count
        assert np.abs(shares * drawn.sum() - drawn).max() <= 2 * length


def test_a_mixture_by_tag_gives_each_tag_its_share_and_its_sources_their_parts_of_it():
    tags = {"prose": "general", "web": "general", "sums": "reasoning", "code": "code"}
    sources = [DataSource(path=name, weight=1.0 + (name == "web"), tag=tag) for name, tag in tags.items()]
    config = DataConfig(sources=by_tag(sources, {"reasoning": 32, "general": 68}), sequence_length=10)
    drawing = Mixture({name: source_of(i, 500, 10) for i, name in enumerate(tags)}, config, 10)
    found = drawing.metrics(drawing.draw(drawing.start(), 1_000)[1])
    shares = {key: value for key, value in found.items() if not key.endswith("/epochs")}
    wanted = {"data/prose/share": 0.68 / 3, "data/web/share": 1.36 / 3, "data/sums/share": 0.32}
    assert shares == pytest.approx({**wanted, "data/tag_general": 0.68, "data/tag_reasoning": 0.32}, abs=2e-3)


def test_the_long_rows_of_a_source_are_of_its_tag():
    rows = {name: Rows(Stream(np.arange(401, dtype=np.uint32), np.array(starts)), 10) for name, starts in
            {"a": [0, *range(200, 400, 5)], "b": [*range(0, 400, 5)]}.items()}  # fmt: skip
    sources = tuple(DataSource(path=name, tag=f"of {name}") for name in rows)
    config = DataConfig(sources=sources, sequence_length=10, long_document=10, long_share=0.3)
    drawing = Mixture(rows, config, 10)
    found = drawing.metrics(drawing.draw(drawing.start(), 200)[1])
    assert found["data/a (long rows)/share"] == pytest.approx(0.3, abs=1e-2)
    assert found["data/tag_of a"] == found["data/a/share"] + found["data/a (long rows)/share"]


@pytest.mark.parametrize(
    ("tags", "shares", "message"),
    [
        (["a", ""], {"a": 1}, "data source '1' has no tag"),
        (["a", "b"], {"a": 1, "c": 2}, "the tag 'c' has a share, but no data source: their tags are a, b"),
        (["a", "b"], {"a": 1, "b": 0}, "the share 0 of the tag 'b' must be positive"),
        (["a/b"], {}, "tag = 'a/b' of data source '0' must have no slash"),
    ],
)
def test_tags_that_give_no_mixture_are_one_error(tags, shares, message):
    with pytest.raises(ValueError, match=message):
        by_tag([DataSource(path=str(i), tag=tag) for i, tag in enumerate(tags)], shares)


@pytest.mark.parametrize("weights", [[32, 68], [46, 54], [0.1, 99.9], [1, 2, 27, 30, 40]])
def test_shares_are_exact_in_the_long_run(weights):
    drawing, state = mixture([1000] * len(weights), weights, 10)
    after = drawing.draw(state, 5_000)[1]
    found = np.array([after.drawn[str(i)] for i in range(len(weights))]) / sum(after.drawn.values())
    np.testing.assert_allclose(found, np.array(weights) / sum(weights), atol=4e-4)  # two rows


def tokens_of(pieces: list, sizes: list[int]) -> Counter:
    """How often each token of each source was an input; the sources' last tokens are none."""
    counts: Counter = Counter()
    for piece in pieces:
        assert 0 <= piece.begin and piece.begin + piece.count <= sizes[int(piece.source)]
        counts.update((piece.source, token) for token in range(piece.begin, piece.begin + piece.count))
    return counts


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.integers(1, 12),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=4),
)
def test_no_token_comes_twice_in_an_epoch_whatever_lengths_follow_one_another(sizes, block, stages):
    """Places are tokens, so every token up to a place has come once an epoch, or at a change of length not at all."""
    state, pieces = None, []
    for length, count in stages:
        drawing, begin = mixture(sizes, [1.0] * len(sizes), min(length, block), block)
        found, state = drawing.draw(begin if state is None else drawing.start(state), count)
        pieces += found
    counts = tokens_of(pieces, sizes)
    for name, source in drawing.sources.items():
        epochs = -(-state.places[name] // (source.blocks * block))
        assert max((n for (of, _), n in counts.items() if of == name), default=0) <= epochs


def test_at_one_length_an_epoch_has_every_token_once():
    sizes = [40, 41, 7]
    drawing, state = mixture(sizes, [1.0, 1.0, 1.0], 5)
    pieces = drawing.draw(state, 200)[0]
    for name, size in enumerate(sizes):
        of_one = [piece for piece in pieces if piece.source == str(name)]
        epoch = -(-size // 5)
        for first in range(0, len(of_one) - epoch, epoch):
            assert sorted(tokens_of(of_one[first : first + epoch], sizes).values()) == [1] * size


def test_the_state_goes_through_json_and_gives_the_same_rows():
    drawing, state = mixture([33, 50], [0.3, 0.7], 8)
    whole = drawing.draw(state, 50)[0]
    first, after = drawing.draw(state, 17)
    again = DataState(**json.loads(json.dumps(after.to_json())))
    assert again == after and first + drawing.draw(drawing.start(again), 33)[0] == whole


def test_another_share_moves_no_place_and_a_new_source_begins_at_its_beginning():
    drawing, state = mixture([100, 100], [0.5, 0.5], 5)
    first, after = drawing.draw(state, 20)
    rows = {str(i): source_of(i, 100, 5) for i in range(3)}
    wider, begin = mixture_of(rows, config_of([0.1, 0.3, 0.6], 5), after)
    assert begin.places == {"0": 50, "1": 50, "2": 0} and sum(begin.drawn.values()) == 0
    second, end = wider.draw(begin, 30)
    assert Counter(piece.source for piece in second) == {"0": 3, "1": 9, "2": 18}
    assert max(tokens_of(first + second, [100] * 3).values()) == 1
    back = drawing.start(end)
    assert back.places == end.places  # of the source that is left out too


def test_a_source_that_was_read_often_enough_leaves_its_share_to_the_others():
    drawing, state = mixture([50, 1000, 1000], [0.5, 0.3, 0.2], 5, caps=[2.0, None, None])
    pieces, after = drawing.draw(state, 100)
    assert Counter(piece.source for piece in pieces)["0"] == 20
    late = Counter(piece.source for piece in drawing.draw(after, 100)[0])
    assert late == {"1": 60, "2": 40}
    assert {n: s for n, s in after.shares.items()} == pytest.approx({"1": 0.6, "2": 0.4})


def test_what_is_planned_is_what_is_drawn_and_too_little_text_is_said_beforehand(caplog):
    caplog.set_level("INFO")
    drawing, state = mixture([500, 1000, 2000], [0.5, 0.3, 0.2], 5, caps=[1.0, 2.0, None])
    after = drawing.draw(state, 2000)[1]
    planned = drawing.planned(state, 2000)
    assert all(abs(planned[name] - after.places[name]) <= 10 for name in planned)
    drawing.announce(state, 2000)
    assert "0: 5.00% of the tokens to come, in all read 1.00 times" in caplog.text
    assert f"read more than {MANY_EPOCHS} times" not in caplog.text
    drawing.announce(state, 5000)
    assert f"2 will have been read more than {MANY_EPOCHS} times" in caplog.text
    capped, state = mixture([50, 100], [0.5, 0.5], 5, caps=[1.0, 2.0])
    capped.announce(state, 50)
    with pytest.raises(ValueError, match=r"as often as its max_epochs allows \(0 1, 1 2\): raise one.*train.steps"):
        capped.announce(state, 51)
    with pytest.raises(ValueError, match="as often as its max_epochs allows"):
        capped.draw(state, 51)


def test_max_epochs_must_be_positive():
    with pytest.raises(ValueError, match="max_epochs = 0 of data source 'a' must be positive"):
        DataSource(path="a", max_epochs=0)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_every_host_draws_the_same_rows(hosts):
    sizes, config = [90, 33, 400], config_of([0.2, 0.3, 0.5], 6, batch=8)
    rows = {str(i): source_of(i, size, 6) for i, size in enumerate(sizes)}
    whole = [batch.arrays["tokens"] for batch in itertools.islice(train_batches(rows, config), 12)]
    share = 8 // hosts
    parts = []
    for host in range(hosts):
        here = list(range(host * share, (host + 1) * share))
        parts.append([b.arrays["tokens"] for b in itertools.islice(train_batches(rows, config, here=here), 12)])
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), batch)


def test_a_batch_says_how_far_it_has_read_and_its_shares():
    rows = {str(i): source_of(i, 60, 5) for i in range(2)}
    config = config_of([0.25, 0.75], 5)
    batches = list(itertools.islice(train_batches(rows, config), 6))
    assert [batch.state.rows for batch in batches] == [4, 8, 12, 16, 20, 24]
    assert batches[-1].metrics == {
        "data/0/share": 0.25,
        "data/1/share": 0.75,
        "data/0/epochs": 0.5,
        "data/1/epochs": 1.5,
    }
    later = list(itertools.islice(train_batches(rows, config, 2, state=batches[1].state), 4))
    assert [batch.state for batch in later] == [batch.state for batch in batches[2:]]


def test_rows_that_an_older_version_read_by_grains_mixture_do_not_come_again():
    config = config_of([0.3, 0.7], 5)
    sources = [grain.MapDataset.source([i]).repeat() for i in range(2)]
    mixed = grain.MapDataset.mix(sources, [0.3, 0.7])
    counts = Counter(mixed[i] for i in range(57))
    state = _before_places(config, 57)
    assert state.places == {"0": counts[0] * 5, "1": counts[1] * 5} and state.rows == 57
    assert _before_places(replace(config, sources=config.sources[:1]), 57).places == {"0": 285}


# The ramp of the batch.


RAMP = DataConfig(
    sources=(DataSource(path="/0"),), sequence_length=4096, global_batch_size=4400, batch_ramp_from=3024,
    batch_ramp_by=16, batch_ramp_tokens=500 * 10**9,
)  # fmt: skip


def test_the_batch_grows_evenly_over_its_tokens_and_then_stays():
    increments = (4400 - 3024) // 16
    assert [RAMP.batch_at(tokens) for tokens in (0, 500 * 10**9 // increments, 500 * 10**9 - 1, 500 * 10**9)] == [
        3024, 3024, 4384, 4400,
    ]  # fmt: skip
    assert RAMP.batch_at(500 * 10**9 // increments + 1) == 3040
    assert RAMP.batch_at(20 * 10**12) == 4400
    for tokens in range(0, 500 * 10**9, 7_777_777_777):
        exact = Fraction(tokens, 500 * 10**9) * increments
        assert RAMP.batch_at(tokens) == 3024 + 16 * math.floor(exact)
    late = replace(RAMP, batch_ramp_tokens=40 * 10**12)  # far beyond float32 and int32
    for tokens in range(20 * 10**12, 20 * 10**12 + 40, 7):
        assert late.batch_at(tokens) == 3024 + 16 * math.floor(Fraction(tokens, 40 * 10**12) * increments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_ramp_tokens=0), "batch_ramp_tokens = 0 must be set together"),
        (dict(batch_ramp_from=4400), "do not lead to data.global_batch_size = 4400"),
        (dict(batch_ramp_by=17), "batch_ramp_by must divide what is lacking"),
    ],
)
def test_a_ramp_that_leads_nowhere_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RAMP, **changes)


def test_the_batches_of_a_ramp_are_the_rows_of_the_sequence_then_padding_on_every_host_and_after_a_resume():
    rows = {"0": source_of(0, 2000, 5)}
    plain = DataConfig(sources=(DataSource(path="/0"),), sequence_length=5, global_batch_size=1)
    config = replace(plain, global_batch_size=8, batch_ramp_from=2, batch_ramp_by=2, batch_ramp_tokens=200)
    steps = list(itertools.islice(train_batches(rows, config), 16))
    sizes = [int(batch.metrics["data/batch_size"]) for batch in steps]
    tokens = np.cumsum([0, *(size * 5 for size in sizes)])
    assert sizes == [config.batch_at(int(t)) for t in tokens[:-1]] and sizes[0] == 2 and sizes[-1] == 8
    assert steps[-1].state.tokens == tokens[-1] and config.tokens_of(0, 16) == 5 * sum(sizes)
    sequence = itertools.islice(train_batches(rows, plain), sum(sizes))
    wanted = iter([batch.arrays for batch in sequence])
    for batch, size in zip(steps, sizes, strict=True):
        for row in range(size):
            want = next(wanted)
            for name in want:
                np.testing.assert_array_equal(batch.arrays[name][row], want[name][0])
        assert (batch.arrays["segment_ids"][size:] == 0).all() and (batch.arrays["targets"][size:] == IGNORE).all()
    here = [7, 0, 3, 4]  # rows of a host, in the order of its devices
    for part, batch in zip(itertools.islice(train_batches(rows, config, here=here), 16), steps, strict=True):
        np.testing.assert_array_equal(part.arrays["tokens"], batch.arrays["tokens"][here])
    later = list(itertools.islice(train_batches(rows, config, 5, state=steps[4].state), 11))
    assert [batch.state for batch in later] == [batch.state for batch in steps[5:]]
    assert [b.state for b in itertools.islice(train_batches(rows, config, 5), 11)] == [b.state for b in later]


# Rows of one long document.


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 12), st.data())
def test_a_block_is_long_where_one_document_has_enough_of_it(lengths, block, data):
    least = data.draw(st.integers(1, block))
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    stream = Stream(np.arange(sum(lengths), dtype=np.uint32), starts)
    total = max(sum(lengths) - 1, 1)
    owner = np.repeat(np.arange(len(lengths)), lengths)[:total]
    pieces = [owner[begin : begin + block] for begin in range(0, total, block)]
    want = [bool((np.bincount(piece) >= least).any()) for piece in pieces]
    assert long_blocks(stream, block, least).tolist() == want


def long_and_short(length: int, **changes) -> tuple[Mixture, DataState]:
    """Two sources: a third of the first's blocks of ten is one document's, none of the other's."""
    lengths = [30, *[2] * 30] * 20
    streams = [
        Stream(np.arange(1800, dtype=np.uint32), np.cumsum([0, *lengths[:-1]], dtype=np.int64)),
        Stream(np.arange(1800, dtype=np.uint32), np.arange(0, 1800, 3, dtype=np.int64)),
    ]
    config = replace(config_of([0.5, 0.5], length), block_length=10, long_document=10, **changes)
    return mixture_of({str(i): Rows(stream, length) for i, stream in enumerate(streams)}, config, None)


@pytest.mark.parametrize("length", [10, 5])
def test_long_rows_have_their_share_of_the_tokens_at_every_length(length):
    drawing, state = long_and_short(length, long_share=0.2)
    rows, after = drawing.draw(state, 400)
    is_long = [row.source == "0" and row.begin % 90 < 30 for row in rows]
    assert abs(np.mean(is_long) - 0.2) < 0.01
    assert abs(np.mean([row.source == "0" for row in rows]) - 0.5) < 0.01
    assert drawing.metrics(after)["data/0 (long rows)/share"] == pytest.approx(0.2, abs=0.01)


def test_without_a_share_they_are_as_many_as_there_are_and_never_come_twice_when_one_follows():
    drawing, state = long_and_short(5)
    rows, after = drawing.draw(state, 300)
    assert abs(np.mean([row.source == "0" and row.begin % 90 < 30 for row in rows]) - 0.5 / 2) < 0.1
    later, begin = long_and_short(10, long_share=0.3)
    rows += later.draw(later.start(after), 40)[0]
    assert max(tokens_of(rows, [1800, 1800]).values()) == 1
    assert begin.rows == 0


def test_without_a_share_the_only_short_row_is_read_no_oftener_than_the_long_ones_though_it_has_a_few_tokens():
    """A document of four blocks, and at the end one of a single token."""
    stream = Stream(np.arange(42, dtype=np.uint32), np.array([0, 40]))
    drawing, state = mixture_of({"0": Rows(stream, 10)}, replace(config_of([1.0], 10), long_document=10), None)
    found = drawing.metrics(drawing.draw(state, 200)[1])
    assert found["data/0 (long rows)/share"] == pytest.approx(40 / 41, abs=5e-3)
    assert found["data/0/epochs"] == pytest.approx(found["data/0 (long rows)/epochs"], abs=10)  # the tokens of a row


def test_a_share_of_long_rows_that_are_not_there_is_refused():
    rows = {"0": source_of(0, 100, 10)}
    short = {"0": Rows(Stream(rows["0"].stream.tokens_S, np.arange(0, 100, 2, dtype=np.int64)), 10)}
    config = replace(config_of([1.0], 10), long_document=8, long_share=0.2)
    with pytest.raises(ValueError, match="long_share = 0.2, but no row of 10 tokens has 8 of one document"):
        mixture_of(short, config, None)
    with pytest.raises(ValueError, match="long_share = 0.2 must be from 0 to below 1, and data.long_document above 0"):
        replace(config, long_document=0)
    with pytest.raises(ValueError, match="long_document = 11 must be at most the run's longest row, 10 tokens"):
        mixture_of(short, replace(config, long_document=11), None)
