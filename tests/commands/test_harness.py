"""lm-eval's tasks from files of one's own: results as request by request, kept in the run, and nothing is fetched."""

import importlib.util
import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ling_jax import load_pretrained
from ling_jax.commands import harness
from ling_jax.commands.harness import TaskSettings, file_name
from ling_jax.convert.tokenizer import ends_of, tokenizer_of
from ling_jax.generate.tasks import TaskModel, windows
from ling_jax.model.model import split_model
from ling_jax.train.evaluations import HEADINGS, read_records, rows, save_record
from tests.generate.test_tasks import TIE, alone, continued, words
from tests.support.commands import call
from tests.support.helpers import VALUES, Oracle
from tests.support.tokenizers import OWN
from tests.tiny_run import REPO, SPARSE, train_args

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval, an extra, is not installed"
)
GOLDEN = REPO / "tests" / "golden" / "tiny-ling"
UNSHARE = ("unshare", "--map-root-user", "--net")  # a network of its own, without any interface that is up
WINDOW, NEW = 32, 6  # tokens of the run's rows, and of an answer
CHOICES = """\
task: choices
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
"""
TEXTS = """\
task: texts
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
ANSWERS = """\
task: answers
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""
DOCUMENTS = {
    "choices": [
        {"question": words(2 + i, i), "choices": [words(1 + j, 9 * i + j) for j in range(3)], "answer": i % 3}
        for i in range(12)
    ],
    "texts": [{"text": words(4 + 9 * i, i)} for i in range(4)],
    "answers": [{"question": words(2 + i % 5, i), "answer": words(1, i)} for i in range(10)],
}


def write_tasks(folder: Path) -> Path:
    """The three tasks with their documents; `answers` are what they are."""
    folder.mkdir()
    for name, text in {"choices": CHOICES, "texts": TEXTS, "answers": ANSWERS}.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS[name]))
        data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
        (folder / f"{name}.yaml").write_text(text + data)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    changes = SPARSE | dict(train__steps=4, checkpoint__every=2, train__eval_every=0)
    call("train.py", *train_args(folder, "trained", **changes))
    return folder / "runs" / "trained"


@pytest.fixture
def task_path(tmp_path, monkeypatch) -> Path:
    """A folder with the tasks; what `datasets` makes of their documents is forgotten afterwards."""
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def requests(monkeypatch) -> dict[str, list]:
    """Requests of lm-eval with their answers, by kind."""
    seen: dict[str, list] = {}

    def watch(name: str) -> None:
        ask = getattr(TaskModel, name)

        def watched(model: TaskModel, asked: list) -> list:
            answers = ask(model, asked)
            seen.setdefault(name, []).extend(zip(asked, answers, strict=True))
            return answers

        monkeypatch.setattr(TaskModel, name, watched)

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        watch(name)
    return seen


def assert_as_alone(run: Path, requests: dict[str, list]) -> None:
    """Each answer is that of a loop over single requests without padding, in float64; a tie may fall either way."""
    tokenizer, model = tokenizer_of(str(run)), load_pretrained(run)
    oracle, first, ties = Oracle(model.config, *split_model(model)[1:]), [tokenizer.bos_id], 0
    for (context, continuation), (total, greedy) in requests["loglikelihood"]:
        ids = first + tokenizer.encode(context)
        after = (first + tokenizer.encode(context + continuation))[len(ids) :]
        want, best, distance = alone(oracle, (ids + after)[-WINDOW - 1 : -len(after)], after)
        assert abs(total - want) <= VALUES * max(1, abs(want))
        ties += distance < TIE
        assert greedy == best or distance < TIE
    for text, total in requests["loglikelihood_rolling"]:
        want = sum(alone(oracle, *pair)[0] for pair in windows(tokenizer.encode(text), first[0], WINDOW))
        assert abs(total - want) <= VALUES * max(1, abs(want))
    ends = ends_of(str(run), tokenizer)
    for (prompt, _), text in requests["generate_until"]:
        ids, distance = continued(oracle, (first + tokenizer.encode(prompt))[NEW - WINDOW :], NEW)
        ended = next((i for i, token in enumerate(ids) if token in ends), NEW)
        ties += distance < TIE
        assert text == tokenizer.decode(ids[:ended]).split("\n")[0] or distance < TIE
    print(f"{ties} ties among {sum(map(len, requests.values()))} requests")


@needs_lm_eval
def test_results_are_those_of_the_requests_and_are_kept(run, task_path, requests, monkeypatch):
    reached = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: reached.append(to) or 1 / 0)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: reached.append(args) or 1 / 0)
    out, err = call("evaluate", "--checkpoint", run, "--tasks", "choices,texts", "answers", "--task-path", task_path)
    assert reached == []
    [record] = read_records(run)
    assert (record["step"], record["tasks"], record["window"]) == (4, ["choices", "texts", "answers"], 32)
    table = [tuple(line.split()) for line in out.splitlines()]
    assert table[0] == tuple(" ".join(HEADINGS).split())
    assert table[1:] == [tuple(filter(None, row)) for row in rows(record)] and len(table) == 5
    found = {name: record["results"][name] for name in DOCUMENTS}
    assert_as_alone(run, requests)
    totals = [total for _, (total, _) in requests["loglikelihood"]]
    best = [max(range(3), key=lambda j, i=i: totals[3 * i + j]) for i in range(12)]
    assert found["choices"]["acc,none"] == sum(b == i % 3 for i, b in enumerate(best)) / 12
    nats = -sum(total for _, total in requests["loglikelihood_rolling"])
    count = sum(len(document["text"].encode()) for document in DOCUMENTS["texts"])
    assert math.isclose(found["texts"]["bits_per_byte,none"], nats / count / math.log(2), rel_tol=1e-9)
    right = [text == DOCUMENTS["answers"][i]["answer"] for i, (_, text) in enumerate(requests["generate_until"])]
    assert found["answers"]["exact_match,none"] == sum(right) / 10
    page = (run / "report.html").read_text()
    assert page.count('id="evaluations"') == 1 and f"<td>{found['choices']['acc,none']:.4f}</td>" in page
    assert str(run / "evaluations" / "4-choices+texts+answers.json") in err


@needs_lm_eval
def test_exact_match_counts_answers_that_are_right(run, task_path, requests):
    """Where the documents' answers are the model's own."""
    asked = ("--checkpoint", run, "--tasks", "answers", "--task-path", task_path)
    call("evaluate", *asked, "--limit", 10)
    own = [text for _, text in requests["generate_until"]]
    documents = [document | {"answer": text} for document, text in zip(DOCUMENTS["answers"], own, strict=True)]
    (task_path / "answers.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    out, _ = call("evaluate", *asked, "--limit", 10, "--num-fewshot", 0)
    assert out.splitlines()[1].split()[:3] == ["answers", "exact_match", "1.0000"]
    assert {path.stem for path in (run / "evaluations").iterdir()} >= {
        "4-answers-first-10",
        "4-answers-0-shot-first-10",
    }


@needs_lm_eval
def test_questions_in_the_chat_template(run, task_path, requests):
    call(
        "evaluate", "--checkpoint", run / "checkpoints" / "2", "--tasks", "answers", "--task-path", task_path, "--chat"
    )
    (prompt, _), _ = requests["generate_until"][0]
    assert prompt.startswith("<role>SYSTEM</role>") and prompt.endswith("<|role_end|><role>ASSISTANT</role>")
    assert DOCUMENTS["answers"][0]["question"] in prompt
    assert (run / "evaluations" / "2-answers-chat.json").exists()


def test_a_begun_answer_is_gone_on_with():
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is "}]
    assert harness.chat_text(OWN, history, False).endswith("<role>ASSISTANT</role>The answer is")


@needs_lm_eval
def test_windows_are_lm_evals():
    utils = importlib.import_module("lm_eval.utils")
    for count in (0, 1, 7, 8, 9, 30):
        ids = list(range(count))
        theirs = utils.get_rolling_token_windows(ids, prefix_token=-1, max_seq_len=8, context_len=1)
        assert list(windows(ids, -1, 8)) == [utils.make_disjoint_window(pair) for pair in theirs]


@needs_lm_eval
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="this system has no unshare, or does not permit it",
)
def test_without_a_network(run, task_path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    command = ["-m", "ling_jax.evaluate", "--checkpoint", run, "--tasks", "choices", "--task-path", task_path]
    words = [*UNSHARE, sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("choices")


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("chioces", "", "", ["no task, group or tag 'chioces'; names like it: choices"]),
        ("choices", "choices.jsonl", "gone.jsonl", ["task choices cannot be loaded", "gone.jsonl"]),
        ("choices", "dataset_path: json\n", "", ["task choices cannot be loaded"]),
        ("choices", "test_split: test", "test_split: exam", ["task choices cannot be loaded: there is no 'exam' in"]),
        ("answers", "max_gen_toks: 6", "max_gen_toks: 60", ["task answers", "window of 32"]),
        ("answers", "max_gen_toks: 6", "max_gen_toks: 6\n  best_of: 6", ["task answers", "best_of"]),
        ("answers", "task: answers", "task: answers\nunsafe_code: true", ["task answers runs code"]),
    ],
)
def test_a_mistake_is_told_before_weights_are_read(run, task_path, monkeypatch, name, old, new, says):
    monkeypatch.setattr(harness, "load_weights", lambda *_, **__: 1 / 0)
    if not old:  # or all of lm-eval's own tasks would be listed, for ten seconds
        manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=task_path, include_defaults=False)
        monkeypatch.setattr(harness, "_index", lambda *_: manager)
    else:
        file = task_path / f"{name}.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    _, err = call("evaluate", "--checkpoint", run, "--tasks", name, "--task-path", task_path, code=2)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all(text in line for text in says), line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "give one of --text FILE, --held-out and --tasks NAMES"),
        (("--text", "a", "--tasks", "b"), "give one of --text FILE, --held-out and --tasks NAMES"),
        (("--tasks", "b", "--held-out"), "give one of --text FILE, --held-out and --tasks NAMES"),
        (("--held-out",), f"--held-out: {GOLDEN} is no checkpoint of a run, nor an average of some: give --text"),
        (("--text", "a", "--limit", 3), "--limit and --chat go with --tasks"),
        (("--tasks", "a", "--compare-slopes"), "--compare-slopes goes with --text"),
        (("--tasks", "a", "--limit", 0), "--limit = 0 must be at least 1"),
        (("--tasks", "a", "--length", 257), "length = 257 must be between 2 and the model's 256 positions"),
    ],
)
def test_flags_that_do_not_go_together(flags, says):
    _, err = call("evaluate", "--checkpoint", GOLDEN, *flags, code=2)
    assert says in err


@needs_lm_eval
def test_a_folder_of_tasks_that_is_not_there(run, tmp_path):
    _, err = call("evaluate", "--checkpoint", run, "--tasks", "a", "--task-path", tmp_path / "gone", code=2)
    assert f"--task-path: no folder {tmp_path / 'gone'}" in err


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    _, err = call("evaluate", "--checkpoint", GOLDEN, "--tasks", "choices", code=2)
    assert err == "error: --tasks needs lm-eval, which is not installed: pip install 'lm-eval>=0.4.13'\n"


def test_records_are_read_by_step_and_a_stranger_is_named(tmp_path):
    for step in (20, 100, 3):
        save_record(tmp_path, f"{step}-a", {"step": step, "results": {"a": {"acc,none": 0.5, "alias": "a"}}})
    assert [record["step"] for record in read_records(tmp_path)] == [3, 20, 100]
    assert rows(read_records(tmp_path)[0]) == [("a", "acc", "0.5000", "", "")]
    (tmp_path / "evaluations" / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="b.json is no record of an evaluation"):
        read_records(tmp_path)


def test_a_file_is_named_by_what_was_asked():
    settings = TaskSettings(tasks=("a*", "b"), window=8, num_fewshot=5, limit=None, chat=True)
    assert file_name(settings).startswith("a_+b-") and file_name(settings).endswith("-chat-5-shot")
    assert file_name(settings) != file_name(TaskSettings(**{**vars(settings), "tasks": ("a?", "b")}))
    assert len(file_name(TaskSettings(**{**vars(settings), "tasks": ("name",) * 99}))) < 150
