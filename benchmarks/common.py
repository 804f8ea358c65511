"""The report that every benchmark prints."""

import json
import platform
from typing import Any

import flax
import jax
import jaxlib

from ling_jax.train.hardware import matmul_rate, peak_memory_bytes


def report(result: dict[str, Any], useful_flops: float, seconds: float) -> None:
    """Prints one JSON object: `result`, and the share of the measured float32 matmul rate that `useful_flops`
    in `seconds` reach."""
    rate = matmul_rate()
    common = {
        "peak_rss_bytes": peak_memory_bytes(),
        "matmul_gflops": rate / 1e9,
        "useful_flops": useful_flops,
        "roofline_fraction": useful_flops / seconds / rate,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "flax": flax.__version__,
        },
    }
    print(json.dumps(result | common))
