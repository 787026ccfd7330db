"""Runs a loss over rows of classes, together with the derivatives it writes out.

A rule says what is summed over the classes of a row, and how the derivative of an
entry follows from the sums. Here it becomes a function with every kind of derivative,
which keeps nothing of the size of the logits but the gradient itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike


class Rule(NamedTuple):
    """A loss of rows of classes.

    Its inputs are logits ``[..., V]``, then numbers ``[..., 1]`` or scalars; ``tops``
    are the largest logits of each row, ``[..., 1]``, one for each array of logits.

    Attributes:
      sums: ``(tops, *inputs)`` to a named tuple of arrays ``[..., 1]``, of which
        ``value`` is the loss.
      partial: ``(index, sums, *inputs)`` to the derivative of the loss by the input of
        that index: ``[..., V]`` by logits, ``[..., 1]`` by numbers.
      sums_on_tpu: ``sums`` in fewer passes over the classes, where there is a way.
    """

    sums: Callable[..., Any]
    partial: Callable[..., Array]
    sums_on_tpu: Callable[..., Any] | None = None


def by_rows(rule: Rule) -> Callable[..., Array]:
    """Makes ``(*inputs) -> [...]`` of a rule.

    The derivatives serve reverse mode, forward mode and derivatives of themselves.
    They are elementwise, so as safe under a sharded batch or vocabulary as sums are.
    """

    @jax.custom_jvp
    def loss(*inputs: Array) -> Array:
        return _evaluated(rule, (), inputs)[0][..., 0]

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        moving = {
            index: dot
            for index, dot in enumerate(tangents)
            if not isinstance(dot, SymbolicZero)
        }
        value, partials = _evaluated(rule, tuple(moving), primals)
        tangent = jnp.zeros_like(value)
        for partial, dot in zip(partials, moving.values(), strict=True):
            by_class = partial.shape != value.shape
            terms = partial * dot
            tangent += terms.sum(-1, keepdims=True) if by_class else terms
        return value[..., 0], tangent[..., 0]

    loss.defjvp(derivative, symbolic_zeros=True)
    return loss


def wide_dtype(*logits: ArrayLike) -> jnp.dtype:
    """What a loss of these logits is computed in: float32, or float64 if any is."""
    return functools.reduce(
        jnp.promote_types, map(jnp.result_type, logits), jnp.dtype(jnp.float32)
    )


def as_columns(dtype: jnp.dtype, *numbers: ArrayLike) -> list[Array]:
    """Scalars as they are, one number per row as ``[..., 1]``."""
    arrays = [jnp.asarray(number, dtype) for number in numbers]
    return [array[..., None] if array.ndim else array for array in arrays]


def largest(logits: Array) -> Array:
    """The largest logit of each row, ``[..., 1]``; 0 where none is left."""
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return jnp.where(jnp.isneginf(top), 0, top)


Inputs = tuple[Array, ...]


def _logits(inputs: Inputs) -> Inputs:
    return tuple(each for each in inputs if each.shape == inputs[0].shape)


def _widened(inputs: Inputs) -> Inputs:
    dtype = wide_dtype(*_logits(inputs))
    return tuple(
        each.astype(dtype) if jnp.issubdtype(each.dtype, jnp.floating) else each
        for each in inputs
    )


# 1 MB in float32: what is made of a block stays in the caches of the cores.
_BLOCK = 2**18


def _evaluated(
    rule: Rule, by: tuple[int, ...], inputs: Inputs
) -> tuple[Array, list[Array]]:
    """The value ``[..., 1]``, and the derivatives by the inputs of these indices.

    On a CPU, one block of rows after the other takes half the time and no memory beside
    the result: derivatives find in the caches what the sums have read. But a loop over
    rows that lie on several devices would gather them all; so there has to be only one.
    """
    *leading, classes = inputs[0].shape
    # Not in the blocks: a bare reduction is fast by itself.
    tops = tuple(map(largest, _logits(inputs)))

    def at_once(sums: Callable[..., Any], *arrays: Array) -> tuple[Array, list[Array]]:
        wide = _widened(arrays)
        own = wide[len(tops) :]
        found = sums(wide[: len(tops)], *own)
        return found.value, [rule.partial(index, found, *own) for index in by]

    here = functools.partial(at_once, rule.sums)
    elsewhere = {}
    block = _block(leading, classes)
    if block != leading and jax.device_count() == 1:
        elsewhere["cpu"] = functools.partial(_in_blocks, here, leading, block)
    if rule.sums_on_tpu:
        elsewhere["tpu"] = functools.partial(at_once, rule.sums_on_tpu)
    if not elsewhere:
        return here(*tops, *inputs)
    return jax.lax.platform_dependent(*tops, *inputs, default=here, **elsewhere)


def _block(leading: list[int], classes: int) -> list[int]:
    """The shape of a block of rows: all of the last axes, and some of one more."""
    rows = max(1, _BLOCK // max(1, classes))
    block: list[int] = []
    for size in reversed(leading):
        block.insert(0, min(size, rows))
        rows = max(1, rows // max(1, size))
    return block


def _in_blocks(
    of_rows: Callable[..., Any], leading: list[int], block: list[int], *arrays: Array
) -> Any:
    """``of_rows(*arrays)``, arrays ``[..., n]`` like those that it is given."""
    steps = [math.ceil(n / b) for n, b in zip(leading, block, strict=True)]

    def of_block(start: tuple[Array, ...], *arrays: Array) -> Any:
        return of_rows(
            *(
                jax.lax.dynamic_slice(each, (*start, 0), (*block, each.shape[-1]))
                if each.ndim
                else each
                for each in arrays
            )
        )

    def unwritten(rows: list[int]) -> Any:
        return jax.tree.map(
            lambda part: jax.lax.empty((*rows, part.shape[-1]), part.dtype), shapes
        )

    def fill(step: Array, filled: Any) -> Any:
        places = jnp.unravel_index(step, steps)
        # The last block reaches back into the one before, and finds the same again.
        start = tuple(
            jnp.minimum(place * b, n - b)
            for place, b, n in zip(places, block, leading, strict=True)
        )
        # Always so, but XLA cannot know: else it would join the derivative with its
        # way into its place, and that is work for one core.
        part = jax.lax.cond(
            step >= 0, of_block, lambda *_: unwritten(block), start, *arrays
        )
        put = jax.lax.dynamic_update_slice
        return jax.tree.map(
            lambda all_, some: put(all_, some, (*start, 0)), filled, part
        )

    shapes = jax.eval_shape(of_block, (0,) * len(block), *arrays)
    # Several blocks in a round: one core puts a derivative into its place, while others
    # begin the next block.
    return jax.lax.fori_loop(0, math.prod(steps), fill, unwritten(leading), unroll=4)
