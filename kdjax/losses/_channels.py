"""Losses over how channels, or representations as a whole, relate."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._labels import widened
from kdjax.losses._maps import (
    by_position,
    channel_products,
    of_one_size,
    replaced,
)
from kdjax.losses._vectors import (
    scaled,
    standardized,
    unit,
)


@functools.partial(jax.jit, inline=True)
def _solution_flow(
    student_features: tuple[Array, Array], teacher_features: tuple[Array, Array]
) -> Array:
    def flow(layers: tuple[Array, Array]) -> Array:
        first, second = of_one_size(widened(layers[0]), widened(layers[1]))
        first, second = by_position(first), by_position(second)
        return channel_products(first, second) / first.shape[1]

    return jnp.mean((flow(student_features) - flow(teacher_features)) ** 2, (1, 2))


def solution_flow(
    student_features: tuple[Float[Array, "B H0 W0 C0"], Float[Array, "B H1 W1 C1"]],
    teacher_features: tuple[Float[Array, "B H2 W2 C0"], Float[Array, "B H3 W3 C1"]],
) -> Float[Array, "B"]:
    r"""Pulls how the student gets from one layer to another to how the teacher does.

    .. math:: \frac{1}{C_0 C_1} \sum_{cd} (G^s_{cd} - G^t_{cd})^2, \quad
       G_{cd} = \frac{1}{HW} \sum_{hw} f^0_{hwc} f^1_{hwd}

    Of two layers the larger is pooled to the size of the smaller, by averages as in
    the published code; the paper takes the largest. The published weight is 50.

    Args:
      student_features: maps of two layers of the student, ``[B, H, W, C0]`` and
        ``[B, H, W, C1]``; heights and widths may all differ.
      teacher_features: the same of the teacher, with the same channels.

    Returns:
      One value per example, ``[B]``.

    Raises:
      ValueError: there are not two layers, or the shapes do not fit.
      TypeError: features that are not floating.

    Example:
      >>> layer = jnp.ones((1, 2, 2, 1))
      >>> solution_flow((layer, 3.0 * layer), (layer, layer))
      Array([4.], dtype=float32)

    Reference:
      Yim, Joo, Bae and Kim, A Gift from Knowledge Distillation: Fast Optimization,
      Network Minimization and Transfer Learning, CVPR 2017, equations 1 and 2.
    """
    layers = {
        "student_features": student_features,
        "teacher_features": teacher_features,
    }
    for name, pair in layers.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = f"{len(pair)} of them" if isinstance(pair, tuple | list) else "one"
            raise ValueError(f"{name}: got {got}, expected the maps of two layers.")
    for layer in (0, 1):
        named: dict[str, Any] = {
            f"{name}[{layer}]": pair[layer] for name, pair in layers.items()
        }
        _checks.maps(space=False, **named)
    _checks.maps(
        space=False,
        channels=False,
        **{f"student_features[{i}]": student_features[i] for i in (0, 1)},
    )
    return _solution_flow(tuple(student_features), tuple(teacher_features))


@functools.partial(jax.jit, inline=True)
def _channel_similarity(
    student_features: Array, teacher_features: Array, where: Array | None
) -> Array:
    def similarity(features: Array) -> Array:
        # Rows of length 1 hide the scale, which the squares would let overflow.
        rows = scaled(by_position(replaced(widened(features), where)), (1, 2))
        return unit(channel_products(rows, rows))

    gaps = similarity(student_features) - similarity(teacher_features)
    return jnp.sum(gaps**2, (1, 2)) / gaps.shape[-1]


def channel_similarity(
    student_features: Float[Array, "B Hs Ws C"],
    teacher_features: Float[Array, "B Ht Wt C"],
    *,
    where: Bool[Array, "B Hs Ws"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls how alike the channels of the student are to how alike the teacher's are.

    .. math:: \frac{1}{C} \sum_{c} \Bigl\| \frac{G^s_{c}}{\|G^s_{c}\|} -
       \frac{G^t_{c}}{\|G^t_{c}\|} \Bigr\|^2, \quad G_{cd} = \sum_{hw} f_{hwc} f_{hwd}

    The published code divides the sum over a batch by its size twice, the mean of
    this once: its weights carry over divided by the batch size.

    Args:
      student_features: map of the student, ``[B, H, W, C]``.
      teacher_features: map of the teacher, with the same channels; height and width
        may differ.
      where: positions that count, ``[B, H, W]``; for maps of one size.

    Returns:
      One value per example, ``[B]``. A channel that is 0 everywhere stays 0 and
      carries no gradient.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: features that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[[[1.0, 2.0], [0.0, 1.0]]]])
      >>> channel_similarity(3.0 * teacher, teacher)
      Array([0.], dtype=float32)

    Reference:
      Liu, Huang, Lin, Xie, Wang, Chang and Liang, Exploring Inter-Channel Correlation
      for Diversity-Preserved Knowledge Distillation, ICCV 2021.
    """
    _checks.maps(
        where=where,
        space=False,
        student_features=student_features,
        teacher_features=teacher_features,
    )
    return _channel_similarity(student_features, teacher_features, where)


@functools.partial(jax.jit, inline=True)
def _feature_correlation(
    student_features: Array, teacher_features: Array, where: Array | None
) -> Array:
    if where is None:
        where = jnp.ones(student_features.shape[:1], bool)
    where, axes = where[:, None, None, None], (0, 1, 2)

    def by_channel(features: Array) -> Array:
        features = jnp.where(where, widened(features), 0.0)
        return standardized(features, axes, where, epsilon=1e-6)

    gaps = by_channel(student_features) - by_channel(teacher_features)
    return 0.5 * jnp.mean(gaps**2, (1, 2, 3))


def feature_correlation(
    student_features: Float[Array, "B H W C"],
    teacher_features: Float[Array, "B H W C"],
    *,
    where: Bool[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls how each channel varies in the student to how it does in the teacher.

    .. math:: \frac{1}{2 HWC} \sum_{hwc} (\hat s_{hwc} - \hat t_{hwc})^2, \quad
       \hat f = \frac{f - \mathrm{mean}_c(f)}{\mathrm{std}_c(f) + 10^{-6}}

    with mean and unbiased deviation of a channel over all positions of all examples:
    on average 1 - Pearson's correlation, but for the factor (n - 1) / n of n numbers.
    This loss relates the examples of a batch: on a mesh it sees the global one, and
    its value over micro-batches is another than over the whole. The 1e-6 is that of
    the published code, whose weight is 6.

    Args:
      student_features: map of the student, ``[B, H, W, C]``.
      teacher_features: the same of the teacher, equal in shape.
      where: examples that count, ``[B]``.

    Returns:
      One value per example, ``[B]``, 0 for one that does not count. A channel that is
      constant is standardised to 0 and carries no gradient.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: features that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.array([[[[1.0], [0.0]]]])
      >>> feature_correlation(3.0 * teacher + 1.0, teacher).round(5)
      Array([0.], dtype=float32)

    Reference:
      Cao, Zhang, Gao, Cheng, Cheng and Zhang, PKD: General Distillation Framework for
      Object Detectors via Pearson Correlation Coefficient, 2022.
      arXiv:2207.02039
    """
    _checks.maps(student_features=student_features, teacher_features=teacher_features)
    if where is not None:
        _checks.boolean(jnp.shape(student_features)[:1], where=where)
    return _feature_correlation(student_features, teacher_features, where)
