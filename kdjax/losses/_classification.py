"""Losses over the classes of one example: hard labels, alone or with soft ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Integer

from kdjax.losses import _checks
from kdjax.losses._distillation_core import distillation_core
from kdjax.losses._kl import soft_cross_entropy
from kdjax.losses._labels import (
    at_label,
    negative_log_likelihood,
    scored,
    weighted,
    widened,
)
from kdjax.losses._rows import (
    as_columns,
    wide_dtype,
)


@functools.partial(jax.jit, inline=True)
def _cross_entropy(
    logits: Array, labels: Array, smoothing: Array | None, where: Array | None
) -> Array:
    logits = widened(logits)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)

    hard = negative_log_likelihood(logits, labels)
    if smoothing is None:
        return hard

    def uniform(logits: Array) -> Array:
        exists = ~jnp.isneginf(logits)
        finite = jnp.where(exists, logits, 0.0)
        picked = jnp.sum(
            jnp.where(at_label(labels[..., None], logits), finite, 0.0), -1
        )
        gaps = jnp.where(exists, picked[..., None] - finite, 0.0)
        count = jnp.maximum(jnp.sum(exists, -1), 1)
        return smoothing * jnp.sum(gaps, -1) / count

    return hard + scored(uniform, labels, logits)


def cross_entropy(
    logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    label_smoothing: float | Array = 0.0,
    where: Bool[Array, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the model towards the label of each position.

    .. math:: -\sum_v y_v \log \mathrm{softmax}(z)_v, \quad
       y = (1 - \epsilon) \, \mathrm{onehot}(label) + \epsilon / V

    Args:
      logits: unnormalised log-probabilities, ``[..., V]``.
      labels: index of the right class, integers of shape ``[...]``. Below 0: the
        position is not scored.
      label_smoothing: the share :math:`\epsilon` of the target that is spread evenly
        over all slots that exist, in [0, 1].
      where: slots that exist; the others are neither predicted nor smoothed to. A
        logit of -inf says the same.

    Returns:
      One value per position, ``[...]``; 0 where the label is below 0 and where no
      slot exists, +inf where the label's slot does not, and, under ``jax.jit``, NaN
      where the label is V or more.

    Raises:
      ValueError: shapes do not fit, ``label_smoothing`` is outside [0, 1], or a label
        is too large (where its value can be seen).
      TypeError: labels that are not integers, logits that are not floating.

    Example:
      >>> logits = jnp.array([[2.0, 0.0], [2.0, 0.0]])
      >>> cross_entropy(logits, jnp.array([0, -100]))
      Array([0.126928, 0.      ], dtype=float32)

    Reference:
      Szegedy, Vanhoucke, Ioffe, Shlens and Wojna, Rethinking the Inception
      Architecture for Computer Vision, 2015, section 7, for the smoothing.
      arXiv:1512.00567
    """
    _checks.floating(logits=logits)
    _checks.labels(labels, logits)
    _checks.fraction(label_smoothing=label_smoothing)
    _checks.scale(jnp.shape(labels), label_smoothing=label_smoothing)
    if where is not None:
        _checks.boolean(jnp.shape(logits), where=where)
    # The Python number 0 leaves the smoothing out of the program.
    off = isinstance(label_smoothing, (int, float)) and label_smoothing == 0
    return _cross_entropy(logits, labels, None if off else label_smoothing, where)


@functools.partial(jax.jit, inline=True)
def _knowledge_distillation(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    temperature: Array,
    alpha: Array,
) -> Array:
    logits = student_logits, teacher_logits
    softening, share = as_columns(wide_dtype(*logits), temperature, alpha)
    weights = share, (1.0 - share) * softening**2
    return distillation_core(*logits, 1 / softening, labels[..., None], *weights)


def knowledge_distillation(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    temperature: float | Array = 4.0,
    alpha: float | Array = 0.5,
) -> Float[Array, "*batch"]:
    r"""Alpha weighs the hard labels: alpha * CE + (1 - alpha) * temperature² * KL.

    Pulls the student towards the label and over the whole softened distribution of
    the teacher. Sources disagree on which part alpha weighs; here it is the labels.

    .. math:: \alpha \, (-\log \mathrm{softmax}(z_s)_{label})
       + (1 - \alpha) \, \tau^2 \sum_v p_v (\log p_v - \log q_v), \quad
       p = \mathrm{softmax}(z_t / \tau), \; q = \mathrm{softmax}(z_s / \tau)

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      teacher_logits: the same of the teacher, equal in shape.
      labels: index of the right class, integers of shape ``[...]``. Below 0 the whole
        position is left out, its soft part too; where unlabelled examples are to be
        distilled, add :func:`cross_entropy` and :func:`forward_kl` as two terms.
      temperature: softens both sides of the KL, never the hard part; positive.
      alpha: weight of the hard labels, in [0, 1]; the soft ones have 1 - alpha.

    Returns:
      One value per position, ``[...]``; see :func:`cross_entropy` for labels.

    Raises:
      ValueError: shapes do not fit, a label is too large, ``temperature`` is not
        positive, or ``alpha`` is outside [0, 1].
      TypeError: labels that are not integers, logits that are not floating.

    Example:
      >>> student = jnp.array([[2.0, 0.5, -1.0]])
      >>> teacher, labels = jnp.array([[3.0, 1.0, -0.5]]), jnp.array([0])
      >>> knowledge_distillation(student, teacher, labels, temperature=3.0)
      Array([0.136201...], dtype=float32)

    Reference:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
      section 2. arXiv:1503.02531
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.labels(labels, student_logits)
    _checks.positive(temperature=temperature)
    _checks.fraction(alpha=alpha)
    _checks.scale(jnp.shape(labels), temperature=temperature, alpha=alpha)
    return _knowledge_distillation(
        student_logits, teacher_logits, labels, temperature, alpha
    )


@functools.partial(jax.jit, inline=True)
def _hard_distillation(
    student_logits: Array, teacher_logits: Array, where: Array | None
) -> Array:
    student, teacher = widened(student_logits), widened(teacher_logits)
    if where is not None:
        student = jnp.where(where, student, -jnp.inf)
        teacher = jnp.where(where, teacher, -jnp.inf)
    # A NaN has no rank: beyond the classes, which makes the loss NaN too.
    unknown = jnp.isnan(teacher).any(-1)
    choice = jnp.where(unknown, teacher.shape[-1], jnp.argmax(teacher, -1))
    return negative_log_likelihood(student, choice)


def hard_distillation(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    *,
    where: Bool[Array, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the student towards the class that the teacher holds most probable.

    .. math:: -\log \mathrm{softmax}(z_s)_{\arg\max_v z_{t,v}}

    DeiT gives this loss to the logits of a distillation token, and adds it to half of
    the class token's :func:`cross_entropy`, with half the weight.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      teacher_logits: the same of the teacher, equal in shape. Of equal largest ones
        the first counts.
      where: vocabulary slots that exist.

    Returns:
      One value per position, ``[...]``; a cross-entropy, hence not 0 at equality.
      0 where no slot exists.

    Raises:
      ValueError: the shapes differ.
      TypeError: logits that are not floating.

    Example:
      >>> student, teacher = jnp.array([2.0, 0.0]), jnp.array([0.1, 0.0])
      >>> hard_distillation(student, teacher)
      Array(0.126928, dtype=float32)

    Reference:
      Touvron, Cord, Douze, Massa, Sablayrolles and Jégou, Training data-efficient
      image transformers & distillation through attention, 2020, equation 3.
      arXiv:2012.12877
    """
    _checks.logits(student_logits, teacher_logits, where=where)
    return _hard_distillation(student_logits, teacher_logits, where)


@functools.partial(jax.jit, inline=True)
def _weighted_soft_labels(
    student_logits: Array, teacher_logits: Array, labels: Array, temperature: Array
) -> Array:
    def loss(student: Array, teacher: Array) -> Array:
        # An infinite loss of both models would make the ratio NaN.
        largest = jnp.finfo(student.dtype).max
        hard_student = jnp.minimum(negative_log_likelihood(student, labels), largest)
        hard_teacher = jnp.minimum(negative_log_likelihood(teacher, labels), largest)
        weight = -jnp.expm1(-hard_student / (hard_teacher + 1e-7))
        soft = soft_cross_entropy(student, teacher, temperature=temperature)
        return weighted(jax.lax.stop_gradient(weight), soft)

    return scored(loss, labels, widened(student_logits), widened(teacher_logits))


def weighted_soft_labels(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    temperature: float | Array = 2.0,
) -> Float[Array, "*batch"]:
    r"""Pulls towards the teacher where the student's label loss is still the larger.

    .. math:: \tau^2 \, w \, \Bigl(-\sum_v p_v \log q_v\Bigr), \quad
       w = 1 - \exp\Bigl(-\frac{CE(z_s)}{CE(z_t) + 10^{-7}}\Bigr)

    with p and q softened by the temperature and both cross-entropies against the
    label, at temperature 1. The weight carries no gradient. The 1e-7 is that of the
    published code: it lets the weight of an example go to 0 that both have learnt.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      teacher_logits: the same of the teacher, equal in shape.
      labels: index of the right class, integers of shape ``[...]``. Below 0 the whole
        position is left out; where unlabelled examples are to be distilled, add a
        term without labels.
      temperature: softens both sides of the soft cross-entropy; positive.

    Returns:
      One value per position, ``[...]``. It keeps the teacher's entropy, hence it is
      not 0 at equality. See :func:`cross_entropy` for labels.

    Raises:
      ValueError: shapes do not fit, a label is too large, or ``temperature`` is not
        positive.
      TypeError: labels that are not integers, logits that are not floating.

    Example:
      >>> logits, labels = jnp.array([[1.0, 0.0]]), jnp.array([0])
      >>> weighted_soft_labels(logits, logits, labels, temperature=1.0)
      Array([0.3681...], dtype=float32)

    Reference:
      Zhou, Song, Chen, Zhou, Wang, Yuan and Zhang, Rethinking Soft Labels for
      Knowledge Distillation: A Bias-Variance Tradeoff Perspective, 2021, section 4.
      arXiv:2102.00650
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.labels(labels, student_logits)
    _checks.positive(temperature=temperature)
    _checks.scale(jnp.shape(labels), temperature=temperature)
    return _weighted_soft_labels(student_logits, teacher_logits, labels, temperature)
