"""Sources, split, packing, batches and scoring windows."""

import ast
import itertools
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ling_jax.data
from ling_jax.config import DataConfig, DataSource, MeshConfig
from ling_jax.data import sources
from ling_jax.data.baselines import baselines
from ling_jax.data.packing import IGNORE, Rows, Stream, build_stream
from ling_jax.data.pipeline import open_data, scoring_windows, train_batches
from ling_jax.data.sources import Document, read_corpus
from ling_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from ling_jax.parallel.mesh import make_mesh, place_batch, rows_here

VOCAB = 256 + len(SPECIAL_TOKENS)  # bytes only


def config_of(*paths, **changes) -> DataConfig:
    return DataConfig(sources=tuple(DataSource(path=str(path)) for path in paths), **changes)


def write_texts(folder: Path, count: int, size: int = 300) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"text {i}\n" + f"{i} is a number\n" * (size // 15))
    return folder


def texts(documents) -> list[str]:
    return [document.text for document in documents]


def make_stream(lengths: list[int]) -> Stream:
    """Documents whose tokens are all different: token t of the stream is t + 1."""
    return Stream(np.arange(1, sum(lengths) + 1, dtype=np.uint32), np.cumsum([0, *lengths[:-1]], dtype=np.int64))


# --- sources and split


def test_the_standard_library_is_a_corpus_without_leaks():
    config = config_of("python-stdlib")
    corpus = read_corpus(config)
    train, heldout = corpus.train["python-stdlib"], corpus.heldout["python-stdlib"]
    assert {d.origin for d in train}.isdisjoint(d.origin for d in heldout)
    assert {d.text.strip() for d in train}.isdisjoint(d.text.strip() for d in heldout)
    assert {d.kind for d in train} == {d.kind for d in heldout} == {"code", "docs"}
    assert {d.licence for d in train} == {"PSF-2.0"}
    assert sources.size(train) > 5e6 and 2e4 < sources.size(heldout) <= config.holdout_max_bytes
    assert not any("/test/" in f"/{d.origin}" or "pydoc_data/topics.py" == d.origin and d.kind == "code" for d in train)


def test_the_split_depends_on_the_path_alone(tmp_path):
    folder = write_texts(tmp_path / "a", 200)
    first = read_corpus(config_of(folder, holdout_fraction=0.2))
    second = read_corpus(config_of(folder, holdout_fraction=0.2, seed=7))
    assert first == second
    held = {d.origin for d in first.heldout["a"]}
    assert 20 <= len(held) <= 60
    (folder / "new.txt").write_text("one more file moves no other")
    third = read_corpus(config_of(folder, holdout_fraction=0.2))
    assert {d.origin for d in third.heldout["a"]} - {"new.txt"} == held


@pytest.mark.parametrize("count", [2, 3])
def test_a_small_folder_has_documents_on_both_sides(tmp_path, count):
    for fraction in (1e-6, 1 - 1e-6):
        folder = tmp_path / "a"
        corpus = read_corpus(
            config_of(folder if folder.exists() else write_texts(folder, count), holdout_fraction=fraction)
        )
        assert corpus.train["a"] and corpus.heldout["a"]


def test_of_a_single_text_the_end_is_held_out(tmp_path):
    text = "".join(f"line {i} of one long text\n" for i in range(40_000))
    (tmp_path / "one.txt").write_text(text)
    corpus = read_corpus(config_of(tmp_path / "one.txt", holdout_fraction=0.1))
    train, heldout = texts(corpus.train["one"]), texts(corpus.heldout["one"])
    assert "".join(train) + "".join(heldout) == text
    assert 0.09 < sum(map(len, heldout)) / len(text) < 0.11
    assert len(train) > 1 and max(map(len, train)) <= sources.MAX_DOCUMENT


def test_equal_documents_stay_once_and_the_held_out_one_wins(tmp_path):
    a, b = write_texts(tmp_path / "a", 30), tmp_path / "b"
    b.mkdir()
    for file in a.iterdir():
        (b / f"copy-{file.name}").write_text("\n" + file.read_text() + "  \n")
    (b / "own-1.txt").write_text("only here")
    (b / "own-2.txt").write_text("only here, too")
    (b / "own-3.txt").write_text("and this")
    corpus = read_corpus(config_of(a, b, holdout_fraction=0.3))
    everything = [d.text.strip() for side in (corpus.train, corpus.heldout) for ds in side.values() for d in ds]
    assert len(everything) == len(set(everything)) == 33


def test_docstrings_go_with_a_dropped_copy_of_their_file(tmp_path):
    def documents(origin, docs):
        return [Document("code", "s", "l", "code", origin), Document(docs, "s", "l", "docs", origin)]

    heldout, train = sources._drop_duplicates(
        {"s": documents("a.py", "docs")}, {"s": [*documents("b.py", "docs, otherwise cut"), *documents("c.py", "x")]}
    )
    assert len(heldout["s"]) == 2 and train["s"] == []


def test_docstrings_share_the_origin_of_their_file(tmp_path):
    long = "A docstring of some length." * 10
    (tmp_path / "m.py").write_text(f'"""{long}"""\ndef f():\n    """short"""\n')
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text("x = 1\n")
    code, docs = sources._read_python_tree(tmp_path, "s", "l")
    assert (code.kind, docs.kind) == ("code", "docs") and code.origin == docs.origin == "m.py"
    assert docs.text == long


def test_jsonl_and_parquet_records_carry_their_own_source_and_licence(tmp_path):
    records = [{"body": f"record {i}\u2028still {i}", "source": "s", "licence": "CC0"} for i in range(8)] + [
        {"body": "bare"}
    ]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "j.jsonl").write_text(lines + "\n\n")
    table = pyarrow.table({"body": [f"row {i}" for i in range(8)], "licence": ["MIT"] * 8})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    source = DataSource(path=str(tmp_path), licence="mine", text_field="body")
    corpus = read_corpus(DataConfig(sources=(source,)))
    found = {d.text: d for side in (corpus.train, corpus.heldout) for ds in side.values() for d in ds}
    assert len(found) == 17
    one, bare, row = found["record 3\u2028still 3"], found["bare"], found["row 5"]
    assert (one.source, one.licence, one.origin) == ("s", "CC0", "j.jsonl:4")
    assert (bare.source, bare.licence) == (tmp_path.name, "mine")
    assert (row.licence, row.origin) == ("MIT", "p.parquet:6")


def test_max_bytes_takes_a_seeded_sample_and_leaves_the_held_out_side_alone(tmp_path):
    folder = write_texts(tmp_path / "a", 100)
    whole = read_corpus(config_of(folder))
    sample, other = (read_corpus(config_of(folder, max_bytes=5000, seed=seed)) for seed in (0, 1))
    assert 4000 < sources.size(sample.train["a"]) <= 5000
    assert set(texts(sample.train["a"])) < set(texts(whole.train["a"]))
    assert texts(sample.train["a"]) != texts(other.train["a"])
    assert sample.heldout == whole.heldout


def test_the_held_out_side_is_bounded_but_never_empty(tmp_path):
    folder = write_texts(tmp_path / "a", 100)
    assert (
        sources.size(read_corpus(config_of(folder, holdout_fraction=0.5, holdout_max_bytes=1000)).heldout["a"]) <= 1000
    )
    assert len(read_corpus(config_of(folder, holdout_fraction=0.5, holdout_max_bytes=1)).heldout["a"]) == 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"abc\xff", "a.txt is not UTF-8: byte 0xff at offset 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl:2: a JSON object is needed, not list"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: field 'text' is NoneType, not a string \(fields: body\)"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: field 'text' is int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: field 'text' is no Unicode text"),
        ("a.parquet", b"PAR0", "a.parquet is not a parquet file"),
        ("a.txt", b" \n ", "no documents with text"),
        ("a.txt", b"one line", "no line end"),
        ("a.csv", b"x", "holds no documents"),
    ],
)
def test_a_bad_corpus_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_corpus(config_of(tmp_path))


def test_a_bad_corpus_path_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give"):
        read_corpus(config_of(tmp_path / "none"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match="ends in '.csv'; give"):
        read_corpus(config_of(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="listed twice"):
        read_corpus(config_of(tmp_path, tmp_path))


def test_the_same_text_only_is_too_little(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("the same")
    with pytest.raises(ValueError, match="0 to train on and 1 held out"):
        read_corpus(config_of(tmp_path))


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


def make_documents(count: int) -> list[Document]:
    return [Document(f"document {i} " * (i + 1), "s", "l", "text", str(i)) for i in range(count)]


def test_a_stream_is_each_document_with_its_prefix_and_end(tmp_path):
    tokenizer = Tokenizer.train([], VOCAB)
    stream = build_stream(make_documents(9), tokenizer, "s", 0, str(tmp_path))
    pieces = np.split(stream.tokens_S, stream.starts_D[1:])
    assert stream.tokens_S.dtype == np.uint16
    assert all(piece[0] == tokenizer.bos_id and piece[-1] == tokenizer.eod_id for piece in pieces)
    decoded = [tokenizer.decode(piece[1:-1].tolist()) for piece in pieces]
    assert sorted(decoded) == sorted(texts(make_documents(9))) and decoded != texts(make_documents(9))


def test_the_cache_serves_equal_inputs_only_and_leaves_no_temporary_files(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train([], VOCAB)
    first = build_stream(make_documents(5), tokenizer, "s", 0, str(tmp_path))
    build_stream(make_documents(6), tokenizer, "s", 0, str(tmp_path))
    build_stream(make_documents(5), Tokenizer.train(["ab ab ab"], VOCAB + 1), "s", 0, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 6 and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    again = build_stream(make_documents(5), tokenizer, "s", 0, str(tmp_path))
    np.testing.assert_array_equal(first.tokens_S, again.tokens_S)
    assert isinstance(again.tokens_S, np.memmap)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(file, array):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        build_stream(make_documents(3), Tokenizer.train([], VOCAB), "s", 0, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# --- batches


ROWS = {"a": Rows(make_stream([7] * 50), 8), "b": Rows(make_stream([5, 31] * 9), 8)}
MIX = DataConfig(
    sources=(DataSource(path="a", weight=0.1), DataSource(path="b", weight=0.3)),
    sequence_length=8,
    global_batch_size=12,
)
ONE = replace(MIX, sources=MIX.sources[:1])


def take(count: int, *args, **kwargs) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(train_batches(ROWS, *args, **kwargs), count))


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
    placed = [place_batch(devices, batch, here, 12) for batch in take(5, MIX, 10, here.tolist())]
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


def test_weights_are_shares_of_the_rows():
    rows = {
        "a": Rows(make_stream([100]), 8),
        "b": Rows(Stream(make_stream([200]).tokens_S + 100, np.zeros(1, np.int64)), 8),
    }
    batches = itertools.islice(train_batches(rows, MIX, 0), 100)
    from_a = np.concatenate([batch["tokens"][:, 0] <= 100 for batch in batches])
    assert abs(from_a.mean() - 0.25) < 0.005
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
        list(itertools.islice(train_batches(again.rows, config, 0), 3)),
        list(itertools.islice(train_batches(first.rows, config, 0), 3)),
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
    allowed = {"grain", "numpy", "tokenizers", "jinja2", "pyarrow", "etils", "ling_jax.config", "ling_jax.data"}
    allowed |= {
        "ling_jax.files.whole",
        "ling_jax.files.cache",
        "ling_jax.files.one_writer",
    }  # the room has a jax file too
    standard = set(__import__("sys").stdlib_module_names) | {"pydoc_data"}
    for file in Path(ling_jax.data.__file__ or "").parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                depth = 1 if not name.startswith("ling_jax") else 3 if name.startswith("ling_jax.files") else 2
                root = ".".join(name.split(".")[:depth])
                assert root in allowed | standard, f"{file.name} imports {name}"
