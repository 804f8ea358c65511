"""The report that every benchmark prints."""

import json
import platform
from typing import Any

import flax
import jax
import jaxlib

from ling_jax.train.hardware import matmul_rate, peak_flops, peak_memory_bytes


def report(result: dict[str, Any], useful_flops: float, seconds: float) -> None:
    """Prints one JSON object: `result`, the device, and the share of the measured float32 matmul rate that
    `useful_flops` in `seconds` reach; of an accelerator that the data sheets are known of, also that of its bfloat16
    peak."""
    rate, peak = matmul_rate(), peak_flops()
    common = {
        "device": jax.devices()[0].device_kind,
        "data_sheet_fraction": peak and useful_flops / seconds / peak,
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


def compiled_programs(part: str = "") -> list[str]:
    """A list that grows by the name of each program that JAX compiles from now on, if it has `part` in it."""
    found: list[str] = []

    def note(event: str, seconds: float, fun_name: str = "", **_) -> None:
        if event.endswith("/backend_compile_duration") and part in fun_name:
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    return found
