"""Experts, grouped products, attention of both kinds and AdamW in C++ for CPU: builds native.cc at first use with the
system's compiler, loads and registers it.

XLA:CPU has no grouped product, and a loop over groups pays for a copy and a library call each; native.cc reads rows
and weights where they lie. XLA's attention writes all scores to memory. Without a compiler, or with LING_JAX_NATIVE=0,
callers keep XLA's form: see `or_else`.

Legend: R rows, E groups, I inputs, O outputs; of attention as in attention.py, of experts as in swiglu.py.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from ling_jax.files.cache import cache_folder, can_write, cpu_flags

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cc")
HEADERS = tuple(
    SOURCE.with_name(f"native_{name}.h")
    for name in ("vectors", "adamw", "amx", "attention", "cached", "experts", "fp8", "lightning", "router")
)
# Sums of products may fuse: -std=c++17 alone forbids it.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
COMPILERS = ("c++", "g++", "clang++")
TARGETS = {
    "ling_grouped_product": "LingGroupedProduct",
    "ling_grouped_weight_gradient": "LingGroupedWeightGradient",
    "ling_attention": "LingAttention",
    "ling_attention_gradient": "LingAttentionGradient",
    "ling_lightning": "LingLightning",
    "ling_lightning_gradient": "LingLightningGradient",
    "ling_cached_attention": "LingCachedAttention",
    "ling_experts": "LingExperts",
    "ling_experts_gradient": "LingExpertsGradient",
    "ling_empty": "LingEmpty",
    "ling_adamw": "LingAdamW",
    "ling_choose": "LingChoose",
    "ling_fp8_product": "LingFp8Product",
}
DTYPES = (jnp.float32, jnp.bfloat16)
BUILD_SECONDS = 300  # what a compiler may take before it counts as broken

_lock = threading.Lock()


class NoLibrary(Exception):
    """Why there is no library, and what to do about it."""


def _output(*command: str) -> str:
    """Runs a command and returns what it prints. Raises `NoLibrary` if it cannot be run, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibrary(f"cannot run the C++ compiler: {error}") from error
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[:10])
        raise NoLibrary(f"`{shlex.join(command)}` failed:\n{said}")
    return done.stdout


def _compiler() -> list[str]:
    """The command of $CXX, or the first compiler on the path."""
    command = shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not command:
        raise NoLibrary(f"no C++ compiler ({', '.join(COMPILERS)}) on the path")
    return command


def _machine_flag() -> str:
    """-march=native, or what older compilers call it on Arm."""
    arm = platform.machine() in ("aarch64", "arm64")
    return "-mcpu=native" if arm else "-march=native"


def _library() -> Path:
    """The library for this source, compiler, processor and JAX; built if the cache has none.

    Processes that build at once each write a file of their own and rename it: the last one wins, all are equal.
    """
    compiler = _compiler()
    command = [*compiler, *FLAGS, _machine_flag(), f"-I{jax.ffi.include_dir()}", str(SOURCE)]
    known = [_output(*compiler, "--version"), cpu_flags(), jax.__version__, platform.machine(), *command]
    content = b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    key = hashlib.sha256("\0".join(known).encode() + content).hexdigest()[:32]
    name = f"native-{key}.so"
    if (kept := cache_folder() / name).exists():
        return kept
    started = time.perf_counter()
    if can_write(kept.parent):
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            built = Path(scratch) / name
            _output(*command, "-o", str(built))
            built.replace(kept)
    else:
        kept = Path(_own_folder()) / name
        logger.info("%s cannot be written: the C++ kernels are built at every start; XDG_CACHE_HOME names another "
                    "place", cache_folder())  # fmt: skip
        _output(*command, "-o", str(kept))
    logger.info("built %s in %.1f s", kept, time.perf_counter() - started)
    return kept


def _own_folder() -> str:
    """A folder that nobody else can write to, until this process ends."""
    folder = tempfile.mkdtemp(prefix="ling_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _register(library: Path) -> None:
    try:
        symbols = ctypes.CDLL(str(library))
    except OSError as error:
        raise NoLibrary(f"cannot load {library}: {error}") from error
    for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(symbols, symbol)), platform="cpu")


@functools.cache
def _loaded() -> bool:
    try:
        _register(_library())
    except NoLibrary as problem:
        logger.warning(
            "Experts and attention run in XLA's slower forms: %s. Install a C++17 compiler (Debian: apt install g++) "
            "or name one in CXX; LING_JAX_NATIVE=0 silences this.",
            problem,
        )
        return False
    return True


def available() -> bool:
    """Whether the library runs here; builds it if need be, which takes seconds, and says so if it cannot."""
    if os.environ.get("LING_JAX_NATIVE") == "0":
        return False
    with _lock:  # threads may lower programs at once
        return _loaded()


def or_else(name: str, native: Callable[..., Any], fallback: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is `native` on CPU where the library is `available`, and `fallback` elsewhere.

    It is a primitive, so that this is decided when a program is lowered: one for TPU builds nothing. Arguments and
    results are pytrees of arrays, keywords static.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    @functools.lru_cache(maxsize=256)
    def shapes(avals: tuple[jax.ShapeDtypeStruct, ...], tree: Any, static: tuple[tuple[str, Any], ...]) -> Any:
        return jax.eval_shape(functools.partial(fallback, **dict(static)), *jax.tree.unflatten(tree, avals))

    def shapes_of(arrays: Sequence[Any], tree: Any, static: Mapping[str, Any]) -> Any:
        avals = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays)
        return shapes(avals, tree, tuple(static.items()))

    def chosen(*arrays: jax.Array, tree: Any, **static: Any) -> list[jax.Array]:
        args = jax.tree.unflatten(tree, arrays)
        return jax.tree.leaves((native if available() else fallback)(*args, **static))

    def abstract(*avals: Any, tree: Any, **static: Any) -> list[ShapedArray]:
        return [ShapedArray(out.shape, out.dtype) for out in jax.tree.leaves(shapes_of(avals, tree, static))]

    def bind(*args: Any, **static: Any) -> Any:
        arrays, tree = jax.tree.flatten(args)
        results = primitive.bind(*arrays, tree=tree, **static)
        return jax.tree.unflatten(jax.tree.structure(shapes_of(arrays, tree, static)), results)

    primitive.def_impl(chosen)
    primitive.def_abstract_eval(abstract)

    def elsewhere(*arrays: jax.Array, tree: Any, **static: Any) -> list[jax.Array]:
        return jax.tree.leaves(fallback(*jax.tree.unflatten(tree, arrays), **static))

    mlir.register_lowering(primitive, mlir.lower_fun(chosen, multiple_results=True), platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=True))
    return bind


def product(
    x_RI: jax.Array, w_GOI: jax.Array, group_sizes_E: jax.Array, first: jax.Array | int = 0, *, out_dim: int
) -> jax.Array:
    """`kernels.grouped.grouped_product` with the groups' weights from `first` on, which are read where they lie; rows
    and weights each float32 or bfloat16."""
    out = jax.ShapeDtypeStruct((x_RI.shape[0], w_GOI.shape[out_dim]), x_RI.dtype)
    call = jax.ffi.ffi_call("ling_grouped_product", out)
    sizes, first = (jnp.asarray(a, jnp.int32) for a in (group_sizes_E, first))
    return call(x_RI, w_GOI, sizes, first, out_dim=np.int64(out_dim))


def fp8_product(
    x_RI: jax.Array, codes_GOI: jax.Array, scales_Eob: jax.Array, group_sizes_E: jax.Array, first: jax.Array | int
) -> jax.Array:
    """`product` with `out_dim` 1 and codes of `kernels.fp8.FP8Weight`; `scales_Eob` are these groups' alone."""
    out = jax.ShapeDtypeStruct((x_RI.shape[0], codes_GOI.shape[1]), x_RI.dtype)
    sizes, first = (jnp.asarray(a, jnp.int32) for a in (group_sizes_E, first))
    return jax.ffi.ffi_call("ling_fp8_product", out)(x_RI, codes_GOI, scales_Eob, sizes, first)


def weight_gradient(g_RO: jax.Array, x_RI: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """`kernels.grouped.grouped_weight_gradient`; both float32 or both bfloat16."""
    out = jax.ShapeDtypeStruct((group_sizes_E.size, g_RO.shape[1], x_RI.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("ling_grouped_weight_gradient", out)(g_RO, x_RI, group_sizes_E.astype(jnp.int32))


def attention(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    *,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of `kernels.attention.attend`; q, k and v all float32 or all bfloat16. A query that sees no key has
    an lse of -1e30."""
    outs = jax.ShapeDtypeStruct(q_BTHC.shape, jnp.float32), jax.ShapeDtypeStruct(q_BTHC.shape[:3], jnp.float32)
    call = jax.ffi.ffi_call("ling_attention", outs)
    out, lse = call(q_BTHC, k_BSGC, v_BSGC, q_segments_BT, kv_segments_BS, scale=np.float32(scale), causal=causal)
    return out, lse


def attention_gradients(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    out_BTHC: jax.Array,
    lse_BTH: jax.Array,
    g_BTHC: jax.Array,
    *,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`kernels.attention.attend_bwd`; g in q's dtype, `out` in either."""
    outs = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q_BTHC, k_BSGC, v_BSGC)]
    args = q_BTHC, k_BSGC, v_BSGC, q_segments_BT, kv_segments_BS, out_BTHC, lse_BTH, g_BTHC
    dq, dk, dv = jax.ffi.ffi_call("ling_attention_gradient", outs)(*args, scale=np.float32(scale), causal=causal)
    return dq, dk, dv


def lightning(
    q_BTHC: jax.Array,
    k_BTHC: jax.Array,
    v_BTHD: jax.Array,
    slopes_H: jax.Array,
    segments_BT: jax.Array,
    state_BHCD: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.lightning.lightning`; q, k and v each float32 or bfloat16, slopes and state float32."""
    outs = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (v_BTHD, state_BHCD)]
    call = jax.ffi.ffi_call("ling_lightning", outs)
    out, after = call(q_BTHC, k_BTHC, v_BTHD, slopes_H, segments_BT, state_BHCD, scale=np.float32(scale))
    return out, after


def lightning_gradients(
    q_BTHC: jax.Array,
    k_BTHC: jax.Array,
    v_BTHD: jax.Array,
    slopes_H: jax.Array,
    segments_BT: jax.Array,
    state_BHCD: jax.Array,
    g_BTHD: jax.Array,
    dstate_BHCD: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, in their dtypes, and of the state before `native.lightning`, from the cotangents of its
    two results, float32."""
    like = q_BTHC, k_BTHC, v_BTHD, state_BHCD
    call = jax.ffi.ffi_call("ling_lightning_gradient", [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like])
    args = q_BTHC, k_BTHC, v_BTHD, slopes_H, segments_BT, state_BHCD, g_BTHD, dstate_BHCD
    dq, dk, dv, dstate = call(*args, scale=np.float32(scale))
    return dq, dk, dv, dstate


def cached_attention(
    q_BTHC: jax.Array, k_LBSGC: jax.Array, v_LBSGC: jax.Array, layer: jax.Array, slots_BT: jax.Array, *, scale: float
) -> jax.Array:
    """float32 out of `kernels.attention.cached_attention` with one layer of a stack, which is read where it lies; q, k
    and v all float32 or all bfloat16."""
    call = jax.ffi.ffi_call("ling_cached_attention", jax.ShapeDtypeStruct(q_BTHC.shape, jnp.float32))
    return call(q_BTHC, k_LBSGC, v_LBSGC, layer, slots_BT, scale=np.float32(scale))


def experts(
    x_ND: jax.Array,
    scale_NK: jax.Array,
    ids_NK: jax.Array,
    gate_LEFD: jax.Array,
    up_LEFD: jax.Array,
    down_LEDF: jax.Array,
    layer: jax.Array,
    *kept_LRF: jax.Array,
) -> tuple[jax.Array, ...]:
    """y [N, D] of `kernels.swiglu.routed_swiglu` with one layer of a stack; x, and the weights alike, each float32 or
    bfloat16. And the two arrays `kept`, in whose layer, or only one, gate and up are written for `experts_gradients` in
    an order of their own, the last rows not at all; with R 0 they are not kept."""
    outs = [jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype)]
    outs += [jax.ShapeDtypeStruct(kept.shape, kept.dtype) for kept in kept_LRF]
    outs += [jax.ShapeDtypeStruct((ids_NK.size, x_ND.shape[1]), x_ND.dtype)]
    args = x_ND, scale_NK, ids_NK.astype(jnp.int32), gate_LEFD, up_LEFD, down_LEDF, layer
    aliases = {len(args): 1, len(args) + 1: 2} if kept_LRF[0].size else {}
    return tuple(jax.ffi.ffi_call("ling_experts", outs, input_output_aliases=aliases)(*args, *kept_LRF)[:3])


def experts_gradients(
    x_ND: jax.Array,
    scale_NK: jax.Array,
    ids_NK: jax.Array,
    gate_LEFD: jax.Array,
    up_LEFD: jax.Array,
    down_LEDF: jax.Array,
    layer: jax.Array,
    gate_LRF: jax.Array,
    up_LRF: jax.Array,
    g_ND: jax.Array,
    *into: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients of x (in its dtype), of scales, and of the layer's three weights: written where that layer's part lies
    `into` three stacks [L, ...], or ones [1, ...], float32. g in x's dtype; gate and up as `experts` kept them."""
    pairs, (_, _, width, hidden) = ids_NK.size, gate_LEFD.shape
    outs = [jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype), jax.ShapeDtypeStruct(scale_NK.shape, jnp.float32)]
    outs += [jax.ShapeDtypeStruct(stack.shape, jnp.float32) for stack in into]
    outs += [jax.ShapeDtypeStruct((pairs, columns), x_ND.dtype) for columns in (width, width, width, hidden)]
    args = x_ND, scale_NK, ids_NK.astype(jnp.int32), gate_LEFD, up_LEFD, down_LEDF, layer, gate_LRF, up_LRF, g_ND
    aliases = {len(args) + i: 2 + i for i in range(len(into))}
    call = jax.ffi.ffi_call("ling_experts_gradient", outs, input_output_aliases=aliases)
    return tuple(call(*args, *into)[:5])


def empty(like: jax.Array, *, number: int) -> jax.Array:
    """Memory for an array, with whatever is in it; another for every number."""
    return jax.ffi.ffi_call("ling_empty", jax.ShapeDtypeStruct(like.shape, like.dtype))(number=np.int64(number))


def adamw(
    weight: jax.Array, gradient: jax.Array, mean: jax.Array, square: jax.Array, scalars: jax.Array, **rule: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weight, mean, square) after `train.optimizer.OptimizerUpdate`, all float32; written where they lie if donated.

    Args:
      scalars: float32 [5]: what gradients are multiplied with, the learning rate, what the mean and the square are
        divided by, and 0 to change nothing.
      rule: b1, b2, eps, decay.
    """
    outs = [jax.ShapeDtypeStruct(weight.shape, jnp.float32)] * 3
    call = jax.ffi.ffi_call("ling_adamw", outs, input_output_aliases={0: 0, 2: 1, 3: 2})
    new = call(weight, gradient, mean, square, scalars, **{name: np.float32(x) for name, x in rule.items()})
    return new[0], new[1], new[2]


def choose(scores_NE: jax.Array, *, groups: int, open_groups: int, choices: int) -> jax.Array:
    """int32 [N, K] of `model.router`: the best `choices` experts of each token's best groups, best first; of float32
    scores."""
    call = jax.ffi.ffi_call("ling_choose", jax.ShapeDtypeStruct((scores_NE.shape[0], choices), jnp.int32))
    return call(scores_NE, groups=np.int64(groups), open=np.int64(open_groups))
