"""Losses over the tokens that a student has drawn itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kdjax.losses import _checks
from kdjax.losses._labels import widened
from kdjax.losses._pairs import excess


@functools.partial(jax.jit, inline=True)
def k1(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Estimates KL(student ‖ teacher) by the log ratio itself: unbiased, noisy.

    .. math:: x = \log q - \log p

    Its gradient tells nothing: the mean of it over draws is 0.

    Args:
      log_ratio: student's log-probability less the teacher's, of tokens that the
        student has drawn, ``[...]``.

    Returns:
      One value per token, ``[...]``; below 0 where the teacher likes the token more.

    Example:
      >>> k1(jnp.array([0.5, -0.5]))
      Array([ 0.5, -0.5], dtype=float32)

    Reference:
      Schulman, Approximating KL Divergence, 2020. http://joschu.net/blog/kl-approx.html
    """
    return widened(log_ratio)


@functools.partial(jax.jit, inline=True)
def k2(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Estimates KL(student ‖ teacher) by half a square: biased, with a true gradient.

    .. math:: \tfrac{1}{2} x^2, \quad x = \log q - \log p

    The mean of its gradient over the student's draws is that of the reverse KL.

    Args:
      log_ratio: student's log-probability less the teacher's, ``[...]``.

    Returns:
      One value per token, ``[...]``, never negative.

    Example:
      >>> k2(jnp.array([0.5, -0.5]))
      Array([0.125, 0.125], dtype=float32)

    Reference:
      Schulman, Approximating KL Divergence, 2020. http://joschu.net/blog/kl-approx.html
    """
    return 0.5 * widened(log_ratio) ** 2


@functools.partial(jax.jit, inline=True)
def k3(log_ratio: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""Estimates KL(student ‖ teacher) unbiased, with less noise, and never negative.

    .. math:: e^{-x} - 1 + x, \quad x = \log q - \log p

    The mean of its gradient over the student's draws is that of the forward KL.

    Args:
      log_ratio: student's log-probability less the teacher's, ``[...]``.

    Returns:
      One value per token, ``[...]``, accurate also for small ratios.

    Example:
      >>> k3(jnp.array([0.5, -0.5]))
      Array([0.10653..., 0.14872...], dtype=float32)

    Reference:
      Schulman, Approximating KL Divergence, 2020. http://joschu.net/blog/kl-approx.html
    """
    log_ratio = widened(log_ratio)
    return excess(jnp.ones_like(log_ratio), jnp.exp(-log_ratio), log_ratio)


def _log_ratio(student: Array, teacher: Array) -> tuple[Array, Array]:
    """The log ratio, 0 where there is none, and whether the teacher has no token."""
    student, teacher = widened(student), widened(teacher)
    # What the student cannot have drawn is a token that is masked.
    drawn = ~jnp.isneginf(student)
    missing = drawn & jnp.isneginf(teacher)
    return jnp.where(drawn & ~missing, student - teacher, 0), missing


@functools.partial(jax.jit, inline=True, static_argnames="estimator")
def _sampled_reverse_kl(
    student: Array, teacher: Array, *, estimator: Callable[[Array], Array]
) -> Array:
    log_ratio, missing = _log_ratio(student, teacher)
    estimated = estimator(log_ratio)
    if estimated.shape != log_ratio.shape:
        raise ValueError(
            f"estimator: got shape {estimated.shape} for log ratios "
            f"{log_ratio.shape}; expected one value each."
        )
    return jnp.where(missing, jnp.inf, estimated)


def sampled_reverse_kl(
    student_log_probs: Float[Array, "*batch"],
    teacher_log_probs: Float[Array, "*batch"],
    *,
    estimator: Callable[[Array], Array] = k3,
) -> Float[Array, "*batch"]:
    r"""Estimates KL(student ‖ teacher) from tokens that the student has drawn.

    The estimators differ in their values' noise and in the mean of their gradients:
    to report, take :func:`k1` or :func:`k3`; to train on, :func:`k2` or
    :func:`policy_distillation`, whose gradients are those of the reverse KL.

    Args:
      student_log_probs: the student's log-probabilities of the drawn tokens, ``[...]``.
      teacher_log_probs: the same by the teacher, equal in shape.
      estimator: :func:`k1`, :func:`k2`, :func:`k3` or any other function of the log
        ratio ``[...]``.

    Returns:
      One value per token, ``[...]``: 0, without a gradient, for a token that the
      student has at -inf, as masked ones may be; +inf, without a gradient, where the
      teacher alone has.

    Raises:
      ValueError: the shapes differ, or the estimator gives another.
      TypeError: log-probabilities that are not floating.

    Example:
      >>> q, p = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.2]))
      >>> sampled_reverse_kl(q, p, estimator=k1)
      Array([0.6931472, 0.       ], dtype=float32)

    Reference:
      Schulman, Approximating KL Divergence, 2020. http://joschu.net/blog/kl-approx.html
    """
    _check(student_log_probs, teacher_log_probs=teacher_log_probs)
    return _sampled_reverse_kl(
        student_log_probs, teacher_log_probs, estimator=estimator
    )


@functools.partial(jax.jit, inline=True)
def _policy_distillation(
    student: Array,
    teacher: Array,
    behaviour: Array | None,
    coefficient: Array,
    clip: Array | None,
) -> Array:
    log_ratio, missing = _log_ratio(student, teacher)
    advantage = -coefficient * jax.lax.stop_gradient(log_ratio)
    student = widened(student)
    before = jax.lax.stop_gradient(student if behaviour is None else behaviour)
    known = ~(jnp.isneginf(student) | jnp.isneginf(before) | missing)
    ratio = jnp.exp(jnp.where(known, student - before, 0))
    gain = ratio * advantage
    if clip is not None:
        gain = jnp.minimum(gain, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    return jnp.where(missing, jnp.inf, jnp.where(known, -gain, 0))


def policy_distillation(
    student_log_probs: Float[Array, "*batch"],
    teacher_log_probs: Float[Array, "*batch"],
    *,
    behaviour_log_probs: Float[Array, "*batch"] | None = None,
    coefficient: float | Array = 1.0,
    clip: float | Array | None = None,
) -> Float[Array, "*batch"]:
    r"""Pulls the student by its own tokens: reverse KL as each token's advantage.

    .. math:: -r A, \quad A = -c \, (\log \bar q - \log p), \quad
       r = \frac{q}{\bar b}

    without a gradient through the advantage or the behaviour b, which is q itself where
    none is given. The mean of the gradient over tokens drawn from b is c times that of
    the reverse KL at that position; what a token does to later ones is left out, as in
    the published recipes (a discount of 0). With ``clip``, it is PPO's
    :math:`-\min(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon) A)`.

    The advantage is that of the student as it is now. Recipes that keep the one of the
    time of sampling differ from it after the first step on the same rollouts.

    Args:
      student_log_probs: the student's log-probabilities of the drawn tokens, ``[...]``.
      teacher_log_probs: the same by the teacher, equal in shape.
      behaviour_log_probs: the same by the model that has drawn them, equal in shape:
        an older student, or one of a sampler with other rounding.
      coefficient: ``c``; the published recipes have 1.
      clip: ``ε``, by how far the ratio may change; ``None`` for no bound.

    Returns:
      One value per token, ``[...]``: c times the log ratio where nothing is clipped.
      It is 0, without a gradient, for a token that student or behaviour has at -inf, as
      masked ones may be; +inf, without a gradient, where the teacher alone has.

    Raises:
      ValueError: the shapes differ, a number is out of its range, or ``clip`` is given
        without the behaviour, when there is nothing to clip.
      TypeError: log-probabilities that are not floating.

    Example:
      >>> q, p = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
      >>> jax.grad(lambda q: policy_distillation(q, p).sum())(q)
      Array([ 0.693147..., -0.693147...], dtype=float32)

    Reference:
      Lu and Thinking Machines Lab, On-Policy Distillation, 2025.
      https://thinkingmachines.ai/blog/on-policy-distillation
    """
    others = {"teacher_log_probs": teacher_log_probs}
    if behaviour_log_probs is not None:
        others["behaviour_log_probs"] = behaviour_log_probs
    _check(student_log_probs, **others)
    _checks.non_negative(coefficient=coefficient)
    _checks.scale((), coefficient=coefficient)
    if clip is not None:
        _checks.positive(clip=clip)
        _checks.scale((), clip=clip)
        if behaviour_log_probs is None:
            raise ValueError(
                "clip: got a bound on a ratio that is 1 without behaviour_log_probs."
            )
    return _policy_distillation(
        student_log_probs, teacher_log_probs, behaviour_log_probs, coefficient, clip
    )


def _check(student_log_probs: Array, **others: Array) -> None:
    arrays = {"student_log_probs": student_log_probs, **others}
    _checks.real("[...]", **arrays)
    _checks.one_shape("[...]", "One number per drawn token.", **arrays)
