"""Two softmax distributions side by side, and the derivatives of what compares them.

Every divergence of this package is a sum over classes of a function of ``p``
(teacher), ``q`` (student) and ``x = log p - log q``. This file computes those three so
that nothing is lost near ``p == q`` or at a high temperature, and turns the function
and its derivative into a value with safe gradients. The formulas themselves are in
``_kl.py``, ``_mixtures.py`` and ``_powers.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike


class Pair(NamedTuple):
    """Teacher ``p`` and student ``q``, entry by entry, each ``[..., V]``."""

    p: Array
    q: Array
    x: Array  # log p - log q


class Rows(NamedTuple):
    """What normalises a pair, each ``[..., 1]``."""

    student_shift: Array  # the largest logit
    teacher_shift: Array
    student_scale: Array  # one over the sum of the powers below it
    teacher_scale: Array
    log_ratio: Array  # what is added to the shifted difference to make it x


def excess(p: Array, q: Array, x: Array) -> Array:
    """``p log(p/q) + q - p``, never negative and accurate for small ``x``.

    Summed over classes it is KL(p ‖ q), since both sides sum to one.
    """
    near = jnp.abs(x) < 1
    inner = jnp.where(near, x, 0)
    # p(x - 1) must not become 0 * inf where p is 0; all of q remains there.
    outer = jnp.where(p > 0, p * (x - 1), 0) + q
    return jnp.where(near, p * _second_order(inner), outer)


def gap(p: Array, q: Array, x: Array) -> Array:
    """``q - p`` to full relative accuracy for small ``x``."""
    near = jnp.abs(x) < 1
    inner = jnp.where(near, x, 0)
    return jnp.where(near, p * (_second_order(inner) - inner), q - p)


def centred(score: Array, weight: Array, mean: Array) -> Array:
    """``weight * (score - mean)``: a derivative by logits from one by probabilities.

    It is 0 where the weight is, whatever the score; and in rows whose value is
    infinite, which have no finite derivative.
    """
    return jnp.where((weight > 0) & jnp.isfinite(mean), weight * (score - mean), 0)


def _second_order(x: Array) -> Array:
    """``x + exp(-x) - 1`` for ``|x| <= 1`` by its series, which starts at x²/2."""
    # The first term left out is below a quarter of the rounding error.
    last = 19 if x.dtype == jnp.float64 else 11
    total = jnp.zeros_like(x)
    for k in range(last, 1, -1):
        total = total * x + (-1) ** k / math.factorial(k)
    return x * x * total


def _pair(
    student: Array, teacher: Array, inverse: Array, rows: Rows, copy: int = 0
) -> Pair:
    """Recomputes p, q and x from the logits.

    Powers of two go in and out without changing a bit. Giving each pass over the
    classes a ``copy`` of its own keeps XLA from holding p and q, two arrays of the
    size of the logits, from one pass to the next: it does not see that they are equal.
    """
    twos = 2.0**copy
    below_p = teacher * twos - rows.teacher_shift * twos
    below_q = student * twos - rows.student_shift * twos
    p = jnp.exp(below_p * (inverse / twos)) * rows.teacher_scale
    q = jnp.exp(below_q * (inverse / twos)) * rows.student_scale
    # Logits that are close are subtracted first, which is exact; far apart, from an
    # offset between the models or at ±1e4, they are closer below their maxima.
    direct = teacher - student
    shift = rows.teacher_shift - rows.student_shift
    below = (below_p - below_q) / twos
    is_close = jnp.abs(direct) * twos <= jnp.abs(below_p)
    difference = jnp.where(is_close, direct - shift, below)
    # A slot that is -inf in both is out; inf - inf must not stay.
    out = jnp.isneginf(student) & jnp.isneginf(teacher)
    x = jnp.where(out, 0, difference) * inverse + rows.log_ratio
    return Pair(p, q, x)


def largest(logits: Array) -> Array:
    """The largest logit of each row, ``[..., 1]``; 0 where none is left."""
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return jnp.where(jnp.isneginf(top), 0, top)


def _rows(student: Array, teacher: Array, inverse: Array) -> Rows:
    student_shift, teacher_shift = largest(student), largest(teacher)
    one, zero = jnp.ones_like(student_shift), jnp.zeros_like(student_shift)
    shifted = Rows(student_shift, teacher_shift, one, one, zero)
    pair = _pair(student, teacher, inverse, shifted)
    student_sum = pair.q.sum(-1, keepdims=True)
    teacher_sum = pair.p.sum(-1, keepdims=True)
    # A row without a single class left has no distribution; all its terms are 0.
    student_sum = jnp.where(student_sum > 0, student_sum, 1)
    teacher_sum = jnp.where(teacher_sum > 0, teacher_sum, 1)
    # log(student_sum / teacher_sum) would carry the rounding of two logarithms into
    # every x. Near equality the sum of the accurate gaps gives it relative accuracy.
    change = gap(*pair).sum(-1, keepdims=True) / teacher_sum
    near = jnp.abs(change) < 0.5
    log_ratio = jnp.where(
        near,
        jnp.log1p(jnp.where(near, change, 0)),
        jnp.log(student_sum) - jnp.log(teacher_sum),
    )
    return Rows(
        student_shift, teacher_shift, 1 / student_sum, 1 / teacher_sum, log_ratio
    )


Sums = tuple[Array, ...]
Hyper = tuple[Array, ...]


class Formula(NamedTuple):
    """A divergence, and its derivative by the logits of either side.

    Attributes:
      terms: ``(pair, *hyper)`` to arrays ``[..., V]`` that are summed over classes.
      value: their sums, each ``[...]``, to the divergence.
      student: ``(pair, sums, *hyper)`` to the derivative by the student's logits,
        ``[..., V]``; the sums come as ``[..., 1]``.
      teacher: the same by the teacher's.
    """

    terms: Callable[..., Sums]
    value: Callable[[Sums], Array]
    student: Callable[..., Array]
    teacher: Callable[..., Array]


def differentiable(formula: Formula) -> Callable[..., Array]:
    """Makes ``(student, teacher, inverse, *hyper) -> [...]``.

    ``inverse`` is one over the temperature, a scalar or ``[..., 1]``. It multiplies
    differences of logits, never the logits: those would be rounded first.

    The written-out derivative serves reverse mode, forward mode and derivatives of
    itself. It is one elementwise pass over the classes, so it is as safe under a
    sharded batch or vocabulary as the sums are, and finite where differentiating
    through the logarithms would divide 0 by 0.
    """

    def sums(pair: Pair, *hyper: Array) -> Sums:
        return tuple(term.sum(-1) for term in formula.terms(pair, *hyper))

    @jax.custom_jvp
    def core(student, teacher, inverse, *hyper):
        rows = _rows(student, teacher, inverse)
        return formula.value(sums(_pair(student, teacher, inverse, rows, 1), *hyper))

    def derivative(primals: Any, tangents: Any) -> tuple[Array, Array]:
        student, teacher, inverse, *hyper = primals
        rows = _rows(student, teacher, inverse)
        first = _pair(student, teacher, inverse, rows, 1)
        totals = sums(first, *hyper)
        second = _pair(student, teacher, inverse, rows, 2)
        columns = tuple(total[..., None] for total in totals)
        value = formula.value(totals)
        tangent = jnp.zeros_like(value)
        student_dot, teacher_dot, inverse_dot, *hyper_dot = tangents
        sides = (
            (student, student_dot, formula.student),
            (
                teacher,
                teacher_dot,
                formula.teacher,
            ),
        )
        for logits, dot, slope in sides:
            if not isinstance(dot, SymbolicZero):
                by_logits = slope(second, columns, *hyper) * inverse
                tangent += (by_logits * dot).sum(-1)
            if not isinstance(inverse_dot, SymbolicZero):
                # A slot of -inf stays so at every temperature; 0 * -inf would be NaN.
                finite = jnp.where(jnp.isneginf(logits), 0, logits)
                by_scaled = slope(second, columns, *hyper)
                tangent += (by_scaled * finite * inverse_dot).sum(-1)
        for index, dot in enumerate(hyper_dot):
            if not isinstance(dot, SymbolicZero):

                def of_number(number, index=index):
                    changed = (*hyper[:index], number, *hyper[index + 1 :])
                    return formula.value(sums(first, *changed))

                tangent += jax.jvp(of_number, (hyper[index],), (dot,))[1]
        return value, tangent

    core.defjvp(derivative, symbolic_zeros=True)
    return core


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
      core: from :func:`differentiable`, or any function of its signature.
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: scalar, or one per position ``[...]``.
      where: classes that exist, ``[..., V]``, or ``None``.
      *hyper: further numbers for the core, shaped like the temperature.

    Returns:
      ``[...]``, float32 or wider.
    """
    dtype = jnp.promote_types(
        jnp.promote_types(
            jnp.result_type(student_logits), jnp.result_type(teacher_logits)
        ),
        jnp.float32,
    )
    temperature = jnp.asarray(temperature, dtype)
    cast = [jnp.asarray(number, dtype) for number in hyper]
    numbers = [number[..., None] if number.ndim else number for number in cast]
    inverse = 1 / (temperature[..., None] if temperature.ndim else temperature)
    student, teacher = (
        jnp.asarray(logits).astype(dtype) for logits in (student_logits, teacher_logits)
    )
    if where is not None:
        student = jnp.where(where, student, -jnp.inf)
        teacher = jnp.where(where, teacher, -jnp.inf)
    return core(student, teacher, inverse, *numbers) * temperature**2


def entropy_core(logits: Array, inverse: Array) -> Array:
    """Entropy of the softmax at a temperature, in nats, ``[...]``."""
    below = logits - largest(logits)
    held = ~jnp.isneginf(below)
    below = jnp.where(held, below, 0) * inverse
    powers = jnp.where(held, jnp.exp(below), 0)
    total = powers.sum(-1, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    return (powers / total * (jnp.log(total) - below)).sum(-1)
