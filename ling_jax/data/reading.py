"""Users' files as a stream of documents: which files of a folder are read, and how each format is.

Nothing is held in memory but the record or the block of text at hand, so a file may be larger than memory, packed or
not, and may come from a bucket.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

from etils import epath

from ling_jax.config import DataSource
from ling_jax.data.remote import Spans
from ling_jax.files import paths

SUFFIXES = (".jsonl", ".txt", ".parquet", ".json")
PACKED = (".gz", ".zst")  # around all but parquet, which packs its own columns
BLOCK = 1 << 20  # bytes read, and characters of a text given on, at a time
ROWS = 1024  # of a parquet file at a time, at most
NAMED = 5  # files that are not read
BOM = "\ufeff"
ABOUT = re.compile(r"(readme|notice|citation|(licen[cs]e|copying)([._-].*)?)\.txt", re.IGNORECASE)
INDICES = {  # that programs write beside the data
    "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "manifest.json", "metadata.json", "state.json",
}  # fmt: skip
CONVERSATIONS = ("messages", "conversations")
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it is from.

    Attributes:
      source: who wrote it: the data source's name, or what a record states.
      kind: "code", "docs" or "text".
      origin: the file's path relative to its root, with ":row" for one record of many.
      continues: the text goes on in the next `Document` of the stream; together they are one.
    """

    text: str
    source: str
    licence: str
    kind: str
    origin: str
    continues: bool = False


def whole(blocks: Iterable[Document], limit: int | None = None) -> Iterator[Document]:
    """Documents in one piece; of a text longer than `limit` characters, its beginning, up to a line end if there is
    one."""
    texts: list[str] = []
    length = 0
    for block in blocks:
        if limit is None or length < limit:
            texts.append(block.text)
        length += len(block.text)
        if not block.continues:
            text = "".join(texts) if len(texts) > 1 else texts[0]
            if limit is not None and length > limit:
                text = text[: text.rfind("\n", 0, limit) + 1 or limit]
            yield replace(block, text=text)
            texts, length = [], 0


# ---------------------------------------------------------------------------------------------------
# Which files.


@dataclass(frozen=True)
class Listing:
    """The files of a data source that are read, by their paths under `root`, sorted; and those that are not.

    Attributes:
      stamps: of each file that is read, what changes when the file does.
      newest: when the last of them changed, in seconds since 1970; 0 in a bucket, where a stamp tells every change.
      sizes: in bytes, of those in a bucket.
    """

    root: epath.Path
    names: list[str]
    stamps: list[str]
    newest: float
    left_out: list[str]
    sizes: list[int] = field(default_factory=list)


def list_files(path: str, built_in: Iterable[str]) -> Listing:
    """Lists the files that are read at `path`, a file or a folder.

    Raises:
      ValueError: where nothing is, naming what could be, `built_in` among it.
    """
    root = paths.at(path)
    known = f"a file or folder of {', '.join(SUFFIXES)} (or packed: {', '.join(PACKED)}), or one of "
    known += ", ".join(built_in)
    listed = _list_bucket(root) if paths.is_bucket(root) else _list_local(root)
    if listed is None:
        raise ValueError(f"data source {path!r} does not exist; give {known}")
    if listed.names and listed.root != root and _format(root.name) is None:
        raise ValueError(f"data source {path!r} ends in {root.suffix!r}; give {known}")
    if not listed.names:
        only = f" ({few(listed.left_out)})" if listed.left_out else ""
        raise ValueError(f"data source {path!r} holds no documents{only}; give {known}")
    return listed


def _list_local(root: epath.Path) -> Listing | None:
    if not root.exists():
        return None
    if not root.is_dir():
        mark, newest = stamp(root) or ("", 0.0)
        return Listing(root.parent, [root.name], [mark], newest, [])
    found, left_out = [], []
    for folder, folders, files in root.walk(on_error=_refuse):
        links = [name for name in folders if os.path.islink(folder / name)]
        for name in [*files, *links]:
            relative = (folder / name).relative_to(root).as_posix()
            marked = stamp(folder / name) if _is_text(relative) else None
            if marked is None:
                left_out.append(relative)
            else:
                found.append((relative, *marked))
    names, stamps, times = zip(*sorted(found), strict=True) if found else ((), (), (0.0,))
    return Listing(root, list(names), list(stamps), max(times), sorted(left_out))


def _list_bucket(root: epath.Path) -> Listing | None:
    """An object of this name, or those below it. A name that no path can have (a//b, ./a) is left out."""
    found, below = paths.entries(root), True
    if not found and root.is_file():
        found, below = [paths.entry(root)], False
    if not found:
        paths.check_bucket(root)
        return None
    read = [one for one in found if not below or _is_text(one.name)]
    left_out = [one.name for one in found if below and not _is_text(one.name)]
    names, stamps, sizes = [one.name for one in read], [one.stamp for one in read], [one.size for one in read]
    return Listing(root if below else root.parent, names, stamps, 0.0, left_out, sizes)


def few(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def stamp(file: Any) -> tuple[str, float] | None:
    """A value that changes when a local file does, with the time it last did; None where there is no file."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise ValueError(f"corpus file {file} cannot be read: {error.strerror}; mend it, or remove it") from error
    if not stat.S_ISREG(found.st_mode):
        return None
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}", max(found.st_mtime, found.st_ctime)


def _refuse(error: OSError) -> None:
    raise ValueError(f"folder {error.filename} of the corpus cannot be read: {error.strerror}") from error


def _format(name: str) -> str | None:
    """The suffix that tells how a file is read, without that of its packing; None for no format."""
    plain = name.lower()
    for packing in PACKED:
        plain = plain.removesuffix(packing)
    suffix = next((s for s in SUFFIXES if plain.endswith(s)), None)
    return None if suffix == ".parquet" and not name.lower().endswith(suffix) else suffix


def _is_text(relative: str) -> bool:
    """Whether a file of a folder is to be trained on: hidden files, and those about the data, are not."""
    *folders, name = relative.split("/")
    hidden = any(not part or part.startswith(".") or part == "__MACOSX" for part in (*folders, name))
    plain = re.sub(r"\.(gz|zst)$", "", name, flags=re.IGNORECASE)
    return not (hidden or _format(name) is None or ABOUT.fullmatch(plain) or plain.lower() in INDICES)


@dataclass(frozen=True)
class LineRange:
    """Lines of a .jsonl file that is not packed: bytes begin .. end - 1, and how many lines are `before` them."""

    begin: int
    end: int
    before: int


def line_ranges(file: epath.Path, size: int) -> Iterator[LineRange]:
    """The lines of a .jsonl file that is not packed, in ranges of about `size` bytes."""
    begin = before = at = count = 0
    with paths.open_to_read(file) as stream:
        while block := stream.read(BLOCK):
            cut = at + block.rfind(b"\n") + 1
            at, count = at + len(block), count + block.count(b"\n")
            if at - begin >= size and cut > at - len(block):
                yield LineRange(begin, cut, before)
                begin, before = cut, count
    if begin < at:
        yield LineRange(begin, at, before)


# ---------------------------------------------------------------------------------------------------
# Formats.


def read_file(
    file: epath.Path,
    relative: str,
    name: str,
    source: DataSource,
    opener: Callable[[], IO[bytes]] | None = None,
    lines: LineRange | None = None,
) -> Iterator[Document]:
    """The documents of one file; a long text comes in blocks.

    Args:
      opener: opens the file, whose reading may have begun.
      lines: those that are read; by default the whole file.
    Raises:
      ValueError: naming the file, and the line where there are lines, and what is wrong with it.
    """
    opener = opener or (lambda: paths.open_to_read(file))
    if _format(file.name) == ".txt":
        with _opened(file, opener) as stream:
            for text, continues in _followed(_decoded(stream, file)):
                yield Document(text, name, source.licence, "text", relative, continues)
        return
    for number, line, record in read_records(file, opener, lines, text_field=source.text_field):
        yield _from_record(record, f"{file}:{line}", f"{relative}:{number}", name, source)


def read_records(
    file: epath.Path,
    opener: Callable[[], IO[bytes]] | None = None,
    lines: LineRange | None = None,
    text_field: str | None = None,
) -> Iterator[tuple[int, int, Any]]:
    """(number, line, record) of each record of a file that holds records, not one text.

    Args:
      opener, lines: as in `read_file`.
      text_field: of a parquet file only this column is read, with `source` and `licence`; by default all are.
    Raises:
      ValueError: naming the file and the line, for what cannot be read.
    """
    kind = _format(file.name)
    with _opened(file, opener or (lambda: paths.open_to_read(file))) as stream:
        if kind == ".parquet":
            yield from _parquet(stream, file, text_field)
        elif kind == ".jsonl":
            yield from _jsonl(stream, file, lines)
        else:
            yield from _json(_decoded(stream, file), file)


def holds_records(name: str) -> bool:
    """Whether a file of this name holds records; .txt files hold one text."""
    return _format(name) not in (None, ".txt")


@contextlib.contextmanager
def _opened(file: epath.Path, opener: Callable[[], IO[bytes]]) -> Iterator[Any]:
    """A file's bytes, unpacked."""
    name, packed = file.name.lower(), file.name.lower().endswith(PACKED)
    try:
        with opener() as raw:
            if name.endswith(".gz"):
                yield gzip.GzipFile(fileobj=raw)
            elif name.endswith(".zst"):
                import pyarrow  # a slow import that most runs don't need

                yield pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or str(error)
        what = "is damaged or cut short" if packed else "cannot be read"
        raise ValueError(f"corpus file {file} {what}: {why}; copy it again, or remove it") from error


def _blocks(stream: IO[bytes], file: epath.Path, lines: LineRange | None = None) -> Iterator[bytes]:
    empty = True
    left = None
    if lines is not None:
        stream.seek(lines.begin)
        left = lines.end - lines.begin
    while block := stream.read(BLOCK if left is None else min(BLOCK, left)):
        empty = False
        left = None if left is None else left - len(block)
        yield block
    if empty:
        raise ValueError(f"corpus file {file} is empty; remove it or write text to it")


def _decoded(stream: IO[bytes], file: epath.Path) -> Iterator[str]:
    """The text of a UTF-8 file without its byte-order mark, in blocks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, begun = 0, False
    for block in itertools.chain(_blocks(stream, file), [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, str(file), offset - waiting) from error
        offset += len(block)
        if text and not begun:
            text, begun = text.removeprefix(BOM), True
        if text:
            yield text


def _not_utf8(error: UnicodeDecodeError, where: str, offset: int) -> ValueError:
    """`offset`: of the decoded bytes in the file."""
    byte, at = error.object[error.start], offset + error.start
    mark = " (it begins with the byte-order mark of UTF-16)" if at == 0 and byte in (0xFE, 0xFF) else ""
    return ValueError(f"corpus file {where} is not UTF-8: byte 0x{byte:02x} at offset {at}{mark}; convert it")


def _followed(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each text, and whether another one follows it."""
    last = next(texts, None)
    for text in texts:
        assert last is not None
        yield last, True
        last = text
    if last is not None:
        yield last, False


def _jsonl(stream: IO[bytes], file: epath.Path, lines: LineRange | None) -> Iterator[tuple[int, int, Any]]:
    """(number, line, record) of every line that is not blank; the number is the line's."""
    offset, before = (0, 0) if lines is None else (lines.begin, lines.before)
    for number, data in enumerate(_lines(_blocks(stream, file, lines)), start=1 + before):
        if data.strip():
            try:
                line = data.decode().removeprefix(BOM)  # files with marks may have been joined
            except UnicodeDecodeError as error:
                raise _not_utf8(error, f"{file}:{number}", offset) from error
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}:{number}: not JSON: {error}") from error
            yield number, number, record
        offset += len(data) + 1


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends; only \\n ends one, since text may hold every other kind of line end."""
    parts: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield b"".join(parts)


class _Json:
    """Values of JSON that comes in blocks, which are forgotten once they are read."""

    def __init__(self, texts: Iterator[str]):
        self._texts, self._text, self._at = texts, "", 0
        self.line = 1  # of the next character

    def _go_to(self, at: int) -> None:
        self.line += self._text.count("\n", self._at, at)
        self._at = at

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            space = SPACE.match(self._text, self._at)
            assert space is not None
            self._go_to(space.end())
            if self._at < len(self._text):
                return self._text[self._at]
            self._text, self._at = next(self._texts, ""), 0
            if not self._text:
                return ""

    def skip(self) -> None:
        self._go_to(self._at + 1)

    def value(self) -> Any:
        """The value that begins here; JSONDecodeError for none."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # A value that is only cut off fails at its end, or in a string that does not end.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - len("-Infinity")
                if not cut or not self._read_on():
                    self._go_to(min(error.pos, len(self._text)))
                    raise
            else:
                self._go_to(end)
                return value

    def _read_on(self) -> bool:
        """Adds as much text as is waiting, so that a long value is parsed a few times only; whether there was more."""
        waiting = self._text[self._at :]
        more: list[str] = []
        while sum(map(len, more)) <= len(waiting) and (block := next(self._texts, "")):
            more.append(block)
        self._text, self._at = "".join([waiting, *more]), 0
        return bool(more)


def _json(texts: Iterator[str], file: epath.Path) -> Iterator[tuple[int, int, Any]]:
    """(number, line, record) of a file of objects in a row, each on one line or on many, or of lists of objects."""
    values, number = _Json(texts), 0
    in_list = after_entry = False
    while char := values.next():
        if in_list and char == "]":
            in_list = False
            values.skip()
        elif in_list and after_entry:
            if char != ",":
                raise ValueError(f"{file}:{values.line}: not JSON: an entry of a list is followed by {char!r}")
            after_entry = False
            values.skip()
        elif char == "[" and not in_list:
            in_list, after_entry = True, False
            values.skip()
        else:
            number, line = number + 1, values.line
            try:
                record = values.value()
            except (ValueError, RecursionError) as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else error  # its place is that in a block
                raise ValueError(f"{file}:{values.line}: not JSON: {why}") from error
            yield number, line, record
            after_entry = True
    if in_list:
        raise ValueError(f"{file}:{values.line}: not JSON: the file ends inside a list; copy it again")


def _parquet(stream: IO[bytes], file: epath.Path, text_field: str | None) -> Iterator[tuple[int, int, Any]]:
    import pyarrow  # a slow import that most runs don't need
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(stream, buffer_size=BLOCK, pre_buffer=False)
        names = table.schema_arrow.names
        if text_field is not None and text_field not in names:
            raise ValueError(_no_text(str(file), text_field, "missing", names))
        columns = [c for c in names if text_field is None or c in (text_field, "source", "licence")]
        if paths.is_bucket(file) and not isinstance(stream, io.BytesIO):
            wanted = io.BufferedReader(Spans(file, stream.seek(0, io.SEEK_END), _spans(table.metadata, columns)))
            table = parquet.ParquetFile(wanted, metadata=table.metadata, buffer_size=BLOCK, pre_buffer=False)
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        size = sum(group.total_byte_size for group in groups) // max(1, table.metadata.num_rows)
        rows = max(1, min(ROWS, 4 * BLOCK // (size + 1)))
        number = 0
        for batch in table.iter_batches(rows, columns=columns, use_threads=False):
            for record in batch.to_pylist():
                number += 1
                yield number, number, record
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"corpus file {file} is not a parquet file, or is damaged: {error}") from error


def _spans(metadata: Any, columns: list[str]) -> list[tuple[int, int]]:
    """Where in a parquet file the values of some columns are."""
    spans = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            path = column.path_in_schema  # of nested values "messages.list.element.role"
            if path in columns or path.split(".")[0] in columns:
                begin = column.dictionary_page_offset or column.data_page_offset
                begin = min(begin, column.data_page_offset)
                spans.append((begin, begin + column.total_compressed_size))
    return spans


def _from_record(record: Any, where: str, origin: str, name: str, source: DataSource) -> Document:
    """Records of one file don't derive from each other, so each is its own origin."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON object is needed, not {type(record).__name__}")
    text = record.get(source.text_field)
    if not isinstance(text, str):
        raise ValueError(_no_text(where, source.text_field, type(text).__name__, record))
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON but no text
        raise ValueError(f"{where}: field {source.text_field!r} is no Unicode text: {error}") from error
    licence, author = record.get("licence") or source.licence, record.get("source") or name
    return Document(text, str(author), str(licence), "text", origin)


def _no_text(where: str, field: str, found: str, fields: Iterable[str]) -> str:
    fields = list(fields)
    if chat := next((key for key in CONVERSATIONS if key in fields), None):
        return (
            f"{where}: field {chat!r} holds a conversation, which train.py does not train on: that is fine-tuning, "
            f"`python post.py sft`; train.py needs text, in the field {field!r}"
        )
    return (
        f"{where}: field {field!r} is {found}, not a string (fields: {', '.join(fields) or 'none'}); set text_field of "
        "the data source"
    )
