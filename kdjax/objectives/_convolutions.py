"""Convolutions and batch normalisation for what objectives train beside a student.

Written out, since flax is imported by :mod:`kdjax.models` alone. All of it is gone
once the student is deployed, so that normalisation only ever sees training batches,
and keeps no running statistics.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

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


def normalized(params: PyTree, x: Array) -> Array:
    """A convolution, then batch normalisation by the statistics of this batch."""
    x = convolution(params, x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, (0, 1, 2))
    variance = jnp.mean((wide - mean) ** 2, (0, 1, 2))
    wide = (wide - mean) * jax.lax.rsqrt(variance + 1e-5)
    return (wide * params["scale"] + params["bias"]).astype(x.dtype)
