"""The sources keep the house rules: rooms import one way, and nothing is silenced, pickled or printed in them."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room imports only from rooms named before it, and from itself.
ROOMS = (
    "config", "files", "kernels", "parallel", "model", "data", "train", "checkpoint", "generate", "convert", "plan",
    "post",
)  # fmt: skip
ENTRANCES = ("__init__", "cli", "runner", "evaluate")  # may import every room; no room imports them
MAY_NOT_KNOW = {"data": {"model"}, "generate": {"train"}}  # though they come later
NO_JAX = ("config", "data")
JAX = ("jax", "flax", "optax")
MAY_PRINT = ("cli", "evaluate")
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
SILENCERS = re.compile(r"#\s*(type:\s*ignore|(ruff:\s*)?noqa|pyright:|mypy:)", re.IGNORECASE)
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 600

PACKAGE = sorted((ROOT / "ling_jax").rglob("*.py"))
FOLDERS = ("ling_jax", "configs", "benchmarks", "scripts", "tests")
EVERYTHING = sorted(ROOT.glob("*.py")) + [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]


def room_of(module: str) -> str:
    """Room of a dotted name: `ling_jax.model.rope` is in `model`, `ling_jax` itself is the entrance `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    """Dotted name of a file of the package; a folder's `__init__.py` has the folder's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_folder: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that is imported, anywhere in a file; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")
                here = here[: len(here) - node.level + is_folder]
                base = ".".join([*here, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def wrong_imports(path: Path, text: str) -> list[str]:
    module = module_of(path)
    room = room_of(module)
    if room in ENTRANCES:
        return []
    if room not in ROOMS:
        return [f"{path.name}: the room {room!r} has no place in ROOMS"]
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) - MAY_NOT_KNOW.get(room, set())
    found = imports(ast.parse(text), module, path.stem == "__init__")
    ours = [(line, name) for line, name in found if name.split(".")[0] == "ling_jax"]
    return [f"{path.name}:{line} {room} imports {name}" for line, name in ours if room_of(name) not in allowed]


def jax_imports(path: Path, text: str) -> list[str]:
    if room_of(module_of(path)) not in NO_JAX:
        return []
    found = imports(ast.parse(text), module_of(path), path.stem == "__init__")
    return [f"{path.name}:{line} imports {name}" for line, name in found if name.split(".")[0] in JAX]


def silencers(path: Path, text: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return [f"{path.name}:{token.start[0]} {token.string}" for token in comments if SILENCERS.search(token.string)]


def prints(path: Path, text: str) -> list[str]:
    if room_of(module_of(path)) in MAY_PRINT:
        return []
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    names = [(call.lineno, call.func.id) for call in calls if isinstance(call.func, ast.Name)]
    return [f"{path.name}:{line} prints" for line, name in names if name == "print"]


def pickles(path: Path, text: str) -> list[str]:
    tree = ast.parse(text)
    loads = [name for _, name in imports(tree, path.stem, False) if PICKLES & set(name.split("."))]
    allowed = [
        f"line {call.lineno}: allow_pickle"
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", None) is not False
    ]
    return [f"{path.name}: {what}" for what in loads + allowed]


def too_long(path: Path, text: str) -> list[str]:
    found = []
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        found.append(f"{path.name} has {lines} lines, more than {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{path.name}:{node.lineno} {node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}")
    return found


Check = Callable[[Path, str], list[str]]


def violations(check: Check, paths: list[Path]) -> list[str]:
    return [found for path in paths for found in check(path, path.read_text())]


def test_rooms_import_only_rooms_before_them():
    assert violations(wrong_imports, PACKAGE) == []


def test_settings_and_data_need_no_jax():
    assert violations(jax_imports, PACKAGE) == []


def test_the_package_silences_no_checker():
    assert violations(silencers, PACKAGE) == []


def test_the_package_prints_only_in_its_commands():
    assert violations(prints, PACKAGE) == []


def test_nothing_is_pickled():
    assert violations(pickles, EVERYTHING) == []


def test_files_and_functions_stay_short():
    assert violations(too_long, EVERYTHING) == []


@pytest.mark.parametrize(
    ("check", "file", "text"),
    [
        (wrong_imports, "model/rope.py", "from ling_jax.train import step"),
        (wrong_imports, "model/rope.py", "def f():\n    import ling_jax.data.sources"),
        (wrong_imports, "model/rope.py", "from ling_jax import load_pretrained"),
        (wrong_imports, "model/rope.py", "from ..train.step import step"),
        (wrong_imports, "model/__init__.py", "from ..train import step"),
        (wrong_imports, "checkpoint.py", "from .convert import hf"),
        (wrong_imports, "checkpoint.py", "from ling_jax import cli"),
        (wrong_imports, "config.py", "import ling_jax"),
        (wrong_imports, "data/packing.py", "from ling_jax.model import model"),
        (wrong_imports, "generate/engine.py", "from ling_jax.train import step"),
        (wrong_imports, "attic/old.py", ""),
        (jax_imports, "data/packing.py", "import jax.numpy as jnp"),
        (jax_imports, "config.py", "def f():\n    from jax import Array"),
        (silencers, "config.py", "x = 1  # type: ignore"),
        (silencers, "config.py", "x = 1  # pyright: ignore[reportX]"),
        (silencers, "config.py", "# ruff: noqa"),
        (prints, "train/loop.py", "print(1)"),
        (pickles, "train/loop.py", "def f():\n    import pickle"),
        (pickles, "train/loop.py", "from numpy import load\nload('a', allow_pickle=True)"),
        (too_long, "config.py", "def f():\n" + "    x = 1\n" * 80),
        (too_long, "config.py", "x = 1\n" * 601),
    ],
)
def test_each_check_finds_a_planted_violation(check: Check, file: str, text: str):
    assert len(check(ROOT / "ling_jax" / file, text)) == 1


@pytest.mark.parametrize(
    ("check", "file", "text"),
    [
        (wrong_imports, "model/rope.py", "from ling_jax.kernels.linear import linear\nfrom . import norm\nimport jax"),
        (wrong_imports, "train/loop.py", "from ling_jax import config\nfrom ..model.model import Ling"),
        (wrong_imports, "cli.py", "from ling_jax.train import loop"),
        (silencers, "config.py", "x = '# noqa'  # the string is no comment"),
        (prints, "cli.py", "print(1)"),
        (pickles, "data/packing.py", "import numpy as np\nnp.load('a', allow_pickle=False)"),
        (too_long, "config.py", "def f():\n" + "    x = 1\n" * 79),
    ],
)
def test_each_check_lets_the_rightful_pass(check: Check, file: str, text: str):
    assert check(ROOT / "ling_jax" / file, text) == []
