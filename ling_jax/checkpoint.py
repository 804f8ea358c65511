"""Checkpoints: plain nested dicts of arrays plus JSON, written by orbax in the background, restored onto any mesh.

A folder `checkpoints/` holds one folder per saved step, named by its number, each complete by itself:

    500/state/params.embed/...     one Zarr array per leaf, uncompressed, named by its keys
    500/meta/meta.json             the caller's JSON: resolved config, data state, versions

A step's folder bears its number only once complete; other names (`500.orbax-checkpoint-tmp`, `deleting`) are work in
progress, or leftovers that the next `Checkpointer` removes: only one run at a time may write into a folder.
"""

import contextlib
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.array_serialization.serialization import get_tensorstore_spec
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from ling_jax.config import CheckpointConfig
from ling_jax.parallel.processes import barrier

log = logging.getLogger(__name__)

STATE, META, META_FILE = "state", "meta", "meta.json"  # of a step's folder
UNFINISHED = "meta-unfinished"  # META of a folder whose arrays are still being written
DELETING = "deleting"  # old steps move here first: a half-deleted one must not look like a step
CHUNK_BYTES = 256 << 20  # of a file at most: all of it is read, even for a small shard
MAX_LINES = 20  # of a list of mismatches
KEY = re.compile(r"[\w-]+")  # no "." and "/": the first joins keys on disk, the second in messages

Tree = Mapping[str, Any]  # nested dicts with string keys


def _demote_orbax(record: logging.LogRecord) -> bool:
    """Passes orbax's records on as debug; what goes wrong there reaches the user as one error of this module."""
    if "orbax" in record.pathname:
        log.debug("orbax: %s", record.getMessage())
    return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_demote_orbax)  # orbax logs through absl


class Checkpointer:
    """The steps of one run, in `directory` (local or gs://; made if missing, cleared of leftovers).

    When to save is the caller's decision. All processes make the same calls, each from one thread.
    """

    def __init__(self, directory: str, config: CheckpointConfig):
        self._directory = _absolute(directory)
        self._saving: int | None = None  # the step being written
        self._remove_leftovers()
        barrier("leftovers are gone")
        keep = [LatestN(config.keep_last)] + ([EveryNSteps(config.keep_every)] if config.keep_every else [])
        # Plain files without zstd: measured 2 to 3 times as fast to save as orbax's default, and 1.14 times as large.
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(STATE, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))
        handlers.add(META, ocp.args.JsonSave, ocp.JsonCheckpointHandler(META_FILE))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(keep), todelete_subdir=DELETING
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options, handler_registry=handlers)

    def save(self, step: int, state: Tree, meta: Tree) -> None:
        """Waits for the save before, copies `state` off the devices (it may then be donated), writes in the background.

        `step` is greater than every saved one, `state` a nested dict of jax or numpy arrays, `meta` a JSON object;
        ValueError if not, if the save before failed, or if the disk is too full.
        """
        self.wait()
        if step <= (latest := max(self.all_steps(), default=-1)):
            raise ValueError(f"step {step} is not after step {latest}, the latest in {self._directory}: resume there")
        state = _checked(state)
        try:
            meta = json.loads(json.dumps(meta, allow_nan=False))  # a copy, since it is written later
        except (TypeError, ValueError) as error:
            raise ValueError(f"the metadata of step {step} is not plain JSON: {error}") from error
        self._check_space(step, sum(x.nbytes for x in jax.tree.leaves(state)))
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state)
        items = {STATE: ocp.args.PyTreeSave(state, save_args=chunks), META: ocp.args.JsonSave(meta)}
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._abandon(error) from error

    def wait(self) -> None:
        """Blocks until the save under way is complete. ValueError if it failed; the steps before it are intact."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._abandon(error) from error
        if self._saving is not None:
            self._saving = None
            self._remove_leftovers()  # the old steps
            barrier("saved")  # all see the same steps

    def close(self) -> None:
        """Waits, with its error, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def all_steps(self) -> list[int]:
        """The complete steps on disk, ascending."""
        return _steps(self._directory)

    def latest_step(self) -> int | None:
        return max(self.all_steps(), default=None)

    def restore(self, step: int | None, like: Tree) -> dict[str, Any]:
        """The whole state of a step (None: the latest), placed as in `read_arrays`; `like` is the tree that was saved.

        ValueError if there is no such step; or one listing all that differs from `like`, before reading.
        """
        return read_arrays(self._folder(step), like, whole=True)

    def read_meta(self, step: int | None) -> dict[str, Any]:
        return read_meta(self._folder(step))

    def _folder(self, step: int | None) -> epath.Path:
        steps = self.all_steps()
        wanted = max(steps, default=None) if step is None else step
        if wanted not in steps:
            raise ValueError(f"no step {'' if step is None else step} in {self._directory}; saved: {steps or 'none'}")
        return self._directory / str(wanted)

    def _check_space(self, step: int, size: int) -> None:
        """Refuses what cannot fit before it fills the disk (orbax still meets quotas and other writers)."""
        local = "://" not in str(self._directory) and jax.process_count() == 1  # or one of many would turn back alone
        if local and size > (free := shutil.disk_usage(self._directory).free):
            sizes = f"step {step} takes {size / 1e6:.1f} MB and {self._directory} has {free / 1e6:.1f} MB free"
            raise ValueError(f"{sizes}: make room and resume (saved steps {self.all_steps()} are intact)")

    def _abandon(self, error: Exception) -> ValueError:
        """Removes the files of the failed save; returns the error to raise."""
        step, self._saving = self._saving, None
        self._remove_leftovers()
        self._manager.reload()  # it has struck the steps that it was to remove off its list already
        hint = f"check that the folder is writable and has room, and resume (saved steps {self.all_steps()} are intact)"
        return ValueError(f"saving step {step} in {self._directory} failed: {hint}. {str(error).splitlines()[0]}")

    def _remove_leftovers(self) -> None:
        """Removes unfinished saves and old steps, until late writes of a failed save put none back."""
        deadline = time.monotonic() + 10.0
        while jax.process_index() == 0 and (leftovers := _leftovers(self._directory)):
            for path in leftovers:
                try:
                    path.rmtree()
                except OSError:
                    if time.monotonic() > deadline:
                        raise
            time.sleep(0.05)


def find_checkpoint(path: str | epath.Path) -> epath.Path:
    """The folder of one step: `path` itself, or the latest step of a `checkpoints/` or run folder; or ValueError."""
    path = _absolute(path)
    if _is_step(path):
        return path
    for folder in (path, path / "checkpoints"):
        if steps := _steps(folder):
            return folder / str(steps[-1])
    hint = "give a run folder with a saved step, its checkpoints/ folder, or one step's folder"
    raise ValueError(f"no checkpoint in {path}{'' if path.exists() else ', which does not exist'}: {hint}")


def read_meta(path: str | epath.Path) -> dict[str, Any]:
    """The JSON saved with a checkpoint (`path` as for `find_checkpoint`)."""
    return json.loads((find_checkpoint(path) / META / META_FILE).read_text())


def read_shapes(path: str | epath.Path) -> dict[str, Any]:
    """The saved tree, of `jax.ShapeDtypeStruct`, without reading the arrays."""
    tree = ocp.PyTreeCheckpointHandler().metadata(find_checkpoint(path) / STATE).tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def read_arrays(path: str | epath.Path, like: Tree | None = None, whole: bool = False) -> dict[str, Any]:
    """Reads a checkpoint (`path` as for `find_checkpoint`), or the part that `like` has and only its bytes.

    `like` is a nested dict of `jax.ShapeDtypeStruct`, such as "params" and "bias" alone (None: all that was saved);
    a leaf becomes a jax.Array where it has a sharding, a numpy array where it has none. ValueError, before reading,
    listing all of `like` that differs from what was saved (and, if `whole`, all that was saved beyond `like`).
    """
    folder = find_checkpoint(path)
    saved = read_shapes(folder)
    like = saved if like is None else like
    _compare(folder, saved, like, whole)
    tree = unflatten_dict(flatten_dict(like))  # without the empty dicts that `like` may have
    args = ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(_placed, tree), partial_restore=True)
    arrays = ocp.PyTreeCheckpointHandler().restore(folder / STATE, args=args)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(arrays))


def open_array(folder: epath.Path, path: Sequence[str]) -> ts.TensorStore:
    """The array at `path` in one step's folder, to be read (or, as `make_checkpoint` left it, written) in parts."""
    spec = get_tensorstore_spec(str(folder / STATE / ".".join(path)), ocdbt=False)
    return ts.open(spec).result()


class NewArray(NamedTuple):
    """An array that `make_checkpoint` makes room for; `chunk` is the part of it that one file holds."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


def make_checkpoint(folder: epath.Path, arrays: Mapping[tuple[str, ...], NewArray], meta: Tree) -> None:
    """Makes a folder whose arrays are zero until they are written with `open_array`: for states larger than memory.
    `folder` must not exist. It is one step's checkpoint, for whoever reads it, after `finish_checkpoint` only."""
    making = folder.parent / f"{folder.name}.making"
    if making.exists():
        making.rmtree()
    with contextlib.closing(Checkpointer(str(making), CheckpointConfig())) as checkpointer:
        small = {path: np.zeros((1,) * len(new.shape), new.dtype) for path, new in arrays.items()}
        checkpointer.save(0, unflatten_dict(small), meta)
    for path, new in arrays.items():
        place = making / "0" / STATE / ".".join(path)
        place.rmtree()
        spec = get_tensorstore_spec(str(place), ocdbt=False)
        chunked = {"compressor": None, "chunks": list(new.chunk)}
        ts.open(spec | {"metadata": chunked}, create=True, dtype=new.dtype.name, shape=new.shape).result()
    (making / "0" / META).rename(making / "0" / UNFINISHED)
    (making / "0").rename(folder)
    making.rmtree()


def finish_checkpoint(folder: epath.Path) -> None:
    """What `make_checkpoint` made has all its values now."""
    if not (folder / META).exists():
        (folder / UNFINISHED).rename(folder / META)


def chunk_of(shape: Sequence[int], itemsize: int, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """The largest block of at most `limit` bytes that lies together in C order."""
    chunk = [1] * len(shape)
    for dim in reversed(range(len(shape))):
        chunk[dim] = max(1, min(shape[dim], limit // itemsize))
        itemsize *= chunk[dim]
        if chunk[dim] < shape[dim]:
            break
    return tuple(chunk)


def _placed(x: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    kind = np.ndarray if x.sharding is None else jax.Array
    return ocp.ArrayRestoreArgs(restore_type=kind, sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)


def _compare(folder: epath.Path, saved: Tree, wanted: Tree, whole: bool) -> None:
    def show(x: Any) -> str:
        return "nothing" if x is None else f"{np.dtype(x.dtype).name}{list(x.shape)}"

    has, wants = flatten_dict(saved, sep="/"), flatten_dict(wanted, sep="/")
    names = sorted(has.keys() | wants.keys() if whole else wants)
    pairs = [(name, show(has.get(name)), show(wants.get(name))) for name in names]
    lines = [f"{name}: saved {old}, wanted {new}" for name, old, new in pairs if old != new]
    if lines:
        head = f"checkpoint {folder} is not of this configuration, it differs in {len(lines)} arrays:"
        raise ValueError("\n  ".join([head, *lines[:MAX_LINES]] + ["..."] * (len(lines) > MAX_LINES)))


def _checked(state: Tree) -> Tree:
    """`state` without its empty dicts; ValueError for what could not be read back as it is."""
    leaves: dict[tuple[str, ...], Any] = flatten_dict(state)
    for keys, leaf in leaves.items():
        if not all(isinstance(key, str) and KEY.fullmatch(key) for key in keys):
            raise ValueError(f"keys {keys} cannot be saved: use strings of letters, digits, _ and -")
        array = isinstance(leaf, jax.Array | np.ndarray | np.generic) and isinstance(leaf.dtype, np.dtype)
        if not array or not leaf.size:
            kind = f"{type(leaf).__name__} {getattr(leaf, 'dtype', '')}{getattr(leaf, 'shape', '')}"
            raise ValueError(f"{keys} is {kind}: save non-empty arrays, and random keys as jax.random.key_data")
    return unflatten_dict(leaves)


def _steps(folder: epath.Path) -> list[int]:
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted(int(path.name) for path in paths if path.name.isdigit() and _is_step(path))


def _leftovers(folder: epath.Path) -> list[epath.Path]:
    paths = folder.iterdir() if folder.is_dir() else []
    unfinished = ocp.path.step.is_path_temporary
    return [x for x in paths if x.name == DELETING or (x.name.partition(".")[0].isdigit() and unfinished(x))]


def _is_step(path: epath.Path) -> bool:
    return (path / STATE).is_dir() and (path / META / META_FILE).exists() and ocp.path.step.is_path_finalized(path)


def _absolute(path: str | epath.Path) -> epath.Path:
    return epath.Path(path) if "://" in str(path) else epath.Path(path).expanduser().resolve()
