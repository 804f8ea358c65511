"""Models of the hub, from a server on loopback: what is downloaded, checked, kept, refused, and never written down."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from etils import epath
from huggingface_hub import constants, file_download, snapshot_download

from ling_jax import load_pretrained, runner
from ling_jax.cli import parse_train
from ling_jax.convert.to_hf import to_hf
from ling_jax.convert.tokenizer import generation_config_of, tokenizer_of
from ling_jax.convert.weights import model_config_of, open_weights
from ling_jax.data.tokenizer import Tokenizer
from ling_jax.files import hub, hub_files
from ling_jax.model.model import split_model
from ling_jax.runner import _with_commits
from ling_jax.train.session import Session
from tests.support.adapters import ATTENTION, pair, write_adapter
from tests.support.helpers import assert_trees_equal
from tests.support.hf_folders import assert_same_folder, write_folder
from tests.support.hub_server import SIGNATURE, Hub
from tests.tiny_run import DENSE, REPO, train_args

GOLDEN = REPO / "tests" / "golden"
MODEL, TOKEN = "acme/tiny-ling", "hf_a-token-that-nobody-may-see"
PICKLE = b"cos\nsystem\n(S'touch pwned'\ntR."
CODE = b"raise SystemExit('code of a model was run')\n"


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    text = ["plain words of a short text, one after another, in order " * 3]
    return Tokenizer.train(text, 280).to_json().encode()


def files_of(case: str, tokenizer_json: bytes) -> dict[str, bytes]:
    """A release's folder, with what must never be taken beside."""
    own = [f for f in (GOLDEN / case).iterdir() if f.name.startswith("model") or f.name == "config.json"]
    return {file.name: file.read_bytes() for file in own} | {
        "tokenizer.json": tokenizer_json, "tokenizer_config.json": b'{"add_bos_token": true}',
        "generation_config.json": b'{"temperature": 0.5}', "LICENSE": b"free", "README.md": b"# a card",
        ".gitattributes": b"x", "figure.png": b"\x89PNG", "modeling_bailing_moe_v2.py": CODE,
        "pytorch_model.bin": PICKLE, "training_args.bin": PICKLE, "optimizer.safetensors": b"not of the model",
        "original/config.json": b"{}",
    }  # fmt: skip


@pytest.fixture
def server(tokenizer_json) -> Iterator[Hub]:
    with Hub().running() as running:
        running.add(MODEL, files_of("tiny-ling", tokenizer_json))
        yield running


def environment(server: Hub, folder: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": server.address, "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}


def new_process() -> None:
    """Forgets what this process knows of the hub."""
    hub._commits.clear()
    hub._snapshots.clear()


@pytest.fixture(autouse=True)
def surroundings(server, tmp_path, monkeypatch) -> None:
    """This process asks the server, from an empty cache; the library has read its variables long before."""
    for name, value in environment(server, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in {
        "ENDPOINT": server.address, "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "HF_HUB_OFFLINE": False,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hub_files, "WAITS", (0.0,))
    monkeypatch.chdir(tmp_path)
    new_process()


def blob(name: str) -> Path:
    [path] = hub_files.cache().glob(f"*/snapshots/*/{name}")
    return path.resolve()


# What is taken.


def test_a_model_is_read_as_its_folder_is_and_nothing_else_is_taken(server):
    weights, want = open_weights(MODEL), open_weights(GOLDEN / "tiny-ling")
    assert weights.config == want.config
    for path, stack in want.stacks.items():
        index = tuple(slice(0, size) for size in stack.full_shape)
        np.testing.assert_array_equal(weights.read(path, index), want.read(path, index))
    small = {"LICENSE", "config.json", "generation_config.json", "tokenizer_config.json", "modeling_bailing_moe_v2.py"}
    assert set(server.fetched()) == small | {"model.safetensors", "tokenizer.json"}
    assert tokenizer_of(MODEL).vocab_size == 280 and generation_config_of(MODEL) == {"temperature": 0.5}


def test_only_what_is_asked_for_is_taken(server):
    assert model_config_of(MODEL).num_hidden_layers == 4
    assert server.fetched() == ["config.json"]
    assert Tokenizer.load(MODEL).add_bos_token
    assert server.fetched() == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_the_index_says_which_files_a_model_consists_of(server, tokenizer_json):
    files = files_of("tiny-ling-sharded", tokenizer_json)
    server.add("acme/sharded", files)
    load_pretrained("acme/sharded")
    assert [name for name in server.fetched() if name.endswith("safetensors")] == sorted(
        name for name in files if name.startswith("model-")
    )
    index = json.loads(files[hub.INDEX])
    for stray in ("pytorch_model.bin", "../../secret.safetensors", "model-00009-of-00004.safetensors"):
        first = min(index["weight_map"])
        changed = {**index, "weight_map": index["weight_map"] | {first: stray}}
        server.add("acme/stray", files | {hub.INDEX: json.dumps(changed).encode()})
        new_process()
        with pytest.raises(ValueError, match=f"acme/stray has no {stray}"):
            open_weights("acme/stray")


def test_a_folder_of_that_name_goes_before_the_hub_and_a_name_among_runs_is_a_runs(server, tmp_path):
    (tmp_path / "acme").mkdir()
    os.symlink(GOLDEN / "tiny-ling", tmp_path / "acme" / "tiny-ling")
    assert open_weights(MODEL).folder == Path(MODEL)
    (tmp_path / "runs" / "one" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="no checkpoint in .*runs/won, which does not exist: .*ORG/NAME@REVISION"):
        model_config_of("runs/won")
    assert not server.seen
    server.add("runs/won", {"config.json": (GOLDEN / "tiny-ling" / "config.json").read_bytes()})
    assert model_config_of("runs/won@main").vocab_size == 512
    for name in ("Ling-mini-2.0", "a/b/c", "https://hub/acme/tiny-ling"):
        for read in (Tokenizer.load, open_weights, tokenizer_of):
            with pytest.raises(ValueError, match="(no tokenizer at|no tokenizer.json|no checkpoint in|an address)"):
                read(name)
        with pytest.raises(ValueError, match="ORG/NAME or ORG/NAME@REVISION, such as"):
            open_weights(name)


def test_a_model_and_its_adapter_are_merged_from_the_hub(server, tmp_path):
    write_adapter(tmp_path / "lora", pair(ATTENTION), base_model_name_or_path=MODEL)
    brought = {file.name: file.read_bytes() for file in (tmp_path / "lora").iterdir()}
    server.add("acme/lora", brought | {"tokenizer.json": b"{}", "training_args.bin": PICKLE})
    to_hf(MODEL, str(tmp_path / "from-hub"), adapter="acme/lora")
    to_hf(str(GOLDEN / "tiny-ling"), str(tmp_path / "from-disk"), adapter=str(tmp_path / "lora"))
    assert_same_folder(tmp_path / "from-hub", tmp_path / "from-disk")
    assert sorted(p.name for p in hub_files.home("acme/lora").glob("snapshots/*/*")) == sorted(brought)


# Every file is what the hub says.


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_with_another_hash_is_refused_and_removed(server, name):
    server.damaged.add(name)
    with pytest.raises(ValueError, match=f"{MODEL}: {name} is damaged: its hash is .*run the same command again"):
        open_weights(MODEL)
    assert not list(hub_files.cache().glob(f"*/snapshots/*/{name}"))
    server.damaged.clear()
    assert open_weights(MODEL).config.vocab_size == 512


def test_a_file_is_checked_once_until_it_changes(server, monkeypatch):
    read = []
    digest = hub_files._digest
    monkeypatch.setattr(hub_files, "_digest", lambda path, *rest: read.append(path.name) or digest(path, *rest))
    open_weights(MODEL)
    assert sorted(read) == server.fetched()
    read.clear()
    new_process()
    open_weights(MODEL)
    assert not read
    file = blob("model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    new_process()
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        open_weights(MODEL)
    assert read == ["model.safetensors"] and not file.exists()
    open_weights(MODEL)


def test_what_another_program_left_in_the_cache_is_checked_too(server, tmp_path):
    snapshot_download(MODEL, endpoint=server.address)
    file = blob("model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        open_weights(MODEL)


def test_a_cache_that_cannot_remember_is_checked_each_time(server, tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert model_config_of(MODEL).vocab_size == 512
    assert "files are checked at every start" in caplog.text


# Broken connections, two processes, no room.


def test_a_broken_connection_goes_on_where_it_broke(server):
    server.broken["model.safetensors"] = 2
    load_pretrained(MODEL)
    asked = [seen.range for seen in server.seen if "/cdn/" in seen.path and "model.safetensors" in seen.path]
    size = len((GOLDEN / "tiny-ling" / "model.safetensors").read_bytes())
    starts = [0 if wanted is None else int(wanted[len("bytes=") : -1]) for wanted in asked]
    assert np.abs(np.array(starts) - [0, size // 2, size // 4 * 3]).max() <= hub_files.CHUNK_BYTES


def test_files_that_are_complete_are_kept_when_another_fails(server, tokenizer_json):
    files = files_of("tiny-ling-sharded", tokenizer_json)
    server.add("acme/sharded", files)
    server.damaged.add("model-00003-of-00004.safetensors")
    with pytest.raises(ValueError, match="model-00003-of-00004.safetensors is damaged"):
        open_weights("acme/sharded")
    done = {path.name for path in hub_files.cache().glob("*/snapshots/*/model-*")}
    server.damaged.clear()
    server.seen.clear()
    new_process()
    open_weights("acme/sharded")
    assert not done & set(server.fetched()) and "model-00003-of-00004.safetensors" in server.fetched()


def test_what_a_killed_download_has_left_is_removed_when_it_is_old(server):
    model_config_of(MODEL)
    blobs = blob("config.json").parent
    for name in ("new.incomplete", "old.incomplete"):
        (blobs / name).write_bytes(b"half a file")
    os.utime(blobs / "old.incomplete", (0, time.time() - 2 * hub_files.LEFT_SECONDS))
    open_weights(MODEL)
    assert [file.name for file in blobs.glob("*.incomplete")] == ["new.incomplete"]


def test_a_disk_with_too_little_room_is_told_before_anything_comes(server, monkeypatch):
    model_config_of(MODEL)
    server.seen.clear()
    monkeypatch.setattr(hub_files.shutil, "disk_usage", lambda path: type("", (), {"free": 2_000_000}))
    with pytest.raises(ValueError, match=r"acme/tiny-ling takes 0.002 GB more and .* has 0.002 GB free: make room"):
        open_weights(MODEL)
    assert [name for name in server.fetched() if name.endswith("safetensors")] == []


# Revisions.


def test_a_revision_is_a_commit_for_as_long_as_a_process_lives(server, tokenizer_json):
    files = files_of("tiny-ling", tokenizer_json)
    first = open_weights(MODEL).folder.name
    config = json.loads(files["config.json"]) | {"rope_theta": 1e4}
    second = server.add(MODEL, files | {"config.json": json.dumps(config).encode()})
    assert open_weights(MODEL).folder.name == first and model_config_of(MODEL).rope_theta == 6e5
    new_process()
    server.seen.clear()
    assert open_weights(MODEL).folder.name == second and model_config_of(MODEL).rope_theta == 1e4
    assert server.fetched() == ["config.json"]  # the other files are the same
    assert model_config_of(f"{MODEL}@{first}").rope_theta == 6e5
    server.add(MODEL, files, branch="v1.0")
    assert model_config_of(f"{MODEL}@v1.0").rope_theta == 6e5
    server.add(MODEL, files, branch="refs/pr/1")
    assert model_config_of(f"{MODEL}@refs/pr/1").rope_theta == 6e5


def test_a_runs_config_keeps_the_commits_and_a_resume_takes_them(server, tokenizer_json, tmp_path):
    args = train_args(tmp_path, "warm", data__tokenizer=f"{MODEL}@main")
    run_dir, command = epath.Path(tmp_path / "runs" / "warm"), parse_train(args)[1]
    begun = _with_commits(command.config, run_dir, MODEL)
    first = begun.hub[0].split()[1]
    assert begun.hub == (f"{MODEL}@main {first}",)
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(begun.to_json())
    files = files_of("tiny-ling", tokenizer_json)
    second = server.add(MODEL, files | {"tokenizer_config.json": b'{"add_bos_token": false}'})
    new_process()
    server.seen.clear()
    assert _with_commits(command.config, run_dir, MODEL) == begun
    assert Tokenizer.load(f"{MODEL}@main").add_bos_token and model_config_of(MODEL).vocab_size == 512
    assert not any("/main" in seen.path for seen in server.seen)
    new_process()
    other = _with_commits(command.config, epath.Path(tmp_path / "runs" / "new"), MODEL)
    assert other.hub == (f"{MODEL}@main {second}",)


# Without the hub.


def test_offline_the_cache_is_used_or_says_what_it_lacks(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"{MODEL} is no local folder and not in .*HF_HUB_OFFLINE is set"):
        model_config_of(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model_config_of(MODEL)
    new_process()
    server.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_config_of(MODEL).vocab_size == 512
    with pytest.raises(ValueError, match=f"{MODEL}: .* lacks LICENSE, and the hub is not asked"):
        open_weights(MODEL)
    assert not server.seen


def test_offline_a_cache_that_another_program_filled_is_used(server, monkeypatch):
    snapshot_download(MODEL, endpoint=server.address, allow_patterns=["*.json", "model.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.seen.clear()
    assert open_weights(MODEL).config.vocab_size == 512 and tokenizer_of(MODEL).vocab_size == 280
    assert not server.seen
    blob("model.safetensors").unlink()
    new_process()
    with pytest.raises(ValueError, match=f"{MODEL} has no model.safetensors in .*, and the hub is not asked"):
        open_weights(MODEL)


def test_a_hub_out_of_reach_is_said_or_made_up_for_by_the_cache(server, monkeypatch, caplog):
    model_config_of(MODEL)
    new_process()
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:secret@127.0.0.1:9")
    assert model_config_of(MODEL).vocab_size == 512
    assert "http://127.0.0.1:9 cannot be reached: acme/tiny-ling is taken from" in caplog.text
    with pytest.raises(ValueError, match=r"acme/other is no local folder, and http://127.0.0.1:9 cannot be reached"):
        model_config_of("acme/other")
    assert "secret" not in caplog.text


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for read in (load_pretrained, model_config_of, Tokenizer.load):
        with pytest.raises(ValueError, match=f"{MODEL} is no local folder; .*: pip install huggingface_hub"):
            read(MODEL)


def test_an_old_library_is_told_so(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: None, raising=False)
    with pytest.raises(ValueError, match=f"huggingface_hub {huggingface_hub.__version__} is too old .*--upgrade"):
        model_config_of(MODEL)


# What is refused, in one sentence.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acme/nothing", "acme/nothing is no local folder, and .* has no such model for this token: check its"),
        ("acme/gated", "acme/gated is gated: ask for access at http://.*/acme/gated, then set HF_TOKEN"),
        (f"{MODEL}@v9", f"{MODEL} has no revision v9: give a branch, a tag or a commit"),
        ("acme/pickles", "acme/pickles has no model.safetensors, but pickles .pytorch_model.bin., which can run any"),
        ("acme/empty", "acme/empty has no config.json"),
        ("acme/adapter", "is a LoRA adapter of acme/tiny-ling, not a model: merge it first with python convert.py"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(server, name, words):
    server.gated.add("acme/gated")
    server.add("acme/pickles", {"config.json": b"{}", "pytorch_model.bin": PICKLE})
    server.add("acme/empty", {"README.md": b"soon"})
    told = {"peft_type": "LORA", "base_model_name_or_path": MODEL}
    server.add("acme/adapter", {"adapter_config.json": json.dumps(told).encode(), "adapter_model.safetensors": b"x"})
    with pytest.raises(ValueError, match=words) as raised:
        open_weights(name)
    assert len(str(raised.value).splitlines()) == 1
    assert not [name for name in server.fetched() if name.endswith((".bin", ".safetensors"))]


# The commands, as a user types them.


def command(server: Hub, folder: Path, *words: str, token: str) -> str:
    """Runs a command and returns what it says, output and errors."""
    env = dict(os.environ) | environment(server, folder) | {"HF_TOKEN": token}
    done = subprocess.run(
        [sys.executable, *words], cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_token_opens_a_private_model_and_is_written_nowhere(server, tmp_path, monkeypatch):
    server.token = TOKEN
    server.broken["model.safetensors"] = 1
    monkeypatch.setenv("HF_TOKEN", "hf_of-somebody-else")
    with pytest.raises(ValueError, match=f"{MODEL} is no local folder, and .* has no such model") as raised:
        open_weights(MODEL)
    words = ("convert.py", "to-jax", "--source", MODEL, "--target", str(tmp_path / "ours"))
    out = command(server, tmp_path, *words, token=TOKEN)
    to_hf(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert (tmp_path / "back" / "modeling_bailing_moe_v2.py").read_bytes() == CODE  # as it was, and never run
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = [str(raised.value).encode(), out.encode(), *(path.read_bytes() for path in files)]
    for secret in (TOKEN, "hf_of-somebody-else", SIGNATURE):
        assert not [data for data in written if secret.encode() in data]


def test_two_processes_take_one_model_at_once(server, tmp_path):
    words = [sys.executable, "convert.py", "inspect", "--source", MODEL]
    env = dict(os.environ) | environment(server, tmp_path)
    both = [subprocess.Popen(words, cwd=REPO, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and outs[0] == outs[1]
    assert "snapshots" in outs[0]


def test_a_run_begins_from_a_model_and_a_tokenizer_of_the_hub(server, tmp_path, monkeypatch):
    """Weights, configuration and tokenizer come from the hub, and which they were is in the run's config."""
    begun, run = [], Session.run

    def noted(session, batches):
        begun.append(jax.device_get(session.state.params))
        run(session, batches)

    monkeypatch.setattr(Session, "run", noted)
    eod, files = Tokenizer.load(MODEL).eod_id, server.commits[MODEL, "main"][1]
    changes = dict(model__eos_token_id=eod, model__pad_token_id=eod, data__tokenizer="acme/one-layer", **DENSE)
    changes |= dict(train__steps=1, train__eval_every=0, checkpoint__every=1)
    args = [*train_args(tmp_path, "warm", **changes), "--init-from", "acme/one-layer"]
    _, command = parse_train(args)
    write_folder(tmp_path / "folder", config=command.config.model)
    brought = {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()}
    brought |= {name: data for name, data in files.items() if name.startswith("tokenizer")}
    commit = server.add("acme/one-layer", brought)
    assert runner.run_training("ling_tiny", command) == 0
    run_dir = tmp_path / "runs" / "warm"
    assert json.loads((run_dir / "config.json").read_text())["hub"] == [f"acme/one-layer@main {commit}"]
    assert Tokenizer.load(str(run_dir / "tokenizer")).fingerprint == Tokenizer.load(MODEL).fingerprint
    assert_trees_equal(begun[0], split_model(load_pretrained(tmp_path / "folder"))[1])
