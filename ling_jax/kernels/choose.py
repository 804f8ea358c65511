"""Which implementation of a kernel runs: decided by the platform that a program is lowered for, never by the machine
that compiles it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

Implementation = Callable[..., Any]


def by_platform(
    *args: Any,
    rest: Implementation,
    cpu: Implementation | None = None,
    tpu: Implementation | None = None,
    cuda: Implementation | None = None,
) -> Any:
    """Calls the implementation given for the platform, else `rest`, with `args`: any pytrees of arrays."""
    named = {name: f for name, f in {"cpu": cpu, "tpu": tpu, "cuda": cuda}.items() if f is not None}
    return jax.lax.platform_dependent(*args, **named, default=rest) if named else rest(*args)


def traced_for() -> str:
    """The platform that a program is being traced for: that of its mesh's devices, or JAX's own outside any mesh. It
    may be lowered for another, so this chooses between programs that are right on all."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def for_nvidia() -> bool:
    """Whether a program is being traced for NVIDIA GPUs."""
    return traced_for() == "gpu"


def for_cpu() -> bool:
    """Whether a program is being traced for CPUs."""
    return traced_for() == "cpu"


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """A function with several implementations, all of the same arguments.

    Attributes:
      rest: made of XLA's operations, for platforms that have no other.
      cpu, tpu, cuda: what runs there instead, if anything does.
      nvidia: what runs instead of `cuda` in programs traced `for_nvidia`; others do not have it. It is for kernels that
        JAX cannot lower without knowing the GPU.
      named: what `implementation` may name, beside "auto".
    """

    rest: Implementation
    cpu: Implementation | None = None
    tpu: Implementation | None = None
    cuda: Implementation | None = None
    nvidia: Implementation | None = None
    named: Mapping[str, Implementation] = field(default_factory=dict)

    def __call__(self, *args: Any, implementation: str = "auto", **static: Any) -> Any:
        """The result for `args`, any pytrees of arrays.

        Raises:
          ValueError: for an implementation that is neither "auto" nor one of `named`.
        """
        if implementation == "auto":
            cuda = self.nvidia if self.nvidia is not None and for_nvidia() else self.cuda
            of = {"cpu": self.cpu, "tpu": self.tpu, "cuda": cuda, "rest": self.rest}
            chosen: Any = {name: None if f is None else partial(f, **static) for name, f in of.items()}
            return by_platform(*args, **chosen)
        if implementation not in self.named:
            raise ValueError(f"implementation = {implementation!r} must be one of {', '.join(self.named)} or auto")
        return self.named[implementation](*args, **static)


def pallas(kernel: Implementation) -> Implementation:
    """A Pallas kernel for TPU or GPU, which runs interpreted on CPU: `kernel` has a keyword `interpret`."""

    def run(*args: Any, **static: Any) -> Any:
        interpreted, compiled = (partial(kernel, interpret=value, **static) for value in (True, False))
        return by_platform(*args, cpu=interpreted, rest=compiled)

    return run
