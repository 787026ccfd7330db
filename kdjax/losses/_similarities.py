"""Losses over how alike the examples of a batch are."""

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
)
from kdjax.losses._vectors import centred, product, scaled, unit, unit_distance


@functools.partial(jax.jit, inline=True)
def _similarity_preserving(
    student: Array, teacher: Array, where: Array | None
) -> Array:
    where = counting(student, where)

    def likeness(features: Array) -> Array:
        rows = scaled(kept(features, where))
        return unit(product(rows, rows.T))

    gaps = likeness(student) - likeness(teacher)
    return over_pairs(gaps**2, number_of(where, gaps))


def similarity_preserving(
    student: Float[Array, "B ..."],
    teacher: Float[Array, "B ..."],
    *,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    r"""Pulls how alike the examples are, as each example sees it.

    .. math:: \frac{1}{B^2} \| \tilde G_s - \tilde G_t \|_F^2, \quad
       G = F F^\top, \quad \tilde G_{i} = G_{i} / \|G_{i}\|

    with one flattened row of F per example. A matrix of scores, of queries against
    documents, is features too. The published weight is 3000.

    This loss relates the examples of a batch: on a mesh it sees the global one, and
    its value over micro-batches is another than over the whole.

    Args:
      student: features of the student, ``[B, ...]``: embeddings, maps or scores.
      teacher: the same of the teacher, ``[B, ...]``; only B has to agree.
      where: examples that count, ``[B]``; B is their number.

    Returns:
      A scalar; 0 where no example counts. One example is like itself on both sides,
      which is 0 as well. An example of zeros is like nothing.

    Raises:
      ValueError: other numbers of examples.
      TypeError: arrays that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> similarity_preserving(jnp.ones((2, 3)), teacher).round(4).item()
      0.2929

    Reference:
      Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019, equations 1
      to 4. arXiv:1907.09682
    """
    _checks.related("[B, ...]", where, student=student, teacher=teacher)
    return _similarity_preserving(student, teacher, where)


@functools.partial(jax.jit, inline=True, static_argnames="order")
def _correlation_congruence(
    student: Array, teacher: Array, gamma: Array, where: Array | None, order: int
) -> Array:
    where = counting(student, where)
    student, teacher = unit(kept(student, where)), unit(kept(teacher, where))
    student, teacher = product(student, student.T), product(teacher, teacher.T)
    # The constant term of the series is the same on both sides.
    gamma = jnp.asarray(gamma, student.dtype)
    coefficient = jnp.exp(-2 * gamma)
    gaps = jnp.zeros_like(student)
    for power in range(1, order + 1):
        coefficient = coefficient * 2 * gamma / power
        gaps += coefficient * (student**power - teacher**power)
    return over_pairs(gaps**2, number_of(where, gaps))


def correlation_congruence(
    student: Float[Array, "B S"],
    teacher: Float[Array, "B T"],
    *,
    gamma: float | Array = 0.4,
    order: int = 2,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    r"""Pulls the correlations between examples, under a Gaussian kernel.

    .. math:: \frac{1}{B^2} \sum_{ij} (k(s_i, s_j) - k(t_i, t_j))^2, \quad
       k(x, y) = \sum_{p=0}^{P} e^{-2 \gamma} \frac{(2 \gamma)^p}{p!}
       \langle x, y \rangle^p

    with embeddings scaled to length 1 here, for which k is the series of
    :math:`\exp(-\gamma \|x - y\|^2)`.

    RepDistiller's loss of this name is another one: products of the differences to
    the teacher of neighbouring rows, which depends on the order of the batch. Its
    published weight, 0.02, belongs to that.

    This loss relates the examples of a batch: on a mesh it sees the global one, and
    its value over micro-batches is another than over the whole.

    Args:
      student: embeddings of the student, ``[B, D]``.
      teacher: the same of the teacher, ``[B, D]``; its width may be another.
      gamma: how fast the kernel falls; positive.
      order: P, the last power of the series; at least 1.
      where: examples that count, ``[B]``; B is their number.

    Returns:
      A scalar; 0 with one example, and where none counts. The kernel of an example of
      zeros with any is its constant term.

    Raises:
      ValueError: not two axes, other numbers of examples, ``gamma`` that is not
        positive, or an ``order`` below 1.
      TypeError: arrays that are not floating, an ``order`` that is not an integer, a
        mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> student = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> correlation_congruence(student, teacher, order=1).round(4).item()
      0.0646

    Reference:
      Peng, Jin, Liu, Zhou, Wu, Liu, Li and Zhang, Correlation Congruence for Knowledge
      Distillation, 2019, section 3. arXiv:1904.01802
    """
    _checks.related("[B, D]", where, student=student, teacher=teacher)
    _checks.positive(gamma=gamma)
    _checks.scale((), gamma=gamma)
    _checks.whole(order=order)
    return _correlation_congruence(student, teacher, gamma, where, order)


@functools.partial(jax.jit, inline=True)
def _probabilistic_transfer(
    student: Array, teacher: Array, where: Array | None
) -> Array:
    where = counting(student, where)
    pairs = where[:, None] & where[None]
    tiny = 1e-7

    def neighbours(features: Array) -> Array:
        rows = kept(features, where)
        square = jnp.sum(rows**2, -1, keepdims=True)
        directed = square != 0
        length = jnp.where(directed, jnp.sqrt(jnp.where(directed, square, 1.0)), 0.0)
        rows = rows / (length + tiny)
        # Rounding may take the cosine of opposite examples below -1.
        alike = (product(rows, rows.T) + 1) / 2
        alike = jnp.where(pairs & ~(alike <= 0), alike, 0.0)
        total = jnp.sum(alike, -1, keepdims=True)
        return alike / jnp.where(total == 0, 1.0, total) + tiny

    p, q = neighbours(teacher), neighbours(student)
    near = jnp.abs(p - q) < 0.5 * q
    x = jnp.log1p(jnp.where(near, (p - q) / q, 0.0))
    x = jnp.where(near, x, jnp.log(p) - jnp.log(q))
    # (p - tiny) log(p / q), and q - p, which adds up to 0: precise where the two agree.
    terms = p * (x + jnp.expm1(-x)) - tiny * x
    return over_pairs(jnp.where(pairs, terms, 0.0), number_of(where, p))


def probabilistic_transfer(
    student: Float[Array, "B S"],
    teacher: Float[Array, "B T"],
    *,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    r"""Pulls how probable each example's neighbours are, by cosine similarity.

    .. math:: \frac{1}{B^2} \sum_{ij} p_{ij}
       \log \frac{p_{ij} + \epsilon}{q_{ij} + \epsilon}, \quad
       p_{ij} = \frac{1 + \cos(t_i, t_j)}{\sum_k 1 + \cos(t_i, t_k)}

    and q likewise from the student. The :math:`\epsilon = 10^{-7}`, which is also
    added to the norms, is that of the published code, as is the mean over all pairs,
    each example with itself among them, where the paper sums over pairs of different
    ones. The published weight is 30000.

    This loss relates the examples of a batch: on a mesh it sees the global one, and
    its value over micro-batches is another than over the whole.

    Args:
      student: embeddings of the student, ``[B, D]``.
      teacher: the same of the teacher, ``[B, D]``; its width may be another.
      where: examples that count, ``[B]``; B is their number.

    Returns:
      A scalar; 0 with one example, and where none counts. At equality the value is 0,
      and the gradient too up to :math:`\epsilon`.

    Raises:
      ValueError: not two axes, or other numbers of examples.
      TypeError: arrays that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> student = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> probabilistic_transfer(student, teacher).round(4).item()
      0.0283

    Reference:
      Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge
      Transfer, 2018, section 3. arXiv:1803.10837
    """
    _checks.related("[B, D]", where, student=student, teacher=teacher)
    return _probabilistic_transfer(student, teacher, where)


@functools.partial(jax.jit, inline=True)
def _linear_cka(student: Array, teacher: Array, where: Array | None) -> Array:
    where = counting(student, where)

    def likeness(features: Array) -> Array:
        # A cosine hides the scale, which the squares would let overflow.
        rows = scaled(centred(kept(features, where), 0, where[:, None]))
        return product(rows, rows.T)

    return unit_distance(likeness(student), likeness(teacher), None)


def linear_cka(
    student: Float[Array, "B Ds"],
    teacher: Float[Array, "B Dt"],
    *,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    r"""Pulls how alike examples are in the student to how they are in the teacher.

    .. math:: 1 - \frac{\langle K, L \rangle}{\|K\|_F \|L\|_F}, \quad
       K = \bar s \bar s^\top, \; L = \bar t \bar t^\top

    with features :math:`\bar s`, :math:`\bar t` less their means over the batch: 1
    less the linear centred kernel alignment, which no rotation and no common scale of
    the features changes. This loss relates the examples of a batch: on a mesh it sees
    the global one, and its value over micro-batches is another than over the whole.
    There is no published weight that all use; 1 is usual.

    Args:
      student: features of the student, ``[B, D]``.
      teacher: the same of the teacher; their number D may differ.
      where: examples that count, ``[B]``.

    Returns:
      A scalar in [0, 1]; 0 where a side is constant over the examples, which leaves
      the alignment undefined (so with one example), and without a gradient.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: features that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]])
      >>> linear_cka(2.0 * teacher[:, ::-1] + 1.0, teacher).item()
      0.0

    Reference:
      Kornblith, Norouzi, Lee and Hinton, Similarity of Neural Network Representations
      Revisited, 2019, section 3. arXiv:1905.00414
    """
    _checks.related("[B, D]", where, student=student, teacher=teacher)
    return _linear_cka(student, teacher, where)
