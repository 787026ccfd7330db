"""Hard and soft labels of a row together, as knowledge distillation weighs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax import Array

from kdjax.losses._kl_core import (
    FORWARD,
    far,
    forward_rule,
    near_enough,
    refined,
    rough_divergence,
)
from kdjax.losses._labels import (
    Hard,
    hard_near_enough,
    hard_partial,
    hard_sums,
    hard_sums_on_one,
    validity_of,
    weighted,
    where_scored,
)
from kdjax.losses._pairs import STUDENT, Sums, first_pass, power_sums, second_pass
from kdjax.losses._rows import Blocks, Rule, by_rows, state


class Distillation(NamedTuple):
    """Sums over the classes of a row."""

    value: Array  # of both, weighted
    hard: Hard
    soft: Sums


# Of the inputs: student, teacher, one over the temperature, labels, and two weights.
LABELS, HARD_WEIGHT, SOFT_WEIGHT = 3, 4, 5


def _sums(
    of_label: Callable[..., Hard],
    first: Callable[..., Sums],
    second: Callable[..., Sums],
    tops: Sequence[Array],
    student: Array,
    teacher: Array,
    inverse: Array,
    labels: Array,
    *weights: Array,
) -> Distillation:
    hard = of_label(tops, student, labels)
    shifts = where_scored(labels, *tops)
    inputs = *where_scored(labels, student, teacher), inverse
    soft = first((shifts[0], shifts[1]), *inputs)
    # Together: both need one and the same pass over the classes.
    hard, soft = jax.lax.optimization_barrier((hard, soft))
    return _mixed(hard, second(soft, *inputs), student, labels, *weights)


def _mixed(
    hard: Hard, soft: Sums, student: Array, labels: Array, *weights: Array
) -> Distillation:
    validity = validity_of(labels, student)
    hard_weight, soft_weight = (validity * each for each in weights)
    value = weighted(hard_weight, hard.value) + weighted(soft_weight, soft.value)
    return Distillation(value, hard, soft)


def _partial(
    index: int,
    sums: Distillation,
    student: Array,
    teacher: Array,
    inverse: Array,
    labels: Array,
    *weights: Array,
) -> Array:
    validity = validity_of(labels, student)
    if index >= HARD_WEIGHT:
        value = sums.hard.value if index == HARD_WEIGHT else sums.soft.value
        return validity * value
    hard_weight, soft_weight = (validity * each for each in weights)
    logits = where_scored(labels, student, teacher)
    partial = soft_weight * forward_rule.partial(index, sums.soft, *logits, inverse)
    if index == STUDENT:
        partial += hard_weight * hard_partial(index, sums.hard, student, labels)
    return partial


def _sums_in_blocks(
    tops: Sequence[Array], *inputs: Array
) -> tuple[Distillation, Array]:
    ways = hard_sums_on_one, power_sums, rough_divergence
    sums = _sums(*ways, tops, *inputs)
    near = near_enough(sums.soft) & hard_near_enough(sums.hard)
    return sums, state(near, far(sums.soft) | (inputs[LABELS] < 0))


def _refined(
    sums: Distillation,
    student: Array,
    teacher: Array,
    inverse: Array,
    labels: Array,
    *weights: Array,
) -> Distillation:
    soft = refined(sums.soft, *where_scored(labels, student, teacher), inverse)
    return _mixed(sums.hard, soft, student, labels, *weights)


# Hard and soft labels together, so that both come from one look at the logits.
distillation_core = by_rows(
    Rule(
        functools.partial(
            _sums, hard_sums, first_pass, functools.partial(second_pass, FORWARD)
        ),
        _partial,
        blocks=Blocks(_sums_in_blocks, _refined),
    )
)
