"""Convolutions and batch normalisation for what objectives train beside a student.

Written out, since flax is imported by :mod:`kdjax.models` alone. All of it is gone
once the student is deployed, so that normalisation only ever sees training batches,
and keeps no running statistics.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.losses._rows import wide_dtype
from kdjax.objectives._whole_batch import summed_over_devices
from kdjax.types import PyTree


def init_convolution(rng: Array, size: int, inputs: int, outputs: int) -> PyTree:
    """A kernel ``[size, size, inputs, outputs]`` of variance 1 / fan-in, no bias."""
    kernel = jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
    return {"kernel": kernel(rng, (size, size, inputs, outputs))}


def convolution(params: PyTree, x: Array) -> Array:
    """``[B, H, W, inputs] -> [B, H, W, outputs]``."""
    kernel = params["kernel"].astype(x.dtype)
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout
    )


def init_normalized(rng: Array, size: int, inputs: int, outputs: int) -> PyTree:
    """A convolution, and scale and bias of the normalisation after it."""
    return {
        **init_convolution(rng, size, inputs, outputs),
        "scale": jnp.ones(outputs),
        "bias": jnp.zeros(outputs),
    }


def normalized(params: PyTree, x: Array, counts: Array | None) -> Array:
    """A convolution, then batch normalisation by the statistics of this batch.

    They are of the examples of all devices, or of those that count, bool ``[B]``.
    """
    x = convolution(params, x)
    wide = x.astype(wide_dtype(x))
    batch, height, width, _ = x.shape
    counting = jnp.ones(batch, bool) if counts is None else counts
    positions = height * width * summed_over_devices(counting.sum())

    def average(values: Array) -> Array:
        kept = jnp.where(counting[:, None, None, None], values, 0)
        return summed_over_devices(kept.sum((0, 1, 2))) / jnp.maximum(positions, 1)

    wide -= average(wide)
    wide *= jax.lax.rsqrt(average(wide**2) + 1e-5)
    return (wide * params["scale"] + params["bias"]).astype(x.dtype)
