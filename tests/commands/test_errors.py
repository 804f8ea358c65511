"""A user's mistake is one clear message and exit code 2: no traceback, and nothing compiled before it."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

import train
from ling_jax import evaluate
from ling_jax.cli import run_main
from ling_jax.commands import sample
from ling_jax.data.tokenizer import Tokenizer
from tests.support.commands import call
from tests.support.tokenizers import OWN
from tests.tiny_run import REPO, STEPS, start, train_args

GOLDEN = REPO / "tests" / "golden" / "tiny-ling"
FRAME = str.maketrans("", "", "│╭╮╰╯─")  # the box that tyro draws around a message
COMPILED: list[str] = []  # the names of all programs that were compiled, or taken from the cache


def note_compilation(event: str, seconds: float, fun_name: str = "", **_) -> None:
    if event.endswith("/backend_compile_duration") and fun_name != "jit(stage)":  # jax's own copy to a device
        COMPILED.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(note_compilation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a text corpus and the run `trained`."""
    folder = tmp_path_factory.mktemp("errors")
    call("train.py", *train_args(folder, "trained", train__eval_every=0, checkpoint__every=STEPS))
    return folder


@pytest.fixture
def message(monkeypatch, capfd, tmp_path) -> Callable[..., str]:
    """message(main, *args): what a command that must fail says, in one line."""

    def call(main: Callable, *args) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        monkeypatch.setattr("ling_jax.cli.set_up_logging", lambda: None)  # or pytest's own handlers would be lost
        COMPILED.clear()
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        out, err = capfd.readouterr()
        assert stop.value.code == 2 and "Traceback" not in err, err
        assert out == "", "nothing but the message may be printed"
        assert COMPILED == [], "it compiled before it found the mistake"
        lines = err.strip().splitlines()
        assert len(lines) == 1 if lines[0].startswith("error: ") else lines[0].startswith("╭"), err
        return " ".join(err.translate(FRAME).split())

    return call


def assert_says(text: str, *words: str) -> None:
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"


# Settings of a new run -> what the message must name.
SETTINGS = {
    "experts-and-groups": (["--model.num-experts", 9], ["num_experts = 9", "multiple of n_group = 2"]),
    "top-k-and-groups": (
        ["--model.num-experts-per-tok", 5],
        ["num_experts_per_tok = 5", "4 experts", "topk_group = 1", "lower it or raise topk_group"],
    ),
    "too-many-groups": (["--model.topk-group", 3], ["topk_group = 3", "n_group = 2"]),
    "heads": (
        ["--model.num-attention-heads", 3, "--model.num-key-value-heads", 2],
        ["num_attention_heads = 3", "multiple", "num_key_value_heads = 2"],
    ),
    "rotated-width": (["--model.head-dim", 15, "--model.partial-rotary-factor", 1.0], ["15", "even", "head_dim"]),
    "sequence-length": (
        ["--data.sequence-length", 129],
        ["data.sequence_length = 129", "128 positions", "shorten it, or raise max_position_embeddings"],
    ),
    "microbatches": (["--train.microbatches", 3], ["global_batch_size = 4", "multiple", "train.microbatches = 3"]),
    "no-steps": (["--train.steps", 0], ["steps = 0", "at least 1"]),
    "not-a-number": (["--train.steps", "many"], ["--train.steps", "many"]),
    "not-a-choice": (["--train.dtype", "float8"], ["float8", "--train.dtype", "float32", "bfloat16"]),
    "unknown-flag": (["--train.step", 3], ["--train.step", "--train.steps"]),
    "missing-corpus": (["--data.sources.0.path", "/nowhere"], ["/nowhere", "does not exist", ".jsonl, .txt, .parquet"]),
    "wrong-suffix": (["--data.sources.0.path", "train.py"], ["train.py", "'.py'", ".jsonl, .txt, .parquet"]),
    "text-too-short": (
        ["--model.vocab-size", 4000], ["only", "not 4000", "bring more text, or lower model.vocab_size"],
    ),
    "vocabulary-too-small": (["--model.vocab-size", 200], ["200", "256 bytes", "13 special tokens", "269"]),
    "end-of-document": (
        ["--model.eos-token-id", 2],
        ["ends documents with id 1", "model.eos_token_id is 2", "set it (and model.pad_token_id) to 1"],
    ),
    "no-tokenizer": (["--data.tokenizer", "/nowhere"], ["no tokenizer at /nowhere", "tokenizer.json"]),
    "no-weights": (["--init-from", "/nowhere"], ["/nowhere", "does not exist", "run folder"]),
    "other-weights": (["--init-from", GOLDEN], [str(GOLDEN), "model.vocab_size: 512 -> 320", "hidden_size: 64 -> 32"]),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), SETTINGS.values(), ids=SETTINGS.keys())
def test_a_wrong_setting(message, folder, tmp_path, flags, words):
    args = [*train_args(folder, "new", runs_dir=tmp_path), *flags]
    assert_says(message(train.main, *args), *words)
    assert not list(tmp_path.rglob("checkpoints/*"))


def test_a_connection_that_breaks_is_an_error_though_a_closed_output_is_none(message):
    def main(argv):
        raise BrokenPipeError(32, "Broken pipe", "gs://bucket")

    assert_says(message(main), "Broken pipe", "gs://bucket")


def test_an_unknown_configuration(message):
    assert_says(message(train.main, "ling_tyni"), "'ling_tyni'", "ling_tiny", "ling_mini_2_0")


# A file of the corpus -> what the message must name.
CORPORA = {
    "empty": ({"a.txt": b""}, ["a.txt", "is empty", "remove it or write text to it"]),
    "blank": ({"a.txt": b" \n\n"}, ["corpus", "no documents with text"]),
    "no-files": ({}, ["corpus", "holds no documents", ".jsonl, .txt, .parquet"]),
    "undecodable": ({"a.txt": b"plain \xff words\n"}, ["a.txt", "not UTF-8", "0xff", "offset 6", "convert it"]),
    "latin-1-jsonl": ({"a.jsonl": '{"text": "é"}\n'.encode("latin-1")}, ["a.jsonl", "not UTF-8", "0xe9", "convert it"]),
    "invalid-json": ({"a.jsonl": b'{"text": "a"}\n{"text": \n'}, ["a.jsonl:2", "not JSON"]),
    "not-an-object": ({"a.jsonl": b'["a"]\n'}, ["a.jsonl:1", "JSON object", "list"]),
    "no-such-field": ({"a.jsonl": b'{"body": "a"}\n'}, ["a.jsonl:1", "'text'", "fields: body", "set text_field"]),
    "not-parquet": ({"a.parquet": b"PAR?"}, ["a.parquet", "not a parquet file"]),
    "one-line": ({"a.txt": b"one line"}, ["a.txt", "no line end", "held-out", "add documents"]),
    "one-text-twice": (
        {"a.txt": b"same\n", "b.txt": b"same\n"}, ["too few distinct documents", "0 to train on", "add text"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "words"), CORPORA.values(), ids=CORPORA.keys())
def test_a_corpus_that_cannot_be_read(message, folder, tmp_path, files, words):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, data in files.items():
        (corpus / name).write_bytes(data)
    args = train_args(folder, "new", runs_dir=tmp_path / "runs", data__sources__0__path=corpus)
    assert_says(message(train.main, *args), *words)


def test_resuming_with_another_architecture_lists_all_that_differs(message, folder):
    args = train_args(folder, "trained", model__num_experts=16, model__hidden_size=48)
    text = message(train.main, *args)
    assert_says(
        text, "model.num_experts: 8 -> 16", "model.hidden_size: 32 -> 48", "another --run", "--fresh --move-aside"
    )


def test_a_mistake_that_kept_a_run_from_starting_can_be_corrected(message, folder, tmp_path):
    wrong = train_args(folder, "new", runs_dir=tmp_path, model__vocab_size=4000)
    assert_says(message(train.main, *wrong), "lower model.vocab_size")
    corrected = train_args(folder, "new", runs_dir=tmp_path, data__sources__0__path="/nowhere")  # so that it ends here
    assert_says(message(train.main, *corrected), "/nowhere")


def test_another_tokenizer_than_the_runs_own(message, folder, tmp_path):
    other = Tokenizer.train([(REPO / "train.py").read_text()], 300)
    other.save(str(tmp_path))
    args = train_args(folder, "trained", data__tokenizer=tmp_path)
    assert_says(message(train.main, *args), str(tmp_path), "differs", "leave data.tokenizer unset", "new run")


def test_a_tokenizer_with_more_ids_than_the_model(message, folder, tmp_path):
    large_tokenizer().save(str(tmp_path))
    args = train_args(folder, "new", runs_dir=tmp_path, data__tokenizer=tmp_path)
    assert_says(message(train.main, *args), "ids up to 699", "model.vocab_size is 320", "at least 700")


def large_tokenizer() -> Tokenizer:
    """More ids than any model here has rows."""
    return Tokenizer.train([(REPO / "ling_jax" / "config" / "model.py").read_text()], 700)


# Damage to a HF folder -> what the message must name.


def drop_a_tensor(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, hf / "model.safetensors")


def add_a_tensor(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    save_file({**tensors, "model.surplus": tensors["model.norm.weight"]}, hf / "model.safetensors")


def reshape_a_tensor(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    save_file(tensors, hf / "model.safetensors")


def truncate(hf: Path) -> None:
    data = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(data[: len(data) // 2])


def point_outside(hf: Path) -> None:
    names = {name: "../elsewhere.safetensors" for name in load_file(hf / "model.safetensors")}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def drop_the_config(hf: Path) -> None:
    (hf / "config.json").unlink()


def drop_a_field(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    del config["routed_scaling_factor"]
    (hf / "config.json").write_text(json.dumps(config))


def leave_whole(hf: Path) -> None:
    """Only its tokenizer is missing."""


DAMAGE = {
    drop_a_tensor: ["does not match its config.json", "1 tensor(s) missing: model.norm.weight"],
    add_a_tensor: ["1 tensor(s) that the config has no place for: model.surplus"],
    reshape_a_tensor: ["1 wrong shape(s): model.norm.weight is (63,), the config says (64,)"],
    truncate: ["model.safetensors is damaged or truncated", "download it again"],
    point_outside: ["points outside its folder", "'../elsewhere.safetensors'"],
    drop_the_config: ["config.json is missing"],
    drop_a_field: ["config.json lacks routed_scaling_factor", "add"],
    leave_whole: ["no tokenizer.json in or beside", "copy"],
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_hf_folder(message, tmp_path, damage):
    hf = tmp_path / "hf"
    shutil.copytree(GOLDEN, hf, ignore=shutil.ignore_patterns("expected*", "grads*", "generate*"))
    if damage is not leave_whole:
        OWN.save(str(hf))
    damage(hf)
    assert_says(message(sample.main, "--checkpoint", hf, "--prompt", "a"), str(hf), *DAMAGE[damage])


def test_a_prompt_with_tokens_outside_the_vocabulary(message, tmp_path):
    hf = tmp_path / "hf"
    shutil.copytree(GOLDEN, hf, ignore=shutil.ignore_patterns("expected*", "grads*", "generate*"))
    tokenizer = large_tokenizer()
    tokenizer.save(str(hf))
    prompt = "num_experts_per_tok exceeds num_experts"
    assert max(tokenizer.encode(prompt)) >= 512
    text = message(sample.main, "--checkpoint", hf, "--prompt", prompt)
    assert_says(text, "512", "vocab", "tokenizer")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-new-tokens", 500], ["max_new_tokens = 500", "128 positions", "shorten either"]),
        (["--max-new-tokens", 0], ["max_new_tokens = 0", "at least 1"]),
        (["--temperature", -1], ["temperature = -1", "0 is greedy"]),
        (["--top-p", 1.5], ["top_p = 1.5", "at most 1"]),
        (["--top-k", -2], ["top_k = -2", "0 keeps every token"]),
        (["--tempreature", 1], ["--tempreature", "--temperature"]),
    ],
    ids=["too-long", "no-token", "temperature", "top-p", "top-k", "unknown"],
)
def test_a_wrong_flag_of_sample(message, folder, flags, words):
    run_dir = folder / "runs" / "trained"
    assert_says(message(sample.main, "--checkpoint", run_dir, "--prompt", "a", *flags), *words)


def saved_golden(folder: Path, **eos) -> Path:
    """A HF folder with weights and a tokenizer."""
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("expected*", "grads*", "generate*"))
    OWN.save(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | eos))
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", 0], ["--batch-size = 0", "at least 1"]),
        (["--samples", 0], ["--samples = 0", "at least 1"]),
        (["--context-length", 0], ["--context-length = 0", "at least 1"]),
        (["--drafts", 99], ["drafts = 99", "from 0 to 8"]),
        (["--system", "S"], ["--system", "--chat"]),
        (["--thinking", "on"], ["--thinking", "--chat"]),
        (["--prompt", "\udcff"], ["'\\udcff'", "surrogate"]),
    ],
    ids=["batch", "samples", "context", "drafts", "system", "thinking", "bytes"],
)
def test_a_flag_without_a_meaning(message, tmp_path, flags, words):
    hf = saved_golden(tmp_path / "hf")
    prompt = [] if "--prompt" in flags else ["--prompt", "a"]
    assert_says(message(sample.main, "--checkpoint", hf, *prompt, *flags), *words)


def test_a_file_of_prompts_is_checked_whole_before_weights_are_read(message, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_pretrained", lambda *_, **__: 1 / 0)
    file = tmp_path / "prompts.jsonl"
    robot = {"messages": [{"role": "robot", "content": "a"}]}
    file.write_text("\n".join(map(json.dumps, [robot, {"prompt": "a"}, {"prompt": "a " * 300}, {"messages": []}])))
    text = message(sample.main, "--checkpoint", saved_golden(tmp_path / "hf"), "--prompt-file", file)
    assert_says(text, str(file), "line 1: ", "unknown role robot in message 0", "line 3: a prompt of", "256 positions")
    assert_says(text, "line 4: messages is empty")


def test_a_broken_template_is_told_before_a_conversation_begins(message, tmp_path):
    hf = saved_golden(tmp_path / "hf")
    (hf / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    assert_says(message(sample.main, "--checkpoint", hf, "--chat"), "chat template", "division by zero")


def test_a_generation_config_that_cannot_be_understood(message, tmp_path):
    hf = saved_golden(tmp_path / "hf")
    (hf / "generation_config.json").write_text('{"temperature": "hot"}')
    text = message(sample.main, "--checkpoint", hf, "--prompt", "a")
    assert_says(text, "generation_config.json", "temperature = 'hot'", "a number")


def test_a_chat_ends_at_the_tokenizers_end_of_a_turn(tmp_path, capsys):
    """Though no generation_config.json says so: token 4 is far likelier than any other."""
    hf = saved_golden(tmp_path / "hf", eos_token="<|role_end|>")
    flags = ["--temperature", "0", "--logit-bias", "4", "100", "--max-new-tokens", "6"]
    assert sample.main(["--checkpoint", str(hf), "--chat", "--prompt", "hi", *flags]) == 0
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("main", [sample.main, evaluate.main])
@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", ["which does not exist"]), ("", ["no checkpoint in"])], ids=["missing", "empty"]
)
def test_a_checkpoint_that_is_not_there(message, tmp_path, main, name, words):
    (tmp_path / "text").write_text("a")
    rest = ["--prompt", "a"] if main is sample.main else ["--text", tmp_path / "text"]
    assert_says(
        message(main, "--checkpoint", tmp_path / name, *rest), str(tmp_path / name), *words, "give a run folder"
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [(None, ["no file"]), (b"", ["is empty"]), (b"a\xffb", ["not UTF-8", "byte 1", "convert it"])],
    ids=["missing", "empty", "undecodable"],
)
def test_a_text_that_cannot_be_scored(message, folder, tmp_path, data, words):
    file = tmp_path / "text.txt"
    if data is not None:
        file.write_bytes(data)
    text = message(evaluate.main, "--checkpoint", folder / "runs" / "trained", "--text", file)
    assert_says(text, str(file), *words)


def test_windows_longer_than_the_models_positions(message, folder, tmp_path):
    (tmp_path / "text").write_text("a")
    args = ("--checkpoint", folder / "runs" / "trained", "--text", tmp_path / "text", "--length", 129)
    assert_says(message(evaluate.main, *args), "length = 129", "128 positions")


@pytest.mark.parametrize(
    "command",
    [
        ("train.py", "ling_tyni"),
        ("train.py", "ling_tiny", "--model.num-experts", "33"),
        ("sample.py", "--checkpoint", "/nowhere", "--prompt", "a"),
        ("-m", "ling_jax.evaluate", "--checkpoint", "/nowhere", "--text", "/nowhere"),
    ],
    ids=["train-name", "train-setting", "sample", "evaluate"],
)
def test_a_mistake_is_told_within_seconds(command):
    begun = time.monotonic()
    process = start(*command)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and "Traceback" not in err and "rror" in err, err
    assert time.monotonic() - begun < 20
