"""Random keys that depend on the example, and not on where it is computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def by_example(index: Array, step: Array, seed: int) -> Array:
    """A key for each example ``[B]``, of the seed, the step and the example's index."""
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"index: the batch's entry has dtype {index.dtype}; expected integers, the "
            "index of each example in the data."
        )
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda each: jax.random.fold_in(key, each))(index)
