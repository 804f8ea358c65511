"""The sources keep the house rules: rooms import one way, and nothing is silenced, pickled or printed in them."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_run import REPO

# A room imports only from rooms named before it, and from itself.
ROOMS = (
    "config", "files", "kernels", "parallel", "model", "data", "train", "checkpoint", "snapshots", "saver", "generate",
    "convert", "plan", "post",
)  # fmt: skip
ENTRANCES = ("__init__", "cli", "runner", "evaluate", "commands")  # may import every room; no room imports them
RUN_AS_MODULES = ("ling_jax.post.evaluate",)
MAY_NOT_KNOW = {"data": {"model"}, "generate": {"train"}}  # though they come later
NO_JAX = ("config", "data")
JAX = ("jax", "flax", "optax")
MAY_PRINT = ("cli", "evaluate", "commands")
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
SILENCERS = re.compile(r"#\s*(type:\s*ignore|(ruff:\s*)?noqa|pyright:|mypy:)", re.IGNORECASE)
KIND_NAMES = re.compile(r"((softmax|linear)?_(moe|dense)|(softmax|linear)_(moe|dense)?)")
LEANING = {"Of", "Those", "With", "What"}  # first words of a docstring that leans on the line above it
WEIGHTS = {"Weight", "PlainWeight", "ServedWeight", "MasterWeight", "LayerWeight", "FP8Weight"}
MAX_FUNCTION_LINES = 60
MAX_SCRIPT_LINES = 100
MAX_FILE_LINES = 600

PACKAGE = sorted((REPO / "ling_jax").rglob("*.py"))
FOLDERS = ("ling_jax", "configs", "benchmarks", "scripts", "tests")
EVERYTHING = sorted(REPO.glob("*.py")) + [path for name in FOLDERS for path in sorted((REPO / name).rglob("*.py"))]


def room_of(module: str) -> str:
    """Room of a dotted name: `ling_jax.model.rope` is in `model`, `ling_jax` itself is the entrance `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    """Dotted name of a file of the package; a folder's `__init__.py` has the folder's name."""
    parts = path.relative_to(REPO).with_suffix("").parts
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
    if room in ENTRANCES or path.stem == "__main__" or module in RUN_AS_MODULES:  # `python -m` of a room is a command
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


def thick_scripts(path: Path, text: str) -> list[str]:
    """A checkout's scripts only call the package."""
    lines = len(text.splitlines())
    if path.parent != REPO or lines <= MAX_SCRIPT_LINES:
        return []
    return [f"{path.name} has {lines} lines, more than {MAX_SCRIPT_LINES}"]


def kind_names(path: Path, text: str) -> list[str]:
    """Kinds of layers are values: only their own room spells their names."""
    if module_of(path) == "ling_jax.config.layers":
        return []
    strings = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    found = [(node.lineno, node.value) for node in strings if isinstance(node.value, str)]
    return [f"{path.name}:{line} spells {name!r}" for line, name in found if KIND_NAMES.fullmatch(name)]


def losses_in_the_step(path: Path, text: str) -> list[str]:
    """A step is handed what it optimises."""
    module = module_of(path)
    if module != "ling_jax.train.step":
        return []
    found = imports(ast.parse(text), module, False)
    return [f"{path.name}:{line} imports {name}" for line, name in found if name.startswith("ling_jax.train.loss")]


def leaning_docstrings(path: Path, text: str) -> list[str]:
    """A docstring is read alone, in an editor: it names its noun first."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    first = [(getattr(node, "lineno", 1), (ast.get_docstring(node) or "-").split()[0]) for node in nodes]
    return [f"{path.name}:{line} begins with {word}" for line, word in first if word.strip(".,:") in LEANING]


def weight_tests(path: Path, text: str) -> list[str]:
    """The form that a weight is kept in is asked in one place; elsewhere it is a `Weight`."""
    if module_of(path) == "ling_jax.kernels.weight":
        return []
    found = []
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            names = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
            names |= {part.attr for part in ast.walk(node.args[1]) if isinstance(part, ast.Attribute)}
        elif isinstance(node, ast.MatchClass):
            names = {part.id for part in ast.walk(node.cls) if isinstance(part, ast.Name)}
        else:
            continue
        found += [f"{path.name}:{node.lineno} tests for {name}" for name in sorted(names & WEIGHTS)]
    return found


def platform_choices(path: Path, text: str) -> list[str]:
    """One mechanism chooses implementations by platform."""
    if module_of(path) == "ling_jax.kernels.choose":
        return []
    named = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute | ast.Name)]
    found = [node for node in named if "platform_dependent" in (getattr(node, "attr", ""), getattr(node, "id", ""))]
    return [f"{path.name}:{node.lineno} chooses by platform: use kernels.choose" for node in found]


def untyped(path: Path, text: str) -> list[str]:
    """Arguments of kernels' functions all say what they are."""
    if room_of(module_of(path)) != "kernels":
        return []
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            bare = [arg.arg for arg in every if arg is not None and arg.annotation is None]
            found += [f"{path.name}:{node.lineno} {node.name}: {name} has no type" for name in bare]
    return found


Check = Callable[[Path, str], list[str]]


def violations(check: Check, paths: list[Path]) -> list[str]:
    return [found for path in paths for found in check(path, path.read_text())]


def nouns(paths: list[Path]) -> dict[str, set[str]]:
    """The modules that define each public class, or a type by another name."""
    found: dict[str, set[str]] = {}
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            alias = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id
            name = node.name if isinstance(node, ast.ClassDef) else alias or ""
            if name[:1].isupper() and not name.isupper():
                found.setdefault(name, set()).add(module_of(path))
    return found


def test_a_noun_means_one_thing():
    assert {name: modules for name, modules in nouns(PACKAGE).items() if len(modules) > 1} == {}
    assert {"ModelConfig", "Weight", "Answer", "ParamPath"} <= nouns(PACKAGE).keys()


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


def test_scripts_are_thin():
    assert violations(thick_scripts, EVERYTHING) == []


def test_kinds_of_layers_are_spelled_only_where_they_are_made():
    assert violations(kind_names, PACKAGE) == []


def test_the_step_knows_no_loss():
    assert violations(losses_in_the_step, PACKAGE) == []


def test_docstrings_can_be_read_alone():
    assert violations(leaning_docstrings, EVERYTHING) == []


def test_the_form_of_a_weight_is_asked_in_one_place():
    assert violations(weight_tests, PACKAGE) == []


def test_one_mechanism_chooses_by_platform():
    assert violations(platform_choices, PACKAGE) == []


def test_kernels_arguments_are_typed():
    assert violations(untyped, PACKAGE) == []


@pytest.mark.parametrize(
    ("check", "file", "text"),
    [
        (thick_scripts, "../train.py", "x = 1\n" * 101),
        (leaning_docstrings, "model/rope.py", 'def f():\n    """Of one device."""'),
        (leaning_docstrings, "model/rope.py", '"""What users meet."""'),
        (weight_tests, "model/stack.py", "isinstance(value, jax.Array | FP8Weight)"),
        (weight_tests, "kernels/swiglu.py", "any(isinstance(w, weight.MasterWeight) for w in weights)"),
        (weight_tests, "kernels/swiglu.py", "match w:\n    case LayerWeight():\n        pass"),
        (platform_choices, "kernels/swiglu.py", "jax.lax.platform_dependent(x, cpu=f, default=g)"),
        (platform_choices, "train/step.py", "from jax.lax import platform_dependent\nplatform_dependent(x, default=g)"),
        (untyped, "kernels/swiglu.py", "def f(x: int, *rest):\n    pass"),
        (untyped, "kernels/swiglu.py", "def f(x: int, *, block):\n    pass"),
        (kind_names, "train/balance.py", "kind.endswith('_moe')"),
        (kind_names, "model/mtp.py", "Block(config, 'softmax_moe', init)"),
        (losses_in_the_step, "train/step.py", "def f():\n    from ling_jax.train.loss import NextToken"),
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
        (prints, "train/session.py", "print(1)"),
        (pickles, "train/session.py", "def f():\n    import pickle"),
        (pickles, "train/session.py", "from numpy import load\nload('a', allow_pickle=True)"),
        (too_long, "config.py", "def f():\n" + "    x = 1\n" * 80),
        (too_long, "config.py", "x = 1\n" * 601),
    ],
)
def test_each_check_finds_a_planted_violation(check: Check, file: str, text: str):
    assert len(check((REPO / "ling_jax" / file).resolve(), text)) == 1


@pytest.mark.parametrize(
    ("check", "file", "text"),
    [
        (wrong_imports, "model/rope.py", "from ling_jax.kernels.linear import linear\nfrom . import norm\nimport jax"),
        (wrong_imports, "train/session.py", "from ling_jax import config\nfrom ..model.model import Ling"),
        (wrong_imports, "cli.py", "from ling_jax.train import session"),
        (kind_names, "config/layers.py", "'softmax_moe'"),
        (kind_names, "config/hf.py", "'bailing_moe'"),
        (losses_in_the_step, "train/state.py", "from ling_jax.train.loss import NextToken"),
        (silencers, "config.py", "x = '# noqa'  # the string is no comment"),
        (prints, "cli.py", "print(1)"),
        (pickles, "data/packing.py", "import numpy as np\nnp.load('a', allow_pickle=False)"),
        (too_long, "config.py", "def f():\n" + "    x = 1\n" * 59),
        (thick_scripts, "../train.py", "x = 1\n" * 100),
        (leaning_docstrings, "model/rope.py", 'def f():\n    """Tokens of one device."""'),
        (weight_tests, "kernels/weight.py", "isinstance(value, FP8Weight)"),
        (weight_tests, "model/in_place.py", "isinstance(value, jax.Array)"),
        (platform_choices, "kernels/choose.py", "jax.lax.platform_dependent(x, cpu=f, default=g)"),
        (untyped, "kernels/swiglu.py", "def f(x: int, *rest: int):\n    g = lambda y: y"),
        (untyped, "model/stack.py", "def f(x):\n    pass"),
    ],
)
def test_each_check_lets_the_rightful_pass(check: Check, file: str, text: str):
    assert check((REPO / "ling_jax" / file).resolve(), text) == []
