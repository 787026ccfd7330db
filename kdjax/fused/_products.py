"""Matrix products of a chunk, as each kind of device has them fast."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.losses._rows import wide_dtype

WHOLE_BYTES = 2**25
"""Of a kernel, in float32, that a CPU multiplies as a whole for the gradient by hidden
states: 32 MiB. Of more, a copy in another order would come fresh from the system for
each product, which clears it first."""

PART_BYTES = 2**22
"""Of a larger one at a time: 4 MiB, which stay in the caches."""


def product(equation: str, *arrays: Array) -> Array:
    """Of two matrices, in float32 at least: on a TPU at no cost to bfloat16."""
    return jnp.einsum(equation, *arrays, preferred_element_type=wide_dtype(*arrays))


def split(length: int, most: int) -> tuple[int, int]:
    """How many parts, and the size of each, about alike."""
    parts = max(1, math.ceil(length / max(1, most)))
    return parts, math.ceil(length / parts)


def _on_one_cpu(
    in_parts: Callable[..., Array], at_once: Callable[..., Array], *arrays: Array
) -> Array:
    """The first on a CPU; the second elsewhere, and where there are several devices.

    A loop over what lies on several devices would gather it all.
    """
    if jax.device_count() > 1:
        return at_once(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=in_parts, default=at_once)


def with_kernel_gradient(sums: Array, hidden: Array, slopes: Array) -> Array:
    """The kernel's gradient so far, ``[D, V]``, and that of a chunk added to it."""
    width = sums.shape[0]
    # A part's product is no larger than the chunk's logits of a teacher, in whose
    # place it can be.
    _, size = split(width, hidden.shape[0])

    def at_once(sums: Array, hidden: Array, slopes: Array) -> Array:
        return sums + product("nd,nv->dv", hidden, slopes)

    def in_parts(sums: Array, hidden: Array, slopes: Array) -> Array:
        # XLA would take the transposition back, but not through the barrier: its
        # fast product for CPUs is not for columns of the left side.
        columns = jax.lax.optimization_barrier(hidden.T)

        def add(start: Array | int, size: int, sums: Array) -> Array:
            some, here = (
                jax.lax.dynamic_slice_in_dim(each, start, size)
                for each in (sums, columns)
            )
            some += product("dn,nv->dv", here, slopes)
            return jax.lax.dynamic_update_slice_in_dim(sums, some, start, 0)

        parts, rest = divmod(width, size)
        sums = jax.lax.fori_loop(
            0, parts, lambda index, sums: add(index * size, size, sums), sums
        )
        return add(width - rest, rest, sums) if rest else sums

    return _on_one_cpu(in_parts, at_once, sums, hidden, slopes)


def hidden_gradient(slopes: Array, kernel: Array) -> Array:
    """That of a chunk by its hidden states, ``[n, D]``."""
    width, classes = kernel.shape

    def at_once(slopes: Array, kernel: Array) -> Array:
        return product("nv,dv->nd", slopes, kernel)

    def in_parts(slopes: Array, kernel: Array) -> Array:
        parts, size = split(classes, max(1, PART_BYTES // (4 * width)))

        def add(index: Array, sums: Array) -> Array:
            # The last part reaches back, over classes that do not count again: a rest
            # would take memory of its own.
            start = jnp.minimum(index * size, classes - size)
            some, here = (
                jax.lax.dynamic_slice_in_dim(each, start, size, axis=1)
                for each in (slopes, kernel)
            )
            counting = start + jnp.arange(size) >= index * size
            return sums + at_once(jnp.where(counting, some, 0), here)

        sums = jnp.zeros((len(slopes), width), wide_dtype(slopes, kernel))
        return jax.lax.fori_loop(0, parts, add, sums)

    if 4 * kernel.size <= WHOLE_BYTES:
        return at_once(slopes, kernel)
    return _on_one_cpu(in_parts, at_once, slopes, kernel)
