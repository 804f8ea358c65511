"""The corpora that every installation has: Python's own library, the packages that this one requires, and what is made
(`ling_jax.data.made`)."""

import ast
import logging
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from ling_jax.data.made import MADE, VERSION, documents
from ling_jax.data.reading import Document, Listing, stamp

log = logging.getLogger(__name__)

STDLIB = "python-stdlib"
SITE_PACKAGES = "site-packages"
BUILT_IN = (STDLIB, SITE_PACKAGES, *MADE)
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
TOPICS = "pydoc_data/topics.py"  # the chapters of `help()`, as code


def list_built_in(name: str) -> Listing:
    """The .py files of a built-in corpus, in the order in which they are read; of one that is made, a name for all."""
    if name in MADE:
        return Listing(epath.Path(), [name], [f"0 bytes of files, version {VERSION}"], 0.0, [])
    root = Path(sysconfig.get_path("stdlib" if name == STDLIB else "purelib"))
    packages = [""] if name == STDLIB else [package for package in PACKAGE_LICENCES if (root / package).is_dir()]
    names = [file for package in packages for file in python_files(root, package)]
    marked = [(file, *mark) for file in names if (mark := stamp(root / file)) is not None]
    if not marked:
        raise ValueError(f"data source {name!r} finds no .py files in {root}; give a folder of text")
    names, stamps, times = zip(*marked, strict=True)
    return Listing(epath.Path(root), list(names), list(stamps), max(times), [])


def read_built_in(name: str, files: Listing) -> Iterator[Document]:
    """The chapters of `help()`, for Python's library, and each file as a document, followed by one with its longer
    docstrings. Each package has its own licence. What is made is nobody's."""
    if name in MADE:
        for number, text in enumerate(documents(name)):
            yield Document(text, name, "CC0-1.0", "text", f"{name}:{number}")
        return
    if name == STDLIB:
        from pydoc_data import topics

        # Chapters repeat each other's sections, so all of them are one origin; the module itself holds the same text.
        for _, chapter in sorted(topics.topics.items()):
            yield Document(chapter, STDLIB, "PSF-2.0", "docs", TOPICS)
    unread = 0
    for file in files.names:
        package = file.split("/")[0]
        source, licence = (STDLIB, "PSF-2.0") if name == STDLIB else (package, PACKAGE_LICENCES[package])
        if (name, file) == (STDLIB, TOPICS):
            continue
        try:
            yield from read_python(Path(files.root), file, source, licence)
        except (UnicodeDecodeError, SyntaxError):  # old encodings, code templates
            unread += 1
    if unread:
        log.info("%s: %d .py files skipped that are no UTF-8 Python", name, unread)


def python_files(root: Path, under: str = "") -> Iterator[str]:
    """Paths of the .py files in root/under, relative to `root`, tests and the like left out."""
    for folder, folders, files in os.walk(root / under):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for file in sorted(name for name in files if name.endswith(".py")):
            yield Path(folder, file).relative_to(root).as_posix()


def read_python(root: Path, file: str, source: str, licence: str) -> Iterator[Document]:
    """A .py file, then its longer docstrings, which share its origin."""
    text = (root / file).read_bytes().decode()
    docstrings = _docstrings(text)
    yield Document(text, source, licence, "code", file)
    if docstrings:
        yield Document("\n\n".join(docstrings), source, licence, "docs", file)


def _docstrings(text: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(text)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [docstring for docstring in found if docstring and len(docstring) > MIN_DOCSTRING]
