"""Masked generative distillation: the teacher's map out of half of the student's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from kdjax import losses
from kdjax.losses import _checks
from kdjax.objectives import projectors
from kdjax.objectives._convolutions import convolution, init_convolution
from kdjax.objectives._keys import by_example
from kdjax.objectives._terms import MASK, counted, entry, pair_of, single
from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled


def masked_generation(
    *,
    student: str,
    teacher: str,
    name: str = "mgd",
    weight: Scheduled = 2e-5,
    where: str | None = MASK,
    index: str = "index",
    masked: float = 0.65,
    pool: bool = False,
    seed: int = 0,
) -> Objective:
    """MGD: hides positions of the student's map, and has the teacher's generated of it.

    The generator, two 3x3 convolutions with ReLU between them, is trained with the
    student, and so is a 1x1 convolution before it where the channels differ;
    :func:`kdjax.losses.masked_generation` is the loss. What is hidden of an example
    depends on the seed, the step and the example's index alone: not on the batch, the
    micro-batch or the device that it is in.

    Args:
      student: path of a map ``[B, H, W, C]`` of the student.
      teacher: path of a map of the teacher, equal in height and width.
      name: of the term, in metrics.
      weight: of the term; the published one is 2e-5, of a sum over the map.
      where: entry of the batch that says which examples count.
      index: entry of the batch with the index of each example, integers ``[B]``, as
        :func:`kdjax.io.input.batches` gives it.
      masked: share of the positions that is hidden, in [0, 1].
      pool: whether the larger of the two maps is averaged down to the size of the
        smaller.
      seed: of what is hidden.

    Returns:
      An objective of one term, with the generator's parameters.

    Raises:
      ValueError: ``masked`` is out of its range, the weight is not finite, or (when
        traced) a feature or an entry is missing, or a feature is no map.

    Example:
      >>> objective = masked_generation(student="layer4", teacher="layer4")
      >>> spec = Outputs(None, {"layer4": jnp.ones((2, 4, 4, 3))})
      >>> sorted(jax.eval_shape(objective.init, jax.random.key(0), spec, spec))
      ['first', 'second']

    Reference:
      Yang, Li, Shao, Shi, Yuan and Yuan, Masked Generative Distillation, 2022,
      section 3.2. arXiv:2205.01529
    """
    _checks.fraction(masked=masked)
    both = pair_of(name, student, teacher)

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        ours, theirs = (each.shape[-1] for each in both(student, teacher))
        first, second, align = jax.random.split(rng, 3)
        params = {
            "first": init_convolution(first, 3, theirs, theirs),
            "second": init_convolution(second, 3, theirs, theirs),
        }
        if ours != theirs:
            params["align"] = init_convolution(align, 1, ours, theirs)
        return params

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        ours, theirs = both(student, teacher)
        if pool:
            ours, theirs = projectors.pooled(ours, theirs)
        if "align" in params:
            ours = convolution(params["align"], ours)
        keys = by_example(entry(batch, index, "index"), step, seed)
        chance = jax.vmap(lambda key: jax.random.uniform(key, ours.shape[1:3]))(keys)
        ours = jnp.where((chance < masked)[..., None], 0, ours)
        hidden = jax.nn.relu(convolution(params["first"], ours))
        values = losses.masked_generation(convolution(params["second"], hidden), theirs)
        return Mean.of(values, counted(batch, where, values.shape, None))

    return single(name, weight, compute, init)
