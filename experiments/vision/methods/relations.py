"""Methods on relations between the examples of a batch, and on contrast.

Cross-entropy at weight 1 and a term, as RepDistiller; ``rkd+kd`` adds soft labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import Array

from experiments.vision.methods.setup import Method, Setup, beside_labels
from experiments.vision.models.features import EMBEDDING
from kdjax import Objective, losses, objectives
from kdjax.objectives import combine, projectors, relations

_LARGEST_BANK = 16384
_SHARE = 3  # 16384 negatives among 50,000 images


def _embeddings(
    loss: Callable[..., Array], name: str, weight: float, **more: Any
) -> Objective:
    return relations(
        loss, student=EMBEDDING, teacher=EMBEDDING, name=name, weight=weight, **more
    )


def _rkd(setup: Setup) -> Objective:
    return combine(
        _embeddings(losses.relational_distance, "rkd/distance", 25.0),
        _embeddings(losses.relational_angle, "rkd/angle", 50.0),
    )


def _similarity(setup: Setup) -> Objective:
    student, teacher = setup.maps()[-1]
    loss = losses.similarity_preserving
    return relations(loss, student=student, teacher=teacher, name="sp", weight=3000.0)


def _crd(setup: Setup) -> Objective:
    # As large a share of the images as published; all 16384 need about 50,000 images.
    return objectives.contrastive_memory(
        student=EMBEDDING,
        teacher=EMBEDDING,
        dataset_size=setup.examples,
        negatives=min(_LARGEST_BANK, max(1, setup.examples // _SHARE)),
    )


RELATIONS: dict[str, Method] = {
    "rkd": beside_labels(_rkd),
    "sp": beside_labels(_similarity),
    "cc": beside_labels(
        lambda setup: _embeddings(losses.correlation_congruence, "cc", 1.0)
    ),
    "pkt": beside_labels(
        lambda setup: _embeddings(losses.probabilistic_transfer, "pkt", 3e4)
    ),
    "cka": beside_labels(lambda setup: _embeddings(losses.linear_cka, "cka", 1.0)),
    "crd": beside_labels(_crd),
    "contrastive": beside_labels(
        lambda setup: _embeddings(
            losses.contrastive, "contrastive", 1.0, projector=projectors.linear()
        )
    ),
}
"""By name."""
