"""Losses that tell an example from the others, student against teacher."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._examples import counting, kept, number_of
from kdjax.losses._labels import widened
from kdjax.losses._vectors import product, unit


def log_normalizer(scores: Array, dataset_size: Array, where: Array) -> Array:
    """log Z by these scores ``[B, 1 + K]``: N times the mean of their exponentials.

    Without a gradient; -inf where no example counts.
    """
    scores = jax.lax.stop_gradient(scores)
    total = jax.nn.logsumexp(jnp.where(where[:, None], scores, -jnp.inf))
    size = jnp.log(jnp.asarray(dataset_size, scores.dtype))
    return size + total - jnp.log(number_of(where, scores) * scores.shape[1])


def noise_contrastive(
    scores: Array, log_normalizer: Array, dataset_size: Array
) -> Array:
    """The loss ``[B]`` of scores ``[B, 1 + K]``: an example's own, then K others'."""
    # The critic's logit: how much likelier a pair is of one example than of two.
    noise = math.log(scores.shape[1] - 1) - jnp.log(
        jnp.asarray(dataset_size, scores.dtype)
    )
    constant = jnp.where(jnp.isneginf(log_normalizer), 0.0, log_normalizer)
    logits = scores - constant - noise
    own, others = logits[:, 0], logits[:, 1:]
    return jax.nn.softplus(-own) + jnp.sum(jax.nn.softplus(others), 1)


@functools.partial(jax.jit, inline=True)
def _contrastive_representation(
    student: Array,
    teacher: Array,
    negatives: Array,
    dataset_size: Array,
    temperature: Array,
    normalizer: Array | None,
    where: Array | None,
) -> Array:
    where = counting(student, where)
    anchor, positive = kept(student, where), kept(teacher, where)
    negatives = jnp.where(where[:, None, None], widened(negatives), 0.0)
    contrast = jnp.concatenate([positive[:, None], negatives], 1)
    scores = product(contrast, anchor[..., None])[..., 0] / temperature
    if normalizer is None:
        constant = log_normalizer(scores, dataset_size, where)
    else:
        constant = jnp.log(jnp.asarray(normalizer, scores.dtype))
    rows = noise_contrastive(scores, constant, dataset_size)
    return jnp.sum(jnp.where(where, rows, 0.0)) / number_of(where, rows)


def contrastive_representation(
    student: Float[Array, "B D"],
    teacher: Float[Array, "B D"],
    negatives: Float[Array, "B K D"],
    *,
    dataset_size: float | Array,
    temperature: float | Array = 0.07,
    normalizer: float | Array | None = None,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    r"""Pulls an example to the teacher's view of it, off the views of other examples.

    .. math:: -\frac{1}{B} \sum_b \Bigl( \log h(s_b, t_b)
       + \sum_k \log (1 - h(s_b, n_{bk})) \Bigr), \quad
       h(s, t) = \frac{x}{x + K / N}, \quad x = \frac{e^{s \cdot t / \tau}}{Z}

    with N the size of the data set. Embeddings are projected to one width and scaled
    to length 1 by the caller. The published loss adds two of these: the student's
    embedding against memories of the teacher's, and the other way round, which is
    :func:`kdjax.objectives.contrastive_memory`. Its code adds 1e-7 to the
    denominators, which is left out. The published weight is 0.8, and K is 16384. No
    factor temperature²: this temperature softens no teacher.

    Args:
      student: embeddings that move, ``[B, D]``.
      teacher: the other view of the same examples, ``[B, D]``.
      negatives: views of other examples, K for each, ``[B, K, D]``.
      dataset_size: N, how many examples there are to draw negatives from; positive.
      temperature: of the scores; positive.
      normalizer: Z; positive. ``None`` takes N times the mean of the exponentials of
        this batch, without a gradient. The published code does so in its first batch
        and keeps that number.
      where: examples that count, ``[B]``; B is their number.

    Returns:
      A scalar, never negative and not 0 at equality; 0 where no example counts.

    Raises:
      ValueError: shapes that do not fit, no negatives, or a number that is not
        positive.
      TypeError: arrays that are not floating, a mask that is not boolean.

    Example:
      >>> student, negatives = jnp.array([[1.0, 0.0]]), jnp.array([[[0.0, 1.0]]])
      >>> contrastive_representation(
      ...     student, student, negatives, dataset_size=2, temperature=1.0
      ... ).round(4).item()
      0.9515

    Reference:
      Tian, Krishnan and Isola, Contrastive Representation Distillation, 2020, section
      3. arXiv:1910.10699
    """
    _checks.related("[B, D]", where, student=student, teacher=teacher)
    _checks.one_shape("[B, D]", student=student, teacher=teacher)
    _checks.real("[B, K, D]", negatives=negatives)
    batch, width = jnp.shape(student)
    found = jnp.shape(negatives)
    if (found[0], found[2]) != (batch, width) or not found[1]:
        raise ValueError(
            f"negatives: got shape {found}, expected ({batch}, K, {width}): at least "
            "one for each example of student, in its width."
        )
    numbers = {"dataset_size": dataset_size, "temperature": temperature}
    if normalizer is not None:
        numbers["normalizer"] = normalizer
    _checks.positive(**numbers)
    _checks.scale((), **numbers)
    return _contrastive_representation(
        student, teacher, negatives, dataset_size, temperature, normalizer, where
    )


@functools.partial(jax.jit, inline=True)
def _contrastive(
    student: Array, teacher: Array, temperature: Array, where: Array | None
) -> Array:
    where = counting(student, where)
    student, teacher = unit(kept(student, where)), unit(kept(teacher, where))
    scores = product(student, teacher.T) / temperature
    own = jnp.sum(student * teacher, -1) / temperature
    pairs = where[:, None] & where[None] & ~jnp.eye(where.size, dtype=bool)
    # The others are summed apart from the example's own: precise where it is sure.
    exists = jnp.any(pairs, -1)
    scores = jnp.where(pairs | ~exists[:, None], scores, -jnp.inf)
    others = jax.nn.logsumexp(scores, -1)
    odds = jnp.where(exists, others, 0.0) - own
    rows = jnp.where(exists, jax.nn.softplus(odds), 0.0)
    return jnp.sum(rows) / number_of(where, rows)


def contrastive(
    student: Float[Array, "B D"],
    teacher: Float[Array, "B D"],
    *,
    temperature: float | Array = 0.07,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    r"""Pulls an example to the teacher's view of it, off the others of the batch.

    .. math:: -\frac{1}{B} \sum_i \log
       \frac{e^{\cos(s_i, t_i) / \tau}}{\sum_j e^{\cos(s_i, t_j) / \tau}}

    This is InfoNCE from the student to the teacher; swapped arguments give the other
    direction. No factor temperature²: this temperature softens no teacher.

    This loss relates the examples of a batch: on a mesh it sees the global one, and
    its value over micro-batches is another than over the whole.

    Args:
      student: embeddings of the student, ``[B, D]``; scaled to length 1 here.
      teacher: the same of the teacher, equal in shape.
      temperature: of the similarities; positive.
      where: examples that count, ``[B]``; B is their number.

    Returns:
      A scalar, never negative; 0 with one example, which has none to be told from,
      and where none counts. It is not 0 at equality.

    Raises:
      ValueError: the shapes differ, there are not two axes, or ``temperature`` is not
        positive.
      TypeError: arrays that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> contrastive(teacher, teacher, temperature=1.0).round(4).item()
      0.3133

    Reference:
      van den Oord, Li and Vinyals, Representation Learning with Contrastive Predictive
      Coding, 2018, equation 4. arXiv:1807.03748
    """
    _checks.related("[B, D]", where, student=student, teacher=teacher)
    _checks.one_shape("[B, D]", student=student, teacher=teacher)
    _checks.positive(temperature=temperature)
    _checks.scale((), temperature=temperature)
    return _contrastive(student, teacher, temperature, where)
