"""Safetensors files: what the package reads and writes, and nothing that is broken."""

import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ling_jax.convert.tensorfile import DTYPES, NAMES, TensorFile, write_tensors
from tests.support.marks import nightly

TENSORS = {
    "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a.weight": np.arange(5).astype(ml_dtypes.bfloat16),
    "half": np.ones((2, 1, 3), np.float16),
}


def split(data: bytes) -> tuple[bytes, bytes]:
    """(header, tensors' bytes) of a file."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def test_a_file_of_the_package_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    assert file.tensors.keys() == TENSORS.keys()
    for name, want in TENSORS.items():
        assert file.read(name).dtype == want.dtype
        np.testing.assert_array_equal(file.read(name), want)
        part = (slice(1, 2), *(slice(0, size - 1) for size in want.shape[1:]))
        np.testing.assert_array_equal(file.read(name, part), want[part])


def test_the_package_reads_a_file_that_was_filled_in_parts(tmp_path):
    entries = {name: (NAMES[a.dtype], a.shape) for name, a in TENSORS.items()}
    rows = ((name, a[row]) for name, a in TENSORS.items() for row in range(len(a)))
    write_tensors(tmp_path / "x", entries, {"format": "pt"}, rows)
    found = load_file(tmp_path / "x")
    assert found.keys() == TENSORS.keys()
    for name, want in TENSORS.items():
        np.testing.assert_array_equal(found[name], want)


def test_float8_comes_back_bit_by_bit(tmp_path):
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    parts = [("w", codes.view(DTYPES["F8_E4M3"]))]
    write_tensors(tmp_path / "x", {"w": ("F8_E4M3", codes.shape)}, {}, parts)
    np.testing.assert_array_equal(TensorFile(tmp_path / "x").read("w").view(np.uint8), codes)


def test_rows_in_another_order_or_too_few_are_no_file(tmp_path):
    entries = {name: ("F32", (2,)) for name in "ab"}
    for parts in ([("b", np.zeros(2, np.float32))], [("a", np.zeros(2, np.float32))], [("a", np.zeros(3, np.float32))]):
        with pytest.raises(AssertionError):
            write_tensors(tmp_path / "x", entries, {}, parts)


def edited(header: bytes, change) -> bytes:
    entries = json.loads(header)
    change(entries)
    return json.dumps(entries).encode()


BROKEN = {
    "twice": lambda h: h[:-1].rstrip(b" }") + b'}, "half": {"dtype": "F16", "shape": [6], "data_offsets": [0, 12]}}',
    "gap": lambda h: edited(h, lambda e: e["half"].update(data_offsets=[e["half"]["data_offsets"][0] + 2, 70])),
    "overlap": lambda h: edited(h, lambda e: e.update(copy=e["half"])),
    "outside": lambda h: edited(h, lambda e: e["half"].update(data_offsets=[0, 1 << 61])),
    "negative": lambda h: edited(h, lambda e: e["half"].update(data_offsets=[-12, 0])),
    "shape": lambda h: edited(h, lambda e: e["half"].update(shape=[2, 4])),
    "huge shape": lambda h: edited(h, lambda e: e["half"].update(shape=[1 << 61, 1 << 61])),
    "float shape": lambda h: edited(h, lambda e: e["half"].update(shape=[6.0])),
    "bool shape": lambda h: edited(h, lambda e: e["half"].update(shape=[True, 6])),
    "dtype": lambda h: edited(h, lambda e: e["half"].update(dtype="F17")),
    "no dtype": lambda h: edited(h, lambda e: e["half"].pop("dtype")),
    "no offsets": lambda h: edited(h, lambda e: e["half"].pop("data_offsets")),
    "a list": lambda h: b"[]",
    "no object": lambda h: edited(h, lambda e: e.update(half=3)),
    "deep": lambda h: b"[" * 100_000,
    "no text": lambda h: b"\xff\xfe" + h,
    "empty": lambda h: b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_one_error_that_names_the_file(tmp_path, name):
    save_file(TENSORS, tmp_path / "x")
    header, body = split((tmp_path / "x").read_bytes())
    (tmp_path / "x").write_bytes(joined(BROKEN[name](header), body))
    with pytest.raises(ValueError, match=r"x is damaged or truncated \(.*\); download it again"):
        TensorFile(tmp_path / "x")


def mutated(draw: random.Random, header: bytes, body: bytes) -> bytes:
    """A file with some of the header's bytes changed, lost, doubled, or its numbers replaced."""
    data = bytearray(header)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(data)), draw.randrange(5)
        if kind == 0:
            data[at] = draw.randrange(256)
        elif kind == 1:
            del data[at : at + draw.randint(1, 8)]
        elif kind == 2:
            data[at:at] = data[at : at + draw.randint(1, 8)]
        elif kind == 3:
            data[at:at] = draw.choice([b"9", b"-", b"1e9", b"null", b'"', b"{", b"]", b"99999999999999999999"])
        else:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57] or [0]
            data[draw.choice(digits)] = draw.choice(b"0123456789")
    length = draw.choice([len(data)] * 8 + [len(data) + 1, 0, 1 << 62, draw.randrange(1 << 16)])
    return length.to_bytes(8, "little") + bytes(data) + body[: draw.choice([len(body)] * 4 + [0, len(body) - 1])]


@pytest.mark.parametrize("count", [2_000, nightly(10_000)])
def test_mutated_headers_give_an_error_or_tensors_within_the_file(tmp_path, count):
    save_file(TENSORS, tmp_path / "good")
    header, body = split((tmp_path / "good").read_bytes())
    draw, path, opened = random.Random(0), tmp_path / "bad", 0
    for _ in range(count):
        data = mutated(draw, header, body)
        path.write_bytes(data)
        try:
            file = TensorFile(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        opened += 1
        assert sum(tensor.nbytes for tensor in file.tensors.values()) <= len(data)
        for name, tensor in file.tensors.items():
            if tensor.dtype in DTYPES:
                assert file.read(name).nbytes == tensor.nbytes
    assert count / 200 < opened < count / 2  # renamed tensors and the like


def test_a_disk_without_room_is_an_error_when_the_file_is_made(tmp_path):
    free = Path(tmp_path).stat().st_blksize * (1 << 40)
    with pytest.raises(OSError):
        write_tensors(tmp_path / "x", {"w": ("F32", (free,))}, {}, [])
