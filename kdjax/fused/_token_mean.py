"""Means over tokens of any loss per token: what a caller sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.fused import _checks
from kdjax.fused._chunks import Plan, per_token, total
from kdjax.fused._tokens import TOKEN_AXES, Rows
from kdjax.types import LinearHead, Mean, PyTree, SampledTargets, SparseTargets


def token_mean(
    loss: Callable[..., Array],
    student: LinearHead,
    teacher: LinearHead | Array | SparseTargets | SampledTargets | None,
    *per_token_args: PyTree,
    where: Array | None = None,
    chunk_size: int | None = None,
    token_axes: Sequence[str] = TOKEN_AXES,
) -> Mean:
    """Averages a loss over tokens whose logits are multiplied out chunk by chunk.

    The value and the gradient are those of ``Mean.of(loss(student.logits(),
    teacher.logits(), ...), where)``. Gradients by the student's hidden states, kernel,
    bias, scale and cap are computed together with the value, so that no logits are
    kept for a backward pass. Products and sums are in float32 at least, whatever comes
    in; only then are gradients cast to the dtypes of the student's arrays.

    Under the mesh of :func:`~kdjax.train.place_step`, or of ``jax.set_mesh``, every
    device goes through its own tokens. The other axes of the mesh are left to the
    compiler, so that the kernels' classes may be split over one; each device's chunk
    then has its part of the logits alone. Where tokens lie on several devices without
    such a mesh, they would all be gathered. Call it within ``jax.jit``, as a training
    step does: outside, every call compiles anew.

    Args:
      loss: ``loss(student_logits, teacher_logits, *per_token_args) -> [n]`` for logits
        ``[n, V]`` of any ``n`` tokens, such as those of :mod:`kdjax.losses` with one
        value per position. Bind its settings with ``functools.partial``; numbers that
        differ by token are ``per_token_args``.
      student: hidden states ``[*batch, D]`` and their head.
      teacher: a head, of whatever width; logits ``[*batch, V]``; targets, such as
        those of :func:`kdjax.losses.top_k_targets`; or ``None`` for a
        ``loss(student_logits, *per_token_args)``.
      *per_token_args: labels, say: arrays ``[*batch, ...]``, or trees of them.
      where: boolean ``[*batch]``, what counts; what else there is may be NaN.
      chunk_size: most tokens on each device that have logits at a time. ``None`` is as
        many as fit into ``CHUNK_BYTES``, but ``LEAST_TOKENS`` at least, or
        ``LEAST_TOKENS_ON_CPU``. It changes memory and speed alone.
      token_axes: axes of the mesh that tokens are split over; those that it does not
        have, or that a ``shard_map`` around this has split already, are left out.

    Returns:
      The mean of what counts, not yet divided. It has no gradient but the student's:
      the teacher and ``per_token_args`` are constants here, and what ``loss`` closes
      over cannot be differentiated.

    Raises:
      ValueError: shapes do not fit, ``chunk_size`` is below 1, the loss gives anything
        but one value per token, or arrays lie on Explicit axes of a mesh or in a
        ``shard_map`` that checks its axes (``check_vma``).
      TypeError: ``student`` is no :class:`~kdjax.types.LinearHead`, ``token_axes`` is
        a string, or a dtype is wrong. JAX raises it for forward-mode derivatives:
        there are reverse ones only. Second ones are right, but keep all logits.

    Example:
      >>> from kdjax import losses
      >>> hidden, kernel = jnp.eye(4, 3), jnp.ones((3, 5))
      >>> student, teacher = LinearHead(hidden, kernel), 9 * jnp.eye(4, 5)
      >>> token_mean(losses.forward_kl, student, teacher).value()
      Array(1.6045..., dtype=float32)
    """

    def without_others(*arrays: Any) -> tuple[Array, tuple[()]]:
        return loss(*arrays), ()

    mean, _ = token_means(
        without_others,
        student,
        teacher,
        *per_token_args,
        where=where,
        chunk_size=chunk_size,
        token_axes=token_axes,
    )
    return mean


def token_means(
    loss: Callable[..., tuple[Array, PyTree]],
    student: LinearHead,
    teacher: LinearHead | Array | SparseTargets | SampledTargets | None,
    *per_token_args: PyTree,
    where: Array | None = None,
    chunk_size: int | None = None,
    token_axes: Sequence[str] = TOKEN_AXES,
) -> tuple[Mean, PyTree]:
    """Averages a loss, and whatever else is to be known of the same logits.

    One pass gives all, and has one gradient: a weighted sum of losses goes into what
    ``loss`` returns first.

    Args:
      loss: as for :func:`token_mean`, but it returns ``(values, others)``: the values
        ``[n]`` to differentiate, and any tree of values ``[n]`` that are only reported.
      student: as for :func:`token_mean`.
      teacher: likewise.
      *per_token_args: likewise.
      where: likewise; of the others too.
      chunk_size: likewise.
      token_axes: likewise.

    Returns:
      The mean of the values, as from :func:`token_mean`, and the tree of the others'
      means, which have no gradient.

    Raises:
      ValueError: as for :func:`token_mean`.
      TypeError: likewise.

    Example:
      >>> from kdjax import losses
      >>> def mixed(student, teacher, labels):
      ...     hard = losses.cross_entropy(student, labels)
      ...     soft = losses.forward_kl(student, teacher)
      ...     same = student.argmax(-1) == teacher.argmax(-1)
      ...     return 0.1 * hard + 0.9 * soft, {"soft": soft, "agreement": same}
      >>> student, labels = LinearHead(jnp.eye(4, 3), jnp.eye(3, 5)), jnp.zeros(4, int)
      >>> mean, others = token_means(mixed, student, jnp.eye(4, 5), labels)
      >>> float(others["agreement"].value())
      0.75
    """
    others = *(() if teacher is None else (teacher,)), *per_token_args
    sides = {"student": student, "teacher": teacher}
    given = {name: side for name, side in sides.items() if side is not None}
    batch = _checks.arguments(given | _checks.named(per_token_args), chunk_size)
    if where is not None:
        _checks.mask(where, batch)
    counts = jnp.ones(batch, bool) if where is None else jnp.asarray(where)
    rows = Rows.of(batch, token_axes)
    plan = Plan(loss, chunk_size or rows.chunk_of(student), rows.axes)
    # An integer would have no derivative.
    soft_cap, scale = (
        None if number is None else 1.0 * number
        for number in (student.soft_cap, student.scale)
    )
    student = student._replace(soft_cap=soft_cap, scale=scale)
    student, others = per_token(rows.joined, (student, others))
    value, rest = total(plan, student, others, rows.counted(counts))
    count = jnp.sum(counts, dtype=jnp.int32)
    return Mean(value, count), jax.tree.map(lambda each: Mean(each, count), rest)
