"""Files of every kind, what is held out, what is left out, and samples."""

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_jax.config import DataConfig, DataSource
from ling_jax.data import built_in, reading, shards, sources, store, survey
from ling_jax.data.reading import Document, whole
from ling_jax.data.sources import read_corpus
from tests.support.texts import config_of, write_texts

MARK = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`data.cache_dir` by default."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def write_lines(path: Path, *records, pack=lambda data: data) -> None:
    path.write_bytes(pack("".join(json.dumps(record) + "\n" for record in records).encode()))


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def texts(documents) -> list[str]:
    return [document.text for document in documents]


def everything(*paths, **changes) -> dict[str, Document]:
    """The documents of both sides by text."""
    corpus = read_corpus(config_of(*paths, **changes))
    return {d.text: d for side in (corpus.train, corpus.heldout) for documents in side.values() for d in documents}


# --- the split


def test_the_standard_library_is_a_corpus_without_leaks():
    config = config_of("python-stdlib")
    corpus = read_corpus(config)
    train, heldout = list(corpus.train["python-stdlib"]), corpus.heldout["python-stdlib"]
    assert {d.origin for d in train}.isdisjoint(d.origin for d in heldout)
    assert {d.text.strip() for d in train}.isdisjoint(d.text.strip() for d in heldout)
    assert {d.kind for d in train} == {d.kind for d in heldout} == {"code", "docs"}
    assert {d.licence for d in train} == {"PSF-2.0"}
    assert sources.size(train) > 5e6 and 2e4 < sources.size(heldout) <= config.holdout_max_bytes
    assert not any("/test/" in f"/{d.origin}" or "pydoc_data/topics.py" == d.origin and d.kind == "code" for d in train)
    assert len(train) == len(corpus.train["python-stdlib"])
    assert sources.size(train) == corpus.train["python-stdlib"].bytes


def test_the_split_depends_on_the_path_alone(tmp_path):
    folder = write_texts(tmp_path / "a", 200)
    first = read_corpus(config_of(folder, holdout_fraction=0.2))
    second = read_corpus(config_of(folder, holdout_fraction=0.2, seed=7))
    assert first.heldout == second.heldout and texts(first.train["a"]) == texts(second.train["a"])
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
        assert len(corpus.train["a"]) and corpus.heldout["a"]


@pytest.mark.parametrize("block", [1 << 20, 1000])
def test_of_a_single_text_the_end_is_held_out(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    text = "".join(f"line {i} of one long text\n" for i in range(40_000))
    (tmp_path / "one.txt").write_text(text)
    corpus = read_corpus(config_of(tmp_path / "one.txt", holdout_fraction=0.1))
    [train], [heldout] = texts(corpus.train["one"]), texts(corpus.heldout["one"])
    assert train + heldout == text
    assert 0.09 < len(heldout) / len(text) < 0.11 and train == text[: text.rfind("\n", 0, int(len(text) * 0.9)) + 1]


def test_equal_documents_stay_once_and_the_held_out_one_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "AT_ONCE", 7)  # so that digests are compared a few at a time
    a, b = write_texts(tmp_path / "a", 30), tmp_path / "b"
    b.mkdir()
    for file in a.iterdir():
        (b / f"copy-{file.name}").write_text("\n" + file.read_text() + "  \n")
    (b / "own-1.txt").write_text("only here")
    (b / "own-2.txt").write_text("only here, too")
    (b / "own-3.txt").write_text("and this")
    corpus = read_corpus(config_of(a, b, holdout_fraction=0.3))
    found = [d.text.strip() for side in (corpus.train, corpus.heldout) for ds in side.values() for d in ds]
    assert len(found) == len(set(found)) == 33
    held = {d.text.strip() for ds in corpus.heldout.values() for d in ds}
    alone = read_corpus(config_of(a, holdout_fraction=0.3))
    assert {d.text.strip() for d in alone.heldout["a"]} <= held


def table_of(high: list[int], low: list[int] | None = None, kinds: list[int] | None = None) -> dict[str, np.ndarray]:
    count = len(high)
    return {
        "high": np.array(high, np.uint64),
        "low": np.array(low or [0] * count, np.uint64),
        "kind": np.array(kinds or [shards.TEXT] * count, np.uint8),
    }


@given(st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=3), st.data())
def test_duplicates_are_all_but_the_first_of_equals_held_out_ones_before_others(values, data):
    spread = [[v * 2**61 + 5 for v in vs] for vs in values]
    held = [np.array(data.draw(st.lists(st.booleans(), min_size=len(v), max_size=len(v))), bool) for v in values]
    found = sources.duplicates([table_of(vs) for vs in spread], held)
    seen, expected = set(), [np.zeros(len(v), bool) for v in values]
    for side in (True, False):
        for i, vs in enumerate(values):
            for j, v in enumerate(vs):
                if held[i][j] == side:
                    expected[i][j] = v in seen
                    seen.add(v)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_texts_are_equal_where_all_of_their_digest_is():
    [dropped] = sources.duplicates([table_of([3, 3, 3, 3], low=[1, 2, 1, 3])], [np.zeros(4, bool)])
    assert dropped.tolist() == [False, False, True, False]


def test_docstrings_go_with_a_dropped_copy_of_their_file():
    kinds = [shards.CODE, shards.DERIVED, shards.CODE, shards.DERIVED, shards.CODE, shards.DERIVED]
    [dropped] = sources.duplicates([table_of([1, 2, 1, 3, 4, 2], kinds=kinds)], [np.zeros(6, bool)])
    assert dropped.tolist() == [False, False, True, True, False, True]


def test_docstrings_share_the_origin_of_their_file(tmp_path):
    long = "A docstring of some length." * 10
    (tmp_path / "m.py").write_text(f'"""{long}"""\ndef f():\n    """short"""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text("x = 1\n")
    assert list(built_in.python_files(tmp_path)) == ["m.py"]
    code, docs = built_in.read_python(tmp_path, "m.py", "s", "l")
    assert (code.kind, docs.kind) == ("code", "docs") and code.origin == docs.origin == "m.py"
    assert docs.text == long


def test_the_same_text_only_is_too_little(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("the same")
    with pytest.raises(ValueError, match="0 to train on and 1 held out"):
        read_corpus(config_of(tmp_path))


# --- samples


def test_max_bytes_takes_a_seeded_sample_and_leaves_the_held_out_side_alone(tmp_path):
    folder = write_texts(tmp_path / "a", 100)
    complete = read_corpus(config_of(folder))
    sample, other = (read_corpus(config_of(folder, max_bytes=5000, seed=seed)) for seed in (0, 1))
    assert 4000 < sources.size(sample.train["a"]) <= 5000
    assert set(texts(sample.train["a"])) < set(texts(complete.train["a"]))
    assert texts(sample.train["a"]) != texts(other.train["a"])
    assert sample.heldout == complete.heldout


def test_the_held_out_side_is_bounded_but_never_empty(tmp_path):
    folder = write_texts(tmp_path / "a", 100)
    few = read_corpus(config_of(folder, holdout_fraction=0.5, holdout_max_bytes=1000)).heldout["a"]
    assert 0 < sources.size(few) <= 1000
    assert len(read_corpus(config_of(folder, holdout_fraction=0.5, holdout_max_bytes=1)).heldout["a"]) == 1


def test_books_longer_than_the_bounds_are_cut_at_a_line_end_in_samples_only(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} of a book\n" for i in range(20_000)))
    bounds = dict(holdout_max_bytes=1000, max_bytes=1000)
    corpus = read_corpus(config_of(tmp_path, **bounds))
    [train], [heldout] = texts(corpus.train[tmp_path.name]), texts(corpus.heldout[tmp_path.name])
    for text in (train, heldout):
        assert 249_000 < len(text) <= sources.LONGEST_SAMPLED and text.endswith("\n")
    assert {len(text) for text in texts(read_corpus(config_of(tmp_path)).train[tmp_path.name])} == {348_890}


def test_the_tokenizers_sample_is_everything_or_a_bounded_share(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "a", 100)
    corpus = read_corpus(config_of(folder))
    sample = sources.training_sample(corpus.chosen)
    assert [text for _, text in sample] == texts(corpus.train["a"])
    order = np.concatenate(list(store.stable_order(len(sample), 0, "tokenizer", tmp_path)))
    ranks = [rank for rank, _ in sample]
    assert np.argsort(ranks).tolist() == order.tolist()
    monkeypatch.setattr(sources, "TOKENIZER_SAMPLE_BYTES", 5000)
    part = sources.training_sample(read_corpus(config_of(folder, seed=1)).chosen)
    assert 5000 <= sum(len(text) for _, text in part) < 5700


# --- which files


def test_every_file_that_is_not_read_is_named_once(tmp_path, caplog):
    read = ("a.jsonl", "deep/b.jsonl.gz", "deep/C.JSONL.ZST", "d.json", "e.txt.gz", "f.TXT")
    left = (
        "._a.jsonl", ".DS_Store", ".git/c.txt", "__MACOSX/d.txt", "README.txt", "LICENSE-MIT.txt", "readme.md", "g.csv",
        "dataset_info.json", "h.parquet.gz", "i.jsonl.bz2", "j.jsonl.tmp",
    )  # fmt: skip
    packers = {".gz": gzip.compress, ".zst": zstd}
    for number, name in enumerate((*read, *left)):
        path = tmp_path / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = f"plain {number}".encode() if ".txt" in name.lower() else json.dumps({"text": f"{number}"}).encode()
        path.write_bytes(packers.get(path.suffix.lower(), bytes)(data))
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    with caplog.at_level(logging.INFO):
        found = everything(tmp_path / "a")
    assert {d.origin.split(":")[0] for d in found.values()} == set(read)
    [said] = [r.getMessage() for r in caplog.records if "not read" in r.getMessage()]
    assert "._a.jsonl" in said and f"and {len(left) + 1 - reading.NAMED} more" in said
    assert set(reading.list_files(str(tmp_path / "a"), ()).left_out) == {*left, "link"}


def test_a_file_that_is_named_is_read_whatever_it_is_called(tmp_path):
    (tmp_path / "README.txt").write_text("first\nsecond\n")
    assert set(everything(tmp_path / "README.txt", holdout_fraction=0.5)) == {"first\n", "second\n"}


def test_a_folder_of_other_files_only_names_them(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"holds no documents \(a.csv\); give a file or folder of .jsonl, .txt"):
        read_corpus(config_of(tmp_path))
    with pytest.raises(ValueError, match="ends in '.csv'; give"):
        read_corpus(config_of(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="does not exist; give"):
        read_corpus(config_of(tmp_path / "none"))
    with pytest.raises(ValueError, match="listed twice"):
        read_corpus(config_of(tmp_path, tmp_path))


def test_a_packed_file_is_called_as_its_plain_one(tmp_path):
    assert sources.source_names(config_of("a/b.jsonl.gz", "c.txt.zst", "d.e")) == ["b", "c", "d"]


# --- formats

RECORDS = [{"text": f"record {i}\u2028still {i}", "n": [i, {"deep": "]"}]} for i in range(40)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
PRETTY = "\n".join(json.dumps(record, indent=1) for record in RECORDS)
LIST = json.dumps(RECORDS, indent=1)


FORMS = [(1, bytes), (1 << 20, gzip.compress), (7, zstd), (50, lambda d: gzip.compress(d[:50]) + gzip.compress(d[50:]))]


@pytest.mark.parametrize(("block", "pack"), FORMS)
@pytest.mark.parametrize(
    ("suffix", "text"),
    [(".jsonl", LINES), (".jsonl", LINES.replace("\n", "\r\n\r\n").rstrip()), (".json", LINES), (".json", LIST),
     (".json", PRETTY), (".json", LIST + "\n[]")],
)  # fmt: skip
@pytest.mark.parametrize("mark", [b"", MARK])
def test_records_are_read_from_every_form(tmp_path, monkeypatch, block, pack, suffix, text, mark):
    monkeypatch.setattr(reading, "BLOCK", block)
    data = pack(mark + text.encode())
    packing = {b"\x1f\x8b": ".gz", b"\x28\xb5": ".zst"}.get(data[:2], "")
    file = reading.epath.Path(tmp_path / f"a{suffix}{packing}")
    file.write_bytes(data)
    documents = list(reading.read_file(file, file.name, "a", DataSource(path="a")))
    assert texts(documents) == [record["text"] for record in RECORDS]
    assert len({document.origin for document in documents}) == len(RECORDS)


def test_two_zstandard_frames_are_one_file(tmp_path):
    half = len(LINES) // 2
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES[:half].encode()) + zstd(LINES[half:].encode()))
    assert len(everything(tmp_path)) == len(RECORDS)


@settings(deadline=None)
@given(st.text(alphabet="aé中🙂\n\r \ufeff", min_size=1), st.integers(1, 5))
def test_a_text_in_blocks_is_the_text(text, block):
    class Bytes:
        def __init__(self):
            self.data = MARK + text.encode()

        def read(self, count):
            part, self.data = self.data[:count], self.data[count:]
            return part

    before, reading.BLOCK = reading.BLOCK, block
    try:
        assert "".join(reading._decoded(Bytes(), reading.epath.Path("f"))) == text
    finally:
        reading.BLOCK = before


def test_joined_files_with_byte_order_marks_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"".join(MARK + b'{"text": "%d"}\r\n' % i for i in range(4)))
    assert set(everything(tmp_path)) == set("0123")


def test_jsonl_and_parquet_records_carry_their_own_source_and_licence(tmp_path):
    records = [{"body": f"record {i}\u2028still {i}", "source": "s", "licence": "CC0"} for i in range(8)]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in [*records, {"body": "bare"}])
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


CHAT = b'{"messages": [{"role": "user", "content": "hi"}]}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.jsonl.gz", b"", "a.jsonl.gz is empty"),
        ("a.txt", b"abc\xff", "a.txt is not UTF-8: byte 0xff at offset 3"),
        ("a.txt", "ab".encode("utf-16"), "not UTF-8: byte 0xff at offset 0 .*UTF-16"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "a.jsonl:2 is not UTF-8: byte 0xe9 at offset 24"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl:2: a JSON object is needed, not list"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: field 'text' is NoneType, not a string \(fields: body\)"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: field 'text' is int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: field 'text' is no Unicode text"),
        ("a.jsonl", CHAT, "a.jsonl:1: field 'messages' holds a conversation, .*post.py sft"),
        ("a.json", b"[" + CHAT + b"]", "a.json:1: field 'messages' holds a conversation, .*post.py sft"),
        ("a.json", b'[{"text": "x"},\n{"text": 3}]', "a.json:2: field 'text' is int"),
        ("a.json", b'[{"text": "x"},\n{"text": "y"}\n', "a.json:3: not JSON: the file ends inside a list"),
        ("a.json", b'[{"text": "x"}\n{"text": "y"}]', "a.json:2: not JSON: an entry of a list is followed by '{'"),
        ("a.json", b'{"text":\n "x"', "a.json:2: not JSON: Expecting ',' delimiter"),
        ("a.json", b'{"text":\n oops, "b": "' + b"long" * 99 + b'"}', "a.json:2: not JSON: Expecting value"),
        ("a.json", b"[3]", "a.json:1: a JSON object is needed, not int"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], "a.jsonl.gz is damaged or cut short"),
        ("a.jsonl.gz", b'{"text": "x"}\n', "a.jsonl.gz is damaged or cut short"),
        ("a.jsonl.zst", zstd(LINES.encode())[:-12], "a.jsonl.zst is damaged or cut short"),
        ("a.txt.zst", b"plain text\n", "a.txt.zst is damaged or cut short"),
        ("a.parquet", b"PAR0", "a.parquet is not a parquet file"),
        ("a.txt", b" \n ", "no documents with text"),
        ("a.txt", b"one line", "no line end"),
    ],
)
def test_a_bad_corpus_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_corpus(config_of(tmp_path))


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"messages": [["a"]], "id": [1]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="p.parquet: field 'messages' holds a conversation"):
        read_corpus(config_of(tmp_path))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p.parquet: field 'text' is missing.*fields: body, id"):
        read_corpus(config_of(tmp_path))


# --- long documents and changes


def test_a_long_document_is_one_document(tmp_path):
    book = "".join(f"line {i} of a book\n" for i in range(60_000))
    write_lines(tmp_path / "a.jsonl", {"text": book}, {"text": "x"}, {"text": "y"})
    (tmp_path / "b.txt").write_text(book + "the end\n")
    assert set(everything(tmp_path, holdout_max_bytes=10**8)) == {book, "x", "y", book + "the end\n"}


@settings(deadline=None)
@given(st.text(alphabet="ab \n", min_size=1), st.integers(1, 4), st.integers(1, 9))
def test_blocks_change_no_digest_and_are_joined_again(text, block, limit):
    pieces = [text[i : i + block] for i in range(0, len(text), block)]
    blocks = [Document(p, "s", "l", "text", "o", i + 1 < len(pieces)) for i, p in enumerate(pieces)]
    assert texts(whole(blocks)) == [text]
    one, many = survey._Stripped(), survey._Stripped()
    one.update(text.strip())
    for piece in pieces:
        many.update(piece)
    assert one.digest() == many.digest()
    assert texts(survey.with_text(blocks)) == (pieces if text.strip() else [])
    [short] = texts(whole(blocks, limit))
    assert short == text if len(text) <= limit else text.startswith(short) and 0 < len(short) <= limit


def test_what_was_read_before_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "a", 20)
    first = read_corpus(config_of(folder))
    reads = []
    real = survey.read_file
    monkeypatch.setattr(survey, "read_file", lambda *args: reads.append(args) or real(*args))
    second = read_corpus(config_of(folder))
    assert second.heldout == first.heldout and second.facts() == first.facts() and not reads
    text = (folder / "003.txt").read_text()
    (folder / "003.txt").write_text(text.replace("3", "4"))  # of the same size
    assert read_corpus(config_of(folder)).facts() != first.facts() and reads
    (folder / "003.txt").write_text(text)
    assert read_corpus(config_of(folder)).facts() == first.facts()


def test_a_copy_is_the_same_text(tmp_path):
    folder = write_texts(tmp_path / "a", 20)
    (tmp_path / "other").mkdir()
    copy = write_texts(tmp_path / "other" / "a", 20)
    assert read_corpus(config_of(folder)).facts() == read_corpus(config_of(copy)).facts()


def test_text_that_changes_between_two_readings_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "REMEMBERED", 0)
    folder = write_texts(tmp_path / "a", 20)
    corpus = read_corpus(config_of(folder))
    (folder / "019.txt").write_text("other")
    with pytest.raises(ValueError, match="changed while it was read"):
        list(corpus.train["a"])
