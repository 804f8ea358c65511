"""The comparison with PyTorch: what it runs, in which order, and what it makes of the answers; stubs stand for both
sides, so no torch is needed."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from benchmarks import decode, peers, train_step
from benchmarks.peers import Clocks, Command, Kind, arguments, check, confined, environment, kinds_of, peer_spec
from ling_jax.cli import run_main
from tests.tiny_run import REPO

PEER_SCRIPT = REPO / "benchmarks" / "peer_glm4_moe.py"

# Stands for both Pythons: answers with the next rate of its kind, and writes down how it was called.
STUB = """#!{python} -IS
import json, os, sys
words, here = sys.argv[1:], os.path.dirname(os.path.abspath(__file__))
if words[0] == "-P":
    side, spec = "peer", json.loads(words[2])
else:
    spec = dict(zip([name[2:].replace("-", "_") for name in words[2::2]], words[3::2]))
    side, spec["what"] = "ours", {{"benchmarks.train_step": "train", "benchmarks.decode": "decode"}}[words[1]]
kind = " ".join([side, spec["what"], spec["dtype"], *([str(spec["batch"])] if spec["what"] == "decode" else [])])
env = {{name: os.environ[name] for name in ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "JAX_PLATFORMS")}}
cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
log = os.path.join(here, "log")
with open(log, "a+") as file:
    file.seek(0)
    before = sum(json.loads(line)["kind"] == kind for line in file)
    file.write(json.dumps({{"kind": kind, "env": env, "cpus": cpus}}) + "\\n")
rates = json.load(open(os.path.join(here, "rates")))
if kind not in rates:
    sys.exit("no such rate: " + kind)
more = {{"matmul_gflops": 300.0 + before}} if side == "ours" else {{"setting": "quick"}}
print("some words before")
print(json.dumps({{"tokens_per_second": rates[kind][before], "step_ms": 5.0, "versions": {{"is": side}}}} | more))
"""
RATES = {
    "ours train float32": [300, 330],
    "peer train float32": [200, 300],
    "ours train bfloat16": [600, 660],
    "peer train autocast": [150, 150],
    "peer train bfloat16": [100, 120],
    "ours decode float32 8": [40, 60],
    "peer decode float32 8": [20, 20],
}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The program that stands for the peer's Python and for this one; its answers are RATES."""
    path = tmp_path / "python"
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    (tmp_path / "rates").write_text(json.dumps(RATES))
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def run(stub: Path, *flags: str) -> None:
    """Two rounds."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    peers.main(["--peer-python", str(stub), "--rounds", "2", "--threads", str(len(cpus)), *flags])


def test_both_sides_run_in_turns_and_the_table_and_json_compare_them(stub, capsys):
    run(stub, "--what", "train")
    calls = [json.loads(line) for line in (stub.parent / "log").read_text().splitlines()]
    train = [kind for kind in RATES if " train " in kind]
    assert [call["kind"] for call in calls] == train * 2
    assert all(call["env"] == calls[0]["env"] and call["cpus"] == calls[0]["cpus"] for call in calls)

    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert [(one["ours"], one["peer"], one["fastest_peer"]) for one in result["comparisons"]] == [
        ("train float32", "train float32", True),
        ("train bfloat16", "train autocast", False),
        ("train bfloat16", "train bfloat16", False),
        ("train bfloat16", "train float32", True),
    ]
    assert [one["ratio"] for one in result["comparisons"]] == pytest.approx(
        [315 / 250, 630 / 150, 630 / 110, 630 / 250]
    )
    assert result["comparisons"][0]["ratio_of_each_round"] == pytest.approx([1.5, 1.1])
    assert result["ours"]["train bfloat16"]["of_each_round"] == [600, 660]
    assert result["peer"]["train autocast"]["settings"] == ["quick"]
    assert result["versions"] == {"ours": {"is": "ours"}, "peer": {"is": "peer"}}
    assert (result["matmul_gflops"], result["matmul_gflops_range"]) == (300.5, [300, 301])
    assert [line.split() for line in lines[1:5]] == [
        "train float32 train float32 * 315 250 1.26 1.50 1.10".split(),
        "train bfloat16 train autocast 630 150 4.20 4.00 4.40".split(),
        "train bfloat16 train bfloat16 630 110 5.73 6.00 5.50".split(),
        "train bfloat16 train float32 * 630 250 2.52 3.00 2.20".split(),
    ]


@pytest.mark.parametrize(("used", "told"), [(0.01, False), (0.5, True)])
def test_a_busy_machine_is_told(stub, capsys, monkeypatch, used, told):
    monkeypatch.setattr(peers.Clocks, "other_cpus", lambda self: used)
    run(stub, "--what", "decode", "--dtypes", "float32", "--batch", "8")
    out = capsys.readouterr().out
    assert ("NOT COMPARABLE" in out) == told
    assert json.loads(out.splitlines()[-1])["other_cpus_max"] == used


def test_the_cpus_of_others_are_what_those_started_here_did_not_use(monkeypatch):
    monkeypatch.setattr(Clocks, "read", lambda: Clocks(wall=14.0, busy=28.0, mine=11.0))
    assert Clocks(wall=10.0, busy=20.0, mine=5.0).other_cpus() == 0.5
    assert Clocks(wall=10.0, busy=25.0, mine=5.0).other_cpus() == 0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells how busy all CPUs are")
def test_the_clocks_count_a_program_that_has_ended():
    before = Clocks.read()
    subprocess.run([sys.executable, "-ISc", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
    after = Clocks.read()
    assert after.mine - before.mine >= 0.15  # both in ticks of 0.01 s
    assert after.busy - before.busy >= 0.15


def test_a_part_can_be_chosen(stub, capsys):
    run(stub, "--what", "decode", "--dtypes", "float32", "--batch", "8")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["ours"], one["ratio"]) for one in result["comparisons"]] == [("decode float32 batch 8", 2.5)]


def test_a_failing_process_is_named_with_what_it_said(stub):
    with pytest.raises(ValueError, match=r"ours, decode float32 batch 3: .*code 1(.|\n)*no such rate: ours decode"):
        run(stub, "--what", "decode", "--batch", "3")


def test_without_a_peer_the_error_says_how_to_make_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", "--peer-python", "nowhere/python"])
    with pytest.raises(SystemExit) as ended:
        run_main(peers.main)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "nowhere/python" in said
    assert re.findall(r"^  (\S.*)$", said, re.MULTILINE) == [
        "python3.11 -m venv .venv-peers",
        ".venv-peers/bin/pip install -r requirements-peers.txt",
    ]


@pytest.mark.parametrize("change", [{"rounds": 0}, {"batch": (1, 0)}, {"steps": -1}, {"runs": 0}, {"dtypes": ()}])
def test_what_cannot_be_run_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        check(dataclasses.replace(Command(peer_python=sys.executable), **change))


def test_too_many_threads_are_refused():
    with pytest.raises(ValueError, match="threads = 4096"), confined(4096):
        pass


def test_every_measurement_comes_once_and_next_to_those_it_is_compared_with():
    kinds = kinds_of(Command(batch=(1, 8, 1)))
    assert len(kinds) == len(set(kinds)) == 5 + 2 * 4
    assert [(kind.side, str(kind)) for kind in kinds[5:9]] == [
        ("ours", "decode float32 batch 1"),
        ("peer", "decode float32 batch 1"),
        ("ours", "decode bfloat16 batch 1"),
        ("peer", "decode bfloat16 batch 1"),
    ]


def test_ours_are_this_interpreters_benchmarks():
    asked = Command(runs=5, steps=3)
    words = arguments(Kind("ours", "decode", "bfloat16", 8), asked)
    assert words[:3] == [sys.executable, "-m", "benchmarks.decode"]
    assert tyro.cli(decode.Command, args=words[3:]) == decode.Command(dtype="bfloat16", batch=8, runs=5)
    words = arguments(Kind("ours", "train", "float32", 8), asked)
    assert words[:3] == [sys.executable, "-m", "benchmarks.train_step"]
    assert tyro.cli(train_step.Command, args=words[3:]) == train_step.Command(steps=3)


def test_the_allocator_options_are_the_makefiles():
    parts = re.findall(r"^MALLOC := (?:\$\(MALLOC\):)?(\S+)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert environment(2)["GLIBC_TUNABLES"] == ":".join(parts)


def test_the_peer_imports_nothing_of_ours_and_reads_fields_that_it_gets():
    tree = ast.parse(PEER_SCRIPT.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy", "torch", "transformers"}
    values = {str(getattr(node.targets[0], "id", "")): node.value for node in tree.body if isinstance(node, ast.Assign)}
    spec = peer_spec(Kind("peer", "train", "float32", 8), Command())
    read = {*ast.literal_eval(values["SAME"]), *ast.literal_eval(values["RENAMED"])}
    assert read <= set(spec["model"])
    names = {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and ast.unparse(node.value) == "spec"
    }
    assert names and names <= set(spec)
