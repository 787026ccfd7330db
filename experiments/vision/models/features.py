"""What every network of the benchmark shows, under the same names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx
from jax import Array

from kdjax import Adapted, Outputs

EMBEDDING = "embedding"
"""What the head reads, ``[B, D]``."""

DISTILLATION = "distillation"
"""Logits of the distillation token, ``[B, classes]``, where there is one."""


def map_path(stage: int) -> str:
    """The map after a stage, ``[B, H, W, C]``; networks without space have 1 x 1."""
    return f"stages/{stage}"


def preactivation_path(stage: int) -> str:
    """The same map before its ReLU."""
    return f"stages/{stage}/preactivation"


class Net(NamedTuple):
    """A network taken apart, and what methods need to know of it.

    Attributes:
      name: of the architecture.
      adapted: the function and its arrays.
      positions: of the map of each stage, height times width.
      has_distillation_token: whether it shows :data:`DISTILLATION`.
    """

    name: str
    adapted: Adapted
    positions: Sequence[int]
    has_distillation_token: bool

    @property
    def stages(self) -> int:
        """How many stages it shows the maps of."""
        return len(self.positions)


def outputs(
    logits: Array,
    embedding: Array,
    preactivations: Sequence[Array],
    maps: Sequence[Array] | None = None,
    **more: Array,
) -> Outputs:
    """Names what a network shows; the maps are the ReLU of the preactivations."""
    maps = [nnx.relu(each) for each in preactivations] if maps is None else maps
    features = {EMBEDDING: embedding, **more}
    for stage, (before, after) in enumerate(zip(preactivations, maps, strict=True)):
        features[preactivation_path(stage)] = before
        features[map_path(stage)] = after
    return Outputs(logits, features)
