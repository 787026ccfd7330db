"""Losses over the distances and angles between the examples of a batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._examples import (
    counting,
    kept,
    number_of,
    over_pairs,
    smooth_l1,
)
from kdjax.losses._vectors import product, scaled, unit

# How many numbers of angles, or of differences, are held at a time.
_CHUNK = 2**20


def _centred(features: Array, where: Array) -> Array:
    """Rows without their common level and scale, which distances do not see."""
    rows = kept(features, where)
    mean = jnp.sum(rows, 0) / number_of(where, rows)
    rows = jnp.where(where[:, None], rows - jax.lax.stop_gradient(mean), 0.0)
    return scaled(rows)


def _apart(square: Array, rows: Array) -> Array:
    """Whether a squared distance of such rows is more than rounding.

    Equal rows need not differ by 0: fused with what made them, they may be rounded
    in two ways. A NaN is apart, and not hidden.
    """
    return ~(square <= rows.shape[-1] * (8 * jnp.finfo(rows.dtype).eps) ** 2)


@jax.custom_jvp
def _squared_distances(rows: Array) -> Array:
    """``[B, B]``, from differences, which keeps the digits of near neighbours."""
    return jnp.sum((rows[:, None] - rows[None]) ** 2, -1)


@_squared_distances.defjvp
def _squared_distances_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    # As products of matrices, so that no differences [B, B, D] are kept for it.
    (rows,), (moved,) = primals, tangents
    own = jnp.sum(rows * moved, -1)
    across = product(rows, moved.T)
    slope = 2 * (own[:, None] + own[None] - across - across.T)
    return _squared_distances(rows), slope


def _distances(features: Array, where: Array) -> tuple[Array, Array]:
    """Distances between the examples that count, and their mean without the own."""
    rows = _centred(features, where)
    square = _squared_distances(rows)
    pairs = where[:, None] & where[None] & ~jnp.eye(where.size, dtype=bool)
    apart = pairs & _apart(square, rows)
    distances = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)
    # Rows apart, as one long sum loses digits, which every gap would share.
    mean = jnp.sum(jnp.sum(distances, -1) / number_of(pairs, rows))
    return distances, jnp.where(mean == 0, 1.0, mean)


@functools.partial(jax.jit, inline=True)
def _relational_distance(student: Array, teacher: Array, where: Array | None) -> Array:
    where = counting(student, where)
    student, student_mean = _distances(student, where)
    teacher, teacher_mean = _distances(teacher, where)
    gaps = student / student_mean - teacher / jax.lax.stop_gradient(teacher_mean)
    return over_pairs(smooth_l1(gaps), number_of(where, gaps))


def relational_distance(
    student: Float[Array, "B S"],
    teacher: Float[Array, "B T"],
    *,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    r"""Pulls the distances between examples to the teacher's, up to a scale.

    .. math:: \frac{1}{B^2} \sum_{ij} h\Bigl(
       \frac{\|s_i - s_j\|}{\mu_s} - \frac{\|t_i - t_j\|}{\mu_t} \Bigr), \quad
       h(x) = \begin{cases} x^2 / 2 & |x| < 1 \\ |x| - 1/2 & \text{else} \end{cases}

    with :math:`\mu` the mean distance between different examples; as in the published
    code, the student's carries a gradient and the teacher's does not. The published
    weight is 25. Some published code scales the embeddings to length 1 first: that is
    left to the caller.

    This loss relates the examples of a batch: on a mesh it sees the global one, and
    its value over micro-batches is another than over the whole.

    Args:
      student: embeddings of the student, ``[B, D]``.
      teacher: the same of the teacher, ``[B, D]``; its width may be another.
      where: examples that count, ``[B]``; B is their number.

    Returns:
      A scalar; 0 with one example, which has no distances, and where none counts.

    Raises:
      ValueError: not two axes, or other numbers of examples.
      TypeError: arrays that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[0.0], [1.0], [2.0]])
      >>> relational_distance(3 * teacher, teacher).item()
      0.0

    Reference:
      Park, Kim, Lu and Cho, Relational Knowledge Distillation, 2019, section 3.2.1.
      arXiv:1904.05068
    """
    _checks.related("[B, D]", where, student=student, teacher=teacher)
    return _relational_distance(student, teacher, where)


def _directions(rows: Array, anchor: Array, counts: Array) -> Array:
    """Unit vectors from the anchor to every example that counts, ``[B, D]``."""
    differences = rows - anchor
    apart = counts & _apart(jnp.sum(differences**2, -1), rows)
    return unit(jnp.where(apart[:, None], differences, 0.0))


@functools.partial(jax.jit, inline=True)
def _relational_angle(student: Array, teacher: Array, where: Array | None) -> Array:
    where = counting(student, where)
    student, teacher = _centred(student, where), _centred(teacher, where)
    batch, count = student.shape[0], number_of(where, student)

    # Recomputed for the gradient: otherwise the angles of all anchors are kept.
    @jax.checkpoint
    def at_anchor(anchor: tuple[Array, Array, Array, Array]) -> Array:
        own, others, counts, index = anchor
        counts = counts & where & (jnp.arange(batch) != index)
        first = _directions(student, own, counts)
        second = _directions(teacher, others, counts)
        cosines = product(first, first.T) - product(second, second.T)
        return over_pairs(smooth_l1(cosines), count)

    widest = max(batch, student.shape[1], teacher.shape[1], 1)
    chunk = min(max(_CHUNK // (max(batch, 1) * widest), 1), max(batch, 1))
    anchors = (student, teacher, where, jnp.arange(batch))
    totals = jax.lax.map(at_anchor, anchors, batch_size=chunk)
    return jnp.sum(totals) / count


def relational_angle(
    student: Float[Array, "B S"],
    teacher: Float[Array, "B T"],
    *,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    r"""Pulls the angles of all triplets of examples to the teacher's.

    .. math:: \frac{1}{B^3} \sum_{ijk} h\bigl(
       \langle e^s_{ji}, e^s_{jk} \rangle - \langle e^t_{ji}, e^t_{jk} \rangle
       \bigr), \quad e_{ji} = \frac{x_i - x_j}{\|x_i - x_j\|}

    with :math:`h(x) = x^2 / 2` where :math:`|x| < 1` and :math:`|x| - 1/2` elsewhere.
    Triplets without an angle, as of equal examples, count as 0. The published weight
    is 50. Some published code scales the embeddings to length 1 first: that is left
    to the caller.

    Time grows with B³ D, memory only with B² and B D: the angles are taken for a few
    anchors j at a time, and once more for the gradient. This loss relates the
    examples of a batch: on a mesh it sees the global one, and its value over
    micro-batches is another than over the whole.

    Args:
      student: embeddings of the student, ``[B, D]``.
      teacher: the same of the teacher, ``[B, D]``; its width may be another.
      where: examples that count, ``[B]``; B is their number.

    Returns:
      A scalar; 0 with less than three examples, and where none counts.

    Raises:
      ValueError: not two axes, or other numbers of examples.
      TypeError: arrays that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> relational_angle(teacher * 2 + 1, teacher).item()
      0.0

    Reference:
      Park, Kim, Lu and Cho, Relational Knowledge Distillation, 2019, section 3.2.2.
      arXiv:1904.05068
    """
    _checks.related("[B, D]", where, student=student, teacher=teacher)
    return _relational_angle(student, teacher, where)
