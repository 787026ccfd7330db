"""Divergences through a mixture of teacher and student, which keeps them bounded."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._pairs import (
    Formula,
    Pair,
    Totals,
    centred,
    excess,
    exp_and_less_one,
    log1p_near,
    rule,
    softened,
)
from kdjax.losses._rows import by_rows


def _logs_to_mixture(x: Array, share: Array) -> tuple[Array, Array]:
    """log(p/m) and log(q/m) with the mixture m = share p + (1 - share) q."""
    # One logarithm is enough, of numbers that cannot overflow: the other is x away.
    above, far = x >= 0, jnp.abs(x)
    weight = jnp.where(above, 1 - share, share)
    larger = -_log_mixed(weight, jnp.where(above, share, 1 - share), -far)
    smaller = larger - far
    return jnp.where(above, larger, smaller), jnp.where(above, smaller, larger)


def _mixture(pair: Pair, share: Array) -> Array:
    return share * pair.p + (1 - share) * pair.q


def _log_mixed(weight: Array, rest: Array, x: Array) -> Array:
    """``log(weight * exp(x) + rest)`` for x <= 0 and weights that sum to one."""
    power, less_one = exp_and_less_one(x)
    change = weight * less_one
    near = change > -0.5
    inner = log1p_near(jnp.where(near, change, 0))
    # Where the change eats up nearly all of the one, the sum is the exact form. It is
    # at least exp(x), which alone is left, and may underflow, where the rest is 0.
    return jnp.where(near, inner, jnp.maximum(jnp.log(weight * power + rest), x))


def _js_terms(pair: Pair, beta: Array) -> Totals:
    log_p, log_q = _logs_to_mixture(pair.x, beta)
    mixture = _mixture(pair, beta)
    return (
        beta * excess(pair.p, mixture, log_p),
        (1 - beta) * excess(pair.q, mixture, log_q),
    )


def _js_scores(x: Array, beta: Array) -> tuple[Array, Array]:
    log_p, log_q = _logs_to_mixture(x, beta)
    return beta * log_p, (1 - beta) * log_q


_js_core = by_rows(
    rule(
        Formula(
            terms=_js_terms,
            value=lambda totals: totals[0] + totals[1],
            student=lambda pair, totals, beta: centred(
                _js_scores(pair.x, beta)[1], pair.q, totals[1]
            ),
            teacher=lambda pair, totals, beta: centred(
                _js_scores(pair.x, beta)[0], pair.p, totals[0]
            ),
            scores=_js_scores,
        )
    )
)


def jensen_shannon(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    beta: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the student to the teacher through their mixture; bounded.

    .. math::
        \tau^2 [\beta \, \mathrm{KL}(p \| m) + (1 - \beta) \, \mathrm{KL}(q \| m)],
        \quad m = \beta p + (1 - \beta) q

    Divided by :math:`\beta` it tends to forward KL as :math:`\beta \to 0`, and divided
    by :math:`1 - \beta` to reverse KL as :math:`\beta \to 1`; it is itself 0 at both
    ends. TRL switches to the KLs there, and has no factor :math:`\tau^2`. The gradient
    flows through the mixture.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      beta: share of the teacher, strictly between 0 and 1; a scalar or one per
        position.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``; 0 where the distributions agree, finite also
      where one side has a logit of -inf.

    Raises:
      ValueError: the shapes differ, or a Python number is out of its range.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> jensen_shannon(jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0])).item()
      0.6931472

    Reference:
      Agarwal et al., On-Policy Distillation of Language Models: Learning from
      Self-Generated Mistakes, 2023, equation 1. arXiv:2306.13649
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    _checks.scale(jnp.shape(student_logits)[:-1], beta=beta)
    _checks.inside(beta=beta, at_zero="forward_kl", at_one="reverse_kl")
    return softened(_js_core, student_logits, teacher_logits, temperature, where, beta)


def _skew_scores(pair: Pair, skew: Array) -> tuple[Array, Array]:
    """The derivative by p, log(p/m) - skew p/m, from two origins.

    The first is 0 where p = q. The second is 0 where q vanishes beside p; in a row that
    is mostly like that the first would be a difference of two nearly equal numbers.
    """
    log_p, _ = _logs_to_mixture(pair.x, skew)
    near = log_p - skew * jnp.expm1(jnp.where(skew == 0, 0, log_p))
    # exp is cut where it would overflow; odds are beyond counting there.
    odds = (1 - skew) / jnp.where(skew > 0, skew, 1)
    odds *= jnp.exp(jnp.minimum(-pair.x, 80))
    return near, odds / (1 + odds) - jnp.log1p(odds)


def _pull(pair: Pair, log_p: Array, skew: Array) -> Array:
    """``q (p/m - 1)``: p - q at skew 0, where p/m is unbounded, and 0 at skew 1."""
    inside = (skew > 0) & (skew < 1)
    pull = pair.q * jnp.expm1(jnp.where(inside, log_p, 0))
    return jnp.where(skew == 0, -pair.gap, pull)


def _skew_terms(pair: Pair, skew: Array) -> Totals:
    log_p, _ = _logs_to_mixture(pair.x, skew)
    # log(p/m) is -inf where p is 0; such a class has no weight in the means over p.
    near, far = (
        jnp.where(pair.p == 0, 0, pair.p * score) for score in _skew_scores(pair, skew)
    )
    return (
        excess(pair.p, _mixture(pair, skew), log_p),
        _pull(pair, log_p, skew),
        near,
        far,
    )


def _skew_student(pair: Pair, totals: Totals, skew: Array) -> Array:
    log_p, _ = _logs_to_mixture(pair.x, skew)
    return (1 - skew) * (pair.q * totals[1] - _pull(pair, log_p, skew))


def _skew_teacher(pair: Pair, totals: Totals, skew: Array) -> Array:
    near, far = _skew_scores(pair, skew)
    mostly_far = (jnp.abs(totals[3]) < jnp.abs(totals[2])) & (skew > 0)
    return jnp.where(
        mostly_far, centred(far, pair.p, totals[3]), centred(near, pair.p, totals[2])
    )


_skew_core = by_rows(
    rule(Formula(_skew_terms, lambda totals: totals[0], _skew_student, _skew_teacher))
)


def _skew_reverse_core(
    student: Array, teacher: Array, inverse: Array, skew: Array
) -> Array:
    return _skew_core(teacher, student, inverse, skew)


def skew_kl(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    skew: ArrayLike = 0.1,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Forward KL against the student mixed with some of the teacher; bounded.

    .. math:: \tau^2 \, \mathrm{KL}(p \,\|\, \lambda p + (1 - \lambda) q)

    The gradient flows through the mixture.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      skew: :math:`\lambda` in [0, 1], the teacher's share; at 0 this is forward KL.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``; 0 where the distributions agree.

    Raises:
      ValueError: the shapes differ, or a Python number is out of its range.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> skew_kl(jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0])).item()
      2.3025851

    Reference:
      Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models,
      2024, equation 4. arXiv:2402.03898
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    _checks.fraction(skew=skew)
    _checks.scale(jnp.shape(student_logits)[:-1], skew=skew)
    return softened(
        _skew_core, student_logits, teacher_logits, temperature, where, skew
    )


def skew_reverse_kl(
    student_logits: Float[ArrayLike, "*batch V"],
    teacher_logits: Float[ArrayLike, "*batch V"],
    *,
    skew: ArrayLike = 0.1,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "*batch V"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Reverse KL against the teacher mixed with some of the student; bounded.

    .. math:: \tau^2 \, \mathrm{KL}(q \,\|\, \lambda q + (1 - \lambda) p)

    The gradient flows through the mixture.

    Args:
      student_logits: ``[..., V]``; see :func:`forward_kl` for the common arguments.
      teacher_logits: ``[..., V]``.
      skew: :math:`\lambda` in [0, 1], the student's share; at 0 this is reverse KL.
      temperature: softens both sides; positive, a scalar or one per position.
      where: classes that exist, ``[..., V]``.

    Returns:
      One value per position, ``[...]``; 0 where the distributions agree.

    Raises:
      ValueError: the shapes differ, or a Python number is out of its range.
      TypeError: the logits are not floating-point, or ``where`` is not boolean.

    Example:
      >>> skew_reverse_kl(jnp.array([0.3, 0.0]), jnp.array([0.3, 0.0])).item()
      0.0

    Reference:
      Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models,
      2024, equation 5. arXiv:2402.03898
    """
    _checks.softened(student_logits, teacher_logits, temperature, where)
    _checks.fraction(skew=skew)
    _checks.scale(jnp.shape(student_logits)[:-1], skew=skew)
    return softened(
        _skew_reverse_core, student_logits, teacher_logits, temperature, where, skew
    )
