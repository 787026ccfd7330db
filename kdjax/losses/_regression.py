"""Losses over logits, or other real numbers, as values to be matched."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._labels import visible, widened
from kdjax.losses._vectors import standardized


@functools.partial(jax.jit, inline=True)
def _standardize_logits(logits: Array) -> Array:
    logits = widened(logits)
    exists = ~jnp.isneginf(logits)
    scores = standardized(logits, -1, exists, epsilon=1e-7)
    return jnp.where(exists, scores, -jnp.inf)


def standardize_logits(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    r"""Takes mean and scale out of the logits; composes with every divergence.

    .. math:: \frac{z - \mathrm{mean}(z)}{\mathrm{std}(z) + 10^{-7}}

    with the unbiased deviation (V - 1 in the denominator). A student of standardised
    logits has to match the teacher's relations, not the size of its logits. The 1e-7
    is that of the published code.

    Args:
      logits: unnormalised log-probabilities, ``[..., V]``. Slots at -inf do not exist
        and stay at -inf.

    Returns:
      Logits of mean 0 and deviation 1, ``[..., V]``; all 0, and without a gradient,
      where all logits are equal or there is but one.

    Raises:
      TypeError: logits that are not floating.

    Example:
      >>> standardize_logits(jnp.array([3.0, 1.0, 2.0])).round(3)
      Array([ 1., -1.,  0.], dtype=float32)

    Reference:
      Sun, Ren, Li, Wang and Cao, Logit Standardization in Knowledge Distillation,
      2024, algorithm 1. arXiv:2403.01427
    """
    _checks.floating(logits=logits)
    return _standardize_logits(logits)


@functools.partial(jax.jit, inline=True)
def _logit_mse(
    student_logits: Array, teacher_logits: Array, where: Array | None
) -> Array:
    student, teacher = widened(student_logits), widened(teacher_logits)
    exists = ~(jnp.isneginf(student) & jnp.isneginf(teacher))
    exists = exists if where is None else exists & where
    student, teacher = (jnp.where(exists, z, 0.0) for z in (student, teacher))
    total = jnp.sum((student - teacher) ** 2, -1)
    return total / jnp.maximum(jnp.sum(exists, -1), 1)


def logit_mse(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    *,
    where: Bool[Array, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls every logit of the student to the teacher's, their common level too.

    .. math:: \frac{1}{V} \sum_v (z_{s,v} - z_{t,v})^2

    The paper has half the sum; this is the mean of the published implementations, so
    that their weights carry over. A softened version is this on logits divided by a
    temperature, and needs no factor for it.

    Args:
      student_logits: logits of the student, ``[..., V]``.
      teacher_logits: the same of the teacher, equal in shape.
      where: slots that exist. A slot at -inf on both sides does not.

    Returns:
      One value per position, ``[...]``, the mean over its slots; 0 where there is
      none, +inf where a slot is -inf on one side only.

    Raises:
      ValueError: the shapes differ.
      TypeError: logits that are not floating, a mask that is not boolean.

    Example:
      >>> logit_mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])).item()
      2.0

    Reference:
      Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014, section 2.2, equation
      1. arXiv:1312.6184
    """
    _checks.logits(student_logits, teacher_logits, where=where)
    return _logit_mse(student_logits, teacher_logits, where)


@functools.partial(jax.jit, inline=True)
def _bounded_regression(
    student: Array, teacher: Array, targets: Array, margin: Array
) -> Array:
    student, teacher, targets = widened(student), widened(teacher), widened(targets)
    own = jnp.sum((student - targets) ** 2, -1)
    bound = jnp.sum((teacher - targets) ** 2, -1)
    return visible(jnp.where(own + margin > bound, own, 0.0), own, bound)


def bounded_regression(
    student: Float[Array, "*batch D"],
    teacher: Float[Array, "*batch D"],
    targets: Float[Array, "*batch D"],
    *,
    margin: float | Array,
) -> Float[Array, "*batch"]:
    r"""Pulls the student to the targets until it beats the teacher by a margin.

    .. math:: \|s - y\|^2 \text{ where } \|s - y\|^2 + m > \|t - y\|^2,
       \text{ else } 0

    The teacher is a bound, not a target: regression is unbounded, and a teacher may
    be further from the truth than the student.

    Args:
      student: what the student regresses, ``[..., D]``: the coordinates of a box, say.
      teacher: the same of the teacher, equal in shape.
      targets: the truth, equal in shape.
      margin: by how much the student's squared error has to be below the teacher's;
        at least 0.

    Returns:
      One value per position, ``[...]``: the squared error, or 0 where the student is
      good enough. It jumps at the bound, and carries no gradient to the teacher.

    Raises:
      ValueError: the shapes differ, or ``margin`` is negative.
      TypeError: arrays that are not floating.

    Example:
      >>> truth, teacher = jnp.zeros((2, 1)), jnp.ones((2, 1))
      >>> student = jnp.array([[0.5], [2.0]])
      >>> bounded_regression(student, teacher, truth, margin=0.5)
      Array([0., 4.], dtype=float32)

    Reference:
      Chen, Choi, Yu, Han and Chandraker, Learning Efficient Object Detection Models
      with Knowledge Distillation, NeurIPS 2017, equation 4.
    """
    arrays = {"student": student, "teacher": teacher, "targets": targets}
    _checks.real("[..., D]", **arrays)
    _checks.one_shape("[..., D]", **arrays)
    _checks.non_negative(margin=margin)
    _checks.scale((), margin=margin)
    return _bounded_regression(student, teacher, targets, margin)
