"""A data source: its documents, as often as they are wanted, and a table of what is known of each of them.

The table is made by reading everything once, and kept: opening a source again reads the files' stamps only.

Legend: D documents of a source.
"""

import hashlib
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import xxhash

from ling_jax.config import DataSource
from ling_jax.data.built_in import BUILT_IN, list_built_in, read_built_in
from ling_jax.data.reading import Document, Listing, few, list_files, read_file
from ling_jax.data.remote import openers
from ling_jax.data.shards import CODE, DERIVED, TEXT, open_prepared
from ling_jax.data.store import Columns, Kept, keep
from ling_jax.files import paths

log = logging.getLogger(__name__)

FORMAT = "ling_jax corpus 1"  # part of every key: change it when a table's meaning changes
REMEMBERED = 100_000_000  # bytes of a small source's text that stay in memory from one reading to the next
OVERHEAD = 300  # bytes of a document in memory besides its text
SETTLED = 0.1  # seconds after which a file that changes again has another time stamp
ROWS = 1 << 16  # of a table that are written at a time


def key_of(*facts: Any) -> str:
    """32 hexadecimal digits that follow from JSON values."""
    return hashlib.sha256(json.dumps([FORMAT, *facts]).encode()).hexdigest()[:32]


class Source:
    """One data source, whose documents come in one order at every reading.

    Attributes:
      table: see `survey`.
      cut: characters of the source's only text before its held-out part; 0 where there are several texts.
      prepared: the shards that the text is in; None where it is read from files of text.
    """

    def __init__(self, name: str, settings: DataSource, cache: paths.Path, holdout_fraction: float):
        """Lists the files, and reads them unless they have been read before, or prepared.

        Raises:
          ValueError: naming the file or folder and what is wrong with it.
        """
        self.name, self.settings, self.cut = name, settings, 0
        self._memory: list[Document] | None = None
        self._content = ""
        self.prepared = None if settings.path in BUILT_IN else open_prepared(settings.path)
        if self.prepared is not None:
            self.table = self.prepared.table
        else:
            self._files = list_source(name, settings)
            self.table = _survey(self, cache)
            self._content = self.table.facts["content"]
        if not self.table.facts["documents"]:
            raise ValueError(f"data source {settings.path!r} holds no documents with text")
        if self.table.facts["least"] == self.table.facts["most"]:
            self.table = _divide(self, cache, holdout_fraction)
            self.cut = self.table.facts["cut"]

    @property
    def stamps(self) -> list[Any]:
        """All that a reading depends on, as JSON."""
        files = self._files
        root = "" if self.settings.path in BUILT_IN else str(files.root)
        marks = hashlib.sha256("\n".join(f"{n}\t{s}" for n, s in zip(files.names, files.stamps, strict=True)).encode())
        return [self.settings.path, root, self.settings.text_field, marks.hexdigest()]

    def read(self) -> Iterator[Document]:
        """Blocks of all documents with text.

        Raises:
          ValueError: if the text is not that of the first reading.
        """
        if self.prepared is not None:
            blocks = self.prepared.read()
        else:
            blocks = self._read() if self._memory is None else iter(self._memory)
        return with_text(_divided(blocks, self.cut)) if self.cut else blocks

    def pick(self, wanted: set[int]) -> Iterator[Document]:
        """Blocks of the documents of these numbers, ascending."""
        if self.prepared is not None and not self.cut:
            return self.prepared.read(sorted(wanted))
        last = max(wanted, default=-1)
        blocks = itertools.takewhile(lambda pair: pair[0] <= last, numbered(self.read()))
        return (block for number, block in blocks if number in wanted)

    def read_first(self) -> Iterator[Document]:
        """`read`, and remembers what is small."""
        age = time.time() - self._files.newest
        time.sleep(max(0.0, min(SETTLED, SETTLED - age)))
        memory: list[Document] | None = []
        room = REMEMBERED
        for block in self._read():
            room -= sys.getsizeof(block.text) + OVERHEAD
            if room < 0:
                memory = None
            elif memory is not None:
                memory.append(block)
            yield block
        if self._files.sizes and list_files(self.settings.path, BUILT_IN) != self._files:
            raise self._changed()
        self._memory = memory

    def _read(self) -> Iterator[Document]:
        content = Content()
        for block in with_text(self._read_files()):
            content.update(block)
            yield block
        if self._content and content.digest() != self._content:
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(
            f"data source {self.settings.path!r} changed while it was read: leave its files alone, and run the same "
            "command again"
        )

    def _read_files(self) -> Iterator[Document]:
        if self.settings.path in BUILT_IN:
            yield from read_built_in(self.settings.path, self._files)
            return
        files = self._files
        begun = openers(files.root, files.names, files.sizes) if files.sizes else itertools.repeat(None)
        for name, opener in zip(files.names, begun, strict=False):
            yield from read_file(files.root / name, name, self.name, self.settings, opener)


def list_source(name: str, settings: DataSource) -> Listing:
    """The files of a source of text; those that are not read are named in the log."""
    built_in = settings.path in BUILT_IN
    files = list_built_in(settings.path) if built_in else list_files(settings.path, BUILT_IN)
    if files.left_out:
        log.warning("%s: files that are not read: %s", name, few(files.left_out))
    return files


class Content:
    """The XXH3-128 of documents: their texts and origins."""

    def __init__(self):
        self._hash = xxhash.xxh3_128()

    def update(self, block: Document) -> None:
        self._hash.update(block.text.encode())
        if not block.continues:
            self._hash.update(b"\xff" + block.origin.encode(errors="surrogateescape") + b"\xff")  # 0xff: never in UTF-8

    def digest(self) -> str:
        return self._hash.hexdigest()


class _Stripped:
    """The XXH3-128 of a text that comes in blocks, white space at its ends aside."""

    def __init__(self):
        self._hash, self._begun, self._space = xxhash.xxh3_128(), False, ""

    def update(self, text: str) -> None:
        text = text if self._begun else text.lstrip()
        body = text.rstrip()
        if not body:
            self._space += text
            return
        self._hash.update((self._space + body).encode())
        self._begun, self._space = True, text[len(body) :]

    def digest(self) -> int:
        return self._hash.intdigest()


def share(origin: str) -> int:
    """A number below 2^64 that depends on the origin alone."""
    return int.from_bytes(hashlib.sha256(origin.encode(errors="surrogateescape")).digest()[:8])


def _survey(source: Source, cache: paths.Path) -> Kept:
    """The table of a source, an entry of `cache`.

    Columns: `share` uint64 [D], of the origin; `high` and `low` uint64 [D], the text's digest, white space at its ends
    aside; `bytes` int64 [D], of the text in UTF-8; `kind` uint8 [D]. Facts: `documents`, `bytes` and `characters` of
    all, `content`, their digest, `least` and `most`, the ends of `share`.
    """
    key = key_of("table", *source.stamps)
    return keep(cache, key, f"{source.name}: reading", lambda columns: tabulate(source.read_first(), columns))


def _divide(source: Source, cache: paths.Path, fraction: float) -> Kept:
    """The table of a source's only text as two documents, of which the second is held out: its last `fraction`."""
    table = source.table

    def build(columns: Columns) -> dict[str, Any]:
        source.cut = 0
        cut, origin = _cut_point(source.read(), int(table.facts["characters"] * (1 - fraction)))
        if cut == 0:
            raise ValueError(
                f"the only text of data source {source.name!r} ({origin}) has no line end to cut a held-out part at; "
                "add documents"
            )
        source.cut = cut
        return tabulate(source.read(), columns, shares=[2**64 - 1, 0]) | {"cut": cut}

    return keep(cache, key_of("halves", table.facts["content"], fraction), f"{source.name}: dividing its text", build)


def tabulate(blocks: Iterable[Document], columns: Columns, shares: list[int] | None = None) -> dict[str, Any]:
    """Appends a row for each document to the columns of `_survey`, and returns its facts.

    Args:
      shares: of the documents, instead of those of their origins.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    content, stripped = Content(), _Stripped()
    documents = total = size = characters = 0
    least, most, code = 2**64, -1, ""

    def write() -> None:
        for name, values in zip(("share", "high", "low", "bytes", "kind"), zip(*rows, strict=True), strict=True):
            dtype = {"bytes": np.int64, "kind": np.uint8}.get(name, np.uint64)
            columns.append(name, np.array(values, dtype))
        rows.clear()

    for block in blocks:
        content.update(block)
        stripped.update(block.text)
        size += len(block.text.encode())
        characters += len(block.text)
        if block.continues:
            continue
        part, digest = shares[documents] if shares else share(block.origin), stripped.digest()
        kind = CODE if block.kind == "code" else DERIVED if code == block.origin else TEXT
        code = block.origin if kind == CODE else ""
        rows.append((part, digest >> 64, digest & (2**64 - 1), size, kind))
        least, most = min(least, part), max(most, part)
        documents, total = documents + 1, total + size
        size, stripped = 0, _Stripped()
        if len(rows) == ROWS:
            write()
    if rows:
        write()
    ends = {"least": least, "most": most, "content": content.digest()}
    return {"documents": documents, "bytes": total, "characters": characters, **ends}


def numbered(blocks: Iterable[Document]) -> Iterator[tuple[int, Document]]:
    """Each block with its document's number."""
    number = 0
    for block in blocks:
        yield number, block
        number += not block.continues


def with_text(blocks: Iterable[Document]) -> Iterator[Document]:
    """The blocks of documents that are more than white space."""
    waiting: list[Document] = []
    begun = False
    for block in blocks:
        if not begun and (not block.text or block.text.isspace()):
            waiting.append(block)
            if not block.continues:
                waiting.clear()
            continue
        yield from waiting
        waiting.clear()
        yield block
        begun = block.continues


def _divided(blocks: Iterable[Document], cut: int) -> Iterator[Document]:
    """One document as two, of which the first has `cut` characters."""
    at = 0
    for block in blocks:
        end = at + len(block.text)
        if at < cut < end:
            yield replace(block, text=block.text[: cut - at], continues=False)
            yield replace(block, text=block.text[cut - at :])
        else:
            yield replace(block, continues=False) if end == cut else block
        at = end


def _cut_point(blocks: Iterable[Document], target: int) -> tuple[int, str]:
    """The characters up to the last line end before `target`, 0 if there is none; and the text's origin."""
    at, cut, origin = 0, 0, ""
    for block in blocks:
        found = block.text.rfind("\n", 0, max(0, target - at))
        cut = at + found + 1 if found >= 0 else cut
        at, origin = at + len(block.text), block.origin
        if at >= target:
            break
    return cut, origin
