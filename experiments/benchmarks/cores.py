"""The processor that benchmarks run on, and programs compiled for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import optax


def count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


CPUINFO = Path("/proc/cpuinfo")

Vectors = Literal["widest", "default"]
"""Those of the processor, as PyTorch takes them; or XLA's own choice, 256 bits."""


def bits(vectors: Vectors) -> int:
    """The width of the vectors that XLA is asked for."""
    wide = CPUINFO.is_file() and " avx512f " in CPUINFO.read_text()
    return 512 if wide and vectors == "widest" else 256


def compiled(function: Callable[..., Any], *arrays: Any, vectors: Vectors) -> Any:
    """The jitted program for these arrays."""
    options: dict[str, str | bool] = {"xla_cpu_prefer_vector_width": str(bits(vectors))}
    return jax.jit(function).lower(*arrays).compile(compiler_options=options)


def described(vectors: Vectors) -> str:
    """What figures were measured with."""
    return (
        f"jax {jax.__version__}, optax {optax.__version__}, Python "
        f"{platform.python_version()}, {jax.devices()[0].device_kind} with "
        f"{count()} cores, vectors of {bits(vectors)} bits, load "
        f"{os.getloadavg()[0]:.1f}"
    )
