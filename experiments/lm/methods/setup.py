"""What every method knows, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax import Array

from experiments.jobs.trainings import Rollout
from experiments.lm.model import DecoderConfig
from experiments.lm.networks import INPUTS
from experiments.lm.rollouts import SCORED, Continuation
from kdjax import Objective, Outputs, Term, objectives
from kdjax.io.input import HostBatch
from kdjax.types import Batch, PyTree


class Unfit(ValueError):
    """A method that these models, or their tokens, have not what it takes for."""


class Setup(NamedTuple):
    """What a method is made for.

    Attributes:
      student: its shape.
      teacher: its shape.
      temperature: of divergences.
      own_share: share of the steps that learn from the student's own texts, where not
        all do.
      go_on: how models go on with rows of the data.
      byte_pairs: the vocabulary of students that read other tokens than the teacher,
        byte pairs; ``None`` if the teacher's are byte pairs too.
      chunk_size: tokens on each device that have logits at a time, in methods on the
        logits of the data's tokens; ``None`` for kdjax' own choice.
    """

    student: DecoderConfig
    teacher: DecoderConfig
    temperature: float
    own_share: float
    go_on: Continuation
    byte_pairs: int | None
    chunk_size: int | None = None


class Recipe(NamedTuple):
    """How a student is trained.

    Attributes:
      objective: for what.
      student_features: what the student shows for it, besides its logits.
      teacher_features: what the teacher shows.
      teacher_inputs: entries of the batch that the teacher reads.
      rows: changes the rows before the training: ``(teacher's parameters, rows,
        seed) -> rows``.
      rollout: changes a batch inside the step.
      layers: of the teacher that the student starts from; none for random weights.
      byte_pairs: whether the student reads byte pairs, and its rows hold the teacher's
        tokens beside them.
    """

    objective: Objective
    student_features: Sequence[str] = ()
    teacher_features: Sequence[str] = ()
    teacher_inputs: Sequence[str] = INPUTS
    rows: Callable[[PyTree, HostBatch, int], HostBatch] | None = None
    rollout: Rollout | None = None
    layers: Sequence[int] = ()
    byte_pairs: bool = False


Method = Callable[[Setup], Recipe]
"""Says how a student is trained."""


def of_data(objective: Objective) -> Objective:
    """A term over every token of the data but the first of each text."""
    return objectives.next_token(objective, segments="segments")


def of_made(objective: Objective, where: str = SCORED) -> Objective:
    """A term over the tokens that a model has made."""
    return objectives.next_token(objective, segments="segments", where=where)


Given = tuple[Outputs, Batch]
"""What an objective learns besides the student: the teacher's outputs and the batch."""


def with_given(
    objective: Objective, change: Callable[[Outputs, Batch], Given]
) -> Objective:
    """The same terms, given what a change makes of teacher and batch."""

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        return objective.apply(params, state, student, *change(teacher, batch), step)

    return objective._replace(apply=apply)
