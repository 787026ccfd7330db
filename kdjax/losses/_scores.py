"""Losses over the scores of a query's candidates, as of a retriever or a reranker."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._kl import forward_kl
from kdjax.losses._labels import widened


def _check(student_scores: Array, teacher_scores: Array, where: Array | None) -> None:
    both = {"student_scores": student_scores, "teacher_scores": teacher_scores}
    _checks.real("[..., K]", **both)
    _checks.one_shape("[..., K]", **both)
    if where is not None:
        _checks.boolean(jnp.shape(student_scores), where=where)


@functools.partial(jax.jit, inline=True)
def _margin_mse(
    student_scores: Array, teacher_scores: Array, where: Array | None
) -> Array:
    student, teacher = widened(student_scores), widened(teacher_scores)
    if where is None:
        where = jnp.ones(student.shape, bool)
    student, teacher = (jnp.where(where, z, 0.0) for z in (student, teacher))
    pairs = where[..., :1] & where[..., 1:]
    gaps = student[..., :1] - student[..., 1:] - (teacher[..., :1] - teacher[..., 1:])
    total = jnp.sum(jnp.where(pairs, gaps, 0.0) ** 2, -1)
    return total / jnp.maximum(jnp.sum(pairs, -1), 1)


def margin_mse(
    student_scores: Float[Array, "*batch K"],
    teacher_scores: Float[Array, "*batch K"],
    *,
    where: Bool[Array, "*batch K"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the margins between the positive and the negatives to the teacher's.

    .. math:: \frac{1}{K - 1} \sum_{k > 0}
       \bigl( (s_0 - s_k) - (t_0 - t_k) \bigr)^2

    Scores of another size or level are no obstacle, as only margins count. Where the
    teacher's margins are what is stored, give 0 and their negatives as its scores.
    The published weight is 1.

    Args:
      student_scores: of each query's candidates, the positive first, ``[..., K]``.
      teacher_scores: the same of the teacher, equal in shape.
      where: candidates that exist, ``[..., K]``.

    Returns:
      One value per query, ``[...]``, the mean over its negatives; 0 where it has no
      negative or no positive.

    Raises:
      ValueError: the shapes differ.
      TypeError: scores that are not floating, a mask that is not boolean.

    Example:
      >>> margin_mse(jnp.array([3.0, 1.0, 1.0]), jnp.array([1.0, 0.0, -1.0])).item()
      0.5

    Reference:
      Hofstätter, Althammer, Schröder, Sertkan and Hanbury, Improving Efficient Neural
      Ranking Models with Cross-Architecture Knowledge Distillation, 2020, section 3.
      arXiv:2010.02666
    """
    _check(student_scores, teacher_scores, where)
    return _margin_mse(student_scores, teacher_scores, where)


def score_kl(
    student_scores: Float[Array, "*batch K"],
    teacher_scores: Float[Array, "*batch K"],
    *,
    temperature: float | Array = 1.0,
    where: Bool[Array, "*batch K"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls a query's spread over its candidates: KL(teacher ‖ student).

    .. math:: \tau^2 \sum_k p_k \log \frac{p_k}{q_k}, \quad
       p = \mathrm{softmax}(t / \tau), \; q = \mathrm{softmax}(s / \tau)

    This is :func:`forward_kl` with candidates for classes. The published weight is 1.

    Args:
      student_scores: of each query's candidates, ``[..., K]``.
      teacher_scores: the same of the teacher, equal in shape.
      temperature: softens both sides; positive, a scalar or one per query ``[...]``.
      where: candidates that exist, ``[..., K]``.

    Returns:
      One value per query, ``[...]``, never negative; 0 where it has no candidates.

    Raises:
      ValueError: the shapes differ, or ``temperature`` is not positive.
      TypeError: scores that are not floating, a mask that is not boolean.

    Example:
      >>> score_kl(jnp.array([3.0, 1.0]), jnp.array([2.0, 0.0])).item()
      0.0

    Reference:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
      section 2. arXiv:1503.02531
    """
    _check(student_scores, teacher_scores, where)
    _checks.positive(temperature=temperature)
    _checks.scale(jnp.shape(student_scores)[:-1], temperature=temperature)
    return forward_kl(
        student_scores, teacher_scores, temperature=temperature, where=where
    )
