"""Fine-tuning runs: epochs, resumes, what they start from, what they refuse."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ling_jax.checkpoint import read_arrays, read_meta
from ling_jax.cli import parse_post
from ling_jax.config import SFTRun
from ling_jax.data.packing import IGNORE
from ling_jax.post.sft import ConversationFeed, open_conversations
from ling_jax.train.metrics import read_metrics
from tests.support.commands import call
from tests.support.runs import kill_at, lines_of
from tests.tiny_run import DENSE, SHARED, SIZES, numbers, run, start, train_args

TINY = {
    **{name.replace(".", "__").replace("-", "_"): value for name, value in SIZES.items()}, **DENSE,
    "data__sequence_length": 128, "data__holdout_fraction": 0.1, "sft__task_rows": 80, "train__eval_every": 0,
    "sft__epochs": 2,
}  # fmt: skip
TINY.pop("train__steps")


def sft_args(folder: Path, name: str, **changes: Any) -> list[str]:
    """Arguments of `post.py` for `folder`/runs/`name`."""
    settings = {"runs_dir": folder / "runs", "data__cache_dir": folder / "cache", "run": name, **TINY, **changes}
    flags = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    return ["sft", "sft_tiny", *(text for flag, value in flags.items() for text in (f"--{flag}", str(value)))]


def sft(folder: Path, name: str, *flags: Any, code: int = 0, **changes: Any) -> str:
    return call("post.py", *sft_args(folder, name, **changes), *flags, code=code)[1]


def config_of(folder: Path, **changes: Any) -> SFTRun:
    return parse_post("sft", sft_args(folder, "none", **changes)[1:])[1].config


def feed_of(folder: Path, **changes: Any) -> ConversationFeed:
    return open_conversations(config_of(folder, **changes), None, str(folder / "tokenizer"), None, None)


def test_a_run_reads_each_conversation_as_often_as_its_epochs_say(tmp_path):
    feed, config = feed_of(tmp_path), config_of(tmp_path, data__global_batch_size=5)
    rows = len(feed.packed)
    settled = feed.settled(config, 0)
    assert settled.train.steps == -(-2 * rows // 5) and 2 * rows % 5, "the last batch must not be full"
    batches = feed.reading(settled, 0, None, range(5)).batches(None)
    read: dict[bytes, int] = {}
    for _ in range(settled.train.steps):
        batch = next(batches)
        for tokens in batch.arrays["tokens"][batch.arrays["segment_ids"].any(1)]:
            read[tokens.tobytes()] = read.get(tokens.tobytes(), 0) + 1
    assert read == {feed.packed[i]["tokens"].tobytes(): 2 for i in range(rows)}
    assert batch.metrics == {"data/epoch": 2.0} and batch.state.rows == 2 * rows
    padding = batch.arrays["segment_ids"].any(1) == 0
    assert padding.sum() == -2 * rows % 5 and (batch.arrays["targets"][padding] == IGNORE).all()


def test_the_rows_are_the_same_on_any_number_of_hosts(tmp_path):
    feed, config = feed_of(tmp_path), config_of(tmp_path)
    whole = feed.reading(config, 0, None, range(4)).batches(None)
    parts = [feed.reading(config, 0, None, here).batches(None) for here in ([0, 1], [2, 3])]
    for _ in range(5):
        both = [next(part).arrays["tokens"] for part in parts]
        np.testing.assert_array_equal(next(whole).arrays["tokens"], np.concatenate(both))


def test_no_question_is_on_both_sides_of_the_split(tmp_path):
    feed = feed_of(tmp_path)

    def asked(packed) -> set[str]:
        starts = {i: (packed.starts_D[i], packed.starts_D[i + 1]) for row in packed.rows for i in row}
        texts = [feed.tokenizer.decode(packed.tokens_S[begin:end].tolist()) for begin, end in starts.values()]
        return {text.split("<role>HUMAN</role>")[1].split("<|role_end|>")[0] for text in texts}

    held = [asked(packed) for packed in feed.held_out.values()]
    assert len(held) == 2 and held[0] == held[1], "both answers to a question are on one side"
    assert held[0] and not held[0] & asked(feed.packed)


def test_a_run_from_random_weights_learns_and_shows_it(tmp_path):
    log = sft(tmp_path, "a", sft__epochs=30, train__eval_every=40, train__sample_tokens=8)
    records = read_metrics(tmp_path / "runs" / "a")
    assert records[-1]["data/epoch"] == 30 and records[-1]["step"] == len(records)
    assert [r["data/epoch"] for r in records] == sorted(r["data/epoch"] for r in records)
    scored = [record for record in records if "eval/nats_per_token" in record]
    assert scored[-1]["eval/thinking/nats_per_token"] < scored[0]["eval/thinking/nats_per_token"] < 6
    assert {"eval/instant/nats_per_token", "eval/nats_per_token/turn_1"} <= scored[-1].keys()
    assert "eval/bits_per_byte" not in scored[-1]
    page = (tmp_path / "runs" / "a" / "report.html").read_text()
    assert "held-out thinking" in page and "detailed thinking o" in page
    assert "examples to learn from" in log and "report.html" in log


def test_a_run_killed_in_an_epoch_ends_as_one_that_was_left_alone(tmp_path):
    sizes = dict(sft__epochs=3, checkpoint__every=4, **SHARED)
    run("post.py", *sft_args(tmp_path, "whole", **sizes))
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    kill_at(start("post.py", *sft_args(tmp_path, "killed", **sizes)), killed, "line", 7, 0.0)
    assert 0 < read_metrics(killed)[-1]["data/epoch"] % 1 < 1
    run("post.py", *sft_args(tmp_path, "killed", **sizes))
    assert lines_of(killed) == lines_of(whole)
    assert numbers(read_metrics(killed)) == numbers(read_metrics(whole))
    jax.tree.map(np.testing.assert_array_equal, read_arrays(killed), read_arrays(whole))


def write_rows(path: Path, count: int, answer: str = "yes") -> Path:
    rows = [{"prompt": f"is {i} a number", "completion": f"{answer} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_goes_on_with_another_batch_but_not_with_other_rows(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 60)
    changes = dict(data__sources__0__path=rows, data__sequence_length=48, checkpoint__every=3)
    sft(tmp_path, "a", **changes, sft__epochs=1)
    done = read_meta(tmp_path / "runs" / "a")["data"]
    total = done["text"]["conversations"]["rows"]
    assert done["read"]["rows"] == total
    assert "rows would come twice" in sft(tmp_path, "a", **{**changes, "data__sequence_length": 96}, code=2)
    assert "seed" in sft(tmp_path, "a", **changes, data__seed=1, code=2)
    sft(tmp_path, "a", **changes, sft__epochs=3, data__global_batch_size=8)
    more = read_meta(tmp_path / "runs" / "a")["data"]
    assert more["read"]["rows"] == 3 * total and more["next_step"] == done["next_step"] + -(-2 * total // 8)
    write_rows(rows, 60, "no")
    os.utime(rows, (1, 1))
    assert "checksum" in sft(tmp_path, "a", **changes, sft__epochs=4, code=2)


def test_what_is_too_long_is_left_out_or_cut_and_counted(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "a", "completion": "b " * 200}) + "\n")
    changes = dict(data__sources__0__path=rows, data__sequence_length=40, train__steps=1, sft__epochs=0)
    assert "1 examples are longer than data.sequence_length = 40: 1 of them are left out" in sft(
        tmp_path, "a", **changes
    )
    assert "0 of them are left out, the others are cut" in sft(tmp_path, "b", **changes, sft__too_long="cut")
    log = sft(tmp_path, "c", **{**changes, "data__sequence_length": 8}, code=2)
    assert "no conversation fits into data.sequence_length = 8 tokens: the shortest has" in log


def test_a_run_starts_from_a_pretrained_one_and_has_its_model_and_tokenizer(tmp_path):
    call("train.py", *train_args(tmp_path, "base", **{**DENSE, "train__steps": 2, "model__hidden_size": 48}))
    base = tmp_path / "runs" / "base"
    left_out = [f"model__{name}" for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")]
    changes = {name: value for name, value in TINY.items() if not name.startswith("model__")}
    assert all(name in TINY for name in left_out)
    args = ["sft", "sft_tiny", "--init-from", base, "--run", "tuned", "--runs-dir", tmp_path / "runs"]
    flags = {**changes, "data__cache_dir": tmp_path / "cache", "sft__epochs": 1}
    args += [t for k, v in flags.items() for t in (f"--{k.replace('__', '.').replace('_', '-')}", v)]
    _, log = call("post.py", *args)
    tuned = read_meta(tmp_path / "runs" / "tuned")
    assert tuned["config"]["model"]["hidden_size"] == 48 and "sft" in tuned["config"]
    assert tuned["tokenizer"] == read_meta(base)["tokenizer"] and "tokenizer of the weights" in log
    (tmp_path / "runs" / "base").rename(tmp_path / "gone")  # a run that has begun needs its origin no more
    assert "already at step" in call("post.py", *args)[1]
    hf = tmp_path / "hf"
    call("convert.py", "to-hf", "--source", tmp_path / "runs" / "tuned", "--target", hf)
    args[args.index("tuned")], args[args.index(base)] = "again", hf
    call("post.py", *args)
    assert read_meta(tmp_path / "runs" / "again")["config"]["model"]["hidden_size"] == 48


def test_each_command_refuses_the_other_kind_of_run(tmp_path):
    assert "post.py sft sft_tiny" in call("train.py", "sft_tiny", code=2)[1]
    _, err = call("post.py", "sft", "ling_tiny", code=2)
    assert "ling_tiny is no fine-tuning on conversations: train.py ling_tiny; post.py sft has ling_mini_sft" in err
    assert "usage: post.py sft NAME" in call("post.py", code=2)[0]
    assert "sft_tiny" in call("post.py", "sft", code=2)[0]


def test_examples_are_shown_with_what_is_learned_marked(tmp_path):
    out, _ = call("post.py", *sft_args(tmp_path, "a"), "--show", 2)
    assert out.count("tokens are learned") == 2 and "\u27e6" in out and "<|role_end|><|endoftext|>\u27e7" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sft__epochs=-1), "epochs = -1"),
        (dict(sft__task_worked=1.5), "task_worked = 1.5 is a share"),
        (dict(data__sources__0__weight=2.0), "weight and max_epochs of data source 'sums' mean nothing"),
        (
            dict(data__batch_ramp_from=2, data__batch_ramp_by=2, data__batch_ramp_tokens=9, train__microbatches=2),
            "data.batch_ramp_tokens = 9 is for pre-training",
        ),
        (dict(data__sources__0__path="nothing"), "data source 'nothing' does not exist"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, changes, message):
    assert message in " ".join(sft(tmp_path, "a", **changes, code=2).replace("\u2502", " ").split())


def test_held_out_text_of_a_fine_tuned_run_is_refused_with_the_way(tmp_path):
    sft(tmp_path, "a", sft__epochs=0, train__steps=1)
    _, err = call("evaluate", "--checkpoint", tmp_path / "runs" / "a", "--held-out", code=2)
    assert "was fine-tuned on conversations" in err and "ling_jax.post.evaluate" in err
