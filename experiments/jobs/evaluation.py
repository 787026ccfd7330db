"""Networks on the validation and the test part, beside a teacher that ran once."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.jobs.data import Images, Parts
from kdjax import Model, Teacher, teachers
from kdjax.io.input import padded_batches
from kdjax.train import (
    DistillState,
    evaluate,
    make_eval_step,
    make_mesh,
    place,
    place_batch,
)
from kdjax.types import Batch, PyTree

_LARGEST_BATCH = 1000

# What the teacher says of an image does not change: it is kept beside the image.
_KNOWN, _ = teachers.cached(lambda batch: batch["teacher_logits"])


class Evaluator:
    """Measures trainings of one network.

    Args:
      model: the network.
      parts: the data.
      classes: how many there are.
      teacher: from ``teachers.frozen``, whom the network is compared with; ``None`` if
        there is none.
      test_too: whether the accuracy on the test part is recorded along the way, for
        the step that validation chooses afterwards.
    """

    def __init__(
        self,
        model: Model,
        parts: Parts,
        classes: int,
        teacher: tuple[Teacher, PyTree] | None,
        *,
        test_too: bool = False,
    ):
        self._mesh = make_mesh()
        self._has_teacher = teacher is not None
        self._test_too = test_too
        same = NamedSharding(self._mesh, PartitionSpec())
        self._eval_step = jax.jit(make_eval_step(model, _KNOWN), out_shardings=same)

        def student_logits(state: DistillState, batch: Batch) -> jax.Array:
            arrays = state.params["student"], state.model_state
            shown, _ = model.apply(*arrays, batch, rng=None, train=False)
            return shown.dense_logits()

        self._student_logits = jax.jit(student_logits, out_shardings=same)
        # Batches of one shape for both parts: one program.
        longest = max(len(parts.validation["x"]), len(parts.test["x"]))
        devices = self._mesh.size
        self._batch_size = -(-min(longest, _LARGEST_BATCH) // devices) * devices
        self._test_images = len(parts.test["x"])
        answer = self._answers(classes, teacher)

        def batches(images: Images) -> list[Batch]:
            whole = padded_batches(
                images, batch_size=self._batch_size, num_classes=classes
            )
            placed = [place_batch(batch, self._mesh) for batch in whole]
            return [{**batch, "teacher_logits": answer(batch)} for batch in placed]

        self._validation = batches(parts.validation)
        self._test = batches(parts.test)

    def along_the_way(self, state: DistillState) -> dict[str, float]:
        """What a training records of itself."""
        scores = self._scores(state, self._validation)
        if self._test_too:
            scores["test_accuracy"] = self.test(state)["student_accuracy"]
        return scores

    def test(self, state: DistillState) -> dict[str, float]:
        """All scores on the test part."""
        return self._scores(state, self._test)

    def files(self, state: DistillState) -> dict[str, bytes]:
        """What the network says of each image of the test part, ``[N, classes]``."""
        logits = [self._student_logits(state, batch) for batch in self._test]
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(logits)[: self._test_images])
        return {"test_logits.npy": buffer.getvalue()}

    def _scores(self, state: DistillState, part: list[Batch]) -> dict[str, float]:
        scores = evaluate(self._eval_step, state, {}, part)
        if self._has_teacher:
            return scores
        return {
            name: value for name, value in scores.items() if name.startswith("student_")
        }

    def _answers(
        self, classes: int, teacher: tuple[Teacher, PyTree] | None
    ) -> Callable[[Batch], jax.Array]:
        """What the teacher says of a batch, ``[B, classes]``."""
        if teacher is None:
            # Nobody to compare with: such scores are left out again.
            nothing = np.zeros((self._batch_size, classes), np.float32)
            return lambda batch: place(nothing, self._mesh)
        source, frozen = teacher

        @jax.jit
        def logits(frozen: PyTree, batch: Batch) -> jax.Array:
            return source.outputs(frozen, (), batch).dense_logits()

        return functools.partial(logits, place(frozen, self._mesh))
