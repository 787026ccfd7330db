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

from kdjax.losses import _blocks


class Blocks(NamedTuple):
    """How the sums of a rule are found in blocks: by less arithmetic, in more passes.

    For rules whose derivatives XLA makes in a single pass: those in which it meets no
    exponential, logarithm or quotient of all classes twice.

    Attributes:
      sums: ``(tops, *inputs)`` to the rule's sums, and to what each row's are,
        ``[..., 1]``, by :func:`state`.
      refined: ``(sums, *inputs)`` to what rough ones lack.
    """

    sums: Callable[..., tuple[Any, Array]]
    refined: Callable[..., Any] = lambda sums, *_: sums


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
      blocks: ``sums`` for blocks of rows, where there is a way.
      sides: how many of the inputs are logits.
    """

    sums: Callable[..., Any]
    partial: Callable[..., Array]
    sums_on_tpu: Callable[..., Any] | None = None
    blocks: Blocks | None = None
    sides: int = 2


def state(near: Array, right: Array | bool = True) -> Array:
    """What a block's sums are, as a number for each row.

    Where the tops were near enough to the largest logits, 0 or, if still to be refined,
    1; else 2. It is the way that :func:`kdjax.losses._blocks.reduced` then takes.
    """
    return jnp.where(near, jnp.where(right, 0, 1), 2)


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
            terms = partial * (_once(dot, partial) if by_class else dot)
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


def _once(tangent: Array, partial: Array) -> Array:
    """The tangent, so that its product with the derivative is made once in reverse.

    On a CPU, XLA repeats a product for each of its users, and keeps the powers that it
    comes from in arrays of their own; never a quotient. This one is by 1.
    """

    def quotient(tangent: Array, partial: Array) -> Array:
        # By 0 beside a NaN, which is what remains.
        return tangent / (partial == partial).astype(tangent.dtype)

    return jax.lax.platform_dependent(
        tangent, partial, cpu=quotient, default=lambda tangent, _: tangent
    )


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


# Of a sum of powers relative to a logit that may not be the largest. A logit further
# from it than this one's logarithm, 16, would be rounded by more than 1e-6.
MOST = 2.0**23

Inputs = tuple[Array, ...]


def has_mesh_axes(array: ArrayLike) -> bool:
    """Whether axes of a mesh are in its type, as in shard_map, or where Explicit.

    What a loop starts from would have to be of that type too.
    """
    kind = jax.typeof(array)
    return bool(kind.manual_axis_type.varying or kind.sharding.mesh.explicit_axes)


def _widened(inputs: Inputs) -> Inputs:
    def is_floating(each: Array) -> bool:
        return jnp.issubdtype(each.dtype, jnp.floating)

    dtype = wide_dtype(*filter(is_floating, inputs))
    return tuple(each.astype(dtype) if is_floating(each) else each for each in inputs)


# 2 MB in float32: what is made of a block stays in the caches of the cores. Of fewer
# rows than this the cores could not get the same share. Rows that make only a few
# blocks are cut smaller, so that what is made of a block is little beside them.
_BLOCK, _LEAST_ROWS, _BLOCKS = 2**19, 8, 20


def _rows_of_block(rows: int, classes: int) -> int | None:
    """An even number, for the cores, or ``None`` where one block holds them all."""
    fitting = max(_LEAST_ROWS, _BLOCK // max(1, classes))
    if rows <= fitting:
        return None
    size = max(_LEAST_ROWS, min(fitting, rows // _BLOCKS))
    return size - size % 2


def _evaluated(
    rule: Rule, by: tuple[int, ...], *inputs: Array
) -> tuple[Array, list[Array]]:
    """The value ``[..., 1]``, and the derivatives by the inputs of these indices.

    On a CPU, one block of rows after the other takes half the time and no memory. But a
    loop over rows that lie on several devices would gather them all; so there has to be
    only one.

    Derivatives that are a single pass are made after the blocks: what multiplies one
    joins in, and the gradient takes the place of logits from a product.
    """
    *leading, classes = inputs[0].shape
    # Not in the blocks: a bare reduction is fast by itself.
    tops = tuple(map(largest, inputs[: rule.sides]))
    with_sums, after_sums = ((), by) if rule.blocks else (by, ())

    def at_once(sums: Callable[..., Any], *arrays: Array) -> tuple[Any, list[Array]]:
        wide = _widened(arrays)
        found, own = sums(*wide), wide[-len(inputs) :]
        return found, [rule.partial(index, found, *own) for index in with_sums]

    def from_tops(*arrays: Array) -> tuple[Any, list[Array]]:
        def sums(*wide: Array) -> Any:
            return rule.sums(wide[: len(tops)], *wide[len(tops) :])

        return at_once(sums, *arrays)

    def in_blocks(size: int, *arrays: Array) -> tuple[Any, list[Array]]:
        if rule.blocks is None:
            places = [len(tops) + index for index in by]
            # Smaller, as there are derivatives in them too.
            return _blocks.in_place(from_tops, size // 2, places, *arrays)
        first, others = _ways(rule.blocks, rule.sides)
        return _blocks.reduced(first, others, size, *arrays[len(tops) :]), []

    ways: dict[str, Callable[..., tuple[Any, list[Array]]]] = {}
    size = _rows_of_block(math.prod(leading), classes)
    if size and jax.device_count() == 1 and not any(map(has_mesh_axes, inputs)):
        ways["cpu"] = functools.partial(in_blocks, size)
    if rule.sums_on_tpu:
        on_tpu = functools.partial(at_once, rule.sums_on_tpu)
        ways["tpu"] = lambda *arrays: on_tpu(*arrays[len(tops) :])
    way = functools.partial(jax.lax.platform_dependent, default=from_tops, **ways)
    found, partials = (way if ways else from_tops)(*tops, *inputs)
    wide = _widened(inputs)
    partials += [rule.partial(index, found, *wide) for index in after_sums]
    return found.value, partials


# 4 kB of a row have hardly ever nothing near its largest.
_SOME = 1024


def _largest_of_some(logits: Array) -> Array:
    """-inf where none of them is left; what is relative to that is NaN or infinite."""
    return jax.lax.stop_gradient(logits[..., :_SOME].max(-1, keepdims=True))


def _ways(
    blocks: Blocks, sides: int
) -> tuple[Callable[..., Any], list[Callable[..., Any]]]:
    """To the sums of rows, as :func:`kdjax.losses._blocks.reduced` takes them."""

    def of_tops(top: Callable[[Array], Array], *rows: Array) -> tuple[Any, Array]:
        wide = _widened(rows)
        return blocks.sums(tuple(map(top, wide[:sides])), *wide)

    def from_some(*rows: Array) -> tuple[Any, Array]:
        return of_tops(_largest_of_some, *rows)

    def refined(sums: Any, *rows: Array) -> Any:
        return blocks.refined(sums, *_widened(rows))

    def from_all(_: Any, *rows: Array) -> Any:
        return refined(of_tops(largest, *rows)[0], *rows)

    return from_some, [refined, from_all]
