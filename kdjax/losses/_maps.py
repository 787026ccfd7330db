"""What losses over feature maps share: pooling and masked positions."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdjax.losses._vectors import EXACT, product


def by_position(features: Array) -> Array:
    """``[B, H, W, C] -> [B, H * W, C]``."""
    batch, height, width, channels = features.shape
    return features.reshape(batch, height * width, channels)


def channel_products(first: Array, second: Array) -> Array:
    """Inner products of channels over positions, ``[B, P, C]`` to ``[B, C, D]``."""
    return product(first.mT, second)


def replaced(features: Array, where: Array | None) -> Array:
    """The features ``[..., C]``, 0 where masked: what stands there may be NaN."""
    return features if where is None else jnp.where(where[..., None], features, 0.0)


def positions(features: Array, where: Array | None) -> Array:
    """How many positions of each map count, at least 1: a divisor."""
    if where is None:
        return jnp.asarray(features.shape[1] * features.shape[2], features.dtype)
    return jnp.maximum(jnp.sum(where, (1, 2)), 1).astype(features.dtype)


def _bins(size: int, pooled: int) -> np.ndarray:
    """The matrix ``[pooled, size]`` that averages over bins, which may overlap."""
    averages = np.zeros((pooled, size))
    for row in range(pooled):
        start, end = row * size // pooled, -(-(row + 1) * size // pooled)
        averages[row, start:end] = 1 / (end - start)
    return averages


def pooled(features: Array, height: int, width: int) -> Array:
    """Average-pooled to a smaller size, which need not divide the size it has."""
    if features.shape[1:3] == (height, width):
        return features
    rows = jnp.asarray(_bins(features.shape[1], height), features.dtype)
    columns = jnp.asarray(_bins(features.shape[2], width), features.dtype)
    features = jnp.einsum("ih,bhwc->biwc", rows, features, precision=EXACT)
    return jnp.einsum("jw,biwc->bijc", columns, features, precision=EXACT)


def of_one_size(first: Array, second: Array) -> tuple[Array, Array]:
    """Both pooled to the smaller height and the smaller width of the two."""
    height = min(first.shape[1], second.shape[1])
    width = min(first.shape[2], second.shape[2])
    return pooled(first, height, width), pooled(second, height, width)
