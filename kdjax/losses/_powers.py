"""Divergences built on powers of the probabilities, and total variation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._pairs import (
    Formula,
    Pair,
    Totals,
    rule,
    softened,
)
from kdjax.losses._rows import by_rows, largest


def _variation_terms(pair: Pair) -> Totals:
    difference = pair.gap
    sign = jnp.sign(difference)
    return jnp.abs(difference) / 2, pair.q * sign / 2, -pair.p * sign / 2


_variation_core = by_rows(
    rule(
        Formula(
            terms=_variation_terms,
            value=lambda totals: totals[0],
            student=lambda pair, totals: pair.q * (jnp.sign(pair.gap) / 2 - totals[1]),
            teacher=lambda pair, totals: -pair.p * (jnp.sign(pair.gap) / 2 + totals[2]),
        )
    )
)


def total_variation(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Moves the probability that is in the wrong place, all of it alike.

    .. math:: \frac{\tau^2}{2} \sum_v |p_v - q_v|

    The gradient is that of the sign, and 0 for classes on which both agree exactly.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``, between 0 and temperature².

    Raises:
      ValueError: the shapes differ, or a Python ``temperature`` is not positive.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> total_variation(jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.8, 0.2]))).item()
      0.3

    Reference:
      Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation,
      2023, section 3. arXiv:2307.15190
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    return softened(_variation_core, student_logits, teacher_logits, temperature, where)


# Gauss-Legendre nodes and weights on [0, 1]; six integrate a polynomial of degree 11.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def _decay(rate: Array, u: Array) -> Array:
    """``(1 - exp(-rate u)) / rate``, which is u at rate 0."""
    z = rate * u
    small = jnp.abs(z) < 1e-6
    safe = jnp.where(small, 1, rate)
    # To second order, for the derivative by the rate.
    return jnp.where(small, u - z * u / 2, -jnp.expm1(-jnp.where(small, 0, z)) / safe)


def _curvature(z: Array) -> Array:
    """``(1 - (1 + z) exp(-z)) / z²``, which is 1/2 at 0."""
    near = jnp.abs(z) < 1
    inner, outer = jnp.where(near, z, 0), jnp.where(near, 1, z)
    series = jnp.zeros_like(z)
    for k in range(18 if z.dtype == jnp.float64 else 10, -1, -1):
        series = series * inner + (-1) ** k / (math.factorial(k) * (k + 2))
    return jnp.where(near, series, (1 - (1 + outer) * jnp.exp(-outer)) / outer**2)


def _by_size(pair: Pair, alpha: Array, beta: Array) -> tuple[Array, ...]:
    """The larger of p and q to the power alpha + beta, |x|, and the exponents.

    Written from the larger side, every exponential decays; the divergence of (p, q)
    with (alpha, beta) is that of (q, p) with (beta, alpha).
    """
    above = pair.x >= 0
    base = jnp.maximum(pair.p, pair.q)
    power = jnp.where(base == 0, 0, jnp.where(base == 0, 1, base) ** (alpha + beta))
    # Beyond this |x| nothing changes any more, but for what is infinite at infinity.
    u = jnp.minimum(jnp.abs(pair.x), 1e6)
    own, other = jnp.where(above, alpha, beta), jnp.where(above, beta, alpha)
    return power, u, own, other


def _alpha_beta_terms(pair: Pair, alpha: Array, beta: Array) -> Totals:
    power, u, own, other = _by_size(pair, alpha, beta)
    # A difference quotient of _decay. Where its two ends are close, it is the mean of
    # the derivative between them, which also covers own = 0.
    close = jnp.abs(own * u) < 1
    near = jnp.where(close, u, 0)
    mean = sum(
        weight * _curvature((other + node * own) * near)
        for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True)
    )
    quotient = (_decay(other, u) - _decay(alpha + beta, u)) / jnp.where(close, 1, own)
    value = power * jnp.where(close, near**2 * mean, quotient)
    endless = jnp.isinf(pair.x) & (other <= 0) & (power > 0)
    value = jnp.where(power == 0, 0, jnp.where(endless, jnp.inf, value))
    student, teacher = _alpha_beta_slopes(pair, alpha, beta)
    return value, student, teacher


def _alpha_beta_slopes(pair: Pair, alpha: Array, beta: Array) -> tuple[Array, Array]:
    """q dF/dq and p dF/dp of each summand F."""
    power, u, own, other = _by_size(pair, alpha, beta)
    larger = _decay(other, u)
    # An exponent below 0 grows; it is put together with the one that outweighs it.
    grows = own * u < -1
    steady = jnp.exp(-other * u) * _decay(own, jnp.where(grows, 0, u))
    apart = jnp.exp(-other * u) - jnp.exp(-(alpha + beta) * u)
    smaller = -jnp.where(grows, apart / jnp.where(grows, own, 1), steady)
    # Where both probabilities are 0, nothing is to be moved.
    larger, smaller = (
        jnp.where(power == 0, 0, power * slope) for slope in (larger, smaller)
    )
    above = pair.x >= 0
    return jnp.where(above, smaller, larger), jnp.where(above, larger, smaller)


def _balanced(slope: Array, weight: Array, total: Array, value: Array) -> Array:
    """``slope - weight * total``, 0 where :func:`~kdjax.losses._pairs.centred` is."""
    # Slopes of an infinite value may be infinite both ways.
    endless = jnp.isinf(total) | (jnp.isnan(total) & jnp.isinf(value))
    return jnp.where((weight == 0) | endless, 0, slope - weight * total)


_alpha_beta_core = by_rows(
    rule(
        Formula(
            terms=_alpha_beta_terms,
            value=lambda totals: totals[0],
            student=lambda pair, totals, alpha, beta: _balanced(
                _alpha_beta_slopes(pair, alpha, beta)[0], pair.q, totals[1], totals[0]
            ),
            teacher=lambda pair, totals, alpha, beta: _balanced(
                _alpha_beta_slopes(pair, alpha, beta)[1], pair.p, totals[2], totals[0]
            ),
        )
    )
)


def alpha_beta(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    alpha: ArrayLike = 0.5,
    beta: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The alpha-beta divergence, between and beyond forward and reverse KL.

    .. math::
        -\frac{\tau^2}{\alpha \beta} \sum_v \Bigl[ p_v^\alpha q_v^\beta
        - \frac{\alpha}{\alpha + \beta} p_v^{\alpha + \beta}
        - \frac{\beta}{\alpha + \beta} q_v^{\alpha + \beta} \Bigr]

    Where :math:`\alpha`, :math:`\beta` or their sum is 0 it is the limit: (1, 0) is
    forward KL, (0, 1) reverse KL, (0, 0) half the squared difference of the
    log-probabilities. Classes whose probability underflows on both sides do not count.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      alpha: the teacher's exponent, any number; a scalar or one per position.
      beta: the student's exponent, likewise.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``; 0 where the distributions agree.

    Raises:
      ValueError: the shapes differ, or a Python number is out of its range.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> a, b = jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.8, 0.2]))
      >>> alpha_beta(a, b, alpha=1.0, beta=0.0).item()  # 0.8 log 1.6 + 0.2 log 0.4
      0.192745

    Reference:
      Wang et al., ABKD: Pursuing a Proper Allocation of the Probability Mass in
      Knowledge Distillation via α-β-Divergence, 2025, definition 3.1. arXiv:2505.04560
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    _checks.finite(alpha=alpha, beta=beta)
    _checks.scale(jnp.shape(student_logits)[:-1], alpha=alpha, beta=beta)
    return softened(
        _alpha_beta_core,
        student_logits,
        teacher_logits,
        temperature,
        where,
        alpha,
        beta,
    )


def _renyi_core(student: Array, teacher: Array, inverse: Array, order: Array) -> Array:
    row_order = order[..., 0] if order.ndim else order
    # A side without a class has no distribution; both as if uniform give 0.
    sides = student, teacher
    gone = [jnp.isneginf(logits).all(-1, keepdims=True) for logits in sides]
    student, teacher = (jnp.where(gone[0] | gone[1], 0, logits) for logits in sides)
    # Below the top first: a common offset would take digits with it.
    q, p = (
        jnp.maximum(logits - largest(logits), -1e30) * inverse
        for logits in (student, teacher)
    )
    log_sum = (
        jax.nn.logsumexp(order * p + (1 - order) * q, axis=-1)
        - row_order * jax.nn.logsumexp(p, axis=-1)
        - (1 - row_order) * jax.nn.logsumexp(q, axis=-1)
    )
    # The floor of -1e30 stands for -inf, so what came of it does too.
    close = jnp.abs(log_sum) < 0.5
    apart = log_sum / jnp.where(close, -1, row_order - 1)
    apart = jnp.where(apart > 1e25, jnp.inf, apart)
    # Near each other, log_sum is lost in rounding. There it is log(1 - y) with
    # y = a(1 - a) times the alpha-beta divergence, and order 1 is no special case.
    student = jnp.where(close[..., None], student, teacher)
    similar = row_order * _alpha_beta_core(student, teacher, inverse, order, 1 - order)
    y = (1 - row_order) * similar
    tiny = jnp.abs(y) < 1e-6
    ratio = jnp.where(tiny, 1 + y / 2, -jnp.log1p(-y) / jnp.where(tiny, 1, y))
    return jnp.where(close, similar * ratio, apart)


def renyi(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    order: ArrayLike,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The Rényi divergence of the student from the teacher.

    .. math:: \frac{\tau^2}{a - 1} \log \sum_v p_v^a q_v^{1 - a}

    The larger the order ``a``, the more the student must cover all of the teacher; at
    1 it is forward KL.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      order: ``a``, positive; a scalar or one per position.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``; 0 where the distributions agree.

    Raises:
      ValueError: the shapes differ, or a Python number is not positive.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> a, b = jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.8, 0.2]))
      >>> renyi(a, b, order=2.0).item()  # log(2 (0.8² + 0.2²))
      0.3074847

    Reference:
      Rényi, On Measures of Entropy and Information, 1961, equation 3.3; van Erven and
      Harremoës, Rényi Divergence and Kullback-Leibler Divergence, 2012. arXiv:1206.2459
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    _checks.positive(order=order)
    _checks.scale(jnp.shape(student_logits)[:-1], order=order)
    return softened(
        _renyi_core, student_logits, teacher_logits, temperature, where, order
    )
