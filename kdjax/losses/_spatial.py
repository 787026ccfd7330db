"""Losses over where in a map the features are active."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._kl import forward_kl
from kdjax.losses._labels import widened
from kdjax.losses._maps import (
    by_position,
    channel_products,
    of_one_size,
    positions,
    replaced,
)
from kdjax.losses._vectors import scaled, unit


def _check(
    student_features: Array, teacher_features: Array, where: Array | None
) -> None:
    """Two maps of one batch, of any size and channels."""
    _checks.maps(
        where=where,
        channels=False,
        space=False,
        student_features=student_features,
        teacher_features=teacher_features,
    )


def _prepared(
    student_features: Array, teacher_features: Array, where: Array | None
) -> tuple[Array, Array]:
    """In float32 at least, 0 where masked, and of one height and width."""
    student = replaced(widened(student_features), where)
    teacher = replaced(widened(teacher_features), where)
    return of_one_size(student, teacher)


def _attention(features: Array, power: Array) -> Array:
    """The mean of |features|^power over channels, of length 1: ``[B, H * W]``."""
    # Its length hides the scale, which a power would let overflow.
    sizes = scaled(jnp.abs(by_position(features)), (1, 2))
    return unit(jnp.mean(sizes**power, -1))


@functools.partial(jax.jit, inline=True)
def _attention_transfer(
    student_features: Array,
    teacher_features: Array,
    power: Array,
    where: Array | None,
) -> Array:
    student, teacher = _prepared(student_features, teacher_features, where)
    gaps = _attention(student, power) - _attention(teacher, power)
    return jnp.sum(gaps**2, -1) / positions(student, where)


def attention_transfer(
    student_features: Float[Array, "B Hs Ws Cs"],
    teacher_features: Float[Array, "B Ht Wt Ct"],
    *,
    power: float | Array = 2.0,
    where: Bool[Array, "B Hs Ws"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls where in its map the student is active to where the teacher is.

    .. math:: \frac{1}{HW} \Bigl\| \frac{a_s}{\|a_s\|} - \frac{a_t}{\|a_t\|} \Bigr\|^2,
       \quad a_{hw} = \frac{1}{C} \sum_c |f_{hwc}|^p

    The paper has half the distance itself; this is the mean over positions of the
    published code, whose weight is 1000. Of two sizes the larger is average-pooled
    to the smaller.

    Args:
      student_features: map of the student, ``[B, H, W, C]``.
      teacher_features: map of the teacher; height, width and channels may differ.
      power: the exponent p; positive. Below 1 the gradient at 0 is infinite.
      where: positions that count, ``[B, H, W]``; for maps of one size.

    Returns:
      One value per example, ``[B]``. An attention that is 0 everywhere stays 0 and
      carries no gradient.

    Raises:
      ValueError: the shapes do not fit, or ``power`` is not positive.
      TypeError: features that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[[[1.0], [0.0]]]])
      >>> attention_transfer(jnp.array([[[[0.0], [3.0]]]]), teacher)
      Array([1.], dtype=float32)

    Reference:
      Zagoruyko and Komodakis, Paying More Attention to Attention, 2017, equation 2.
      arXiv:1612.03928
    """
    _check(student_features, teacher_features, where)
    _checks.positive(power=power)
    _checks.scale((), power=power)
    return _attention_transfer(student_features, teacher_features, power, where)


@functools.partial(jax.jit, inline=True)
def _factor_transfer(
    student_features: Array,
    teacher_features: Array,
    power: Array,
    where: Array | None,
) -> Array:
    student, teacher = _prepared(student_features, teacher_features, where)
    student_map, teacher_map = _attention(student, power), _attention(teacher, power)
    gaps = jnp.abs(student_map - teacher_map)
    # A gap that is merely rounding would have a gradient as large as any other.
    rounding = 8 * jnp.finfo(gaps.dtype).eps * teacher_map
    total = jnp.sum(jnp.where(gaps <= rounding, 0.0, gaps), -1)
    return total / positions(student, where)


def factor_transfer(
    student_features: Float[Array, "B Hs Ws Cs"],
    teacher_features: Float[Array, "B Ht Wt Ct"],
    *,
    power: float | Array = 2.0,
    where: Bool[Array, "B Hs Ws"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls the student's translated factor to the teacher's paraphrased one.

    .. math:: \frac{1}{HW} \Bigl\| \frac{a_s}{\|a_s\|} - \frac{a_t}{\|a_t\|}
       \Bigr\|_1, \quad a_{hw} = \frac{1}{C} \sum_c |f_{hwc}|^p

    The paper compares the factors f themselves, scaled to length 1; this is the
    published code, which takes the mean of their powers over channels first, and
    whose weight is 200. The paraphraser and the translator belong to the objective.
    Of two sizes the larger is average-pooled to the smaller.

    Args:
      student_features: what the translator gives, ``[B, H, W, C]``.
      teacher_features: what the paraphraser gives; height, width and channels may
        differ.
      power: the exponent p; positive. Below 1 the gradient at 0 is infinite.
      where: positions that count, ``[B, H, W]``; for maps of one size.

    Returns:
      One value per example, ``[B]``. A factor that is 0 everywhere stays 0 and
      carries no gradient.

    Raises:
      ValueError: the shapes do not fit, or ``power`` is not positive.
      TypeError: features that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[[[1.0], [0.0]]]])
      >>> factor_transfer(jnp.array([[[[0.0], [3.0]]]]), teacher)
      Array([1.], dtype=float32)

    Reference:
      Kim, Park and Kwak, Paraphrasing Complex Network: Network Compression via Factor
      Transfer, 2018. arXiv:1802.04977
    """
    _check(student_features, teacher_features, where)
    _checks.positive(power=power)
    _checks.scale((), power=power)
    return _factor_transfer(student_features, teacher_features, power, where)


@functools.partial(jax.jit, inline=True)
def _neuron_selectivity(
    student_features: Array, teacher_features: Array, where: Array | None
) -> Array:
    student, teacher = _prepared(student_features, teacher_features, where)
    student, teacher = (unit(by_position(each), 1) for each in (student, teacher))
    if student.shape == teacher.shape:
        # With gap and middle of each pair of channels, s s' - t t' is
        # gap middle' + middle gap': precise where student and teacher agree.
        gap, middle = student - teacher, (student + teacher) / 2
        same = channel_products(gap, gap) * channel_products(middle, middle)
        cross = channel_products(gap, middle)
        value = 2 * jnp.mean(same + cross * cross.mT, (1, 2))
    else:

        def kernel(first: Array, second: Array) -> Array:
            return jnp.mean(channel_products(first, second) ** 2, (1, 2))

        value = kernel(teacher, teacher) + kernel(student, student)
        value -= 2 * kernel(student, teacher)
    # It is a squared distance; rounding alone is below 0.
    return jnp.where(value <= 0, 0.0, value)


def neuron_selectivity(
    student_features: Float[Array, "B Hs Ws Cs"],
    teacher_features: Float[Array, "B Ht Wt Ct"],
    *,
    where: Bool[Array, "B Hs Ws"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls the distribution of the student's channel maps to the teacher's.

    .. math:: \frac{1}{C_t^2} \sum_{ij} k(t_i, t_j) + \frac{1}{C_s^2} \sum_{ij}
       k(s_i, s_j) - \frac{2}{C_s C_t} \sum_{ij} k(s_i, t_j), \quad
       k(a, b) = (a \cdot b)^2

    over the maps of single channels, each scaled to length 1 over its positions: the
    squared maximum mean discrepancy, with the polynomial kernel. The published
    weight is 50. Of two sizes the larger is average-pooled to the smaller.

    Args:
      student_features: map of the student, ``[B, H, W, C]``.
      teacher_features: map of the teacher; height, width and channels may differ.
      where: positions that count, ``[B, H, W]``; for maps of one size.

    Returns:
      One value per example, ``[B]``, at least 0. A channel that is 0 everywhere stays
      0 and carries no gradient.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: features that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[[[1.0], [0.0]]]])
      >>> neuron_selectivity(jnp.array([[[[0.0], [3.0]]]]), teacher)
      Array([2.], dtype=float32)

    Reference:
      Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity
      Transfer, 2017. arXiv:1707.01219
    """
    _check(student_features, teacher_features, where)
    return _neuron_selectivity(student_features, teacher_features, where)


@functools.partial(jax.jit, inline=True)
def _channel_distribution(
    student_features: Array,
    teacher_features: Array,
    temperature: Array,
    where: Array | None,
) -> Array:
    student = by_position(widened(student_features)).mT
    teacher = by_position(widened(teacher_features)).mT
    if where is not None:
        where = jnp.broadcast_to(where.reshape(len(where), 1, -1), student.shape)
    rows = forward_kl(student, teacher, temperature=temperature, where=where)
    return jnp.mean(rows, -1)


def channel_distribution(
    student_features: Float[Array, "B H W C"],
    teacher_features: Float[Array, "B H W C"],
    *,
    temperature: float | Array = 4.0,
    where: Bool[Array, "B H W"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls where each channel of the student is active to where the teacher's is.

    .. math:: \frac{\tau^2}{C} \sum_c KL(p_{\cdot c} \| q_{\cdot c}), \quad
       p_{\cdot c} = \mathrm{softmax}(t_{\cdot c} / \tau), \;
       q_{\cdot c} = \mathrm{softmax}(s_{\cdot c} / \tau)

    with the softmax over the positions of a channel. The paper's temperature is 4;
    the published code has 1 with a weight of 5 for the logits of segmentation.

    Args:
      student_features: map of the student, ``[B, H, W, C]``.
      teacher_features: the same of the teacher, equal in shape.
      temperature: softens both sides; positive.
      where: positions that exist, ``[B, H, W]``.

    Returns:
      One value per example, ``[B]``, the mean over its channels; 0 where no position
      exists.

    Raises:
      ValueError: the shapes differ, or ``temperature`` is not positive.
      TypeError: features that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[[[1.0], [0.0]]]])
      >>> channel_distribution(teacher + 3.0, teacher)
      Array([0.], dtype=float32)

    Reference:
      Shu, Liu, Gao, Yan and Shen, Channel-wise Knowledge Distillation for Dense
      Prediction, 2021. arXiv:2011.13256
    """
    _checks.maps(
        where=where,
        student_features=student_features,
        teacher_features=teacher_features,
    )
    _checks.positive(temperature=temperature)
    _checks.scale((), temperature=temperature)
    return _channel_distribution(student_features, teacher_features, temperature, where)
