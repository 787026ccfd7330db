"""Tokens a chunk at a time: sums with the student's gradient, and plain functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from kdjax.fused._products import (
    hidden_gradient,
    product,
    split,
    with_kernel_gradient,
)
from kdjax.losses._rows import wide_dtype
from kdjax.types import LinearHead, PyTree

SUMMED_BYTES = 2**26
"""Of a gradient that are summed over devices at a time: 64 MiB."""


class Plan(NamedTuple):
    """How tokens are gone through.

    Attributes:
      loss: logits ``[n, V]`` and what else there is per token to ``(values, others)``.
      chunk_size: most tokens at a time, on each device.
      axes: of the mesh around, which tokens are split over.
    """

    loss: Callable[..., tuple[Array, PyTree]]
    chunk_size: int
    axes: tuple[str, ...]


class Gradient(NamedTuple):
    """By the student, unscaled: of the sum over tokens.

    Attributes:
      hidden: by its hidden states ``[N, D]``, in their dtype.
      head: by what all tokens share, by name, in float32 at least.
    """

    hidden: Array
    head: dict[str, Array]


def per_token(change: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """Changes what has an entry per token: hidden states of heads, and bare arrays."""

    def of(node: Any) -> Any:
        if isinstance(node, LinearHead):
            return node._replace(hidden=change(node.hidden))
        return change(node)

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, LinearHead))


def total(
    plan: Plan, student: LinearHead, others: PyTree, counts: Array
) -> tuple[Array, PyTree]:
    """Sums values over the tokens ``[N]`` that count; the student has a gradient."""

    @jax.custom_vjp
    def sums(student: LinearHead, others: PyTree, counts: Array) -> Any:
        return _everywhere(plan, False, student, others, counts)[0]

    def forward(student: LinearHead, others: PyTree, counts: Array) -> Any:
        return _everywhere(plan, True, student, others, counts)

    def backward(gradient: Gradient, cotangents: Any) -> Any:
        by_total, _ = cotangents
        scaled = jax.tree.map(
            lambda slope, of: (slope * by_total).astype(jnp.result_type(of)),
            LinearHead(gradient.hidden, **gradient.head),
            student,
        )
        return scaled, None, None

    sums.defvjp(forward, backward)
    return sums(student, others, counts)


def _everywhere(plan: Plan, differentiate: bool, *inputs: Any) -> Any:
    """The sums, and the gradient of the total or ``None``, over all devices."""
    if not plan.axes:
        return _over_chunks(plan, differentiate, *inputs)

    def on_device(*inputs: Any) -> Any:
        sums, gradient = _over_chunks(plan, differentiate, *inputs)
        if gradient is None:
            return jax.lax.psum(sums, plan.axes), None
        head = {name: _summed(by, plan.axes) for name, by in gradient.head.items()}
        return jax.lax.psum(sums, plan.axes), gradient._replace(head=head)

    split, whole = _specs(plan.axes)
    gradient = Gradient(split, whole) if differentiate else None
    return _spread(on_device, plan.axes, (whole, gradient), inputs)


def _summed(array: Array, axes: tuple[str, ...]) -> Array:
    """Its sum over devices, a block of rows after the other.

    The sum of a whole kernel's gradient would take its memory once more.
    """
    rows = array.shape[0] if array.ndim > 1 else 1
    most = max(1, SUMMED_BYTES * rows // array.nbytes)
    if rows <= most:
        return jax.lax.psum(array, axes)
    size = max(n for n in range(1, most + 1) if rows % n == 0)

    def sum_block(index: Array, array: Array) -> Array:
        block = jax.lax.dynamic_slice_in_dim(array, index * size, size)
        block = jax.lax.psum(block, axes)
        return jax.lax.dynamic_update_slice_in_dim(array, block, index * size, 0)

    return jax.lax.fori_loop(0, rows // size, sum_block, array)


def _specs(axes: tuple[str, ...]) -> tuple[Any, Any]:
    """Split by tokens, and not at all."""
    return PartitionSpec(axes), PartitionSpec()


def _spread(
    on_device: Callable[..., Any], axes: tuple[str, ...], out_specs: Any, inputs: Any
) -> Any:
    """Runs a function on every device, each with its own tokens.

    A loop over tokens that lie on several devices would gather them all.
    """
    split, whole = _specs(axes)
    given = per_token(lambda _: split, jax.tree.map(lambda _: whole, inputs))
    # The check would want the zeros that sums start from to be marked as different on
    # each device, and nothing is differentiated in here.
    spread = jax.shard_map(
        on_device,
        in_specs=given,
        out_specs=out_specs,
        axis_names=set(axes),
        check_vma=False,
    )
    # Outside of jit a mesh with further axes would be refused.
    return jax.jit(spread)(*inputs)


def mapped(
    function: Callable[..., PyTree],
    chunk_size: int,
    axes: tuple[str, ...],
    head: LinearHead,
    others: PyTree,
) -> PyTree:
    """What a function gives for logits and more of some tokens, for all tokens."""
    # A loop that fills arrays has no reverse derivative.
    inputs = jax.lax.stop_gradient((head, others))

    def on_device(head: LinearHead, others: PyTree) -> PyTree:
        return _filled(function, chunk_size, head, others)

    if not axes:
        return on_device(*inputs)
    return _spread(on_device, axes, _specs(axes)[0], inputs)


def _filled(
    function: Callable[..., PyTree], chunk_size: int, head: LinearHead, others: PyTree
) -> PyTree:
    """The same over the tokens of one device."""
    tokens = head.hidden.shape[0]
    chunks, size = split(tokens, chunk_size)

    def of_chunk(index: Array | int) -> tuple[Array, PyTree]:
        start, taken = _chunk(index, size, tokens)
        logits, *rest = map(_given, per_token(taken, (head, *others)))
        return start, function(logits, *rest)

    def empty(part: jax.ShapeDtypeStruct) -> Array:
        if part.shape[:1] != (size,):
            raise ValueError(
                f"function: got an array of shape {part.shape} for {size} tokens; "
                "expected an entry for each first."
            )
        return jnp.zeros((tokens, *part.shape[1:]), part.dtype)

    def fill(index: Array, filled: PyTree) -> PyTree:
        start, parts = of_chunk(index)
        put = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0
        )
        return jax.tree.map(put, filled, parts)

    start = jax.tree.map(empty, jax.eval_shape(lambda: of_chunk(0)[1]))
    return jax.lax.fori_loop(0, chunks, fill, start)


def _over_chunks(
    plan: Plan, differentiate: bool, student: LinearHead, others: PyTree, counts: Array
) -> tuple[tuple[Array, PyTree], Gradient | None]:
    """The same over the tokens of one device."""
    tokens = counts.shape[0]
    chunks, size = split(tokens, plan.chunk_size)

    def add(gradient: Gradient | None, index: Array) -> Any:
        # The last chunk reaches back into the one before, whose tokens do not count
        # again.
        start, of_chunk = _chunk(index, size, tokens)
        here, there, counting = per_token(of_chunk, (student, others, counts))
        counting &= start + jnp.arange(size) >= index * size
        if gradient is None:
            return None, _values(plan.loss, here, there, counting)
        sums, more, slopes = _values_and_gradient(plan.loss, here, there, counting)
        hidden = of_chunk(gradient.hidden) + more.hidden
        hidden = jax.lax.dynamic_update_slice_in_dim(gradient.hidden, hidden, start, 0)
        head = {name: gradient.head[name] + by for name, by in more.head.items()}
        head["kernel"] = with_kernel_gradient(gradient.head["kernel"], *slopes)
        return Gradient(hidden, head), sums

    zeros = _zeros(student) if differentiate else None
    gradient, sums = jax.lax.scan(add, zeros, jnp.arange(chunks))
    return jax.tree.map(lambda each: each.sum(0), sums), gradient


def _chunk(
    index: Array | int, size: int, tokens: int
) -> tuple[Array, Callable[[Array], Array]]:
    """Where a chunk starts, and what takes its tokens out of an array."""
    start = jnp.minimum(index * size, tokens - size)
    return start, functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size
    )


def _zeros(student: LinearHead) -> Gradient:
    """A gradient to add to."""
    dtype = wide_dtype(student.hidden, student.kernel)
    _, *shared = student._asdict().items()
    head = {
        name: jnp.zeros(jnp.shape(leaf), dtype)
        for name, leaf in shared
        if leaf is not None
    }
    return Gradient(jnp.zeros_like(student.hidden), head)


def _multiplied(student: LinearHead, counts: Array) -> tuple[Array, Array]:
    """Hidden states, 0 where nothing counts, times the kernel."""
    # 0 * NaN would make the kernel's gradient NaN.
    hidden = jnp.where(counts[:, None], student.hidden, 0)
    return hidden, product("nd,dv->nv", hidden, student.kernel)


def _given(other: Any) -> Any:
    """What a function gets for an argument: logits for a head, else what it is."""
    if not isinstance(other, LinearHead):
        return other
    # The only head beside the student's. Profiles tell its share by the name, as they
    # tell the rest of the teacher's.
    with jax.named_scope("teacher"):
        return other.finished(product("nd,dv->nv", other.hidden, other.kernel))


def _loss_of(
    loss: Callable[..., tuple[Array, PyTree]], others: PyTree, counts: Array
) -> Callable[[Array], tuple[Array, tuple[Array, PyTree]]]:
    """Student's logits to the values, and the sums of all that is asked for."""

    def summed(name: str, values: Array) -> Array:
        values = jnp.asarray(values)
        if values.shape != counts.shape:
            raise ValueError(
                f"loss: got {name} of shape {values.shape} for {counts.size} tokens; "
                "expected one each. A loss that relates tokens or keeps classes apart "
                "needs all logits: call it with student.logits()."
            )
        return jnp.where(counts, values, 0).sum(dtype=wide_dtype(values))

    def of(logits: Array) -> tuple[Array, tuple[Array, PyTree]]:
        values, rest = loss(logits, *map(_given, others))
        sums = (
            summed("values", values),
            jax.tree.map(functools.partial(summed, "others"), rest),
        )
        return values, sums

    return of


def _values(
    loss: Callable[..., tuple[Array, PyTree]],
    student: LinearHead,
    others: PyTree,
    counts: Array,
) -> tuple[Array, PyTree]:
    """The sums of one chunk."""
    _, products = _multiplied(student, counts)
    return _loss_of(loss, others, counts)(student.finished(products))[1]


def _values_and_gradient(
    loss: Callable[..., tuple[Array, PyTree]],
    student: LinearHead,
    others: PyTree,
    counts: Array,
) -> tuple[tuple[Array, PyTree], Gradient, tuple[Array, Array]]:
    """The sums of one chunk, and the gradient of the first by the student.

    That by the kernel is in two factors, hidden states and slopes.
    """
    hidden, products = _multiplied(student, counts)
    of_logits = _loss_of(loss, others, counts)
    # One per token, so that what does not count can be left out of their gradients.
    numbers = {
        name: jnp.full((counts.size, 1), number, wide_dtype(products))
        for name, number in (("scale", student.scale), ("soft_cap", student.soft_cap))
        if number is not None
    }

    def of_products(products: Array, numbers: dict[str, Array]) -> Any:
        return of_logits(student._replace(**numbers).finished(products))

    values, pull, sums = jax.vjp(of_products, products, numbers, has_aux=True)

    def counted(slopes: Array) -> Array:
        return jnp.where(counts[:, None], slopes, 0)

    by_products, by_numbers = jax.tree.map(counted, pull(jnp.ones_like(values)))
    # In the dtype that logits multiplied out would have, and so their gradient.
    slopes = by_products.astype(jnp.result_type(hidden, student.kernel))
    head = {name: by.sum() for name, by in by_numbers.items()}
    if student.bias is not None:
        head["bias"] = by_products.sum(0)
    by_hidden = hidden_gradient(slopes, student.kernel)
    return sums, Gradient(by_hidden.astype(hidden.dtype), head), (hidden, slopes)
