"""Means, lengths, directions and products of vectors, in full precision and range."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

# The default precision of a matrix product is bfloat16 on a TPU.
EXACT = jax.lax.Precision.HIGHEST
product = functools.partial(jnp.matmul, precision=EXACT)

Axes = int | tuple[int, ...] | None


def scaled(values: Array, axis: Axes = None) -> Array:
    """Divided by the power of 2 below the largest, so that squares stay in range.

    Which rounds nothing. Only for what does not depend on the scale, and therefore
    needs no gradient through it.
    """
    top = jnp.max(jnp.abs(values), axis, keepdims=True, initial=0.0)
    top = jax.lax.stop_gradient(top)
    power = top / (2 * jnp.frexp(top)[0])
    return values / jnp.where(power > 0, power, 1.0)


def unit(values: Array, axis: Axes = -1) -> Array:
    """Scaled to length 1 along the axis; zeros stay so, without a gradient."""
    values = scaled(values, axis)
    square = jnp.sum(values**2, axis, keepdims=True)
    directed = square != 0  # true of NaN, which is not to be hidden
    length = jnp.sqrt(jnp.where(directed, square, 1.0))
    return jnp.where(directed, values / length, 0.0)


def unit_distance(first: Array, second: Array, axis: Axes = -1) -> Array:
    """1 - cosine; 0 where a side is all 0, which has no direction.

    As half the squared distance of unit vectors it is never negative, and precise
    where they agree.
    """
    distance = 0.5 * jnp.sum((unit(first, axis) - unit(second, axis)) ** 2, axis)
    return jnp.where(jnp.any(first, axis) & jnp.any(second, axis), distance, 0.0)


def centred(values: Array, axis: Axes, where: Array) -> Array:
    """Less the mean of what counts along the axis, 0 elsewhere; exactly 0 if constant.

    ``where`` broadcasts against the values.
    """
    # Against the largest first: what is constant becomes 0 exactly, not rounding.
    top = jnp.max(values, axis, keepdims=True, initial=-jnp.inf, where=where)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    below = jnp.where(where, values - top, 0.0)
    count = jnp.maximum(number_along(values, axis, where), 1)
    mean = jnp.sum(below, axis, keepdims=True) / count
    return jnp.where(where, below - mean, 0.0)


def number_along(values: Array, axis: Axes, where: Array) -> Array:
    """How many values count along the axis, which is kept with length 1."""
    return jnp.sum(jnp.broadcast_to(where, values.shape), axis, keepdims=True)


def standardized(values: Array, axis: Axes, where: Array, epsilon: float) -> Array:
    """Centred, and divided by the unbiased deviation plus epsilon; 0 if constant."""
    rows = centred(values, axis, where)
    freedom = jnp.maximum(number_along(values, axis, where) - 1, 1)
    square = jnp.sum(rows**2, axis, keepdims=True) / freedom
    varies = square != 0
    deviation = jnp.sqrt(jnp.where(varies, square, 1.0))
    return jnp.where(varies, rows / (deviation + epsilon), 0.0)
