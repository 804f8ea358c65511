"""The benchmark of linear attention times every kernel at every length and draws them."""

import json

import pytest

from benchmarks.lightning import main


def test_every_kernel_is_timed_at_every_length(tmp_path, capsys):
    options = "--tokens 64 --lengths 32 64 --heads 2 --head-dim 8 --rounds 1 --figure".split()
    main([*options, str(tmp_path / "lengths.png")])
    printed = capsys.readouterr()
    times = json.loads(printed.out.splitlines()[-1])["times"]
    assert set(times) == {
        f"{kernel}, {part}"
        for kernel in ("linear native", "linear xla", "softmax")
        for part in ("forward", "with gradients")
    }
    assert all(set(by_length) == {"32", "64"} for by_length in times.values())
    assert "last over first" in printed.err and (tmp_path / "lengths.png").stat().st_size > 10_000


def test_rows_that_do_not_divide_the_tokens_are_refused():
    with pytest.raises(ValueError, match="--tokens 64 is not a multiple"):
        main(["--tokens", "64", "--lengths", "48"])
