"""Documents from files, split into training and held-out by the file they come from.

The split looks only at a document's origin, so it is the same for every seed, machine and sample size, and text
derived from a file (its docstrings) stays on the file's side.
"""

import ast
import hashlib
import json
import logging
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from etils import epath

from ling_jax.config import DataConfig, DataSource

log = logging.getLogger(__name__)

STDLIB = "python-stdlib"
SITE_PACKAGES = "site-packages"
# Packages under permissive licences that a run's requirements bring along.
PACKAGE_LICENCES = {
    "chex": "Apache-2.0", "etils": "Apache-2.0", "flax": "Apache-2.0", "grain": "Apache-2.0", "jax": "Apache-2.0",
    "jinja2": "BSD-3-Clause", "networkx": "BSD-3-Clause", "numpy": "BSD-3-Clause", "optax": "Apache-2.0",
    "orbax": "Apache-2.0", "scipy": "BSD-3-Clause", "sympy": "BSD-3-Clause",
}  # fmt: skip
# Tests; what is not the project's own; and code pages: tables so alike that held-out ones would be known by heart.
SKIPPED_FOLDERS = {
    "encodings", "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
MIN_DOCSTRING = 200  # characters; shorter ones are seldom prose
MAX_DOCUMENT = 250_000  # characters; a longer text is cut at line ends into documents of one origin
SUFFIXES = (".jsonl", ".txt", ".parquet")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it is from.

    Attributes:
      source: who wrote it: the data source's name, or what a record states.
      kind: "code", "docs" or "text".
      origin: the file's path relative to its root, with ":row" for one record of many.
    """

    text: str
    source: str
    licence: str
    kind: str
    origin: str


@dataclass(frozen=True)
class Corpus:
    """Documents by data source (`source_names`), in the order of the config; no text is on both sides."""

    train: dict[str, list[Document]]
    heldout: dict[str, list[Document]]


def source_names(config: DataConfig) -> list[str]:
    """A name per data source: the built-in's own, or the file's or folder's; the whole path where two agree."""
    paths = [source.path for source in config.sources]
    stems = [path if path in BUILT_IN else Path(path).stem or path for path in paths]
    names = [stem if stems.count(stem) == 1 else path for stem, path in zip(stems, paths, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"data source {name!r} is listed twice; list it once, with a larger weight")
    return names


def read_corpus(config: DataConfig) -> Corpus:
    """Reads, splits, deduplicates and samples every source; held-out text wins over equal training text.

    Raises:
      ValueError: naming the path and what is wrong with it: missing, empty, undecodable, no documents.
    """
    train: dict[str, list[Document]] = {}
    heldout: dict[str, list[Document]] = {}
    for name, source in zip(source_names(config), config.sources, strict=True):
        documents = [piece for document in _read(name, source) for piece in _cut(document)]
        if not documents:
            raise ValueError(f"data source {source.path!r} holds no documents with text")
        train[name], heldout[name] = _split(documents, config.holdout_fraction)
    heldout, train = _drop_duplicates(heldout, train)
    for name in train:
        if not train[name] or not heldout[name]:
            raise ValueError(
                f"data source {name!r} has too few distinct documents: {len(train[name])} to train on and "
                f"{len(heldout[name])} held out; add text, or change data.holdout_fraction"
            )
        if config.max_bytes is not None:
            train[name] = _sample(train[name], config.max_bytes, config.seed)
        heldout[name] = _sample(heldout[name], config.holdout_max_bytes, config.seed)
    return Corpus(train, heldout)


def size(documents: Iterable[Document]) -> int:
    """UTF-8 bytes of the documents' texts."""
    return sum(len(document.text.encode()) for document in documents)


def stable_order(count: int, seed: int, salt: str) -> list[int]:
    """A shuffle of range(count) that no library's version can change."""
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}:{salt}:{i}".encode()).digest())


# ---------------------------------------------------------------------------------------------------
# The split.


def _share(origin: str) -> float:
    """A number in [0, 1) that depends on the origin alone."""
    return int.from_bytes(hashlib.sha256(origin.encode()).digest()[:8]) / 2**64


def _split(documents: list[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, held out): about `fraction` of the origins are held out, at least one and not all of them.

    Of a source with a single origin (one text file), the last `fraction` of the text is held out.
    """
    origins = {document.origin for document in documents}
    if len(origins) == 1:
        text = "".join(document.text for document in documents)
        cut = text.rfind("\n", 0, int(len(text) * (1 - fraction))) + 1
        if cut == 0:
            raise ValueError(
                f"the only text of data source {documents[0].source!r} ({documents[0].origin}) has no line end to "
                "cut a held-out part at; add documents"
            )
        head, tail = replace(documents[0], text=text[:cut]), replace(documents[0], text=text[cut:])
        return list(_cut(head)), list(_cut(tail))
    ranked = sorted(origins, key=_share)
    held = {origin for origin in ranked[1:-1] if _share(origin) < fraction} | {ranked[0]}
    return [d for d in documents if d.origin not in held], [d for d in documents if d.origin in held]


def _drop_duplicates(*sides: dict[str, list[Document]]) -> list[dict[str, list[Document]]]:
    """Keeps the first of equal texts (white space at the ends aside) over all sides, in the order given.

    With a dropped file go the docstrings taken from it.
    """
    seen: set[bytes] = set()
    kept_sides = []
    for side in sides:
        kept_side: dict[str, list[Document]] = {}
        for name, documents in side.items():
            kept_side[name] = []
            dropped: set[str] = set()
            for document in documents:
                digest = hashlib.sha256(document.text.strip().encode()).digest()
                if digest in seen:
                    if document.kind == "code":
                        dropped.add(document.origin)
                elif document.origin not in dropped:
                    seen.add(digest)
                    kept_side[name].append(document)
            if len(kept_side[name]) < len(documents):
                log.info("%s: %d duplicate documents dropped", name, len(documents) - len(kept_side[name]))
        kept_sides.append(kept_side)
    return kept_sides


def _sample(documents: list[Document], max_bytes: int, seed: int) -> list[Document]:
    """Whole documents of at most `max_bytes` together, a seeded choice in the given order; at least one."""
    sizes = [size([document]) for document in documents]
    chosen: set[int] = set()
    room = max_bytes
    for index in stable_order(len(documents), seed, "sample"):
        if sizes[index] <= room:
            chosen.add(index)
            room -= sizes[index]
    chosen = chosen or {min(range(len(documents)), key=sizes.__getitem__)}
    return [document for index, document in enumerate(documents) if index in chosen]


def _cut(document: Document) -> Iterator[Document]:
    """The document in pieces of at most MAX_DOCUMENT characters, at line ends where there are any."""
    text = document.text
    while len(text) > MAX_DOCUMENT:
        end = text.rfind("\n", 0, MAX_DOCUMENT) + 1 or MAX_DOCUMENT
        yield replace(document, text=text[:end])
        text = text[end:]
    if text.strip():
        yield replace(document, text=text)


# ---------------------------------------------------------------------------------------------------
# Built-in sources.


def _read_stdlib() -> Iterator[Document]:
    """The running Python's library: its code, its longer docstrings, and the chapters of `help()`."""
    from pydoc_data import topics

    # Chapters repeat each other's sections, so all of them are one origin; the module itself holds the same text.
    origin, licence = "pydoc_data/topics.py", "PSF-2.0"
    for _, chapter in sorted(topics.topics.items()):
        yield Document(chapter, STDLIB, licence, "docs", origin)
    for document in _read_python_tree(Path(sysconfig.get_path("stdlib")), STDLIB, licence):
        if document.origin != origin:
            yield document


def _read_site_packages() -> Iterator[Document]:
    """Code and docstrings of the installed packages of PACKAGE_LICENCES; each has its own licence."""
    root = Path(sysconfig.get_path("purelib"))
    for package, licence in PACKAGE_LICENCES.items():
        if (root / package).is_dir():
            yield from _read_python_tree(root, package, licence, package)


def _read_python_tree(root: Path, source: str, licence: str, under: str = "") -> Iterator[Document]:
    """Each .py file of root/under as a document, followed by one with its longer docstrings."""
    unread = 0
    for folder, folders, files in os.walk(root / under):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for file in sorted(name for name in files if name.endswith(".py")):
            path = Path(folder, file)
            try:
                text = path.read_bytes().decode()
                docstrings = _docstrings(text)
            except (UnicodeDecodeError, SyntaxError):  # old encodings, code templates
                unread += 1
                continue
            origin = path.relative_to(root).as_posix()
            yield Document(text, source, licence, "code", origin)
            if docstrings:
                yield Document("\n\n".join(docstrings), source, licence, "docs", origin)
    if unread:
        log.info("%s: %d .py files skipped that are no UTF-8 Python", source, unread)


def _docstrings(text: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(text)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [docstring for docstring in found if docstring and len(docstring) > MIN_DOCSTRING]


BUILT_IN = {STDLIB: _read_stdlib, SITE_PACKAGES: _read_site_packages}


# ---------------------------------------------------------------------------------------------------
# Users' files.


def _read(name: str, source: DataSource) -> Iterator[Document]:
    if source.path in BUILT_IN:
        yield from BUILT_IN[source.path]()
        return
    for file, relative in _files(source.path):
        if file.suffix == ".parquet":
            yield from _read_parquet(file, relative, name, source)
            continue
        text = _decode(file)
        if file.suffix == ".jsonl":
            yield from _read_jsonl(text, file, relative, name, source)
        else:
            yield Document(text, name, source.licence, "text", relative)


def _files(path: str) -> list[tuple[epath.Path, str]]:
    """(file, path relative to the root) of the corpus files at `path`, sorted."""
    root = epath.Path(path).expanduser()
    known = f"a file or folder of {', '.join(SUFFIXES)}, or one of {', '.join(BUILT_IN)}"
    if not root.exists():
        raise ValueError(f"data source {path!r} does not exist; give {known}")
    if not root.is_dir():
        if root.suffix not in SUFFIXES:
            raise ValueError(f"data source {path!r} ends in {root.suffix!r}; give {known}")
        return [(root, root.name)]
    files = [folder / file for folder, _, files in root.walk() for file in files if file.endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"data source {path!r} holds no documents; give {known}")
    return sorted(((file, file.relative_to(root).as_posix()) for file in files), key=lambda pair: pair[1])


def _decode(file: epath.Path) -> str:
    data = file.read_bytes()
    if not data:
        raise ValueError(f"corpus file {file} is empty; remove it or write text to it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus file {file} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it"
        ) from error


def _read_jsonl(text: str, file: epath.Path, relative: str, name: str, source: DataSource) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut at U+2028
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{file}:{number}: a JSON object is needed, not {type(record).__name__}")
        yield _from_record(record, f"{file}:{number}", f"{relative}:{number}", name, source)


def _read_parquet(file: epath.Path, relative: str, name: str, source: DataSource) -> Iterator[Document]:
    import pyarrow  # a slow import that most runs don't need
    import pyarrow.parquet as parquet

    with file.open("rb") as stream:
        try:
            table = parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"corpus file {file} is not a parquet file: {error}") from error
        columns = [c for c in (source.text_field, "source", "licence") if c in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield _from_record(record, f"{file}:{number}", f"{relative}:{number}", name, source)


def _from_record(record: dict[str, Any], where: str, origin: str, name: str, source: DataSource) -> Document:
    """Records of one file don't derive from each other, so each is its own origin."""
    text = record.get(source.text_field)
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: field {source.text_field!r} is {type(text).__name__}, not a string (fields: "
            f"{', '.join(record) or 'none'}); set text_field of the data source"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON but no text
        raise ValueError(f"{where}: field {source.text_field!r} is no Unicode text: {error}") from error
    licence, author = record.get("licence") or source.licence, record.get("source") or name
    return Document(text, str(author), str(licence), "text", origin)
