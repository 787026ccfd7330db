"""A batch in parts, run one after the other, and their results put together."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.types import Batch, PyTree


def split(batch: Batch, parts: int, argument: str) -> dict[str, Array]:
    """Micro-batches along a new first axis.

    Each takes every n-th example, so that under a sharded batch every device has its
    share of each of them.

    Args:
      batch: arrays with the examples first.
      parts: how many.
      argument: that asked for them, for the refusal.

    Returns:
      Arrays ``[parts, B / parts, ...]``.

    Raises:
      ValueError: ``parts`` does not divide the examples.

    Example:
      >>> split({"x": jnp.arange(4)}, 2, "accumulate")["x"].tolist()
      [[0, 2], [1, 3]]
    """
    for name, array in batch.items():
        if array.shape[0] % parts:
            raise ValueError(
                f"{argument}: got {parts}, which does not divide the {array.shape[0]} "
                f"examples of {name!r}."
            )
    return {
        name: array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)
        for name, array in batch.items()
    }


def mapped(
    function: Callable[[Batch], PyTree], batch: Batch, parts: int, argument: str
) -> PyTree:
    """What a function gives for a batch, computed micro-batch by micro-batch.

    Args:
      function: of a batch to a tree of arrays, each of which has the examples along
        one axis, wherever that is, or does not depend on them (a head's kernel, say).
      batch: as for :func:`split`.
      parts: likewise.
      argument: likewise.

    Returns:
      The tree of the whole batch.

    Raises:
      ValueError: as from :func:`split`, or the shape of an array does not grow with the
        batch along one axis alone.

    Example:
      >>> batch = {"x": jnp.arange(4.0)}
      >>> mapped(lambda batch: batch["x"] ** 2, batch, 2, "parts").tolist()
      [0.0, 1.0, 4.0, 9.0]
    """
    # Of a large network each trace takes seconds, and it is looked at four times.
    function = jax.jit(function, inline=True)
    micros = split(batch, parts, argument)
    first = jax.tree.map(lambda array: array[0], micros)
    whole, structure = jax.tree.flatten(jax.eval_shape(function, dict(batch)))
    part = jax.tree.leaves(jax.eval_shape(function, first))
    examples = len(next(iter(batch.values())))
    axes = [
        _examples_axis(large.shape, small.shape, examples, parts, argument)
        for large, small in zip(whole, part, strict=True)
    ]

    def grown(micro: Batch) -> list[Array]:
        leaves = jax.tree.leaves(function(micro))
        return [
            leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is not None
        ]

    stacked = iter(jax.lax.map(grown, micros))
    # Of this one the compiler keeps only what does not depend on the examples.
    constant = jax.tree.leaves(function(first))
    leaves = [
        one if axis is None else _joined(next(stacked), axis)
        for one, axis in zip(constant, axes, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def _examples_axis(
    whole: tuple[int, ...],
    part: tuple[int, ...],
    examples: int,
    parts: int,
    argument: str,
) -> int | None:
    """The axis along which an array grows with the batch, if it does."""
    if whole == part:
        return None
    grown = [
        i for i, sizes in enumerate(zip(whole, part, strict=True)) if len({*sizes}) > 1
    ]
    # Examples joined with something else would come out in another order.
    if len(grown) > 1 or whole[grown[0]] != examples:
        raise ValueError(
            f"{argument}: an output of shape {whole} has the shape {part} for one of "
            f"{parts} parts of the batch; expected the examples along one axis."
        )
    return grown[0]


def _joined(stacked: Array, axis: int) -> Array:
    """From every n-th example in each part to all of them in their order."""
    moved = jnp.moveaxis(stacked, 0, axis + 1)
    shape = moved.shape
    return moved.reshape(*shape[:axis], -1, *shape[axis + 2 :])
