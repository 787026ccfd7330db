"""Rows in blocks, one after the other, which stay in the caches of a CPU's cores.

Passes over a block find there what the first of them has read. Arrays are ``[..., n]``,
with as many rows each, or scalars, which every block gets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Arrays = Sequence[Array]
Of = Callable[..., Any]


def reduced(of_rows: Of, others: Sequence[Of], size: int, *arrays: Array) -> Any:
    """What comes of all rows, as small arrays ``[..., 1]`` each.

    Args:
      of_rows: ``(*rows)`` of some of them to a tree of such arrays, and to one of
        integers: 0 where a row's are right, else which of the others it takes. The
        whole block takes the last that one of its rows does.
      others: ``(tree, *rows)`` to the tree that is right.
      size: rows of a block, at most all there are.
      *arrays: what the functions take, for all rows.
    """
    *leading, _ = arrays[0].shape
    rows = math.prod(leading)
    given = _flat(arrays, rows)

    def first(start: Array | int, *given: Array) -> Any:
        return of_rows(*_taken(given, start, size))

    def kept(part: Any, *_: Array) -> Any:
        return part

    def by(other: Of, part: Any, start: Array, *given: Array) -> Any:
        return other(part, *_taken(given, start, size))

    def fill(index: Array, filled: Any) -> Any:
        # The last block goes back over rows: a rest would have to be compiled too.
        start = jnp.minimum(index * size, rows - size)
        part, which = first(start, *given)
        # Each takes its rows itself: handed in, they would be copied each time.
        ways: list[Of] = [kept]
        ways += [functools.partial(by, other) for other in others]
        part = jax.lax.switch(which.max(), ways, part, start, *given)
        return _put(filled, part, start)

    shapes, _ = jax.eval_shape(functools.partial(first, 0), *given)
    filled = jax.lax.fori_loop(0, -(-rows // size), fill, _unwritten(shapes, rows))
    return _as_rows(filled, leading)


def in_place(
    of_rows: Of, size: int, places: Sequence[int], *arrays: Array
) -> tuple[Any, list[Array]]:
    """``of_rows(*arrays)``: small arrays ``[..., 1]``, and large ones.

    Each of the latter takes the place of the given array of its index, whose rows are
    read before they are written over: logits that nothing else needs take no memory
    beside their gradient.
    """
    *leading, _ = arrays[0].shape
    rows = math.prod(leading)
    given = _flat(arrays, rows)

    def of_block(start: Array | int, size: int, *arrays: Array) -> Any:
        return of_rows(*_taken(arrays, start, size))

    def fill(start: Array, size: int, filled: tuple[Any, list[Array]]) -> Any:
        current = list(given)
        for place, derivative in zip(places, filled[1], strict=True):
            if place in replaced:
                current[place] = derivative
        # Always so, but XLA cannot know: else it would join the derivative with its
        # way into its place, and that is work for one core.
        part = jax.lax.cond(
            start >= 0,
            lambda start, *arrays: of_block(start, size, *arrays),
            lambda *_: _unwritten(shapes, size),
            start,
            *current,
        )
        return _put(filled, part, start)

    shapes = jax.eval_shape(functools.partial(of_block, 0, size), *given)
    small, large = _unwritten(shapes, rows)
    replaced = set()
    for index, place in enumerate(places):
        if jax.typeof(given[place]) == jax.typeof(large[index]):
            large[index] = given[place]
            replaced.add(place)
    blocks, rest = divmod(rows, size)
    filled = jax.lax.fori_loop(
        0,
        blocks,
        lambda index, filled: fill(index * size, size, filled),
        (small, large),
    )
    if rest:
        # The barrier hides the number, which would give the condition away.
        filled = fill(jax.lax.optimization_barrier(rows - rest), rest, filled)
    return _as_rows(filled, leading)


def _flat(arrays: Arrays, rows: int) -> list[Array]:
    return [each.reshape(rows, -1) if each.ndim else each for each in arrays]


def _taken(arrays: Arrays, start: Array | int, size: int) -> list[Array]:
    take = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size
    )
    return [take(each) if each.ndim else each for each in arrays]


def _unwritten(shapes: Any, rows: int) -> Any:
    return jax.tree.map(
        lambda part: jax.lax.empty((rows, part.shape[-1]), part.dtype), shapes
    )


def _put(filled: Any, part: Any, start: Array) -> Any:
    put = functools.partial(
        jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0
    )
    return jax.tree.map(put, filled, part)


def _as_rows(tree: Any, leading: Sequence[int]) -> Any:
    return jax.tree.map(lambda each: each.reshape(*leading, -1), tree)
