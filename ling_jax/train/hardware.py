"""The devices' peak, the denominator of MFU, and their memory in use."""

import ctypes
import os
import resource
import sys
import time

import jax
import jax.numpy as jnp

# Peak dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets.
PEAK_BF16_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
MATRIX = 2048
# mallopt's options (malloc.h) and what is asked of them: freed memory is never given back, nor mapped array by array.
MALLOC = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 1 << 28)}


def matmul_rate() -> float:
    """Measured FLOP/s of a 2048^3 float32 product with all threads (the best of three)."""
    a = jnp.ones((MATRIX, MATRIX), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / min(times)


def peak_flops() -> float | None:
    """FLOP/s of all devices together: the data sheet's, or on CPU what a matrix product reaches here; None
    for a device this table lacks."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return matmul_rate()
    kinds = sorted((kind for kind in PEAK_BF16_FLOPS if device.device_kind.startswith(kind)), key=len)
    return PEAK_BF16_FLOPS[kinds[-1]] * jax.device_count() if kinds else None


def peak_memory_bytes() -> int:
    """Peak bytes in use: of the first device, or of this process where the device does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def keep_freed_memory() -> None:
    """Lets a process on CPU keep the memory of arrays that are freed, for those of the next step.

    By default glibc gives each large array back to the kernel, which clears its pages before the next one gets them:
    a fifth of a small step's processor time. `make` asks for the same, and for huge pages, in GLIBC_TUNABLES; a user's
    own settings of the allocator there are left alone. Other C libraries have no such options.
    """
    library = ctypes.CDLL(None)
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if jax.devices()[0].platform != "cpu" or tuned or not hasattr(library, "mallopt"):
        return
    for option, value in MALLOC.values():
        library.mallopt(option, value)
