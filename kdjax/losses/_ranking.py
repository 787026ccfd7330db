"""Losses over the order in which the teacher puts the classes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._labels import widened


def _differences(scores: Array) -> Array:
    """``[..., k, l]``: the score of k less that of l, 0 where both are -inf."""
    first, second = scores[..., :, None], scores[..., None, :]
    excluded = jnp.isneginf(first) & jnp.isneginf(second)
    return jnp.where(excluded, 0.0, first - second)


def _ordered_pairs(
    student_logits: Array, teacher_logits: Array, where: Array | None
) -> tuple[Array, Array, Array]:
    """Differences of both sides, and the pairs that the teacher puts in order."""
    student, teacher = widened(student_logits), widened(teacher_logits)
    exists = ~jnp.isneginf(teacher)
    exists = exists if where is None else exists & where
    # Replaced before anything is subtracted: what is masked may be NaN.
    student, teacher = (jnp.where(exists, z, 0.0) for z in (student, teacher))
    teacher = _differences(teacher)
    pairs = (teacher > 0) & exists[..., :, None] & exists[..., None, :]
    return _differences(student), teacher, pairs


def _mean_over(pairs: Array, values: Array, *differences: Array) -> Array:
    """The mean over the pairs; NaN if a difference is, which has no order."""
    total = jnp.sum(jnp.where(pairs, values, 0.0), (-2, -1))
    mean = total / jnp.maximum(jnp.sum(pairs, (-2, -1)), 1)
    for each in differences:
        # Not by their largest, as XLA's maximum of many numbers drops a NaN on a CPU.
        mean = jnp.where(jnp.isnan(each).any((-2, -1)), jnp.nan, mean)
    return mean


@functools.partial(jax.jit, inline=True)
def _pairwise_hinge(
    student_logits: Array,
    teacher_logits: Array,
    margin: Array | None,
    where: Array | None,
) -> Array:
    student, teacher, pairs = _ordered_pairs(student_logits, teacher_logits, where)
    lacking = (teacher if margin is None else margin) - student
    # Not maximum(): at a tie its gradient is a half, and equality is all ties.
    return _mean_over(pairs, jnp.where(lacking > 0, lacking, 0.0), student, teacher)


def pairwise_hinge(
    student_logits: Float[Array, "*batch K"],
    teacher_logits: Float[Array, "*batch K"],
    *,
    margin: float | Array | None = None,
    where: Bool[Array, "*batch K"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls classes apart that the teacher ranks, until the margin is kept.

    .. math:: \frac{1}{|P|} \sum_{(k, l) \in P} \max(0, m - (s_k - s_l)), \quad
       P = \{(k, l): t_k > t_l\}

    with the margin :math:`m`, or :math:`m = t_k - t_l` where none is given.

    DistillKit's hinge loss is this on probabilities instead of logits, those of the
    teacher's top K, divided by the number of pairs of the whole batch instead of
    each position's. For the first, give probabilities in the place of the logits.

    Args:
      student_logits: the student's scores, ``[..., K]``.
      teacher_logits: the same of the teacher, equal in shape. Memory grows with K²:
        give its top K, not a vocabulary.
      margin: by how much the student should rank k over l; finite. ``None``: by as
        much as the teacher does, which is 0 at equality.
      where: slots that exist. Slots that the teacher has at -inf do not.

    Returns:
      One value per position, ``[...]``, the mean over its ordered pairs; 0 where
      there is none.

    Raises:
      ValueError: the shapes differ, or ``margin`` is not finite.
      TypeError: logits that are not floating, a mask that is not boolean.

    Example:
      >>> student, teacher = jnp.array([0.0, 0.5]), jnp.array([2.0, 1.0])
      >>> pairwise_hinge(student, teacher).item()
      1.5

    Reference:
      Herbrich, Graepel and Obermayer, Large Margin Rank Boundaries for Ordinal
      Regression, 2000, for the hinge on pairs; arcee-ai/DistillKit, hingeloss.py, for
      its use here.
    """
    _checks.logits(student_logits, teacher_logits, where=where)
    if margin is not None:
        _checks.finite(margin=margin)
        _checks.scale((), margin=margin)
    return _pairwise_hinge(student_logits, teacher_logits, margin, where)


@functools.partial(jax.jit, inline=True)
def _logistic_ranking(
    student_logits: Array, teacher_logits: Array, where: Array | None
) -> Array:
    student, teacher, pairs = _ordered_pairs(student_logits, teacher_logits, where)
    return _mean_over(pairs, jax.nn.softplus(-student), student, teacher)


def logistic_ranking(
    student_logits: Float[Array, "*batch K"],
    teacher_logits: Float[Array, "*batch K"],
    *,
    where: Bool[Array, "*batch K"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the student's order of the classes to the teacher's.

    .. math:: \frac{1}{|P|} \sum_{(k, l) \in P} \log(1 + e^{-(s_k - s_l)}), \quad
       P = \{(k, l): t_k > t_l\}

    Only the order of the teacher's logits matters, not their size; it carries no
    gradient. DistillKit's loss is this over the teacher's top K, divided by the
    number of pairs of the whole batch instead of each position's.

    Args:
      student_logits: the student's scores, ``[..., K]``.
      teacher_logits: the same of the teacher, equal in shape. Memory grows with K²:
        give its top K, not a vocabulary.
      where: slots that exist. Slots that the teacher has at -inf do not.

    Returns:
      One value per position, ``[...]``, the mean over its ordered pairs; 0 where
      there is none. Not 0 at equality: a wider gap is always a little better.

    Raises:
      ValueError: the shapes differ.
      TypeError: logits that are not floating, a mask that is not boolean.

    Example:
      >>> student, teacher = jnp.array([1.0, 1.0]), jnp.array([2.0, 1.0])
      >>> logistic_ranking(student, teacher)  # log(2)
      Array(0.693147, dtype=float32)

    Reference:
      Burges and others, Learning to Rank using Gradient Descent, ICML 2005, equation
      3, for pairs that are certain; arcee-ai/DistillKit, logistic_ranking.py, for its
      use here.
    """
    _checks.logits(student_logits, teacher_logits, where=where)
    return _logistic_ranking(student_logits, teacher_logits, where)
