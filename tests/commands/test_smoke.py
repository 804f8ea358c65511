"""The commands, as a user types them: train, resume, stop, sample, evaluate, and start from given weights."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import sample
from ling_jax.cli import parse_train
from ling_jax.config import RunConfig
from ling_jax.convert.to_hf import to_hf
from ling_jax.data.sources import read_corpus
from ling_jax.evaluate import evaluate, window_of
from ling_jax.train.metrics import read_metrics
from tests.support.commands import call
from tests.tiny_run import REPO, STEPS, WORDS, numbers, run, start, train_args

KEYS = {
    "step", "train/loss", "train/tokens_per_second", "train/mfu", "train/data_wait_s", "moe/load_max_over_mean",
    "moe/dropped", "mem/peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a text corpus and the finished run `whole`."""
    folder = tmp_path_factory.mktemp("smoke")
    run("train.py", *train_args(folder, "whole", train__sample_tokens=96))
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    return folder / "runs" / "whole"


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


def held_out_file(folder: Path) -> Path:
    """The run's held-out text, which is one document, as a file."""
    corpus = read_corpus(parse_train(train_args(folder, "whole"))[1].config.data)
    [document] = corpus.heldout["text"]
    path = folder / "heldout.txt"
    path.write_text(document.text)
    return path


def test_a_run_learns_and_leaves_its_record_checkpoints_report_and_tokenizer(whole):
    records = read_metrics(whole)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(record.keys() >= KEYS for record in records)
    assert [record["step"] for record in records if "eval/bits_per_byte" in record] == [20, 40, 60]
    losses = [record["train/loss"] for record in records]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1, losses
    bits = [record["eval/bits_per_byte"] for record in records if "eval/bits_per_byte" in record]
    assert bits == sorted(bits, reverse=True), bits
    assert steps_of(whole) == [40, 60]
    assert RunConfig.from_json((whole / "config.json").read_text()).train.steps == STEPS
    assert {path.name for path in (whole / "report").iterdir()} >= {"loss.png", "bits_per_byte.png", "expert_load.png"}
    page = (whole / "report.html").read_text()
    assert (
        "<h2>Sample</h2>" in page
        and page.count("data:image/png;base64,") >= 6
        and not re.search(r'(src|href)="http', page)
    )
    tokenizer = {path.name for path in (whole / "tokenizer").iterdir()}
    assert tokenizer >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert list((whole / "tensorboard").iterdir())


def test_a_finished_run_does_nothing_more_until_it_is_given_more_steps(folder, whole):
    shutil.copytree(whole, folder / "runs" / "longer")
    lines = (whole / "metrics.jsonl").read_bytes()
    _, log = call("train.py", *train_args(folder, "longer"))
    assert f"resuming from step {STEPS}" in log
    assert (folder / "runs" / "longer" / "metrics.jsonl").read_bytes() == lines
    _, log = call("train.py", *train_args(folder, "longer", train__steps=STEPS + 5))
    assert f"resuming from step {STEPS}" in log
    longer = (folder / "runs" / "longer" / "metrics.jsonl").read_bytes()
    assert longer.startswith(lines)
    assert [json.loads(line)["step"] for line in longer[len(lines) :].splitlines()] == list(range(61, 66))
    assert steps_of(folder / "runs" / "longer")[-1] == STEPS + 5


def test_sigterm_saves_and_ends_cleanly_and_the_run_goes_on_as_if_nothing_had_been(folder, whole):
    process = start("train.py", *train_args(folder, "stopped"))
    metrics = folder / "runs" / "stopped" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    stopped = re.search(r"stopped by SIGTERM at step (\d+); run the same command to resume", log)
    assert stopped, log
    step = int(stopped[1])
    assert 3 <= step < STEPS and steps_of(folder / "runs" / "stopped")[-1] == step
    _, log = run("train.py", *train_args(folder, "stopped"))
    assert f"resuming from step {step}" in log
    assert numbers(read_metrics(folder / "runs" / "stopped")) == numbers(read_metrics(whole))


def test_sample_continues_a_prompt_the_same_way_each_time(whole):
    command = ("sample.py", "--checkpoint", whole, "--prompt", "the model reads", "--max-new-tokens", 24)
    greedy, log = run(*command, "--temperature", 0)
    assert greedy.startswith("the model reads") and len(greedy.split()) > 5
    assert sum(word in WORDS for word in greedy.split()) > 4, greedy
    assert log == ""
    assert run(*command, "--temperature", 0)[0] == greedy


def test_sample_answers_in_chat(whole):
    command = ("sample.py", "--checkpoint", whole / "checkpoints", "--prompt", "which word", "--chat", "--seed", 1)
    answer, _ = call(*command, "--max-new-tokens", 8)
    assert answer.strip() and "which word" not in answer and "<role>" not in answer


def test_sample_answers_a_file_of_prompts_and_tells_its_speed(whole, tmp_path):
    prompts = [{"prompt": "the model reads", "id": "a"}, {"messages": [{"role": "user", "content": "which word"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, prompts)))
    command = ("sample.py", "--checkpoint", whole, "--max-new-tokens", 8, "--temperature", 0)
    out, _ = call(*command, "--prompt-file", file, "--samples", 2)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line.get("id"), line["sample"]) for line in lines] == [("a", 0), ("a", 1), (None, 0), (None, 1)]
    assert all(line["tokens"] == 8 and line["end"] == "length" and line["completion"] for line in lines)
    alone, log = call(*command, "--prompt", "the model reads", "--stats")
    assert alone == f"the model reads{lines[0]['completion']}\n" and "tokens/s" in log


def test_sample_talks_until_the_end_of_its_input(whole):
    chat = start("sample.py", "--checkpoint", whole, "--chat", "--max-new-tokens", 4, stdin=subprocess.PIPE)
    out, log = chat.communicate("which word\nand another\n", timeout=120)
    assert chat.returncode == 0, out + log
    first, _ = call("sample.py", "--checkpoint", whole, "--prompt", "which word", "--chat", "--max-new-tokens", 4)
    assert first.strip() and out.count(first.strip()) >= 1, (out, first)
    assert len(out.strip().splitlines()) >= 2, out


def test_evaluate_gives_the_bits_per_byte_that_the_run_logged(folder, whole):
    text = held_out_file(folder)
    logged = read_metrics(whole)[-1]
    score = evaluate(str(whole), text.read_text(), 32, 4)
    assert window_of(str(whole)) == 32  # as it was trained
    assert score.bits_per_byte == pytest.approx(logged["eval/bits_per_byte"], rel=1e-6)
    assert score.nats_per_token == pytest.approx(logged["eval/nats_per_token"], rel=1e-6)
    out, _ = run("-m", "ling_jax.evaluate", "--checkpoint", whole, "--text", text, "--length", 32, "--batch-size", 4)
    shown = re.search(r"bits per byte +(\d+\.(\d{4,}))", out)
    assert shown and f"{score.bits_per_byte:.{len(shown[2])}f}" == shown[1], out
    assert f"{len(text.read_bytes()):,} bytes" in out and re.search(r"perplexity +[\d.]+", out)


def test_fresh_refuses_a_folder_with_a_run_or_moves_it_aside(folder, whole):
    aside = folder / "fresh"
    shutil.copytree(whole, aside / "run")
    before = (aside / "run" / "metrics.jsonl").read_bytes()
    again = train_args(folder, "run", runs_dir=aside)
    _, log = call("train.py", *again, "--fresh", code=2)
    assert re.fullmatch(r"error: .*holds a run.*--move-aside.*", log.splitlines()[-1])
    assert (aside / "run" / "metrics.jsonl").read_bytes() == before
    call("train.py", *again, "--fresh", "--move-aside")
    assert numbers(read_metrics(aside / "run")) == numbers(read_metrics(whole))
    [moved] = [path for path in aside.iterdir() if path.name != "run"]
    assert moved.name.startswith("run.") and (moved / "metrics.jsonl").read_bytes() == before


def test_print_config_prints_what_would_run_and_does_nothing(folder, whole):
    out, log = call("train.py", *train_args(folder, "printed", train__steps=7), "--print-config")
    printed = RunConfig.from_json(out)
    assert printed.train.steps == 7
    assert printed.model == RunConfig.from_json((whole / "config.json").read_text()).model
    assert log == "" and not (folder / "runs" / "printed").exists()


def test_the_profiler_window_writes_a_trace_also_at_the_runs_end(folder):
    window = dict(train__profile_start=STEPS - 2, train__profile_steps=2)
    call("train.py", *train_args(folder, "profiled", **window))
    files = [path for path in (folder / "runs" / "profiled" / "profile").rglob("*") if path.is_file()]
    assert any(path.name.endswith(".xplane.pb") and path.stat().st_size > 0 for path in files), files


def test_a_run_starts_from_a_hf_folder_and_sample_reads_it(folder, whole, capsys):
    hf = folder / "hf"
    to_hf(str(whole), str(hf))
    ids = {"bos_token_id": 0, "eos_token_id": [1, 4], "pad_token_id": 1}
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8}
    assert json.loads((hf / "generation_config.json").read_text()) == ids | sampled
    written = json.loads((hf / "config.json").read_text())
    assert (written["model_type"], written["bos_token_id"], written["eos_token_id"]) == ("bailing_moe", 0, 1)
    original = json.loads((hf / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling.Model"}}
    (hf / "config.json").write_text(json.dumps(original))
    (hf / "modeling.py").write_text("raise SystemExit")
    texts = []
    for checkpoint in (whole, hf):
        options = ["--prompt", "plain words", "--temperature", "0", "--max-new-tokens", "16"]
        sample.main(["--checkpoint", str(checkpoint), *options])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    call("train.py", *train_args(folder, "warm"), "--init-from", hf)
    new, warm = read_metrics(whole), read_metrics(folder / "runs" / "warm")
    assert abs(warm[0]["train/loss"] - new[-1]["train/loss"]) < 0.3 < new[0]["train/loss"] - warm[0]["train/loss"]
    to_hf(str(folder / "runs" / "warm"), str(folder / "back"))
    assert json.loads((folder / "back" / "config.json").read_text()) == original
    for name in ("tokenizer.json", "generation_config.json", "modeling.py"):
        assert (folder / "back" / name).read_text() == (hf / name).read_text()


def test_init_from_another_architecture_is_one_error_that_lists_what_differs(folder):
    golden = REPO / "tests" / "golden" / "tiny-ling"
    _, log = call("train.py", *train_args(folder, "other"), "--init-from", golden, code=2)
    error = log.splitlines()[-1]
    assert error.startswith("error: ") and str(golden) in error
    assert "model.vocab_size: 512 -> 320" in error and "model.hidden_size: 64 -> 32" in error
