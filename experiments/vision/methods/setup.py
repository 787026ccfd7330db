"""What every method knows, and the terms that several of them have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax import Array

from experiments.vision.models.features import Net, map_path, preactivation_path
from kdjax import Mean, Objective, Outputs, Term, losses, objectives
from kdjax.objectives import last_layers, uniform_layers
from kdjax.types import Batch, PyTree, Scheduled


class Unfit(ValueError):
    """A method that this pair of networks, or this data, has not what it takes for."""


class Setup(NamedTuple):
    """What a method is made for.

    Attributes:
      student: its network.
      teacher: its network.
      examples: images that the student learns from.
      steps: of its training.
      mixup: whether images are blends of two, with two labels.
      margins: of the teacher's channels, ``[C]`` for each stage: the mean of what is
        negative before the ReLU.
    """

    student: Net
    teacher: Net
    examples: int
    steps: int
    mixup: bool
    margins: Callable[[], Sequence[Array]]

    def stages(self) -> list[tuple[int, int]]:
        """Pairs of stages, student first; the last ones are a pair."""
        ours, theirs = self.student.stages, self.teacher.stages
        if ours <= theirs:
            return uniform_layers(ours, theirs)
        return [(stage, other) for other, stage in last_layers(theirs, ours)]

    def maps(self) -> list[tuple[str, str]]:
        """Pairs of paths of the maps, student first."""
        return [(map_path(ours), map_path(theirs)) for ours, theirs in self.stages()]

    def positions(self) -> list[int]:
        """Of the maps of each pair, of the smaller one."""
        return [
            min(self.student.positions[ours], self.teacher.positions[theirs])
            for ours, theirs in self.stages()
        ]

    def preactivations(self) -> list[tuple[str, str]]:
        """Pairs of paths of the maps before their ReLU, student first."""
        return [
            (preactivation_path(ours), preactivation_path(theirs))
            for ours, theirs in self.stages()
        ]


Method = Callable[[Setup], Objective]
"""Makes what the student is trained for."""


def hard(setup: Setup, weight: Scheduled = 1.0) -> Objective:
    """Cross-entropy against the label, with mixup against both in their shares."""
    if not setup.mixup:
        return objectives.hard_labels(weight=weight)

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        logits, own = student.dense_logits(), batch["mix"]
        label, partner = batch["label"], batch["partner_label"]
        values = own * losses.cross_entropy(logits, label)
        values += (1 - own) * losses.cross_entropy(logits, partner)
        mean = Mean.of(values, (label >= 0) & (partner >= 0))
        return {"hard": Term(weight(step) if callable(weight) else weight, mean)}, state

    return Objective(lambda rng, student, teacher: {}, dict, apply)


def one_label(setup: Setup, name: str) -> None:
    """Refuses mixup for a method whose formula has one label per image."""
    if setup.mixup:
        raise Unfit(f"{name} reads one label per image; expected --mixup 0.")


def warm_up(setup: Setup, weight: float) -> Scheduled:
    """A weight that rises over the first twelfth, as over 20 of 240 epochs."""
    steps = max(1, setup.steps // 12)
    return lambda step: weight * (step / steps).clip(max=1.0)


def beside_labels(term: Callable[[Setup], Objective]) -> Method:
    """The usual method: cross-entropy at weight 1, and a term."""
    return lambda setup: objectives.combine(hard(setup), term(setup))
