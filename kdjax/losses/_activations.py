"""Losses over maps position by position, with a threshold or at several scales."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._labels import visible, widened
from kdjax.losses._maps import pooled, replaced


@functools.partial(jax.jit, inline=True)
def _activation_boundary(
    student_features: Array,
    teacher_features: Array,
    margin: Array,
    where: Array | None,
) -> Array:
    student = replaced(widened(student_features), where)
    teacher = replaced(widened(teacher_features), where)
    too_active = (teacher <= 0) & (student > -margin)
    too_quiet = (teacher > 0) & (student <= margin)
    values = jnp.where(too_active, (student + margin) ** 2, 0.0)
    values += jnp.where(too_quiet, (student - margin) ** 2, 0.0)
    values = visible(values, student, teacher)
    return jnp.sum(replaced(values, where), (1, 2, 3))


def activation_boundary(
    student_features: Float[Array, "B H W C"],
    teacher_features: Float[Array, "B H W C"],
    *,
    margin: float | Array = 1.0,
    where: Bool[Array, "B H W"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls each neuron of the student to the teacher's side of 0, with a margin.

    .. math:: \sum_{hwc} \begin{cases} \max(s_{hwc} + m, 0)^2 & t_{hwc} \le 0 \\
       \max(m - s_{hwc}, 0)^2 & t_{hwc} > 0 \end{cases}

    Features are those before the activation function. The published code has
    3/1000 of this, halved for each layer before the last, at a weight of 1.

    Args:
      student_features: map of the student, ``[B, H, W, C]``.
      teacher_features: the same of the teacher, equal in shape.
      margin: how far from 0 the student has to be; at least 0.
      where: positions that count, ``[B, H, W]``.

    Returns:
      One value per example, ``[B]``, a sum over its positions and channels. It is not
      0 for a student that equals the teacher within the margin.

    Raises:
      ValueError: the shapes differ, or ``margin`` is negative.
      TypeError: features that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[[[-0.1], [5.0]]]])
      >>> activation_boundary(jnp.array([[[[1.0], [3.0]]]]), teacher)
      Array([4.], dtype=float32)

    Reference:
      Heo, Lee, Yun and Choi, Knowledge Transfer via Distillation of Activation
      Boundaries Formed by Hidden Neurons, 2019. arXiv:1811.03233
    """
    _checks.maps(
        where=where,
        student_features=student_features,
        teacher_features=teacher_features,
    )
    _checks.non_negative(margin=margin)
    _checks.scale((), margin=margin)
    return _activation_boundary(student_features, teacher_features, margin, where)


@functools.partial(jax.jit, inline=True)
def _margin_relu_mse(
    student_features: Array,
    teacher_features: Array,
    margin: Array,
    where: Array | None,
) -> Array:
    student = replaced(widened(student_features), where)
    teacher = replaced(widened(teacher_features), where)
    target = jnp.maximum(teacher, widened(margin))
    off = (student <= target) & (target <= 0)
    values = jnp.where(off, 0.0, (student - target) ** 2)
    return jnp.sum(replaced(values, where), (1, 2, 3))


def margin_relu_mse(
    student_features: Float[Array, "B H W C"],
    teacher_features: Float[Array, "B H W C"],
    *,
    margin: Float[Array, "C"],
    where: Bool[Array, "B H W"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls the student to the teacher's features, and not up where both are off.

    .. math:: \sum_{hwc} \begin{cases} 0 & s_{hwc} \le r_{hwc} \le 0 \\
       (s_{hwc} - r_{hwc})^2 & \text{else} \end{cases}, \quad
       r_{hwc} = \max(t_{hwc}, m_c)

    Features are those before the ReLU. The published weight is 1e-3, halved for each
    layer before the last.

    Args:
      student_features: map of the student, ``[B, H, W, C]``.
      teacher_features: the same of the teacher, equal in shape.
      margin: the mean of the teacher's negative responses in each channel, ``[C]``:
        negative numbers. For normal responses of mean :math:`\mu` and deviation
        :math:`\sigma` it is :math:`\mu - \sigma \phi(\mu / \sigma) / \Phi(-\mu /
        \sigma)`, so that a batch normalisation tells it.
      where: positions that count, ``[B, H, W]``.

    Returns:
      One value per example, ``[B]``, a sum over its positions and channels.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: arrays that are not floating, a mask that is not boolean.

    Example:
      >>> teacher, margin = jnp.array([[[[-9.0], [2.0]]]]), jnp.array([-1.0])
      >>> margin_relu_mse(jnp.array([[[[1.0], [-1.0]]]]), teacher, margin=margin)
      Array([13.], dtype=float32)

    Reference:
      Heo, Kim, Yun, Park, Kwak and Choi, A Comprehensive Overhaul of Feature
      Distillation, 2019. arXiv:1904.01866
    """
    _checks.maps(
        where=where,
        student_features=student_features,
        teacher_features=teacher_features,
    )
    _checks.per_channel(student_features, margin=margin)
    return _margin_relu_mse(student_features, teacher_features, margin, where)


@functools.partial(jax.jit, inline=True, static_argnames="sizes")
def _hierarchical_context(
    student_features: Array, teacher_features: Array, sizes: tuple[int, ...]
) -> Array:
    # Pooling is linear: that of the difference is the difference of the pooled.
    gap = widened(student_features) - widened(teacher_features)
    total, weight, weights = jnp.mean(gap**2, (1, 2, 3)), 1.0, 1.0
    for size in sizes:
        if size < min(gap.shape[1:3]):
            weight /= 2
            weights += weight
            total += weight * jnp.mean(pooled(gap, size, size) ** 2, (1, 2, 3))
    return total / weights


def hierarchical_context(
    student_features: Float[Array, "B H W C"],
    teacher_features: Float[Array, "B H W C"],
    *,
    sizes: Sequence[int] = (4, 2, 1),
) -> Float[Array, "B"]:
    r"""Pulls the student's map to the teacher's, at its full size and pooled.

    .. math:: \frac{\sum_{j=0}^{n} 2^{-j} \mathrm{mse}(P_j(s), P_j(t))}
       {\sum_{j=0}^{n} 2^{-j}}

    with the map itself as :math:`P_0`, and then average-pooled to each of ``sizes``
    that is smaller than the map. ReviewKD adds this up over its levels, fused by
    attention, with a weight of 0.6 to 8, by network, that rises over 20 epochs.

    Args:
      student_features: map of the student, ``[B, H, W, C]``.
      teacher_features: the same of the teacher, equal in shape.
      sizes: heights and widths of the pooled maps, each weighing half of the one
        before; those not below the map's are left out.

    Returns:
      One value per example, ``[B]``.

    Raises:
      ValueError: the shapes differ, or a size is below 1.
      TypeError: features that are not floating, a size that is not an integer.

    Example:
      >>> teacher = jnp.zeros((1, 2, 2, 1))
      >>> hierarchical_context(teacher + 2.0, teacher)
      Array([4.], dtype=float32)

    Reference:
      Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, 2021.
      arXiv:2104.09044
    """
    _checks.maps(student_features=student_features, teacher_features=teacher_features)
    for size in sizes:
        if not isinstance(size, int):
            raise TypeError(f"sizes: got {size!r}, expected integers.")
        if size < 1:
            raise ValueError(f"sizes: got {size}, expected numbers of at least 1.")
    return _hierarchical_context(student_features, teacher_features, tuple(sizes))
