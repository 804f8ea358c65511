"""Models of the Hugging Face hub, by their id: which files a caller needs, of which commit.

A hub id is ORG/NAME or ORG/NAME@REVISION. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to
`huggingface_hub`. Only safetensors and text are taken, and nothing of it is ever run; see `hub_files` for how each file
is checked. A revision is resolved to a commit once in a process, and a run keeps it in its config (`pinned`).
"""

import contextlib
import fnmatch
import json
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from ling_jax.files.hub_files import File, Snapshot, address, cache, home, is_out_of_reach, library, said, take
from ling_jax.files.whole import read_json

log = logging.getLogger(__name__)

HINT = "a model of the hub is ORG/NAME or ORG/NAME@REVISION, such as inclusionAI/Ling-mini-2.0"
ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"  # the revision without an @
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What a caller needs of a model: patterns of names.
CONFIG = ("config.json", ADAPTER_CONFIG)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
BESIDE = (*CONFIG, "generation_config.json", *TOKENIZER)
WEIGHTS = (*BESIDE, "*.json", "*.jinja", "*.txt", "*.py", "LICENSE*", "NOTICE*")  # and the files that `_weights` names
ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
LISTINGS = ".ling_jax"  # in a model's folder of the cache: what the hub said of each commit

_commits: dict[str, str] = {}  # of "ORG/NAME@REVISION": what each stands for in this process
_snapshots: dict[tuple[str, str], Snapshot] = {}  # by model and commit


def folder_of(path: str | os.PathLike[str], patterns: Sequence[str]) -> pathlib.Path | None:
    """The local folder with files of a hub's model, downloaded and checked; None for what is no hub id, but a path.

    Args:
      path: ORG/NAME or ORG/NAME@REVISION; whatever is there on the disk goes before the hub.
      patterns: CONFIG, TOKENIZER, BESIDE, WEIGHTS or ADAPTER: the files that the caller needs.
    Raises:
      ValueError: one sentence, for a model or revision that is not there or not for this token, a hub out of reach, a
        file with another hash than the hub's, a disk with too little room, or the library that is missing.
    """
    asked = _parse(path)
    if asked is None:
        return None
    snapshot = _snapshot(*asked)
    names = [name for name in snapshot.files if _matches(name, patterns)]
    if not names:
        raise ValueError(f"{snapshot.name} has no {patterns[0]}{_where(snapshot)}")
    take(snapshot, names)
    if patterns is WEIGHTS:
        take(snapshot, _weights(snapshot))
    return snapshot.folder


def pinned(names: Iterable[str], kept: Sequence[str]) -> tuple[str, ...]:
    """The commits of the hub ids among `names`, each as "ORG/NAME@REVISION COMMIT", with those of `kept`, which hold
    for the rest of this process whatever the hub says today."""
    pins = dict(pin.split() for pin in kept)
    _commits.update(pins)
    for asked in filter(None, map(_parse, names)):
        if "@".join(asked) not in pins:
            pins["@".join(asked)] = _snapshot(*asked).commit
    return tuple(f"{name} {commit}" for name, commit in sorted(pins.items()))


def _parse(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """(ORG/NAME, revision) of a hub id. A name in a folder of runs is a run's, misspelled, and nobody else's affair."""
    if re.match("https?://", os.fspath(path)):
        raise ValueError(f"{path} is an address, which nothing is read from: {HINT}")
    found = ID.fullmatch(os.fspath(path))
    if found is None or os.path.exists(path):
        return None
    beside = pathlib.Path(path).parent
    if found[2] is None and beside.is_dir() and any((run / "checkpoints").is_dir() for run in beside.iterdir()):
        return None
    return found[1], found[2] or MAIN


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file is among those needed; of folders, only the one that a pattern names."""
    folder = name.rpartition("/")[0]
    return any(folder == p.rpartition("/")[0] and fnmatch.fnmatchcase(name, p) for p in patterns)


def _where(snapshot: Snapshot) -> str:
    return "" if snapshot.online else f" in {cache()}, and the hub is not asked"


def _weights(snapshot: Snapshot) -> list[str]:
    """The safetensors files that a model consists of; none for an adapter."""
    have = snapshot.files
    if INDEX in have:
        named = read_json(snapshot.folder / INDEX).get("weight_map")
        files = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
    else:
        files = [WHOLE] if WHOLE in have or ADAPTER_CONFIG not in have else []
    if wrong := [file for file in files if file not in have or not file.endswith(".safetensors")]:
        pickles = sorted(name for name in have if name.endswith(PICKLES))
        hint = f", but pickles ({pickles[0]}), which can run any code when read" if pickles else ""
        raise ValueError(f"{snapshot.name} has no {wrong[0]}{_where(snapshot)}{hint}: only safetensors files are taken")
    return files


def _snapshot(repo: str, revision: str) -> Snapshot:
    """The commit that a revision stands for, and its files: asked of the hub once, or known from an earlier time."""
    key, name = f"{repo}@{revision}", repo if revision == MAIN else f"{repo}@{revision}"
    hub = library(name)
    commit = revision if COMMIT.fullmatch(revision) else _commits.get(key)
    if commit is not None and (repo, commit) in _snapshots:
        return _snapshots[repo, commit]
    online, files = not hub.constants.HF_HUB_OFFLINE, _listed(repo, commit)
    if files is None and online:
        try:
            commit, files = _ask(hub, repo, commit or revision)
        except Exception as error:
            if not is_out_of_reach(error) or _in_cache(repo, commit or revision) is None:
                raise said(error, name) from None
            log.warning("%s cannot be reached: %s is taken from %s", address(), name, cache())
            online = False
        else:
            _note(repo, revision, commit, files)
    if files is None:
        commit = _in_cache(repo, commit or revision)
        if commit is None:
            raise ValueError(
                f"{name} is no local folder and not in {cache()}, and HF_HUB_OFFLINE is set: unset it, or run the same "
                "command once where the hub can be reached"
            )
        files = _listed(repo, commit) or _cached(home(repo) / "snapshots" / commit)
    assert commit is not None
    _commits[key] = commit
    _snapshots[repo, commit] = Snapshot(name, repo, commit, files, online)
    return _snapshots[repo, commit]


def _ask(hub: Any, repo: str, revision: str) -> tuple[str, dict[str, File]]:
    info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    log.info("%s at %s is commit %s", repo, revision, info.sha)
    siblings = info.siblings or ()
    return info.sha, {f.rfilename: File(f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in siblings}


def _note(repo: str, revision: str, commit: str, files: dict[str, File]) -> None:
    """Remembers what the hub said, as the library remembers a revision: for a time without it."""
    texts = {home(repo) / LISTINGS / f"{commit}.json": json.dumps(files)}
    if revision != commit:
        texts[home(repo) / "refs" / revision] = commit
    with contextlib.suppress(OSError):  # a cache that only others may fill can be read all the same
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
            temporary.write_text(text)
            temporary.replace(path)


def _listed(repo: str, commit: str | None) -> dict[str, File] | None:
    """The file list of a commit that the hub once gave, which never changes."""
    file = home(repo) / LISTINGS / f"{commit}.json"
    return {name: File(*entry) for name, entry in read_json(file).items()} if commit and file.is_file() else None


def _in_cache(repo: str, revision: str) -> str | None:
    """The commit that a revision stood for when the cache got files of it; None if it has none."""
    ref = home(repo) / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    return commit if (home(repo) / "snapshots" / commit).is_dir() else None


def _cached(folder: pathlib.Path) -> dict[str, File]:
    """The files that another program has left in the cache."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return dict.fromkeys(sorted(found), File(None, None))
