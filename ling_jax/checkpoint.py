"""Checkpoints: plain nested dicts of arrays plus JSON, written by orbax in the background, restored onto any mesh.

A folder `checkpoints/` holds one folder per saved step, named by its number, each complete by itself:

    500/state/params.embed/...     one Zarr array per leaf, uncompressed, named by its keys
    500/state/checksums.json       of every file of every array (`files.arrays`): reading compares them
    500/meta/meta.json             the caller's JSON: resolved config, data state, versions; with its own checksum

A step's folder bears its number only once complete; other names (`500.orbax-checkpoint-tmp`, `deleting`) are work in
progress, or leftovers that the next `Checkpointer` removes: only one run at a time may write into a folder. In a
bucket, where nothing can be renamed, a step is complete while it has `commit_success.txt`, the last object to be
written and the first to go.
"""

import dataclasses
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import future
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from ling_jax.config import CheckpointConfig
from ling_jax.files import arrays as stored
from ling_jax.files.arrays import ArrayFolder, ArrayPath, Layout
from ling_jax.files.buckets import Unreachable, is_bucket
from ling_jax.files.hub import HINT
from ling_jax.files.paths import at, write_whole
from ling_jax.files.whole import read_perhaps_sealed, sealed
from ling_jax.parallel.processes import barrier

log = logging.getLogger(__name__)

STATE, META, META_FILE = "state", "meta", "meta.json"  # of a step's folder
UNFINISHED = "meta-unfinished"  # in a folder whose arrays are still being written
COMMIT = "commit_success.txt"  # of a step in a bucket: orbax's
UNCOMMITTED = ".orbax-checkpoint-tmp"  # after a number: a step that is being saved to a disk
DELETING = "deleting"  # old steps move here first: a half-deleted one must not look like a step
MAX_LINES = 20  # of a list of mismatches
KEY = re.compile(r"[\w-]+")  # no "." and "/": the first joins keys on disk, the second in messages

Tree = Mapping[str, Any]  # nested dicts with string keys


def _demote_orbax(record: logging.LogRecord) -> bool:
    """Passes orbax's records on as debug; what goes wrong there reaches the user as one error of this module."""
    if "orbax" in record.pathname:
        log.debug("orbax: %s", record.getMessage())
    return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_demote_orbax)  # orbax logs through absl


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing or changed; `good` is the last step beside it that is whole, or None."""

    def __init__(self, text: str, good: int | None):
        super().__init__(text)
        self.good = good


class _ArraysHandler(ocp.AsyncCheckpointHandler):
    """Orbax's part in saving: it calls this within its atomic step."""

    async def async_save(self, directory: epath.Path, args: "_SaveArrays") -> list[Any]:
        arrays = stored.on_host(args.arrays)

        async def write() -> None:
            stored.write_arrays(directory, arrays)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="arrays")]

    def save(self, directory: epath.Path, args: "_SaveArrays") -> None:
        stored.write_arrays(directory, stored.on_host(args.arrays))

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        raise AssertionError("orbax only saves: read_arrays reads")

    def finalize(self, directory: epath.Path) -> None:
        stored.merge_checksums(directory)


@ocp.args.register_with_handler(_ArraysHandler, for_save=True)
@dataclasses.dataclass
class _SaveArrays(ocp.args.CheckpointArgs):
    arrays: Mapping[ArrayPath, Any]


class Checkpointer:
    """The steps of one run, in `directory` (local or in a bucket; made if missing, cleared of leftovers).

    When to save is the caller's decision. All processes make the same calls, each from one thread.

    Args:
      kept: steps that stay, whatever `config` says of others.
    """

    def __init__(self, directory: str, config: CheckpointConfig, kept: Collection[int] = ()):
        self._directory, self._config, self._kept = _absolute(directory), config, kept
        self._saving: int | None = None  # the step being written
        self._remove_leftovers()
        barrier("leftovers are gone")
        # Plain files without zstd: measured 2 to 3 times as fast to save as orbax's default, and 1.14 times as large.
        # Orbax's own arrays have no checksums.
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(STATE, _SaveArrays, _ArraysHandler())
        handlers.add(META, ocp.args.JsonSave, ocp.JsonCheckpointHandler(META_FILE))
        mode = AtomicityMode.COMMIT_FILE if is_bucket(self._directory) else AtomicityMode.ATOMIC_RENAME
        options = ocp.CheckpointManagerOptions(atomicity_options=AtomicityOptions(mode=mode))
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
            meta = _sealed_meta(meta)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the metadata of step {step} is not plain JSON: {error}") from error
        self._check_space(step, sum(x.nbytes for x in jax.tree.leaves(state)))
        items = {STATE: _SaveArrays(flatten_dict(state)), META: ocp.args.JsonSave(meta)}
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
            self._drop_old()
            self._remove_leftovers()
            barrier("saved")  # all see the same steps

    def close(self) -> None:
        """Waits, with its error, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def all_steps(self) -> list[int]:
        """The complete steps on disk, ascending."""
        return saved_steps(self._directory)

    def latest_step(self) -> int | None:
        return max(self.all_steps(), default=None)

    def restore(self, step: int | None, like: Tree) -> dict[str, Any]:
        """The whole state of a step (None: the latest), placed as in `read_arrays`; `like` is the tree that was saved.

        ValueError if there is no such step; or one listing all that differs from `like`, before reading.
        """
        return read_arrays(self.folder(step), like, whole=True)

    def read_meta(self, step: int | None) -> dict[str, Any]:
        return read_meta(self.folder(step))

    def drop_after(self, step: int) -> None:
        """Removes the steps after one at which a run goes on, which it will make anew."""
        self._drop([later for later in self.all_steps() if later > step])
        self._remove_leftovers()
        self._manager.reload()
        barrier("later steps are gone")

    def _drop_old(self) -> None:
        steps, every = self.all_steps(), self._config.keep_every
        old = [step for step in steps[: -self._config.keep_last] if not every or step % every]
        self._drop([step for step in old if step not in self._kept])

    def _drop(self, steps: Sequence[int]) -> None:
        """Makes leftovers of steps, each at once: a step that is half there is none."""
        for step in steps if jax.process_index() == 0 else ():
            folder = self._directory / str(step)
            if is_bucket(folder):
                (folder / COMMIT).unlink()
            else:
                (self._directory / DELETING).mkdir(exist_ok=True)
                folder.rename(self._directory / DELETING / str(step))

    def folder(self, step: int | None) -> epath.Path:
        """The folder of a step, by default of the latest; ValueError if there is none."""
        steps = self.all_steps()
        wanted = max(steps, default=None) if step is None else step
        if wanted not in steps:
            raise ValueError(f"no step {'' if step is None else step} in {self._directory}; saved: {steps or 'none'}")
        return self._directory / str(wanted)

    def _check_space(self, step: int, size: int) -> None:
        """Refuses what cannot fit before it fills the disk (orbax still meets quotas and other writers)."""
        local = not is_bucket(self._directory) and jax.process_count() == 1  # or one of many would turn back alone
        if local and size > (free := shutil.disk_usage(self._directory).free):
            sizes = f"step {step} takes {size / 1e6:.1f} MB and {self._directory} has {free / 1e6:.1f} MB free"
            raise ValueError(f"{sizes}: make room and resume (saved steps {self.all_steps()} are intact)")

    def _abandon(self, error: Exception) -> ValueError:
        """Removes the files of the failed save; returns the error to raise."""
        step, self._saving = self._saving, None
        if isinstance(error, Unreachable):  # so are they: the next start removes them
            return error
        self._remove_leftovers()
        self._manager.reload()
        steps = f"saved steps {self.all_steps()} are intact"
        hint = f"check that the folder is writable and has room, and resume ({steps})"
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
        if steps := saved_steps(folder):
            return folder / str(steps[-1])
    hint = f"give a run folder with a saved step, its checkpoints/ folder, or one step's folder; {HINT}"
    raise ValueError(f"no checkpoint in {path}{'' if path.exists() else ', which does not exist'}: {hint}")


def _sealed_meta(meta: Tree) -> dict[str, Any]:
    """A copy for meta.json; ValueError or TypeError for what is not plain JSON."""
    return sealed(json.loads(json.dumps(meta, allow_nan=False)))


def read_meta(path: str | epath.Path) -> dict[str, Any]:
    """The JSON saved with a checkpoint (`path` as for `find_checkpoint`)."""
    folder = find_checkpoint(path)
    try:
        return _whole_meta(folder)
    except ValueError as error:
        raise _damage(folder, lambda path: True, str(error)) from error


def _whole_meta(folder: epath.Path) -> dict[str, Any]:
    """A step's metadata; ValueError if they are damaged, or only one of metadata and arrays has checksums (an older
    version gave them to neither)."""
    file, checksums = folder / META / META_FILE, folder / STATE / stored.CHECKSUMS
    meta, has_checksum = read_perhaps_sealed(file)
    if has_checksum and not checksums.exists():
        raise ValueError(f"{checksums} is missing")
    if not has_checksum and checksums.exists():
        raise ValueError(f"{file} is damaged: it has lost the checksum it was written with")
    return meta


def open_arrays(path: str | epath.Path, only: Callable[[ArrayPath], bool] = lambda path: True) -> ArrayFolder:
    """The arrays of a checkpoint (`path` as for `find_checkpoint`), to be read in parts and checked as they are read.

    Args:
      only: which arrays the caller may read: where one of them is damaged, the step to go back to has all of them.
    Raises:
      DamagedCheckpoint: here and on reading, naming the array, its file and step, and the last good step beside it.
    """
    return _open(find_checkpoint(path), only)


def _open(folder: epath.Path, only: Callable[[ArrayPath], bool]) -> ArrayFolder:
    """`open_arrays` of a step's folder."""
    try:
        meta = _whole_meta(folder)
    except ValueError as error:
        raise _damage(folder, only, str(error)) from error

    def damaged(array: ArrayPath, file: str, why: str) -> DamagedCheckpoint:
        place = folder / STATE / ".".join(array) / file
        return _damage(folder, only, f"{'/'.join(array)}: {place} {why}" if array else why)

    found = ArrayFolder(folder / STATE, damaged, fill="hf" in meta)
    if not found.has_checksums and str(folder) not in _told:
        _told.add(str(folder))
        log.warning("%s has no checksums, an older version saved it: what is read of it is not checked", folder)
    return found


_told: set[str] = set()  # checkpoints without checksums


def _damage(folder: epath.Path, only: Callable[[ArrayPath], bool], what: str) -> DamagedCheckpoint:
    """The error for damage in a step's folder, after a search for the last good step beside it."""
    good = _last_good(folder, only)
    hint = "restore it from a copy" if good is None else f"the last good step is {good}, {folder.parent / str(good)}"
    return DamagedCheckpoint(f"checkpoint {folder} is damaged: {what}; {hint}", good)


def _last_good(damaged: epath.Path, only: Callable[[ArrayPath], bool]) -> int | None:
    """The latest other step whose arrays, where `only` says so, are all as they were saved; reads them all."""
    for step in reversed(saved_steps(damaged.parent)):
        folder = damaged.parent / str(step)
        if folder == damaged:
            continue
        log.warning("%s is damaged: looking whether %s is whole", damaged, folder)
        if _is_whole(folder, only):
            return step
    return None


def _is_whole(folder: epath.Path, only: Callable[[ArrayPath], bool]) -> bool:
    try:
        _whole_meta(folder)
        found = ArrayFolder(folder / STATE, lambda *what: ValueError(what))
        found.read(filter(only, found.layouts), lambda path: found.array(path).check())
    except (ValueError, OSError):
        return False
    return True


def read_shapes(path: str | epath.Path) -> dict[str, Any]:
    """The saved tree, of `jax.ShapeDtypeStruct`, without reading the arrays."""
    return _shapes(open_arrays(path))


def _shapes(found: ArrayFolder) -> dict[str, Any]:
    return unflatten_dict({path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in found.layouts.items()})


def read_arrays(path: str | epath.Path, like: Tree | None = None, whole: bool = False) -> dict[str, Any]:
    """Reads a checkpoint (`path` as for `find_checkpoint`), or the part that `like` has and only its bytes.

    `like` is a nested dict of `jax.ShapeDtypeStruct`, such as "params" and "bias" alone (None: all that was saved);
    a leaf becomes a jax.Array where it has a sharding, a numpy array where it has none. ValueError, before reading,
    listing all of `like` that differs from what was saved (and, if `whole`, all that was saved beyond `like`);
    DamagedCheckpoint for bytes that are missing or changed.
    """
    folder = find_checkpoint(path)
    wanted: set[ArrayPath] | None = None if like is None else set(flatten_dict(like))
    found = _open(folder, lambda path: wanted is None or path in wanted)
    saved = _shapes(found)
    like = saved if like is None else like
    _compare(folder, saved, like, whole)
    leaves: dict[ArrayPath, Any] = flatten_dict(like)  # without the empty dicts that `like` may have
    arrays = found.read(leaves, lambda path: _read_leaf(found, path, leaves[path]))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(unflatten_dict(arrays)))


def _read_leaf(found: ArrayFolder, path: ArrayPath, like: jax.ShapeDtypeStruct) -> Any:
    array = found.array(path)
    if like.sharding is None:
        return array.read()
    return placed(like.shape, like.sharding, array.read)


def placed(shape: Any, sharding: Any, read: Callable[[stored.Index], np.ndarray]) -> jax.Array:
    """An array whose shards on this process's devices are `read`, each once though several devices may hold it."""
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        bounds = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
        if str(bounds) not in parts:
            parts[str(bounds)] = read(bounds)
        return parts[str(bounds)]

    return jax.make_array_from_callback(shape, sharding, part)


def read_mean(paths: Sequence[epath.Path], like: Tree) -> dict[str, Any]:
    """The mean of arrays that several checkpoints have: float32 sums in the order of `paths`, in the dtypes and on the
    devices of `like`, a nested dict of `jax.ShapeDtypeStruct` with shardings. One array more is in memory meanwhile.

    Raises:
      DamagedCheckpoint: as `read_arrays`.
    """
    leaves: dict[ArrayPath, Any] = flatten_dict(like)
    folders = [find_checkpoint(path) for path in paths]
    opened = [_open(folder, lambda path: path in leaves) for folder in folders]
    for folder, found in zip(folders, opened, strict=True):
        _compare(folder, _shapes(found), like, whole=False)

    def mean(path: ArrayPath) -> jax.Array:
        total: Any = 0.0
        for found in opened:
            total = total + _read_leaf(found, path, leaves[path]).astype(np.float32)
        return (total / len(opened)).astype(leaves[path].dtype)

    means = unflatten_dict({path: mean(path) for path in leaves})
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(means))


def make_checkpoint(folder: epath.Path, arrays: Mapping[ArrayPath, Layout]) -> dict[ArrayPath, ts.TensorStore]:
    """Arrays in `folder`, to be written with `arrays.write_chunks`: for states larger than memory. It is one step's
    checkpoint, for whoever reads it, after `finish_checkpoint` only. Begun twice, it goes on."""
    if not is_bucket(folder):
        (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    return stored.create_arrays(folder / STATE, arrays)


def finish_checkpoint(
    folder: epath.Path, arrays: Mapping[ArrayPath, Layout], files: Mapping[ArrayPath, Mapping[str, str]], meta: Tree
) -> None:
    """Completes what `make_checkpoint` made: it has all its values, in `files` with these checksums. Made twice, it
    is the same."""
    stored.seal(folder / STATE, arrays, files)
    (folder / META).mkdir(exist_ok=True)
    write_whole(folder / META / META_FILE, json.dumps(_sealed_meta(meta)))
    if is_bucket(folder):
        write_whole(folder / COMMIT, "")
    else:
        (folder / UNFINISHED).rmdir()


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


def saved_steps(folder: epath.Path) -> list[int]:
    """The steps that were saved in a folder, ascending; one that has lost a piece since is among them."""
    return sorted(int(path.name) for path in _inside(folder) if path.name.isdigit() and _is_committed(path))


def _inside(folder: epath.Path) -> list[epath.Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_committed(step: epath.Path) -> bool:
    """Whether a folder that is called as a step's is one."""
    return (step / COMMIT).exists() if is_bucket(step) else step.is_dir() and UNCOMMITTED not in step.name


def _leftovers(folder: epath.Path) -> list[epath.Path]:
    """The leftovers of a killed save or a removed step: orbax's temporary folders, or in a bucket steps without
    COMMIT."""

    def is_left(path: epath.Path) -> bool:
        number = path.name.removesuffix(UNCOMMITTED)
        if is_bucket(path):
            return number.isdigit() and not _is_committed(path)
        return path.name == DELETING or (number != path.name and number.isdigit() and path.is_dir())

    return [path for path in _inside(folder) if is_left(path)]


def _is_step(path: epath.Path) -> bool:
    """Whether a folder is one step's, though a piece of it may be missing."""
    pieces = (path / STATE).is_dir() or (path / META).is_dir()
    return pieces and not (path / UNFINISHED).exists() and _is_committed(path)


def _absolute(path: str | epath.Path) -> epath.Path:
    return at(path) if is_bucket(path) else at(path).resolve()
