"""What losses over the relations of examples share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.losses._labels import widened

# The default precision of a matrix product is bfloat16 on a TPU.
product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def kept(features: Array, where: Array) -> Array:
    """One row of numbers per example, ``[B, D]``; 0 for those that do not count."""
    rows = widened(features).reshape(features.shape[0], -1)
    return jnp.where(where[:, None], rows, 0.0)


def counting(features: Array, where: Array | None) -> Array:
    """Which examples count, ``[B]``."""
    return jnp.ones(features.shape[:1], bool) if where is None else where


def number_of(where: Array, values: Array) -> Array:
    """How many count, at least 1; in floating point, where its cube has room."""
    return jnp.maximum(jnp.sum(where), 1).astype(values.dtype)


def over_pairs(values: Array, count: Array) -> Array:
    """The sum of ``[B, B]`` over count²: rows apart, as one long sum loses digits."""
    return jnp.sum(jnp.sum(values, -1) / count) / count


def scaled(values: Array, axis: int | None = None) -> Array:
    """Divided by the power of 2 below the largest, so that squares stay in range.

    Which rounds nothing. Only for what does not depend on the scale, and therefore
    needs no gradient through it.
    """
    top = jnp.max(jnp.abs(values), axis, keepdims=True, initial=0.0)
    top = jax.lax.stop_gradient(top)
    power = top / (2 * jnp.frexp(top)[0])
    return values / jnp.where(power > 0, power, 1.0)


def unit(vectors: Array) -> Array:
    """Scaled to length 1 along the last axis; zeros stay so, without a gradient."""
    vectors = scaled(vectors, -1)
    square = jnp.sum(vectors**2, -1, keepdims=True)
    directed = square > 0
    length = jnp.sqrt(jnp.where(directed, square, 1.0))
    return jnp.where(directed, vectors / length, 0.0)


def smooth_l1(gaps: Array) -> Array:
    """Huber's loss with its bend at 1."""
    size = jnp.abs(gaps)
    return jnp.where(size < 1, 0.5 * gaps**2, size - 0.5)
