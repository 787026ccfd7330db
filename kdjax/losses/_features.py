"""Losses over features as values to be matched, or to be predicted."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._labels import widened
from kdjax.losses._maps import positions, replaced
from kdjax.losses._vectors import unit_distance


@functools.partial(jax.jit, inline=True)
def _feature_mse(student_features: Array, teacher_features: Array) -> Array:
    student, teacher = widened(student_features), widened(teacher_features)
    return jnp.mean((student - teacher) ** 2, -1)


def feature_mse(
    student_features: Float[Array, "*batch D"],
    teacher_features: Float[Array, "*batch D"],
) -> Float[Array, "*batch"]:
    r"""Pulls every feature of the student to the teacher's.

    .. math:: \frac{1}{D} \sum_d (s_d - t_d)^2

    Only the last axis is reduced: maps, tokens and embeddings alike. A mask over
    positions or tokens belongs to ``Mean.of``. The FitNets paper has half the sum;
    this is the mean of the published implementations, whose weight is 100.

    Args:
      student_features: features of the student, ``[..., D]``; projected to the
        teacher's width where they have another.
      teacher_features: the same of the teacher, equal in shape.

    Returns:
      One value per position, ``[...]``.

    Raises:
      ValueError: the shapes differ.
      TypeError: features that are not floating.

    Example:
      >>> feature_mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])).item()
      2.0

    Reference:
      Romero, Ballas, Kahou, Chassang, Gatta and Bengio, FitNets: Hints for Thin Deep
      Nets, 2015, equation 3. arXiv:1412.6550
    """
    _checks.features(student_features, teacher_features)
    return _feature_mse(student_features, teacher_features)


@functools.partial(jax.jit, inline=True)
def _feature_cosine(student_features: Array, teacher_features: Array) -> Array:
    return unit_distance(widened(student_features), widened(teacher_features))


def feature_cosine(
    student_features: Float[Array, "*batch D"],
    teacher_features: Float[Array, "*batch D"],
) -> Float[Array, "*batch"]:
    r"""Pulls the direction of the student's features to the teacher's.

    .. math:: 1 - \frac{s \cdot t}{\|s\| \|t\|}

    Only the last axis is reduced: maps, tokens and embeddings alike. A mask over
    positions or tokens belongs to ``Mean.of``. The published weight is 1.

    Args:
      student_features: features of the student, ``[..., D]``.
      teacher_features: the same of the teacher, equal in shape.

    Returns:
      One value per position, ``[...]``, in [0, 2]; 0 where a side is all 0, which
      leaves the direction undefined, and without a gradient.

    Raises:
      ValueError: the shapes differ.
      TypeError: features that are not floating.

    Example:
      >>> feature_cosine(jnp.array([0.0, 2.0]), jnp.array([1.0, 0.0])).item()
      1.0

    Reference:
      Sanh, Debut, Chaumond and Wolf, DistilBERT, a distilled version of BERT: smaller,
      faster, cheaper and lighter, 2019, section 2. arXiv:1910.01108
    """
    _checks.features(student_features, teacher_features)
    return _feature_cosine(student_features, teacher_features)


@functools.partial(jax.jit, inline=True)
def _variational_information(
    mean: Array, log_scale: Array, target: Array, where: Array | None
) -> Array:
    mean, target = (replaced(widened(each), where) for each in (mean, target))
    variance = jax.nn.softplus(widened(log_scale)) + 1e-5
    values = 0.5 * ((mean - target) ** 2 / variance + jnp.log(variance))
    total = jnp.sum(replaced(values, where), (1, 2, 3))
    return total / (positions(mean, where) * mean.shape[-1])


def variational_information(
    mean: Float[Array, "B H W C"],
    log_scale: Float[Array, "C"],
    target: Float[Array, "B H W C"],
    *,
    where: Bool[Array, "B H W"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls a Gaussian that the student predicts over the teacher's features.

    .. math:: \frac{1}{HWC} \sum_{hwc} \frac{1}{2} \Bigl(
       \frac{(\mu_{hwc} - t_{hwc})^2}{\sigma_c^2} + \log \sigma_c^2 \Bigr), \quad
       \sigma_c^2 = \log(1 + e^{\theta_c}) + 10^{-5}

    A lower bound of the mutual information, but for its sign and a constant. The
    scale has to be trained with the student. The paper's formula is a sum; this is
    the mean of the published code, whose weight is 1. Its scale starts where the
    variance is 5, at ``log(exp(5 - 1e-5) - 1)``.

    Args:
      mean: what the student predicts, from its own features by a regressor,
        ``[B, H, W, C]``.
      log_scale: the parameter :math:`\theta` of each channel's variance, ``[C]``.
      target: features of the teacher, ``[B, H, W, C]``.
      where: positions that count, ``[B, H, W]``.

    Returns:
      One value per example, ``[B]``, the mean over its positions and channels; may be
      negative, is not 0 where the mean is right, and is 0 where no position counts.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: arrays that are not floating, a mask that is not boolean.

    Example:
      >>> target, theta = jnp.zeros((1, 2, 2, 1)), jnp.log(jnp.expm1(jnp.ones(1)))
      >>> variational_information(target + 2.0, theta, target).round(3)
      Array([2.], dtype=float32)

    Reference:
      Ahn, Hu, Damianou, Lawrence and Dai, Variational Information Distillation for
      Knowledge Transfer, 2019. arXiv:1904.05835
    """
    _checks.maps(where=where, mean=mean, target=target)
    _checks.per_channel(mean, log_scale=log_scale)
    return _variational_information(mean, log_scale, target, where)


@functools.partial(jax.jit, inline=True)
def _masked_generation(
    generated_features: Array, teacher_features: Array, where: Array | None
) -> Array:
    generated = replaced(widened(generated_features), where)
    teacher = replaced(widened(teacher_features), where)
    return jnp.sum((generated - teacher) ** 2, (1, 2, 3))


def masked_generation(
    generated_features: Float[Array, "B H W C"],
    teacher_features: Float[Array, "B H W C"],
    *,
    where: Bool[Array, "B H W"] | None = None,
) -> Float[Array, "B"]:
    r"""Pulls what is generated from a masked student to the teacher's features.

    .. math:: \sum_{hwc} (g_{hwc} - t_{hwc})^2

    The random mask and the generator, which is trained, belong to the objective. Every
    position counts, the masked ones and the others. The published weight of this sum is
    2e-5 for detection, at a mask ratio of 0.65.

    Args:
      generated_features: features generated from the student's, ``[B, H, W, C]``.
      teacher_features: features of the teacher, equal in shape.
      where: positions that exist, ``[B, H, W]``: not those of the random mask.

    Returns:
      One value per example, ``[B]``, a sum over its positions and channels.

    Raises:
      ValueError: the shapes differ.
      TypeError: features that are not floating, a mask that is not boolean.

    Example:
      >>> teacher = jnp.zeros((1, 2, 2, 1))
      >>> masked_generation(teacher + 0.5, teacher)
      Array([1.], dtype=float32)

    Reference:
      Yang, Li, Shao, Shi, Yuan and Yuan, Masked Generative Distillation, 2022.
      arXiv:2205.01529
    """
    _checks.maps(
        where=where,
        generated_features=generated_features,
        teacher_features=teacher_features,
    )
    return _masked_generation(generated_features, teacher_features, where)
