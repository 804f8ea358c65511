"""From a command line to a checked configuration: NAME in configs/, then typed overrides."""

import argparse
import dataclasses
import hashlib
import importlib
import importlib.util
import logging
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import tyro
from rich.logging import RichHandler
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from ling_jax.config import ModelConfig, RLRun, RopeScaling, RunConfig, SFTRun
from ling_jax.convert.origin import Mtp
from ling_jax.convert.weights import model_config_of
from ling_jax.files.buckets import log_retries
from ling_jax.files.cache import cache_folder, can_write, cpu_flags
from ling_jax.files.hub_files import TRANSPORTS
from ling_jax.files.paths import at
from ling_jax.files.progress import CONSOLE
from ling_jax.parallel.processes import worker_id

log = logging.getLogger(__name__)

Command = TypeVar("Command", bound="TrainCommand")
InitOptimizer = Literal["fresh", "continued"]
COMPILED_BYTES = 4 << 30
NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # where JAX looks for a GPU too
# Beside the package in a checkout, inside it where it is installed.
CONFIGS = next(folder / "configs" for folder in Path(__file__).parents[:2] if (folder / "configs").is_dir())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The command line of `train.py`."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run: str | None = None
    """Name of the run's folder under --runs-dir; the config's name by default. An existing run resumes."""
    runs_dir: str = "runs"
    """Folder of all runs: local, gs://BUCKET/... or s3://BUCKET/..."""
    fresh: bool = False
    """Start at step 0; refuses a folder that holds a run, unless --move-aside."""
    move_aside: bool = False
    """With --fresh: rename the folder of an earlier run instead of refusing."""
    from_step: int | None = None
    """Resume from this saved step instead of the latest; later ones are moved aside, and their metrics cut."""
    from_stage: str | None = None
    """Resume where this stage begins; what was saved later is moved aside. With --topology: the stage to plan."""
    stop_after: str | None = None
    """End when this stage has ended; the same command without it goes on."""
    init_from: str | None = None
    """A HF folder, hub id, checkpoint or RUN@STEP whose weights, and whose tokenizer, a new run starts from."""
    init_mtp: Mtp = "same"
    """With --init-from, where one side has an MTP layer and the other has none. new: it starts from random weights;
    drop: it is left behind; same: that is an error."""
    init_optimizer: InitOptimizer = "fresh"
    """With --init-from RUN@STEP. continued: moments, schedule, step and places in the text go on as in a resume, in a
    run of its own; fresh: a new run starts at step 0 with the weights alone."""
    print_config: bool = False
    """Print the resolved configuration and stop."""
    print_sharding: bool = False
    """Print how each parameter is split over the mesh and stop; needs none of its devices."""
    topology: str | None = None
    """Compile the step for a topology such as v5p:4x4x4 or h100:8, print what it needs and what bounds it, and stop."""
    slices: int = 1
    """With --topology: so many of it, joined by the data centre's network."""
    json: bool = False
    """With --topology: only one JSON object."""
    suggest: bool = False
    """With --topology: look for the mesh, remat policy, microbatches and buffer factor with the best bound."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTCommand(TrainCommand):
    """The command line of `post.py sft`."""

    config: Annotated[SFTRun, tyro.conf.arg(name="")]
    show: int = 0
    """Print so many examples with what is learned in colour, and stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLCommand(TrainCommand):
    """The command line of `post.py rl`."""

    config: Annotated[RLRun, tyro.conf.arg(name="")]


POST_TRAINING: dict[str, tuple[type[RunConfig], Any, str]] = {
    "sft": (SFTRun, SFTCommand, "fine-tuning on conversations"),
    "rl": (RLRun, RLCommand, "reinforcement learning on a task"),
}
FLAGS = ConstructorRegistry()


@FLAGS.struct_rule
def _rope_scaling_flags(info: StructTypeInfo) -> StructConstructorSpec | None:
    """One flag for each field of a RopeScaling that may be None. By itself tyro makes a subcommand of such a thing,
    after which no other flag may come."""
    if info.type is not RopeScaling:
        return None
    off = tyro.conf.arg(name="", metavar="none", help="none turns YaRN off", help_behavior_hint="")
    word: Any = Annotated[str, off]
    flags = [StructFieldSpec(name="off", type=word, default="")]
    for field in dataclasses.fields(RopeScaling):
        kind: Any = field.type
        unset = field.default
        if unset is dataclasses.MISSING:
            kind, unset = kind | None, None
        flags.append(StructFieldSpec(field.name, kind, getattr(info.default, field.name, unset)))
    return StructConstructorSpec(partial(_rope_scaling, {flag.name: flag.default for flag in flags}), tuple(flags))


def _rope_scaling(unchanged: Mapping[str, Any], off: str, **values: Any) -> RopeScaling | None:
    """YaRN's settings from its flags; `unchanged` are the flags' values where a user gives none.

    Raises:
      ValueError: for one flag where two are needed, or flags that contradict each other.
    """
    changed = [name for name, value in values.items() if value != unchanged[name]]
    if off.lower() not in ("", "none"):
        raise ValueError(f"{off!r}: only none, which turns YaRN off, may stand here; the flag with .factor turns it on")
    if off and changed:
        raise ValueError(f"none turns YaRN off, but there is a flag for {', '.join(changed)} too: leave out either")
    if off or (not changed and values["factor"] is None):
        return None
    required = [field.name for field in dataclasses.fields(RopeScaling) if field.default is dataclasses.MISSING]
    if missing := [name for name in required if values[name] is None]:
        flags = " and ".join(f"--model.rope-scaling.{name.replace('_', '-')}" for name in missing)
        raise ValueError(f"YaRN needs {flags} too: positions to have over positions trained on, and the latter")
    return RopeScaling(**values)


def config_names() -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))


def named_config(name: str) -> RunConfig:
    """The configuration of `configs/NAME.py`, or of a file of the user's own, `PATH.py`.

    Raises:
      ValueError: for a name that is none, or a file without a function `config()` that returns a RunConfig.
    """
    if name.endswith(".py"):
        return _config_of_file(Path(name))
    if name not in config_names():
        raise ValueError(
            f"no configuration {name!r}; configs/ has {', '.join(config_names())}; a file is named FILE.py"
        )
    if CONFIGS.parent.name == "ling_jax":  # installed: pyproject.toml puts configs/ into the package
        return importlib.import_module(f"ling_jax.configs.{name}").config()
    if str(CONFIGS.parent) not in sys.path:
        sys.path.insert(0, str(CONFIGS.parent))
    return importlib.import_module(f"configs.{name}").config()


def _config_of_file(path: Path) -> RunConfig:
    if not path.is_file():
        raise ValueError(f"no file {path}; a configuration is a Python file with a function config()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "config", None)
    config = found() if callable(found) else None
    if not isinstance(config, RunConfig):
        raise ValueError(f"{path} must have a function config() that returns a ling_jax.RunConfig, as configs/ do")
    return config


def program(script: str) -> str:
    """The name that a command was called by: `ling-train` where it is installed, else its script, `train.py`."""
    called = Path(sys.argv[0]).name
    return called if called.startswith("ling-") else script


def parse_train(argv: Sequence[str]) -> tuple[str, TrainCommand]:
    """(config name, command) of `train.py NAME [--flags]`; an unknown name or flag, or a value that fails a check, ends
    the program with one message."""
    prog = program("train.py")
    name, config = _named(argv, prog, RunConfig)
    if (kind := _kind(config)) is not None:
        raise ValueError(f"{name} is {POST_TRAINING[kind][2]}: {program('post.py')} {kind} {name}")
    return _stem(name), _parsed(TrainCommand(config=config), argv[1:], f"{prog} {name}")


def parse_post(kind: str, argv: Sequence[str]) -> tuple[str, TrainCommand]:
    """(config name, command) of `post.py KIND NAME [--flags]`, as `parse_train`. With --init-from the model is that of
    the weights, whatever NAME has."""
    prog, (run, command, told) = f"{program('post.py')} {kind}", POST_TRAINING[kind]
    name, config = _named(argv, prog, run)
    if not isinstance(config, run):
        other = _kind(config)
        right = f"{program('train.py')} {name}" if other is None else f"{program('post.py')} {other} {name}"
        raise ValueError(f"{name} is no {told}: {right}; {prog} has {_names(run)}")
    if (model := _model_to_tune(argv[1:], _stem(name))) is not None:
        rows = dataclasses.replace(config.data, sequence_length=min(config.data.sequence_length, model.max_positions))
        config = dataclasses.replace(config, model=model, data=rows, assumed=())
    return _stem(name), _parsed(command(config=config), argv[1:], f"{prog} {name}")


def _kind(config: RunConfig) -> str | None:
    """The kind of post-training that a configuration is for; None for pre-training."""
    return next((kind for kind, (run, *_) in POST_TRAINING.items() if isinstance(config, run)), None)


def _named(argv: Sequence[str], prog: str, run: type[RunConfig]) -> tuple[str, RunConfig]:
    """The name that a command line begins with, and its configuration; without one the program ends with its usage."""
    if not argv or argv[0].startswith("-"):
        print(f"usage: {prog} NAME [--flags]   (NAME: {_names(run)}, or a file of your own, FILE.py)")
        print(f"       {prog} NAME --help      lists the flags, one for every setting of the configuration")
        raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)
    return argv[0], named_config(argv[0])


def _names(run: type[RunConfig]) -> str:
    """The names of the configurations of a kind of run."""
    return ", ".join(name for name in config_names() if type(named_config(name)) is run)


def _stem(name: str) -> str:
    return Path(name).stem if name.endswith(".py") else name


def _parsed(default: Command, argv: Sequence[str], prog: str) -> Command:
    """The command with what the flags say."""
    command = tyro.cli(type(default), default=default, args=list(argv), prog=prog, registry=FLAGS)
    given, guessed = command.config.model, default.config.model
    still = tuple(n for n in command.config.assumed if getattr(given, n) == getattr(guessed, n))  # no flag says better
    return dataclasses.replace(command, config=dataclasses.replace(command.config, assumed=still))


def _model_to_tune(argv: Sequence[str], name: str) -> ModelConfig | None:
    """The model of the weights that --init-from names, or that a run begun with it has; None without that flag."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in ("--init-from", "--run", "--runs-dir"):
        flags.add_argument(flag, flag.replace("-", "_").replace("__", "--", 1))
    flags.add_argument("--fresh", action="store_true")
    given, _ = flags.parse_known_args(argv)
    if not hasattr(given, "init_from"):
        return None
    runs = at(getattr(given, "runs_dir", TrainCommand.runs_dir))
    begun = runs / getattr(given, "run", name) / "config.json"
    if not hasattr(given, "fresh") and begun.exists():
        return RunConfig.from_json(begun.read_text()).model
    run, _, step = given.init_from.rpartition("@")
    folders = [at(run), runs / run] if step.isdigit() else []
    return model_config_of(next((os.fspath(folder) for folder in folders if folder.exists()), given.init_from))


def set_up_logging() -> None:
    """Log lines on standard error, on a terminal through the console that the progress bar uses; of several processes
    the first tells all, the others only warnings."""
    handler: logging.Handler = logging.StreamHandler()
    level, form = logging.INFO, "%(asctime)s %(message)s"
    if worker_id():
        level, form, CONSOLE.quiet = logging.WARNING, f"%(asctime)s process {worker_id()}: %(message)s", True
    elif CONSOLE.is_terminal:
        handler, form = RichHandler(console=CONSOLE, show_path=False), "%(message)s"
    logging.basicConfig(level=level, format=form, datefmt="%H:%M:%S", handlers=[handler], force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    logging.getLogger("jax").setLevel(logging.WARNING)
    for name in TRANSPORTS:  # a line for each request
        logging.getLogger(name).setLevel(logging.WARNING)
    # A save that fails in orbax's threads is told once, as this package's error, not once for each of its tasks.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda failure: log.debug("%s", failure.exc_value)


def keep_compiled() -> None:
    """Programs that took a second or more to compile are read at the next start, from the cache folder's `xla` (at most
    4 GB, the longest unused go first). JAX's own variables come first: JAX_COMPILATION_CACHE_DIR names another place,
    JAX_ENABLE_COMPILATION_CACHE=0 turns it off."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    machine = hashlib.sha256(f"{cpu_flags()} {jax.__version__}".encode()).hexdigest()[:16]
    folder = cache_folder() / "xla" / machine
    if not can_write(folder):
        log.info("%s cannot be written: compiled programs are not kept; XDG_CACHE_HOME names another place", folder)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)


def settle_jax() -> None:
    """Sets back the switches of JAX that a user has on for other work: what a command computes, and whether it runs,
    follows from its own settings."""
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_default_prng_impl", "threefry2x32")
    jax.config.update("jax_threefry_partitionable", True)


def settle_plugins() -> None:
    """Keeps JAX's CUDA plugin, which compiles for GPUs anywhere, from complaining about libraries that are missing
    where there is no GPU. It says so with a traceback of 25 lines."""
    if not any(Path(device).exists() for device in NVIDIA_DEVICES):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def _missing_platform(error: BaseException) -> str | None:
    """The message for JAX's own `error` about a platform in JAX_PLATFORMS that is not here."""
    asked, frames = os.environ.get("JAX_PLATFORMS"), traceback.extract_tb(error.__traceback__)
    if not asked or not frames or not frames[-1].filename.endswith("xla_bridge.py"):
        return None
    reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
    return (
        f"JAX_PLATFORMS = {asked!r}, but JAX finds no such device here{reason}: unset it, or install JAX for that "
        "device, such as jax[cuda13] or jax[tpu]"
    )


def _output_is_closed() -> bool:
    """Whether the reader of standard output has left, as `head` does when it has enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command; a user's mistake or a refusing system (ValueError, OSError) is one line and exit code 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    set_up_logging()
    settle_jax()
    settle_plugins()
    keep_compiled()
    code = 1
    try:
        code = main(sys.argv[1:]) or 0
        log_retries()
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
            code = 128 + signal.SIGPIPE
        elif os.environ.get("LING_JAX_TRACEBACK"):
            raise
        else:
            print(f"error: {error}", file=sys.stderr)
            code = 2
    except Exception as error:
        if missing := _missing_platform(error):
            print(f"error: {missing}", file=sys.stderr)
            code = 2
        elif worker_id() is None:
            raise
        else:
            traceback.print_exc()
    if code and worker_id() is not None:  # JAX's own exit waits for the other processes, which wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
