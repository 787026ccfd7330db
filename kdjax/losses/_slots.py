"""What losses over some of the classes share: their logits, and those of the rest."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kdjax.losses._labels import at_temperature, wide_integers, widened
from kdjax.losses._rows import largest


def below_top(logits: Array, temperature: ArrayLike) -> Array:
    """The logits less the largest of each row, softened, ``[..., V]``."""
    logits = widened(logits)
    # Only then divided: of logits of 1e4 little would be left behind the point.
    return at_temperature(logits - largest(logits), temperature)


def log_sum(logits: Array) -> Array:
    """The logarithm of the sum of the powers, ``[...]``; -inf where all logits are."""
    top = largest(logits)
    total = jnp.exp(logits - top).sum(-1)
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + top[..., 0])


def slots_of(indices: Array, log_probs: Array, classes: int) -> tuple[Array, Array]:
    """Which slots are used, and their classes: one too large where there is none."""
    used, indices = ~jnp.isneginf(log_probs), wide_integers(indices)
    return used, jnp.where(used & (indices >= 0), indices, classes)


def at_slots(logits: Array, slots: Array) -> Array:
    """Picks the logits of classes, ``[..., k]``; NaN beyond the last one."""
    return jnp.take_along_axis(logits, slots, -1, mode="fill", fill_value=jnp.nan)


def _marked(row: Array, slots: Array) -> Array:
    return row.at[slots].set(True, mode="drop")


# Row by row: a scatter over all rows at once would gather the indices of a mesh.
_marked_in_rows = jnp.vectorize(_marked, signature="(v),(k)->(v)")


def others(logits: Array, slots: Array) -> Array:
    """The logits without those of classes, which are -inf, ``[..., V]``."""
    marked = _marked_in_rows(jnp.zeros(logits.shape, bool), slots)
    return jnp.where(marked, -jnp.inf, logits)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities, ``[..., V]``; all -inf in a row without a class."""
    total = log_sum(logits)[..., None]
    return logits - jnp.where(jnp.isneginf(total), 0, total)
