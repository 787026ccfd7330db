"""Methods on the logits. Temperatures and weights are the published ones.

Where a divergence has none for images, it takes those of plain distillation in
RepDistiller: 0.1 for the labels, 0.9 for the teacher, temperature 4.
"""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from experiments.vision.methods.setup import (
    Method,
    Setup,
    Unfit,
    beside_labels,
    hard,
    one_label,
    warm_up,
)
from experiments.vision.models.features import DISTILLATION
from kdjax import Objective, losses
from kdjax.objectives import combine, relations, soft_labels

HARD_WEIGHT, SOFT_WEIGHT, TEMPERATURE = 0.1, 0.9, 4.0


def _divergence(loss: Callable[..., Array]) -> Method:
    return lambda setup: combine(
        hard(setup, HARD_WEIGHT),
        soft_labels(loss, temperature=TEMPERATURE, weight=SOFT_WEIGHT),
    )


def _dkd(setup: Setup) -> Objective:
    one_label(setup, "dkd")
    weight = warm_up(setup, 1.0)
    term = soft_labels(losses.decoupled_kd, labels="label", name="dkd", weight=weight)
    return combine(hard(setup), term)


def _nkd(setup: Setup) -> Objective:
    one_label(setup, "nkd")
    term = soft_labels(losses.normalized_kd, labels="label", name="nkd")
    return combine(hard(setup), term)


def _wsld(setup: Setup) -> Objective:
    one_label(setup, "wsld")
    loss = losses.weighted_soft_labels
    term = soft_labels(loss, labels="label", name="wsld", weight=2.5)
    return combine(hard(setup), term)


def _dist(setup: Setup) -> Objective:
    # The published sum has a factor temperature², which these losses have not.
    temperature = 4.0
    return combine(
        hard(setup),
        soft_labels(
            losses.inter_class_relation,
            name="dist/inter",
            weight=temperature**2,
            temperature=temperature,
        ),
        relations(
            losses.intra_class_relation,
            name="dist/intra",
            weight=temperature**2,
            temperature=temperature,
        ),
    )


def _standardized_kl(student: Array, teacher: Array, *, temperature: float) -> Array:
    standardized = map(losses.standardize_logits, (student, teacher))
    return losses.forward_kl(*standardized, temperature=temperature)


def _standardized(setup: Setup) -> Objective:
    term = soft_labels(_standardized_kl, temperature=2.0, name="ls", weight=9.0)
    return combine(hard(setup, 0.1), term)


def _deit(setup: Setup) -> Objective:
    if not setup.student.has_distillation_token:
        raise Unfit("deit needs a student with a distillation token; --student vit.")
    loss = losses.hard_distillation
    term = soft_labels(loss, student=DISTILLATION, name="deit", weight=0.5)
    return combine(hard(setup, 0.5), term)


LOGITS: dict[str, Method] = {
    "kd": _divergence(losses.forward_kl),
    "kd_reverse": _divergence(losses.reverse_kl),
    "symmetric": _divergence(losses.symmetric_kl),
    "js": _divergence(losses.jensen_shannon),
    "tv": _divergence(losses.total_variation),
    "akl": _divergence(losses.adaptive_kl),
    "dkd": _dkd,
    "nkd": _nkd,
    "wsld": _wsld,
    "dist": _dist,
    "ls": _standardized,
    "mlkd": beside_labels(
        lambda setup: relations(losses.multi_level_relation, name="mlkd")
    ),
    "logit_mse": beside_labels(
        lambda setup: soft_labels(losses.logit_mse, name="logit_mse")
    ),
    "hard": lambda setup: combine(
        hard(setup, 0.5),
        soft_labels(losses.hard_distillation, name="hard/teacher", weight=0.5),
    ),
    "deit": _deit,
}
"""By name."""
