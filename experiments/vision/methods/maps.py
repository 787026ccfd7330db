"""Methods on feature maps: cross-entropy at weight 1 and a term, as RepDistiller.

The published tables have no soft labels beside these; ``at+kd`` adds them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from jax import Array

from experiments.vision.methods.setup import (
    Method,
    Setup,
    Unfit,
    beside_labels,
    warm_up,
)
from kdjax import Objective, losses, objectives
from kdjax.objectives import combine, feature_pairs, features, projectors


def _every_stage(loss: Callable[..., Array], name: str, weight: float) -> Method:
    """A term per stage between the positions of maps whose channels may differ."""

    def term(setup: Setup) -> Objective:
        _check_positions(name, setup, max(setup.positions()))
        return feature_pairs(loss, setup.maps(), name=name, weight=weight)

    return beside_labels(term)


def _check_positions(name: str, setup: Setup, positions: int) -> None:
    """A term that compares positions is 0 where there is only one."""
    if positions == 1:
        raise Unfit(
            f"{name} compares the positions of maps, of which those of "
            f"{setup.student.name} and {setup.teacher.name} share one; expected two "
            "networks with larger maps."
        )


def _last_map(
    loss: Callable[..., Array], name: str, weight: float, setup: Setup, **more: Any
) -> Objective:
    """A term between the last maps, the student's brought to the teacher's channels."""
    student, teacher = setup.maps()[-1]
    return features(
        loss,
        student=student,
        teacher=teacher,
        name=name,
        weight=weight,
        projector=projectors.linear(),
        pool=True,
        **more,
    )


def _channel_distribution(setup: Setup) -> Objective:
    _check_positions("cwd", setup, setup.positions()[-1])
    return _last_map(losses.channel_distribution, "cwd", 5.0, setup, temperature=1.0)


def _channel_similarity(setup: Setup) -> Objective:
    return _last_map(losses.channel_similarity, "ickd", 1.0, setup)


def _feature_correlation(setup: Setup) -> Objective:
    return _last_map(losses.feature_correlation, "pkd", 6.0, setup)


def _fitnet(setup: Setup) -> Objective:
    pairs = setup.maps()
    student, teacher = pairs[len(pairs) // 2]
    return features(
        losses.feature_mse,
        student=student,
        teacher=teacher,
        name="fitnet",
        weight=100.0,
        projector=projectors.linear(),
        pool=True,
    )


def _activation_boundaries(setup: Setup) -> Objective:
    pairs = setup.preactivations()
    return combine(
        *(
            features(
                losses.activation_boundary,
                student=student,
                teacher=teacher,
                name=f"ab/{index}",
                weight=3e-3 / 2 ** (len(pairs) - 1 - index),
                projector=projectors.linear(),
                pool=True,
            )
            for index, (student, teacher) in enumerate(pairs)
        )
    )


def _overhaul(setup: Setup) -> Objective:
    pairs, margins = setup.preactivations(), setup.margins()
    return combine(
        *(
            features(
                losses.margin_relu_mse,
                student=student,
                teacher=teacher,
                name=f"ofd/{index}",
                weight=1e-3 / 2 ** (len(pairs) - 1 - index),
                projector=projectors.linear(bias=False),
                pool=True,
                margin=margins[theirs],
            )
            for index, ((student, teacher), (_, theirs)) in enumerate(
                zip(pairs, setup.stages(), strict=True)
            )
        )
    )


def _solution_flow(setup: Setup) -> Objective:
    pairs = setup.maps()
    return combine(
        *(
            features(
                losses.solution_flow,
                student=(first[0], second[0]),
                teacher=(first[1], second[1]),
                name=f"fsp/{index}",
                weight=50.0,
                projector=projectors.linear(),
                pool=True,
            )
            for index, (first, second) in enumerate(itertools.pairwise(pairs))
        )
    )


def _variational(setup: Setup) -> Objective:
    return combine(
        *(
            objectives.variational_information(
                student=student, teacher=teacher, name=f"vid/{index}", pool=True
            )
            for index, (student, teacher) in enumerate(setup.maps())
        )
    )


def _masked(setup: Setup) -> Objective:
    student, teacher = setup.maps()[-1]
    return objectives.masked_generation(student=student, teacher=teacher, pool=True)


def _factors(setup: Setup) -> Objective:
    _check_positions("ft", setup, setup.positions()[-1])
    student, teacher = setup.maps()[-1]
    return objectives.factor_transfer(student=student, teacher=teacher)


MAPS: dict[str, Method] = {
    "fitnet": beside_labels(_fitnet),
    "at": _every_stage(losses.attention_transfer, "at", 1000.0),
    "nst": _every_stage(losses.neuron_selectivity, "nst", 50.0),
    "ft": beside_labels(_factors),
    # Published as a first phase without labels; here in one with them.
    "ab": beside_labels(_activation_boundaries),
    "ofd": beside_labels(_overhaul),
    # Published for equal channels, which the projectors here make of others.
    "fsp": beside_labels(_solution_flow),
    "vid": beside_labels(_variational),
    "reviewkd": beside_labels(
        lambda setup: objectives.review(pairs=setup.maps(), weight=warm_up(setup, 1.0))
    ),
    "cwd": beside_labels(_channel_distribution),
    "ickd": beside_labels(_channel_similarity),
    "pkd": beside_labels(_feature_correlation),
    "mgd": beside_labels(_masked),
}
"""By name."""
