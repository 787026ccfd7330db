"""Runs a loss over rows of classes, together with the derivatives it writes out.

A rule says what is summed over the classes of a row, and how the derivative of an
entry follows from the sums. Here it becomes a function with every kind of derivative,
which keeps nothing of the size of the logits but the gradient itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
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
      sums_in_cache: ``sums`` by less arithmetic, if in more passes, likewise.
    """

    sums: Callable[..., Any]
    partial: Callable[..., Array]
    sums_on_tpu: Callable[..., Any] | None = None
    sums_in_cache: Callable[..., Any] | None = None


def by_rows(rule: Rule) -> Callable[..., Array]:
    """Makes ``(*inputs) -> [...]`` of a rule.

    The derivatives serve reverse mode, forward mode and derivatives of themselves.
    They are elementwise, so as safe under a sharded batch or vocabulary as sums are.
    """

    @jax.custom_jvp
    def loss(*inputs: Array) -> Array:
        return _evaluated(rule, (), *inputs)[0][..., 0]

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        moving = _moving(tangents)
        evaluated = _apart(functools.partial(_evaluated, rule, tuple(moving)))
        value, partials = evaluated(*primals)
        tangent = jnp.zeros_like(value)
        for partial, dot in zip(partials, moving.values(), strict=True):
            by_class = partial.shape != value.shape
            terms = partial * dot
            tangent += terms.sum(-1, keepdims=True) if by_class else terms
        return value[..., 0], tangent[..., 0]

    loss.defjvp(derivative, symbolic_zeros=True)
    return loss


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which reverse mode does not look into.

    JAX splits all that a derivative computes into what depends on tangents and what
    does not, twice for each branch. Of what never does, that is half of the tracing.
    """
    apart = jax.custom_jvp(function)

    def derivative(primals: Sequence[Array], tangents: Sequence[Any]) -> Any:
        moving = _moving(tangents)

        def of_moving(*arrays: Array) -> Any:
            changed = dict(zip(moving, arrays, strict=True))
            return function(*(changed.get(i, each) for i, each in enumerate(primals)))

        points = tuple(primals[index] for index in moving)
        return jax.jvp(of_moving, points, tuple(moving.values()))

    # A zero that is written out would become NaN where it meets a logit of -inf.
    apart.defjvp(derivative, symbolic_zeros=True)
    return apart


def _moving(tangents: Sequence[Any]) -> dict[int, Array]:
    """Those by index that are not zero for sure."""
    return {
        index: tangent
        for index, tangent in enumerate(tangents)
        if not isinstance(tangent, SymbolicZero)
    }


# Parts of a rule occur in its sums and in every derivative, for each kind of device.
traced_once = functools.partial(jax.jit, inline=True)


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
    rule: Rule, by: tuple[int, ...], *inputs: Array
) -> tuple[Array, list[Array]]:
    """The value ``[..., 1]``, and the derivatives by the inputs of these indices.

    On a CPU, one block of rows after the other takes half the time and no memory beside
    the result: derivatives find in the caches what the sums have read. But a loop over
    rows that lie on several devices would gather them all; so there has to be only one.
    After the blocks a derivative could be one with what multiplies it, and is faster by
    a twentieth; but where it has two users, XLA makes it twice, from powers that it
    writes down: four to six times the logits.
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
    block = max(1, _BLOCK // max(1, classes))
    if block < math.prod(leading) and jax.device_count() == 1:
        places = [len(tops) + index for index in by]
        of_block = functools.partial(at_once, rule.sums_in_cache or rule.sums)
        elsewhere["cpu"] = functools.partial(
            _in_blocks, of_block, block, places, leading
        )
    if rule.sums_on_tpu:
        elsewhere["tpu"] = functools.partial(at_once, rule.sums_on_tpu)
    if not elsewhere:
        return here(*tops, *inputs)
    return jax.lax.platform_dependent(*tops, *inputs, default=here, **elsewhere)


def _in_blocks(
    of_rows: Callable[..., Any],
    size: int,
    places: Sequence[int],
    leading: Sequence[int],
    *arrays: Array,
) -> tuple[Array, list[Array]]:
    """``of_rows(*arrays)`` for ``[*leading, n]``, so many rows at a time.

    A derivative takes the place of the array that it is by, whose rows are read before
    they are written over: logits that nothing else needs take no memory beside their
    gradient.
    """
    rows = math.prod(leading)
    given = [each.reshape(rows, -1) if each.ndim else each for each in arrays]

    def of_block(start: Array | int, size: int, *arrays: Array) -> Any:
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size
        )
        return of_rows(*(take(each) if each.ndim else each for each in arrays))

    def unwritten(rows: int) -> tuple[Array, list[Array]]:
        return jax.tree.map(
            lambda part: jax.lax.empty((rows, part.shape[-1]), part.dtype), shapes
        )

    def fill(start: Array, size: int, filled: tuple[Array, list[Array]]) -> Any:
        current = list(given)
        for place, derivative in zip(places, filled[1], strict=True):
            if place in replaced:
                current[place] = derivative
        # Always so, but XLA cannot know: else it would join the derivative with its
        # way into its place, and that is work for one core.
        part = jax.lax.cond(
            start >= 0,
            lambda start, *arrays: of_block(start, size, *arrays),
            lambda *_: unwritten(size),
            start,
            *current,
        )
        put = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0
        )
        return jax.tree.map(put, filled, part)

    shapes = jax.eval_shape(functools.partial(of_block, 0, size), *given)
    value, derivatives = unwritten(rows)
    replaced = set()
    for index, place in enumerate(places):
        if jax.typeof(given[place]) == jax.typeof(derivatives[index]):
            derivatives[index] = given[place]
            replaced.add(place)
    blocks, rest = divmod(rows, size)
    filled = jax.lax.fori_loop(
        0,
        blocks,
        lambda index, filled: fill(index * size, size, filled),
        (value, derivatives),
    )
    if rest:
        # The barrier hides the number, which would give the condition away.
        filled = fill(jax.lax.optimization_barrier(rows - rest), rest, filled)
    return jax.tree.map(lambda each: each.reshape(*leading, -1), filled)
