"""A run that the code of 29 November 2026 (commit d59e839) made is still opened, gone on with and exported.

earlier_run.tar.gz, beside this file, has its folder after two steps, what it exported to, and the record of the same
run after four.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ling_jax import load_pretrained
from ling_jax.checkpoint import read_arrays
from ling_jax.convert.to_hf import to_hf
from ling_jax.train.metrics import read_metrics
from tests.support.commands import call
from tests.tiny_run import train_args

SMALL = dict(
    model__hidden_size=16, model__intermediate_size=24, model__moe_intermediate_size=8, model__num_hidden_layers=3,
    train__eval_every=0, checkpoint__every=2,
)  # fmt: skip


@pytest.fixture
def earlier(tmp_path) -> Path:
    with tarfile.open(Path(__file__).with_name("earlier_run.tar.gz")) as archive:
        archive.extractall(tmp_path / "runs", filter="data")
    return tmp_path / "runs"


def test_it_goes_on_as_it_did(earlier, tmp_path):
    """Its text lies elsewhere by now; its numbers are another machine's, so equal but for rounding."""
    call("train.py", *train_args(tmp_path, "run", train__steps=4, **SMALL))
    got, want = read_metrics(earlier / "run"), [json.loads(line) for line in open(earlier / "whole.jsonl")]
    assert [record["step"] for record in got] == [1, 2, 3, 4]
    for key in ("train/loss", "train/mtp_loss", "train/grad_norm"):
        np.testing.assert_allclose([r[key] for r in got], [r[key] for r in want], rtol=1e-3, err_msg=key)
    assert int(read_arrays(str(earlier / "run"))["step"]) == 4


def test_it_is_opened_and_exported_as_it_was(earlier):
    model = load_pretrained(str(earlier / "run"))
    assert model.config.num_hidden_layers == 3 and model.config.num_nextn_predict_layers == 1
    assert np.isfinite(model(np.arange(1, 9)[None]).logits_BTV).all()
    to_hf(str(earlier / "run"), str(earlier / "hf"))
    got, want = (
        json.loads((earlier / name).read_text()) for name in ("hf/conversion_audit.json", "conversion_audit.json")
    )
    assert got["tensors"] == want["tensors"] and len(want["tensors"]) > 50 and got["parameters"] == want["parameters"]
