"""What losses with labels share: which positions count, and the label's logit.

A negative label scores nothing: value and gradient of its position are 0. The logit
of a label is picked by comparing with an iota, never by a gather, so that classes
that are sharded over a mesh stay where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kdjax.losses._rows import MOST, Blocks, Rule, by_rows, state


def widened(logits: Array) -> Array:
    """At least float32; float64 stays."""
    logits = jnp.asarray(logits)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def at_temperature(logits: Array, temperature: ArrayLike) -> Array:
    """Divided; -inf stays so, with no derivative by the temperature, which is NaN."""
    gone = jnp.isneginf(logits)
    return jnp.where(gone, logits, jnp.where(gone, 0, logits) / temperature)


def wide_integers(array: ArrayLike) -> Array:
    """int32, or int64 that stays.

    What is narrower may not hold the number of classes, and what is unsigned no
    negative label.
    """
    array = jnp.asarray(array)
    return array if array.dtype in (jnp.int32, jnp.int64) else array.astype(jnp.int32)


def at_label(labels: Array, logits: Array) -> Array:
    """True in the slot of each label ``[..., 1]``, ``[..., V]``."""
    slots = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return labels == slots


def weighted(weight: Array, loss: Array) -> Array:
    """``weight * loss``, where a weight of 0 also silences an infinite loss."""
    # Also in the derivative by the weight.
    silent = weight == 0
    return jnp.where(silent, 0.0, weight * jnp.where(silent, 0.0, loss))


def visible(values: Array, *inputs: Array) -> Array:
    """The values, NaN where an input is, which comparisons would have hidden."""
    for each in inputs:
        values = jnp.where(jnp.isnan(each), jnp.nan, values)
    return values


def validity_of(labels: Array, logits: Array) -> Array:
    """1 for a class, 0 for a negative label, NaN beyond the classes."""
    labels = wide_integers(labels)
    known = jnp.where(labels < logits.shape[-1], 1.0, jnp.nan)
    return jnp.where(labels < 0, 0.0, known).astype(logits.dtype)


def scored(loss: Callable[..., Array], labels: Array, *logits: Array) -> Array:
    """``loss(*logits)`` where a label is given, 0 elsewhere, NaN beyond the classes.

    The logits of positions without a label are replaced first: masking the loss
    alone would let a NaN of padding into the gradient, as 0 * NaN.
    """
    unscored = labels < 0
    kept = (jnp.where(unscored[..., None], 0.0, each) for each in logits)
    values = jnp.where(unscored, 0.0, loss(*kept))
    return values * validity_of(labels, logits[0])


class Hard(NamedTuple):
    """Sums over the classes that the loss of a label needs, each ``[..., 1]``."""

    value: Array
    top: Array  # the largest logit
    label: Array  # the label's logit below it
    others: Array  # sum of the powers of all others


def where_scored(labels: Array, *arrays: Array) -> list[Array]:
    """The arrays, 0 in rows that are not scored: what stands there may be NaN."""
    return [jnp.where(labels < 0, 0.0, each) for each in arrays]


def _by_sum(logits: Array, labels: Array) -> Array:
    """The logit of each label, without a gathering of classes on several devices."""
    return jnp.where(at_label(labels, logits), logits, 0.0).sum(-1, keepdims=True)


def _by_place(logits: Array, labels: Array) -> Array:
    """The same in a pass less, for rows on one device."""
    return jnp.take_along_axis(logits, labels, -1, mode="clip")


def hard_sums(
    tops: Sequence[Array],
    logits: Array,
    labels: Array,
    pick: Callable[[Array, Array], Array] = _by_sum,
) -> Hard:
    """-log softmax(logits)[label], and what its derivative needs."""
    logits, top = where_scored(labels, logits, tops[0])
    is_label = at_label(labels, logits)
    below = logits - top
    # The other classes are summed apart from the label's: the loss of a confident,
    # right row is then tiny, and not the difference of two equal numbers.
    others = jnp.where(is_label, 0.0, jnp.exp(below)).sum(-1, keepdims=True)
    label = pick(below, labels)
    alone = others == 0
    odds = jnp.log(jnp.where(alone, 1.0, others)) - label
    loss = jnp.where(alone, 0.0, jax.nn.softplus(odds))
    return Hard(weighted(validity_of(labels, logits), loss), top, label, others)


hard_sums_on_one = functools.partial(hard_sums, pick=_by_place)


def hard_partial(index: int, sums: Hard, logits: Array, labels: Array) -> Array:
    """Its derivative by the logits, ``[..., V]``."""
    (logits,) = where_scored(labels, logits)
    total = sums.others + jnp.exp(sums.label)
    scale = validity_of(labels, logits) / jnp.where(total == 0, 1.0, total)
    powers = jnp.exp(logits - sums.top)
    return scale * jnp.where(at_label(labels, logits), -sums.others, powers)


def hard_near_enough(sums: Hard) -> Array:
    """Whether the top was, ``[..., 1]``; not so where a sum is NaN."""
    return sums.others + jnp.exp(sums.label) < MOST


def _sums_in_blocks(
    tops: Sequence[Array], logits: Array, labels: Array
) -> tuple[Hard, Array]:
    sums = hard_sums_on_one(tops, logits, labels)
    return sums, state(hard_near_enough(sums))


_hard = by_rows(Rule(hard_sums, hard_partial, blocks=Blocks(_sums_in_blocks), sides=1))


def negative_log_likelihood(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label], ``[...]``; 0 for a negative label, NaN beyond."""
    return _hard(logits, labels[..., None])
