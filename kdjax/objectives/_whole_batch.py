"""Terms that relate examples which may lie on several devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.types import Mean, PyTree

_AXIS: ContextVar[str | None] = ContextVar("batch axis", default=None)


@contextlib.contextmanager
def split_over(axis_name: str | None) -> Iterator[None]:
    """Says which axis of ``shard_map`` or ``pmap`` splits the batch of what is traced.

    :func:`kdjax.make_train_step` says it to its objective.

    Args:
      axis_name: of the axis; ``None`` where every array is that of the whole batch.
    """
    before = _AXIS.set(axis_name)
    try:
        yield
    finally:
        _AXIS.reset(before)


def summed_over_devices(array: Array) -> Array:
    """What each device has of a sum over examples, added up."""
    axis_name = _AXIS.get()
    return array if axis_name is None else jax.lax.psum(array, axis_name)


def over_whole_batch(loss: Callable[..., Array], *parts: PyTree) -> Mean:
    """Averages what a loss makes of the whole batch.

    Under an axis of ``shard_map`` or ``pmap``, the examples of all devices are gathered
    first, and the first device alone counts the values, which are the same everywhere.
    Objectives of one's own that relate examples go through it.

    Args:
      loss: ``loss(*parts)``, whose values all count, however many they are.
      *parts: arrays, or trees of them, with the examples along their first axis.

    Returns:
      The mean, to be added up over devices as any other.

    Example:
      >>> spread = lambda x: jnp.square(x - x.mean())
      >>> over_whole_batch(spread, jnp.array([1.0, 3.0])).value()
      Array(1., dtype=float32)
    """
    axis_name = _AXIS.get()
    if axis_name is None:
        return Mean.of(loss(*parts))
    values = loss(*jax.lax.all_gather(parts, axis_name, tiled=True))
    first = jax.lax.axis_index(axis_name) == 0
    return Mean.of(values, jnp.full(values.shape, first))
