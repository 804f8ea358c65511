"""Which cases of a test run with every change, and which by `make nightly` alone."""

from typing import Any

import pytest


def nightly(*values: Any) -> Any:
    """A case of `pytest.mark.parametrize` that only `make nightly` runs."""
    return pytest.param(*values, marks=pytest.mark.nightly)
