"""The report on a GPU runs every case at tiny sizes, interpreted on CPU, and tells what it has not run."""

import contextlib
import io
import json
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from benchmarks import h100

KERNELS = ("ceilings", "grouped", "attention", "fp8")
FORMS = {  # cases by their titles: what is computed, and how
    "matmul": "bfloat16",
    "copy": "float32",
    **{f"grouped dx, 1024 rows, blocks of {n}": "blocked triton" for n in (128, 64)},
    **{f"grouped dw, 1024 rows, blocks of {n}": "triton" for n in (128, 64)},
    "grouped product, 1024 rows, blocks of 64": "blocked triton",
    "grouped product, 1024 rows, blocks of 128": "blocked triton mgpu tokamax",
    **{f"grouped {part}, 256 rows, blocks of 128": "ragged triton" for part in ("product", "dx", "dw")},
    **{f"decoding product, {rows} rows": "ragged blocked triton" for rows in (2, 8)},
    **{f"attention, {n} tokens": "cudnn tokamax" for n in (128, 256)},
    **{f"attention, 128 tokens, forward{more}": "xla triton" for more in ("", " and gradients")},
    **{f"attention, 256 tokens, forward{more}": "triton" for more in ("", " and gradients")},
    **{f"attention, 128 tokens in 4 documents, forward{more}": "triton" for more in ("", " and gradients")},
    "attention, one token after 64": "cached triton",
    **{f"fp8 {part}, 256 x 256 x 256": "loop triton bfloat16" for part in ("product", "dx", "dw")},
    **{f"fp8 {part}, 1024 rows, 2 groups": "loop triton" for part in ("product", "dx", "dw")},
    **{f"quantise along dim {dim}": "xla triton" for dim in (0, 1)},
}
CASES = {f"{title}: {name}" for title, names in FORMS.items() for name in names.split()}
WITHOUT_REFERENCE = ("bfloat16", "float32")
NEED_A_GPU = ("mgpu", "tokamax", "cudnn")


class Report(NamedTuple):
    machine: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    end: dict[str, Any]
    table: str


def report(*flags: str) -> Report:
    """The records of a dry run; numbers that JSON does not have are refused."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        h100.main(["--dry", *flags])
    machine, *cases, end = [json.loads(line, parse_constant=pytest.fail) for line in out.getvalue().splitlines()]
    named = {case["case"]: case for case in cases}
    assert len(named) == len(cases) == end["cases"] and end["done"]
    return Report(machine, named, end, err.getvalue())


@pytest.fixture(scope="module")
def dry() -> Report:
    return report("--parts", *KERNELS)


@pytest.mark.nightly
def test_every_case_is_there_and_none_has_failed(dry):
    assert dry.cases.keys() == CASES
    assert [case for case in dry.cases.values() if "error" in case] == dry.end["failed"] == []
    skipped = {name: case["skipped"] for name, case in dry.cases.items() if "skipped" in case}
    assert skipped == {name: "needs a GPU" for name in CASES if name.endswith(NEED_A_GPU)}
    assert len(skipped) == dry.end["skipped"]
    assert dry.machine["device"] == "cpu" and dry.machine["dry"]


@pytest.mark.nightly
def test_every_form_agrees_with_its_reference(dry):
    """To the rounding of bfloat16, which results and the operands of attention's products have."""
    run = {name: case for name, case in dry.cases.items() if "skipped" not in case}
    assert {name for name, case in run.items() if "rel_err" not in case} == {
        name for name in run if name.endswith(WITHOUT_REFERENCE)
    }
    wrong = {
        name: case for name, case in run.items() if case.get("rel_err", 0) > 2**-7 or case.get("rms_err", 0) > 2**-7
    }
    assert wrong == {}


@pytest.mark.nightly
def test_every_case_has_its_figures_and_a_line_of_the_table(dry):
    lines = dry.table.splitlines()
    for name, case in dry.cases.items():
        assert any(line.startswith(f"{name}  ") for line in lines), name
        if "skipped" not in case:
            assert case["ms"] > 0 and ("tflops" in case) + ("gb_s" in case) == 1, case
            assert ("of_copy" in case) == ("gb_s" in case and name != "copy: float32"), case


def test_no_case_begins_once_the_time_is_over(monkeypatch):
    monkeypatch.setattr(h100, "normal", lambda *args: pytest.fail("arrays were made"))
    late = report("--seconds", "0")
    assert late.cases.keys() - CASES == {"train_step, tiny", "decode, tiny"}
    assert {case["skipped"] for case in late.cases.values()} == {"no time left"}
    assert late.end["skipped"] == len(late.cases)


def test_a_case_that_fails_is_a_record_and_the_others_go_on(monkeypatch):
    def broken(x, w, sizes, block, out_dim, implementation):
        if implementation == "ragged":
            raise RuntimeError("too large")
        return jnp.full((len(x), w.shape[out_dim]), jnp.nan if implementation == "triton" else 1.0)

    monkeypatch.setattr(h100, "grouped_product", broken)
    monkeypatch.setattr(
        h100, "grouped_weight_gradient", lambda g, x, sizes, *_: 2 * h100.gradient_by_groups(g, x, sizes)
    )
    broken_run = report("--parts", "grouped")
    cases = broken_run.cases
    assert cases["grouped product, 256 rows, blocks of 128: ragged"]["error"] == "RuntimeError: too large"
    assert "not finite" in cases["grouped dx, 256 rows, blocks of 128: triton"]["error"]
    assert cases["grouped dw, 256 rows, blocks of 128: triton"]["rel_err"] == 1
    assert broken_run.end["failed"] == [name for name, case in cases.items() if "error" in case]
    assert "FAILED" in broken_run.table


@pytest.mark.nightly
def test_whole_steps_are_told_with_what_their_commands_said():
    steps = report("--parts", "steps").cases
    train, decode = steps["train_step, tiny"], steps["decode, tiny"]
    assert train["ms"] == pytest.approx(train["result"]["step_ms"], rel=1e-3) and train["tflops"] > 0
    assert decode["result"]["benchmark"] == "decode" and decode["result"]["dtype"] == "bfloat16"


def test_errors_are_shares_of_the_largest_and_of_the_norm():
    got, want = [jnp.array([3.0, 4.5]), jnp.ones((2, 2))], [jnp.array([3.0, 4.0]), jnp.ones((2, 2))]
    assert h100.errors(got, want) == {"rel_err": 0.125, "rms_err": 0.1}
    with pytest.raises(ValueError, match="not finite"):
        h100.errors([jnp.array([math.inf]), jnp.ones(1)], [jnp.ones(1), jnp.ones(1)])


def test_a_layers_figures_are_its_share_of_the_time():
    assert h100.rates(2.0, flops=6e12, layers=4) == {"ms": 500.0, "tflops": 12.0}
    assert h100.rates(2.0, moved=1e9) == {"ms": 2000.0, "gb_s": 0.5}


def test_the_model_of_two_layers_has_ling_minis_shapes():
    model = h100.two_layers().model
    assert (model.num_hidden_layers, model.hidden_size, model.num_experts) == (2, 2048, 256)
