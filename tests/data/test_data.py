"""Packing, batches, scoring windows, and what a run goes on with."""

import ast
import functools
import hashlib
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

import ling_jax.data
from ling_jax.config import DataConfig, DataSource, MeshConfig
from ling_jax.data import packing, store
from ling_jax.data.baselines import baselines
from ling_jax.data.packing import IGNORE, Rows, Stream, build_stream, pieces_of
from ling_jax.data.pipeline import open_data, scoring_windows, train_batches
from ling_jax.data.reading import Document
from ling_jax.data.sources import Training, read_corpus
from ling_jax.data.tokenizer import PRE_TOKENIZER_PATTERN, SPECIAL_TOKENS, Tokenizer
from ling_jax.parallel.mesh import make_mesh, place_batch, rows_here
from tests.support.texts import config_of, write_texts

VOCAB = 256 + len(SPECIAL_TOKENS)  # bytes only


def make_stream(lengths: list[int]) -> Stream:
    """Documents whose tokens are all different: token t of the stream is t + 1."""
    return Stream(np.arange(1, sum(lengths) + 1, dtype=np.uint32), np.cumsum([0, *lengths[:-1]], dtype=np.int64))


# --- packing


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda n: sum(n) > 1), st.integers(1, 20))
def test_every_token_but_a_documents_first_is_a_target_once(lengths, length):
    stream = make_stream(lengths)
    rows = [Rows(stream, length)[i] for i in range(len(Rows(stream, length)))]
    targets = np.concatenate([row["targets"] for row in rows])
    expected = sorted(set(stream.tokens_S.tolist()) - set(stream.tokens_S[stream.starts_D].tolist()))
    assert sorted(targets[targets != IGNORE].tolist()) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda n: sum(n) > 1), st.integers(1, 20))
def test_rows_are_the_stream_with_positions_and_segments_per_document_piece(lengths, length):
    stream = make_stream(lengths)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for i in range(len(Rows(stream, length))):
        row = Rows(stream, length)[i]
        assert all(values.shape == (length,) and values.dtype == np.int32 for values in row.values())
        used = row["segment_ids"] > 0
        assert np.all(np.diff(used.astype(int)) <= 0), "padding is at the end"
        assert used.all() or i == len(Rows(stream, length)) - 1, "only the last row is padded"
        tokens, count = row["tokens"][used], int(used.sum())
        np.testing.assert_array_equal(tokens, stream.tokens_S[i * length : i * length + count])
        documents = document_of[tokens - 1]
        np.testing.assert_array_equal(row["segment_ids"][used], documents - documents[0] + 1)
        piece_starts = [int(np.argmax(documents == d)) for d in documents]
        np.testing.assert_array_equal(row["positions"][used], np.arange(count) - piece_starts)
        predicted = row["targets"] != IGNORE
        assert np.all(row["targets"][predicted] == row["tokens"][predicted] + 1)
        assert np.all(document_of[row["targets"][predicted] - 1] == document_of[row["tokens"][predicted] - 1])
        assert np.all(row["targets"][~used] == IGNORE)


def test_a_row_outside_the_plan_is_an_error():
    with pytest.raises(IndexError):
        Rows(make_stream([5]), 4)[1]


def make_corpus(folder: Path, documents: list[str], **changes) -> tuple[Training, Path]:
    """The training side of a JSONL file of documents, and the cache."""
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    cache = folder / "cache"
    config = config_of(folder / "a.jsonl", cache_dir=str(cache), holdout_fraction=1e-9, **changes)
    return read_corpus(config, cache).train["a"], cache


DOCUMENTS = [f"document {i} " * (i + 1) for i in range(10)]


def pieces_of_stream(stream: Stream) -> list[np.ndarray]:
    """The documents' tokens, in the stream's order."""
    ids, _ = stream.read(0, len(stream.tokens_S))
    return np.split(ids, stream.starts_D[1:])


@pytest.fixture(params=[1, 3, 1 << 20])
def at_once(monkeypatch, request) -> None:
    """Tables in parts of so many entries, which must not show."""
    monkeypatch.setattr(store, "AT_ONCE", request.param)


def test_a_stream_is_each_document_with_its_prefix_and_end_in_the_order_of_old(tmp_path, at_once):
    tokenizer = Tokenizer.train([], VOCAB)
    train, cache = make_corpus(tmp_path / "c", DOCUMENTS)
    stream = build_stream(train, tokenizer, "s", 5, cache)
    pieces = pieces_of_stream(stream)
    assert stream.tokens_S.dtype == np.uint16 and isinstance(stream.tokens_S, np.memmap)
    assert all(piece[0] == tokenizer.bos_id and piece[-1] == tokenizer.eod_id for piece in pieces)
    decoded = [tokenizer.decode(piece[1:-1].tolist()) for piece in pieces]
    texts = [document.text for document in train]
    # What runs of old versions began with: sorted by the SHA-256 of seed, name and number.
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"5:documents of s:{i}".encode()).digest())
    assert len(texts) == 9 and decoded == [texts[i] for i in order]


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_the_stable_order_is_that_of_whole_digests_also_where_their_beginnings_agree(tmp_path, monkeypatch, count):
    real = hashlib.sha256

    class Short:  # of which many agree in their first eight bytes
        def __init__(self, data):
            self.data = data

        def digest(self):
            full = real(self.data).digest()
            return bytes([full[0] & 0xF0, *[0] * 7]) + full

    monkeypatch.setattr(store, "AT_ONCE", 8)
    if count == 50:
        monkeypatch.setattr(hashlib, "sha256", Short)
    found = [i for part in store.stable_order(count, 3, "salt", tmp_path) for i in part.tolist()]
    expected = sorted(range(count), key=lambda i: hashlib.sha256(f"3:salt:{i}".encode()).digest())
    assert found == expected and list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 20), st.randoms())
def test_rows_of_a_stream_in_another_order_are_those_of_its_tokens_in_that_order(lengths, length, draw):
    plain = make_stream(lengths)
    order = draw.sample(range(len(lengths)), len(lengths))
    pieces = np.split(plain.tokens_S, plain.starts_D[1:])
    moved = Stream(
        np.concatenate([pieces[i] for i in order]),
        plain.starts_D,
        np.cumsum([0, *(lengths[i] for i in order)])[[order.index(i) for i in range(len(order))]],
    )
    for index in range(len(Rows(plain, length))):
        one, other = Rows(plain, length)[index], Rows(moved, length)[index]
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


# Cut points are looked for at line ends and spaces; these have few, many, misleading ones.
LONG = st.text(alphabet="ab中é🙂 \n\r\t.,!/'s19\u00a0", max_size=400)
PATTERNS = {
    "ling": PRE_TOKENIZER_PATTERN,
    "slashes": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "byte level": None,
    "lines": r"[^\n]*\n?",
}


@functools.cache
def tokenizer_of(pattern: str) -> Tokenizer:
    """A tokenizer with merges of all kinds, over white space and punctuation too."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = PATTERNS[pattern]
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(split), "isolated"))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    draw = random.Random(0)
    core.train_from_iterator(["".join(draw.choices("ab \n\r.,!/'s19", k=4000)) for _ in range(20)], trainer)
    return Tokenizer(core, {}, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 60))
def test_the_pieces_of_a_text_have_the_ids_of_the_whole(pattern, data, size, block):
    tokenizer, text = tokenizer_of(pattern), data.draw(LONG)
    blocks = [text[i : i + block] for i in range(0, len(text), block)] or [""]
    documents = [Document(t, "s", "l", "text", "o", i + 1 < len(blocks)) for i, t in enumerate(blocks)]
    before, packing.PIECE_CHARACTERS = packing.PIECE_CHARACTERS, size
    try:
        pieces = list(pieces_of(documents, tokenizer))
    finally:
        packing.PIECE_CHARACTERS = before
    assert "".join(piece for piece, _ in pieces) == text
    assert [end for _, end in pieces] == [False] * (len(pieces) - 1) + [True]
    ids = [i for piece_ids in tokenizer.encode_batch([piece for piece, _ in pieces]) for i in piece_ids]
    assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("pattern", ["ling", "slashes", "byte level"])
def test_prose_code_and_one_endless_line_are_cut(pattern, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 500)
    prose = "It was so.\n\nAnd then, it was not: 17 of them came.\n" * 200
    for text in (prose, Path(__file__).read_text()[:20_000], prose.replace("\n", " ")):
        pieces = list(pieces_of([Document(text, "s", "l", "text", "o")], tokenizer_of(pattern)))
        assert len(pieces) > len(text) / 1200
        ids = tokenizer_of(pattern).encode_batch([piece for piece, _ in pieces])
        assert sum(ids, []) == tokenizer_of(pattern).encode(text)


def test_a_long_document_in_pieces_is_one_document_with_one_end(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train([], VOCAB)
    book = "".join(f"line {i} of a book\n" for i in range(2000))
    train, cache = make_corpus(tmp_path / "a", ["x", book, "y", "z", book + "more"])
    whole = build_stream(train, tokenizer, "s", 0, cache)
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(packing, "CHUNK_CHARACTERS", 2000)
    monkeypatch.setattr(packing, "LAYOUT", "in pieces")
    pieces = build_stream(train, tokenizer, "s", 0, cache)
    assert pieces.checksum == whole.checksum
    assert len(pieces.starts_D) == 4 == (np.asarray(pieces.tokens_S) == tokenizer.eod_id).sum()
    row = Rows(pieces, len(pieces.tokens_S))[0]
    assert row["segment_ids"].max() == 4 and row["positions"].max() > len(book)


def test_the_cache_serves_equal_inputs_only(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train([], VOCAB)
    train, cache = make_corpus(tmp_path / "a", DOCUMENTS)
    first = build_stream(train, tokenizer, "s", 0, cache)
    other = build_stream(make_corpus(tmp_path / "b", DOCUMENTS[:6])[0], tokenizer, "s", 0, cache)
    merged = build_stream(train, Tokenizer.train(["document"], VOCAB + 1), "s", 0, cache)
    assert len({first.checksum, other.checksum, merged.checksum}) == 3
    assert len(list(cache.glob("*.tokens.npy"))) == 3
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    again, shuffled = (build_stream(train, tokenizer, "s", seed, cache) for seed in (0, 1))
    assert again.checksum == first.checksum == shuffled.checksum
    assert again.places_D.tolist() == first.places_D.tolist() != shuffled.places_D.tolist()


# --- batches


ROWS = {"a": Rows(make_stream([7] * 50), 8), "b": Rows(make_stream([5, 31] * 9), 8)}
MIX = DataConfig(
    sources=(DataSource(path="a", weight=0.1), DataSource(path="b", weight=0.3)),
    sequence_length=8,
    global_batch_size=12,
)
ONE = replace(MIX, sources=MIX.sources[:1])


def take(count: int, *args, **kwargs) -> list[dict[str, np.ndarray]]:
    return [batch.arrays for batch in itertools.islice(train_batches(ROWS, *args, **kwargs), count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("config", [ONE, MIX])
def test_starting_at_a_step_gives_the_batches_of_a_run_from_the_start(config):
    whole = take(30, config, 0)
    for start in (1, 7, 29):
        assert_same(take(30 - start, config, start), whole[start:])


@pytest.mark.parametrize("count", [2, 3, 12])
def test_the_parts_of_all_hosts_in_order_are_the_one_host_batch(count):
    share = 12 // count
    parts = [take(9, MIX, 4, range(index * share, (index + 1) * share)) for index in range(count)]
    joined = [{k: np.concatenate([batch[k] for batch in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, take(9, MIX, 4))


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 2, "context": 2}, {"data": 2}, {}])
def test_on_every_mesh_a_step_has_the_same_ids(mesh):
    devices = make_mesh(MeshConfig(**mesh), jax.devices()[: int(np.prod(list(mesh.values()), dtype=int))])
    here = rows_here(devices, 12)
    placed = [
        place_batch(devices, batch, dict.fromkeys(batch, "BT"), here, 12) for batch in take(5, MIX, 10, here.tolist())
    ]
    assert_same([jax.device_get(batch) for batch in placed], take(5, MIX, 10))


def test_batches_are_int32_rows():
    for name, values in take(1, MIX, 0)[0].items():
        assert values.shape == (12, 8) and values.dtype == np.int32, name


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order():
    config = replace(ONE, global_batch_size=len(ROWS["a"]))
    first, second = (batch["tokens"][:, 0].tolist() for batch in take(2, config, 0))
    assert sorted(first) == sorted(second) == [Rows.__getitem__(ROWS["a"], i)["tokens"][0] for i in range(len(first))]
    assert first != second and first != sorted(first)


def test_neighbouring_seeds_share_no_order():
    config = replace(ONE, global_batch_size=len(ROWS["a"]))
    orders = [tuple(b["tokens"][:, 0]) for seed in range(4) for b in take(4, replace(config, seed=seed), 0)]
    assert len(set(orders)) == len(orders)


def test_weights_are_shares_of_the_tokens():
    rows = {
        "a": Rows(make_stream([100]), 8),
        "b": Rows(Stream(make_stream([200]).tokens_S + 100, np.zeros(1, np.int64)), 8),
    }
    batches = [batch.arrays for batch in itertools.islice(train_batches(rows, MIX, 0), 100)]
    from_a = np.concatenate([batch["tokens"][:, 0] <= 100 for batch in batches])
    real = np.concatenate([(batch["segment_ids"] > 0).sum(1) for batch in batches])
    assert abs(real[from_a].sum() / real.sum() - 0.25) < 0.001
    assert 2 <= from_a[:12].sum() <= 4, "mixed evenly, not in blocks"


# --- scoring


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 3), st.integers(1, 20), st.data())
def test_every_token_is_scored_once_with_the_context_promised(count, prefix, length, data):
    stride = data.draw(st.integers(1, length))
    ids, before = list(range(100, 100 + count)), list(range(prefix))
    rows = scoring_windows(ids, before, length, stride)
    scored = rows["targets"][rows["targets"] != IGNORE]
    assert scored.tolist() == ids
    stream = before + ids
    for tokens, targets, positions, segments in zip(*rows.values(), strict=True):
        used = segments > 0
        np.testing.assert_array_equal(positions[used], np.arange(used.sum()))
        begin = stream.index(tokens[0])
        assert tokens[used].tolist() == stream[begin : begin + used.sum()]
        for place in np.flatnonzero(targets != IGNORE):
            assert targets[place] == stream[begin + place + 1]
            assert place + 1 >= min(length - stride, begin + place + 1)
        assert np.all(targets[~used] == IGNORE)


def test_scoring_errors_name_the_limits():
    with pytest.raises(ValueError, match="stride = 9 must be between 1 and the window's length = 8"):
        scoring_windows([1], [0], 8, 9)
    with pytest.raises(ValueError, match="scoring needs a prefix"):
        scoring_windows([1], [], 8, 8)


# --- all of it


def test_open_data_trains_saves_and_reuses_a_tokenizer(tmp_path):
    folder = write_texts(tmp_path / "a", 60)
    config = config_of(folder, cache_dir=str(tmp_path / "cache"), sequence_length=16)
    first = open_data(config, VOCAB + 8, str(tmp_path / "run"))
    assert first.tokenizer.vocab_size == VOCAB + 8
    again = open_data(config, VOCAB + 8, str(tmp_path / "run"))
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    assert again.heldout == first.heldout and first.heldout["a"]
    assert_same(
        [batch.arrays for batch in itertools.islice(train_batches(again.rows, config, 0), 3)],
        [batch.arrays for batch in itertools.islice(train_batches(first.rows, config, 0), 3)],
    )


def test_a_tokenizer_that_does_not_fit_the_model_or_the_run_is_an_error(tmp_path):
    folder = write_texts(tmp_path / "a", 60)
    config = config_of(folder, cache_dir=str(tmp_path / "cache"))
    Tokenizer.train(["ab cd " * 9], VOCAB + 2).save(str(tmp_path / "other"))
    own = replace(config, tokenizer=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"model.vocab_size is {VOCAB}"):
        open_data(own, VOCAB, str(tmp_path / "run"))
    open_data(config, VOCAB + 1, str(tmp_path / "run"))
    with pytest.raises(ValueError, match="differs from the tokenizer this run began with"):
        open_data(own, VOCAB + 2, str(tmp_path / "run"))
    open_data(own, VOCAB + 2, str(tmp_path / "run2"))
    assert Tokenizer.load(str(tmp_path / "run2")).vocab_size == VOCAB + 2


def test_baselines_are_what_the_compressors_and_the_counts_say():
    first, second = ("".join(np.random.default_rng(seed).choice(list("abcd"), 20_000)) for seed in (0, 1))
    assert abs(baselines([first], [second])["byte trigram"] - 2) < 0.02, "four letters at random are two bits"
    figures = baselines(["abcabcabd" * 2000], ["abcabcabd" * 500])
    assert list(figures) == ["gzip -9", "xz -9", "byte trigram"]
    # After "ab" come c, c, d: log2(3) - 2/3 bits there, none elsewhere (a third of the bytes).
    assert abs(figures["byte trigram"] - (np.log2(3) - 2 / 3) / 3) < 0.01
    assert figures["gzip -9"] < 0.2 and figures["xz -9"] < 0.4
    with pytest.raises(ValueError, match="baselines need text"):
        baselines(["a"], [])


def test_the_data_room_imports_neither_jax_nor_later_rooms():
    allowed = {
        "grain",
        "numpy",
        "tokenizers",
        "jinja2",
        "pyarrow",
        "etils",
        "xxhash",
        "ling_jax.config",
        "ling_jax.data",
    }
    allowed |= {
        f"ling_jax.files.{name}" for name in ("buckets", "cache", "hub", "one_writer", "paths", "progress", "whole")
    }  # the room has a jax file too
    standard = set(__import__("sys").stdlib_module_names) | {"pydoc_data"}
    for file in Path(ling_jax.data.__file__ or "").parent.glob("*.py"):
        if file.stem == "__main__":  # a command
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                of_files = node.module == "ling_jax.files"
                names += [f"ling_jax.files.{a.name}" for a in node.names] if of_files else [node.module or ""]
            for name in names:
                depth = 1 if not name.startswith("ling_jax") else 3 if name.startswith("ling_jax.files") else 2
                root = ".".join(name.split(".")[:depth])
                assert root in allowed | standard, f"{file.name} imports {name}"
