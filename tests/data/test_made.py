"""Text that a laptop makes: it is right, the same everywhere, and a source like any other."""

import itertools
import random
import re
import tracemalloc
import types

import pytest

from ling_jax.data import made
from ling_jax.data.made import ARITHMETIC, FILLER, KEYS, MADE, RETRIEVAL, VERSION, documents, retrieval
from ling_jax.data.sources import read_corpus
from ling_jax.files.whole import checksum
from tests.support.texts import config_of

NEEDLE = re.compile(r"-([A-Z][a-z]+)([A-Z][a-z]+)")


@pytest.mark.parametrize(("name", "digest"), [(ARITHMETIC, "71810f8758af1545"), (RETRIEVAL, "a60d095cea41341b")])
def test_the_documents_are_the_same_everywhere(name, digest):
    assert VERSION == 1  # another one goes with other digests, and tells caches and prepared text
    assert checksum("\0".join(documents(name)).encode()) == digest


def test_no_more_than_a_document_is_in_memory():
    tracemalloc.start()
    try:
        assert isinstance(documents(ARITHMETIC), types.GeneratorType)
        assert sum(len(text) for text in itertools.islice(documents(ARITHMETIC), 300)) > 2e5
        assert tracemalloc.get_traced_memory()[1] < 1e5
    finally:
        tracemalloc.stop()


def test_every_step_of_the_arithmetic_is_right():
    for text in (text for text, _ in zip(documents(ARITHMETIC), range(200), strict=False)):
        for problem in text.split("\n\n"):
            asked, *steps = problem.strip().splitlines()
            assert steps[-1] == f"{asked.removesuffix('?')}{eval(asked.removesuffix(' = ?'))}"
            for left, right in (step.split(":")[0].split(" = ") for step in steps):
                assert eval(left) == int(right)
            written = [found for step in steps if (found := re.search(r"write (\d)", step))]
            if written:  # digits, the last one first
                total = int("".join(found[1] for found in reversed(written)))
                assert total == eval(asked.removesuffix(" = ?")) % 10 ** len(written)


def test_each_key_is_given_twice_and_each_time_it_is_asked_for_the_last_value_counts():
    lengths, counts = [], set()
    for text in itertools.islice(documents(RETRIEVAL), 4000):
        body, _, asked = text.partition("?")
        given: dict[str, list[str]] = {}
        for key, value in NEEDLE.findall(body):
            given.setdefault(key, []).append(value)
        assert {len(values) for values in given.values()} == {2} and given.keys() <= set(KEYS)
        answers = re.findall(r"([A-Z][a-z]+)-\1([A-Z][a-z]+)\n", asked)
        assert set(answers) == {(key, last) for key, (_, last) in given.items()}
        assert len(answers) == asked.count("\n") and len(answers) % len(given) == 0
        counts.add(len(given))
        lengths.append(len(text))
    assert counts == set(range(2, len(KEYS) + 1))
    assert min(lengths) < 100 and max(lengths) > 12_000  # of 4 or 5 characters a token
    assert sum(length < 125 for length in lengths) > 0.2 * len(lengths)


def test_the_last_values_lie_one_in_each_part_of_the_lines():
    for seed in range(20):
        lines, questions = retrieval(random.Random(seed), FILLER * 50)
        for part, question in enumerate(questions):
            place = len(lines) - 1 - lines[::-1].index(f"{question.answer}\n")
            assert part - 0.1 < place / len(lines) * len(KEYS) < part + 1.1


def test_they_are_sources_with_held_out_text_and_a_fingerprint(tmp_path, monkeypatch):
    for name in MADE:
        monkeypatch.setitem(made.MADE, name, MADE[name]._replace(count=300))
    corpora = [read_corpus(config_of(*MADE, cache_dir=str(tmp_path / cache))) for cache in ("a", "b", "a")]
    assert corpora[0].facts() == corpora[1].facts() == corpora[2].facts()
    for name in MADE:
        train, heldout = list(corpora[0].train[name]), corpora[0].heldout[name]
        assert len(heldout) >= 1 and {d.text for d in train}.isdisjoint(d.text for d in heldout)
        assert {d.licence for d in train} == {"CC0-1.0"} and len({d.origin for d in train}) == len(train) > 280
