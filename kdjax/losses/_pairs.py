"""Two softmax distributions side by side, and the derivatives of what compares them.

Every divergence of this package is a sum over classes of a function of ``p``
(teacher), ``q`` (student) and ``x = log p - log q``. This file computes those three so
that nothing is lost near ``p == q`` or at a high temperature, and turns the function
and its derivative into a value with safe gradients. The formulas themselves are in
``_kl.py``, ``_mixtures.py`` and ``_powers.py``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from numpy.polynomial import Chebyshev, Polynomial

from kdjax.losses._rows import (
    Blocks,
    Rule,
    as_columns,
    largest,
    traced_once,
    wide_dtype,
)


class Pair(NamedTuple):
    """Teacher ``p`` and student ``q``, entry by entry, each ``[..., V]``."""

    p: Array
    q: Array
    x: Array  # log p - log q
    gap: Array  # q - p, accurate also where they are nearly equal


@traced_once
def excess(p: Array, q: Array, x: Array) -> Array:
    """``p log(p/q) + q - p``, never negative and accurate for small ``x``.

    Summed over classes it is KL(p ‖ q), since both sides sum to one.
    """
    near = jnp.abs(x) < 1
    inner = jnp.where(near, x, 0)
    # p(x - 1) must not become 0 * inf where p is 0; all of q remains there.
    outer = jnp.where(p == 0, 0, p * (x - 1)) + q
    return jnp.where(near, p * _second_order(inner), outer)


@traced_once
def _gap(p: Array, q: Array, x: Array) -> Array:
    """``q - p`` to full relative accuracy for small ``x``."""
    near = jnp.abs(x) < 1
    inner = jnp.where(near, x, 0)
    return jnp.where(near, p * (_second_order(inner) - inner), q - p)


@traced_once
def centred(score: Array, weight: Array, mean: Array) -> Array:
    """``weight * (score - mean)``: a derivative by logits from one by probabilities.

    It is 0 where the weight is, whatever the score; and in rows whose value is
    infinite, which have no finite derivative.
    """
    return jnp.where((weight == 0) | jnp.isinf(mean), 0, weight * (score - mean))


@traced_once
def _second_order(x: Array) -> Array:
    """``x + exp(-x) - 1`` for ``|x| <= 1`` by its series, which starts at x²/2."""
    terms = _SERIES if x.dtype == jnp.float64 else _SHORTER
    return x * x * _polynomial(terms, x)


# Of (x + exp(-x) - 1) / x². The first term left out is below a quarter of the rounding
# error.
_SERIES = [(-1) ** k / math.factorial(k) for k in range(2, 20)]
# As good in float32, with two terms less than the series would need.
_SHORTER = (
    Chebyshev.interpolate(Polynomial(_SERIES), 7).convert(kind=Polynomial).coef.tolist()
)


@traced_once
def exp_and_less_one(x: Array) -> tuple[Array, Array]:
    """``exp(x)`` and ``expm1(x)`` for ``x <= 0``, from one exponential."""
    power = jnp.exp(x)
    near = x > -1
    inner = jnp.where(near, x, 0)
    return power, jnp.where(near, _second_order(-inner) + inner, power - 1)


@traced_once
def log1p_near(x: Array) -> Array:
    """``log1p(x)`` for ``-0.5 <= x <= 0`` by the series of the hyperbolic tangent."""
    ratio = x / (2 + x)
    # Its square is at most 1/9; the first term left out is below the rounding error.
    last = 16 if x.dtype == jnp.float64 else 7
    terms = [2 / (2 * k + 1) for k in range(last + 1)]
    return ratio * _polynomial(terms, ratio * ratio)


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """The first coefficient belongs to the power 0."""
    terms: list[Any] = list(coefficients)
    # By pairs, not one after another: a core then has several to work on at a time.
    power = x
    while len(terms) > 1:
        pairs = itertools.zip_longest(terms[::2], terms[1::2], fillvalue=0.0)
        terms = [even + odd * power for even, odd in pairs]
        power = power * power
    return terms[0]


Totals = tuple[Array, ...]


class Formula(NamedTuple):
    """A divergence, and its derivative by the logits of either side.

    Attributes:
      terms: ``(pair, *hyper)`` to arrays ``[..., V]`` that are summed over classes.
      value: their sums, each ``[..., 1]``, to the divergence.
      student: ``(pair, totals, *hyper)`` to the derivative by the student's logits,
        ``[..., V]``. The totals are the sums of the terms.
      teacher: the same by the teacher's.
      scores: where the totals are the means of something under p and then q,
        ``(x, *hyper)`` to these; on a TPU the totals are then found a pass earlier.
    """

    terms: Callable[..., Totals]
    value: Callable[[Totals], Array]
    student: Callable[..., Array]
    teacher: Callable[..., Array]
    scores: Callable[..., Totals] | None = None


@traced_once
def _unscaled(
    shifts: Sequence[Array], student: Array, teacher: Array, inverse: Array
) -> tuple[Array, Array, Array]:
    """Powers of teacher and student relative to the shifts, and their log ratio."""
    student_shift, teacher_shift = shifts
    below_p, below_q = teacher - teacher_shift, student - student_shift
    # Logits that are close are subtracted first, which is exact; far apart, from an
    # offset between the models or at ±1e4, they are closer after their shifts.
    direct = teacher - student
    is_close = jnp.abs(direct) <= jnp.abs(below_p)
    x = jnp.where(is_close, direct - (teacher_shift - student_shift), below_p - below_q)
    # A slot that is -inf in both is out; a NaN of the logits stays one.
    x = jnp.where(jnp.maximum(below_p, below_q) == -jnp.inf, 0, x)
    # What only a sum needs, XLA takes into it, but on a CPU with the shifts and the
    # temperature in arrays of their own; not so through a selection.
    p, q = (
        jnp.where(below == -jnp.inf, 0, jnp.exp(below * inverse))
        for below in (below_p, below_q)
    )
    return p, q, x * inverse


Tops = tuple[Array, Array]
"""One number per row for student and teacher, ``[..., 1]``."""


class Sums(NamedTuple):
    """What is known of rows, each ``[..., 1]``; powers as by :func:`_unscaled`."""

    value: Array  # of the divergence
    shifts: Tops
    student_scale: Array  # one over the sum of the powers
    teacher_scale: Array
    log_ratio: Array  # what is added to the log ratio of the powers to make it x
    totals: Totals  # of the formula


@traced_once
def pair_of(sums: Sums, student: Array, teacher: Array, inverse: Array) -> Pair:
    """Both sides, once the sums of their powers are known."""
    p, q, x = _unscaled(sums.shifts, student, teacher, inverse)
    p, q, x = p * sums.teacher_scale, q * sums.student_scale, x + sums.log_ratio
    return Pair(p, q, x, _gap(p, q, x))


def total(terms: Array) -> Array:
    """Their sum over the classes, ``[..., 1]``."""
    return terms.sum(-1, keepdims=True)


@traced_once
def power_sums(shifts: Tops, student: Array, teacher: Array, inverse: Array) -> Sums:
    """What is needed before a class can be looked at; the log ratio is rounded.

    The shifts keep the powers from overflowing: the largest logits, or about the
    logarithm of the sum of their powers.
    """
    p, q, _ = _unscaled(shifts, student, teacher, inverse)
    student_total, teacher_total = total(q), total(p)
    # A row without a single class left has no distribution; all its terms are 0. Where
    # it is the teacher's alone, the student's must be too.
    student_sum, teacher_sum = (
        jnp.where(each == 0, 1, each) for each in (student_total, teacher_total)
    )
    untaught = (teacher_total == 0) & (student_total != 0)
    student_scale = jnp.where(untaught, 0, 1 / student_sum)
    log_ratio = jnp.log(student_sum / teacher_sum)
    value = jnp.zeros_like(log_ratio)
    return Sums(value, shifts, student_scale, 1 / teacher_sum, log_ratio, totals=())


@traced_once
def first_pass(shifts: Tops, student: Array, teacher: Array, inverse: Array) -> Sums:
    """The sums of the powers, and a log ratio that is accurate near equality.

    A logarithm would carry its rounding into every x. Near equality the sum of the
    accurate gaps gives the ratio relative accuracy.
    """
    sums = power_sums(shifts, student, teacher, inverse)
    gap = total(_gap(*_unscaled(shifts, student, teacher, inverse)))
    change = gap * sums.teacher_scale
    near = jnp.abs(change) < 0.5
    accurate = jnp.log1p(jnp.where(near, change, 0))
    return sums._replace(log_ratio=jnp.where(near, accurate, sums.log_ratio))


def second_pass(
    formula: Formula,
    sums: Sums,
    student: Array,
    teacher: Array,
    inverse: Array,
    *hyper: Array,
) -> Sums:
    """Adds the value of the divergence to the sums of the first pass."""
    # Else XLA puts sums of the first pass off to this one, and this one off to a third.
    # Not the shifts: it would keep the powers for the derivative.
    sums = jax.lax.optimization_barrier(sums)._replace(shifts=sums.shifts)
    pair = pair_of(sums, student, teacher, inverse)
    totals = tuple(total(term) for term in formula.terms(pair, *hyper))
    return sums._replace(value=formula.value(totals), totals=sums.totals or totals)


def _with_means(
    scores: Callable[..., Totals],
    sums: Sums,
    student: Array,
    teacher: Array,
    inverse: Array,
    *hyper: Array,
) -> Sums:
    """Adds the totals to a first pass, so that derivatives need not wait for a second.

    The scores' argument still lacks the ``log_ratio``, which makes a difference of the
    first order: it has to be small, or the scores linear.
    """
    p, q, x = _unscaled(sums.shifts, student, teacher, inverse)
    at_x, slopes = jax.jvp(lambda x: scores(x, *hyper), (x,), (jnp.ones_like(x),))

    def mean(power: Array, scale: Array, score: Array, slope: Array) -> Array:
        at_shift = total(jnp.where(power == 0, 0, power * score))
        return (at_shift + sums.log_ratio * total(power * slope)) * scale

    scales = sums.teacher_scale, sums.student_scale
    return sums._replace(totals=tuple(map(mean, (p, q), scales, at_x, slopes)))


def _near_log_sum(logits: Array, inverse: Array) -> Array:
    """About the logarithm of the sum of the powers, in one pass and in logits' units.

    Only TPUs have collectives for such a sum where the classes are sharded.
    """
    # A finite start: the difference of two that are -inf would be NaN.
    start = jnp.finfo(logits.dtype).min / 2
    scaled = logits * inverse

    def log_add(a: Array, b: Array) -> Array:
        return jnp.maximum(a, b) + jnp.log1p(jnp.exp(-jnp.abs(a - b)))

    log_sum = jax.lax.reduce(scaled, start, log_add, (scaled.ndim - 1,))
    log_sum = jnp.where(log_sum <= start, 0, log_sum)
    return jax.lax.stop_gradient(log_sum[..., None] / inverse)


def _sums_on_tpu(
    formula: Formula,
    scores: Callable[..., Totals],
    *inputs: Array,
) -> Sums:
    student, teacher, inverse = inputs[:3]
    shifts = _near_log_sum(student, inverse), _near_log_sum(teacher, inverse)
    found = first_pass(shifts, student, teacher, inverse)
    return second_pass(formula, _with_means(scores, found, *inputs), *inputs)


STUDENT, TEACHER, INVERSE = range(3)


def rule(formula: Formula, blocks: Blocks | None = None) -> Rule:
    """Makes a rule over ``(student, teacher, inverse, *hyper)``.

    ``inverse`` is one over the temperature, a scalar or ``[..., 1]``. It multiplies
    differences of logits, never the logits: those would be rounded first.

    Derivatives are written out also because differentiating through the logarithms
    would divide 0 by 0.
    """

    def sums(tops: Tops, *inputs: Array) -> Sums:
        return second_pass(formula, first_pass(tops, *inputs[:3]), *inputs)

    def slope(side: int, pair: Pair, sums: Sums, *hyper: Array) -> Array:
        by_side = formula.student if side == STUDENT else formula.teacher
        return by_side(pair, sums.totals, *hyper)

    def partial(index: int, sums: Sums, *inputs: Array) -> Array:
        pair, hyper = pair_of(sums, *inputs[:3]), inputs[3:]
        if index < INVERSE:
            return slope(index, pair, sums, *hyper) * inputs[INVERSE]
        if index == INVERSE:
            # A slot of -inf stays so at every temperature; 0 * -inf would be NaN.
            logits = (jnp.where(jnp.isneginf(each), 0, each) for each in inputs)
            by_scaled = (slope(side, pair, sums, *hyper) for side in range(INVERSE))
            first, second = map(jnp.multiply, by_scaled, logits)
            return total(first + second)

        def of_number(number: Array) -> Array:
            changed = (*hyper[: index - 3], number, *hyper[index - 2 :])
            terms = formula.terms(pair, *changed)
            return formula.value(tuple(map(total, terms)))

        one = (jnp.ones_like(hyper[index - 3]),)
        return jax.jvp(of_number, (hyper[index - 3],), one)[1]

    on_tpu = None
    if formula.scores is not None:
        on_tpu = functools.partial(_sums_on_tpu, formula, formula.scores)
    return Rule(sums, partial, on_tpu, blocks)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def softened(
    core: Callable[..., Array],
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    where: ArrayLike | None,
    *hyper: ArrayLike,
) -> Array:
    """Applies a core to both sides' logits at a temperature, times temperature².

    Args:
      core: ``(student, teacher, inverse, *hyper) -> [...]``; the logits come as they
        are, the numbers in the dtype to compute in.
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: scalar, or one per position ``[...]``.
      where: classes that exist, ``[..., V]``, or ``None``.
      *hyper: further numbers for the core, shaped like the temperature.

    Returns:
      ``[...]``, float32 or wider.
    """
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    dtype = wide_dtype(student, teacher)
    if where is not None:
        student = jnp.where(where, student, -jnp.inf)
        teacher = jnp.where(where, teacher, -jnp.inf)
    softening, *numbers = as_columns(dtype, temperature, *hyper)
    value = core(student, teacher, 1 / softening, *numbers)
    return value * jnp.asarray(temperature, dtype) ** 2


def entropy_core(logits: Array, inverse: Array) -> Array:
    """Entropy of the softmax at a temperature, in nats, ``[...]``."""
    logits = logits.astype(inverse.dtype)
    below = logits - largest(logits)
    held = ~jnp.isneginf(below)
    below = jnp.where(held, below, 0) * inverse
    powers = jnp.where(held, jnp.exp(below), 0)
    total = powers.sum(-1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    return (powers / total * (jnp.log(total) - below)).sum(-1)
