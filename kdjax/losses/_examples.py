"""What losses over the relations of examples share."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from kdjax.losses._labels import widened


def kept(features: Array, where: Array) -> Array:
    """One row of numbers per example, ``[B, D]``; 0 for those that do not count."""
    batch, *rest = features.shape
    rows = widened(features).reshape(batch, math.prod(rest))
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


def smooth_l1(gaps: Array) -> Array:
    """Huber's loss with its bend at 1."""
    size = jnp.abs(gaps)
    return jnp.where(size < 1, 0.5 * gaps**2, size - 0.5)
