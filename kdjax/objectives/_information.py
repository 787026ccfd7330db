"""Variational information distillation: a regressor and its trained variances."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from kdjax import losses
from kdjax.objectives import projectors
from kdjax.objectives._terms import MASK, counted, pair_of, single
from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled

# Where the variance that the loss makes of it, softplus + 1e-5, is 5.
_FIRST = math.log(math.expm1(5.0 - 1e-5))


def variational_information(
    *,
    student: str,
    teacher: str,
    name: str = "vid",
    weight: Scheduled = 1.0,
    where: str | None = MASK,
    pool: bool = False,
) -> Objective:
    """VID: the student predicts the teacher's map, and how sure it is of each channel.

    The regressor, three 1x1 convolutions with ReLU between them, and one variance per
    channel are trained with the student; :func:`kdjax.losses.variational_information`
    is the loss.

    Args:
      student: path of a map ``[B, H, W, C]`` of the student.
      teacher: path of a map of the teacher, equal in height and width.
      name: of the term, in metrics.
      weight: of the term; the published one is 1.
      where: entry of the batch that says which examples count.
      pool: whether the larger of the two maps is averaged down to the size of the
        smaller.

    Returns:
      An objective of one term, with the regressor and the scales as its parameters.

    Raises:
      ValueError: the weight is not finite, or (when traced) a feature is missing or no
        map.

    Example:
      >>> objective = variational_information(student="layer3", teacher="layer3")
      >>> spec = Outputs(None, {"layer3": jnp.ones((2, 4, 4, 3))})
      >>> params = jax.eval_shape(objective.init, jax.random.key(0), spec, spec)
      >>> params["log_scale"].shape
      (3,)

    Reference:
      Ahn, Hu, Damianou, Lawrence and Dai, Variational Information Distillation for
      Knowledge Transfer, 2019. arXiv:1904.05835
    """

    both = pair_of(name, student, teacher)

    def regressor(theirs: Array) -> projectors.Projector:
        width = theirs.shape[-1]
        return projectors.mlp(width, width, bias=False)

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        ours, theirs = both(student, teacher)
        width = theirs.shape[-1]
        return {
            "regressor": regressor(theirs).init(rng, ours.shape[-1], width),
            "log_scale": jnp.full(width, _FIRST),
        }

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        ours, theirs = both(student, teacher)
        if pool:
            ours, theirs = projectors.pooled(ours, theirs)
        mean = regressor(theirs).apply(params["regressor"], ours)
        values = losses.variational_information(mean, params["log_scale"], theirs)
        return Mean.of(values, counted(batch, where, values.shape, None))

    return single(name, weight, compute, init)
