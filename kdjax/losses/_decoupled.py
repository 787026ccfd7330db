"""Losses that treat the label's class apart from the others, and binary classes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from kdjax.losses import _checks
from kdjax.losses._kl import forward_kl, soft_cross_entropy
from kdjax.losses._labels import (
    at_label,
    at_temperature,
    negative_log_likelihood,
    scored,
    weighted,
    widened,
)
from kdjax.losses._slots import log_sum


def _expm1_less_linear(x: Array) -> Array:
    """exp(x) - 1 - x for moderate x, to full relative precision at 0 too."""
    near = jnp.abs(x) < 0.5
    small = jnp.where(near, x, 0.0)
    # The Taylor series, nested; from the 14th power on it is below float64.
    series = jnp.ones_like(small)
    for power in range(14, 2, -1):
        series = 1.0 + small / power * series
    large = jnp.where(near, 0.5, x)
    return jnp.where(near, 0.5 * small**2 * series, jnp.expm1(large) - large)


def _gap(student: Array, teacher: Array) -> Array:
    """``student - teacher``, 0 where both are the same infinity."""
    both = jnp.isinf(student) & (student == teacher)
    return jnp.where(both, 0.0, student - teacher)


@jax.custom_jvp
def bernoulli_kl(student: Array, teacher: Array, gap: Array) -> Array:
    """KL(sigmoid(teacher) ‖ sigmoid(student)), elementwise; never negative.

    ``gap`` is ``student - teacher``, which callers know better than their difference.
    """
    # Seen from the side on which the teacher's probability is at most a half.
    student = jnp.where(teacher > 0, -student, student)
    gap = jnp.where(teacher > 0, -gap, gap)
    teacher = -jnp.abs(teacher)
    p = jax.nn.sigmoid(teacher)

    near = jnp.abs(gap) < 1
    small = jnp.where(near, gap, 0.0)
    # log(1 + p (e^x - 1)) - p x in terms of second order: with p <= 1/2 the first
    # is at least twice the second, so that nothing cancels.
    spread = _expm1_less_linear(jnp.log1p(p * jnp.expm1(small)))
    close = p * _expm1_less_linear(small) - spread

    apart = jax.nn.softplus(student) - jax.nn.softplus(teacher) - weighted(p, gap)
    apart = jnp.where(jnp.isposinf(student), jnp.inf, apart)
    return jnp.where(near, close, apart)


@bernoulli_kl.defjvp
def _bernoulli_kl_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    # The gap moves with the other two, and has no derivative of its own.
    student, teacher, gap = primals
    # sigmoid(student) - sigmoid(teacher), without the cancellation.
    rises = gap >= 0
    up, down = jnp.where(rises, gap, 0.0), jnp.where(rises, 0.0, gap)
    sigmoid = jax.nn.sigmoid
    student_slope = jnp.where(
        rises,
        -jnp.expm1(-up) * sigmoid(student) * sigmoid(-teacher),
        jnp.expm1(down) * sigmoid(teacher) * sigmoid(-student),
    )
    teacher_slope = weighted(-sigmoid(teacher) * sigmoid(-teacher), gap)
    tangent = student_slope * tangents[0] + teacher_slope * tangents[1]
    return bernoulli_kl(student, teacher, gap), tangent


def _label_log_odds(logits: Array, is_label: Array) -> tuple[Array, Array]:
    """log p(label) - log(1 - p(label)), +inf where no other class exists.

    And the distribution over the others, which is 0 for the label.
    """
    top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    logits = logits - jnp.where(jnp.isneginf(top), 0.0, top)
    label = jnp.sum(jnp.where(is_label, logits, 0.0), -1)
    rest = jnp.where(is_label, -jnp.inf, logits)
    others = log_sum(rest)
    alone = jnp.isneginf(others)
    others = jnp.where(alone, 0.0, others)
    shares = jnp.exp(rest - others[..., None])
    return jnp.where(alone, jnp.inf, label - others), shares


def _target_kl(
    student: Array, teacher: Array, is_label: Array, softening: Array
) -> Array:
    """The KL of the label's class against all the others, from log-odds."""
    wide = softening[..., None]
    student_odds, _ = _label_log_odds(at_temperature(student, wide), is_label)
    teacher_odds, shares = _label_log_odds(at_temperature(teacher, wide), is_label)
    # Where the models are close, the difference of the odds comes from that of the
    # logits: two logarithms of sums would bring their rounding into it.
    gaps = _gap(student, teacher) / wide
    finite = jnp.where(jnp.isfinite(gaps), gaps, 0.0)
    centre = jax.lax.stop_gradient(jnp.sum(shares * finite, -1, keepdims=True))
    gaps = gaps - centre
    near = jnp.all(jnp.abs(gaps) < 0.5, -1)
    gaps = jnp.where(near[..., None], gaps, 0.0)
    label = jnp.sum(jnp.where(is_label, gaps, 0.0), -1)
    close = label - jnp.log1p(jnp.sum(shares * jnp.expm1(gaps), -1))
    gap = jnp.where(near, close, _gap(student_odds, teacher_odds))
    return bernoulli_kl(student_odds, teacher_odds, gap)


@functools.partial(jax.jit, inline=True)
def _decoupled_kd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    alpha: Array,
    beta: Array,
    temperature: Array,
) -> Array:
    def loss(student: Array, teacher: Array) -> Array:
        is_label = at_label(labels[..., None], student)
        softening = jnp.asarray(temperature, student.dtype)
        target = softening**2 * _target_kl(student, teacher, is_label, softening)
        others = forward_kl(student, teacher, temperature=softening, where=~is_label)
        return weighted(alpha, target) + weighted(beta, others)

    return scored(loss, labels, widened(student_logits), widened(teacher_logits))


def decoupled_kd(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    alpha: float | Array = 1.0,
    beta: float | Array = 8.0,
    temperature: float | Array = 4.0,
) -> Float[Array, "*batch"]:
    r"""Pulls the label's probability, and apart from it the shape of all the others.

    .. math:: \tau^2 \bigl(\alpha \, KL(b_t \| b_s) + \beta \, KL(\hat p \| \hat q)
       \bigr), \quad b = (p_{label}, 1 - p_{label})

    where :math:`\hat p` and :math:`\hat q` are the softened distributions over the
    classes other than the label. Plain distillation has :math:`\alpha = 1` and
    :math:`\beta = 1 - p_{label}`, which fades where the teacher is sure. Computed
    from log-odds: no probability underflows, however sure a model is.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      teacher_logits: the same of the teacher, equal in shape.
      labels: index of the right class, integers of shape ``[...]``. Below 0 the whole
        position is left out.
      alpha: weight of the label's class against the rest; at least 0.
      beta: weight of the distribution over the other classes; at least 0.
      temperature: softens both sides; positive.

    Returns:
      One value per position, ``[...]``; 0 where the two distributions agree. See
      :func:`cross_entropy` for labels.

    Raises:
      ValueError: shapes do not fit, a label is too large, ``temperature`` is not
        positive, or a weight is negative.
      TypeError: labels that are not integers, logits that are not floating.

    Example:
      >>> teacher, labels = jnp.array([[2.0, 0.5, 0.0]]), jnp.array([0])
      >>> decoupled_kd(teacher, teacher, labels)
      Array([0.], dtype=float32)

    Reference:
      Zhao, Cui, Song, Qiu and Liang, Decoupled Knowledge Distillation, 2022,
      equation 7. arXiv:2203.08679
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.labels(labels, student_logits)
    _checks.positive(temperature=temperature)
    _checks.non_negative(alpha=alpha, beta=beta)
    shape = jnp.shape(labels)
    _checks.scale(shape, alpha=alpha, beta=beta, temperature=temperature)
    return _decoupled_kd(
        student_logits, teacher_logits, labels, alpha, beta, temperature
    )


@functools.partial(jax.jit, inline=True)
def _normalized_kd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    gamma: Array,
    temperature: Array,
) -> Array:
    def loss(student: Array, teacher: Array) -> Array:
        trust = jnp.exp(-negative_log_likelihood(teacher, labels))
        target = weighted(trust, negative_log_likelihood(student, labels))
        others = soft_cross_entropy(
            student,
            teacher,
            temperature=temperature,
            where=~at_label(labels[..., None], student),
        )
        return target + weighted(gamma, others)

    return scored(loss, labels, widened(student_logits), widened(teacher_logits))


def normalized_kd(
    student_logits: Float[Array, "*batch V"],
    teacher_logits: Float[Array, "*batch V"],
    labels: Integer[Array, "*batch"],
    *,
    gamma: float | Array = 1.5,
    temperature: float | Array = 1.0,
) -> Float[Array, "*batch"]:
    r"""Pulls towards the label as far as the teacher trusts it, and the rest apart.

    .. math:: -p_{label} \log q_{label}
       - \gamma \tau^2 \sum_{v \ne label} \hat p_v \log \hat q_v

    where :math:`\hat p` and :math:`\hat q` are the softened distributions over the
    classes other than the label, each summing to 1. The first part is taken at
    temperature 1, as in the paper and its code; only the second is softened.

    Args:
      student_logits: unnormalised log-probabilities of the student, ``[..., V]``.
      teacher_logits: the same of the teacher, equal in shape.
      labels: index of the right class, integers of shape ``[...]``. Below 0 the whole
        position is left out.
      gamma: weight of the distribution over the other classes; at least 0.
      temperature: softens the distributions over the other classes; positive.

    Returns:
      One value per position, ``[...]``. Both parts are cross-entropies, hence not 0
      at equality. See :func:`cross_entropy` for labels.

    Raises:
      ValueError: shapes do not fit, a label is too large, ``temperature`` is not
        positive, or ``gamma`` is negative.
      TypeError: labels that are not integers, logits that are not floating.

    Example:
      >>> logits, labels = jnp.zeros((1, 3)), jnp.array([0])
      >>> normalized_kd(logits, logits, labels, gamma=0.0)  # log(3) / 3
      Array([0.366204], dtype=float32)

    Reference:
      Yang, Zeng, Li, Zhang, Yuan and Li, From Knowledge Distillation to
      Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
      Customized Soft Labels, 2023, section 3.1. arXiv:2303.13005
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.labels(labels, student_logits)
    _checks.positive(temperature=temperature)
    _checks.non_negative(gamma=gamma)
    _checks.scale(jnp.shape(labels), gamma=gamma, temperature=temperature)
    return _normalized_kd(student_logits, teacher_logits, labels, gamma, temperature)


@functools.partial(jax.jit, inline=True)
def _binary_distillation(
    student_logits: Array, teacher_logits: Array, temperature: Array
) -> Array:
    student, teacher = widened(student_logits), widened(teacher_logits)
    softening = jnp.asarray(temperature, student.dtype)[..., None]
    sides = at_temperature(student, softening), at_temperature(teacher, softening)
    value = bernoulli_kl(*sides, _gap(student, teacher) / softening)
    return softening**2 * value


def binary_distillation(
    student_logits: Float[Array, "*batch K"],
    teacher_logits: Float[Array, "*batch K"],
    *,
    temperature: float | Array = 1.0,
) -> Float[Array, "*batch K"]:
    r"""Pulls every yes-or-no probability of the student to the teacher's.

    .. math:: \tau^2 \Bigl(p \log \frac{p}{q} + (1 - p) \log \frac{1 - p}{1 - q}
       \Bigr), \quad p = \sigma(z_t / \tau), \; q = \sigma(z_s / \tau)

    For labels that do not exclude each other, and detectors with one sigmoid per
    class: each of the K logits is a distribution of its own.

    Args:
      student_logits: log-odds of the student, ``[..., K]``.
      teacher_logits: the same of the teacher, equal in shape.
      temperature: softens both sides; positive.

    Returns:
      One value per logit, ``[..., K]``; 0 where they agree, never negative. -inf and
      +inf are certainty: +inf where the student excludes what the teacher does not.

    Raises:
      ValueError: the shapes differ, or ``temperature`` is not positive.
      TypeError: logits that are not floating.

    Example:
      >>> binary_distillation(jnp.array([0.0, 1.0]), jnp.array([0.0, 0.0]))
      Array([0.       , 0.1201145], dtype=float32)

    Reference:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
      section 2, for two classes. arXiv:1503.02531
    """
    _checks.logits(student_logits, teacher_logits)
    _checks.positive(temperature=temperature)
    _checks.scale(jnp.shape(student_logits)[:-1], temperature=temperature)
    return _binary_distillation(student_logits, teacher_logits, temperature)
