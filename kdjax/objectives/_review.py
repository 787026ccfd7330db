"""Knowledge review: levels of the student, fused from the last to the first."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kdjax import losses
from kdjax.losses import _checks
from kdjax.objectives._convolutions import (
    convolution,
    init_convolution,
    init_normalized,
    normalized,
)
from kdjax.objectives._terms import MASK, counted, pair_of, single
from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled


def review(
    *,
    pairs: Sequence[tuple[str, str]],
    name: str = "review",
    weight: Scheduled = 1.0,
    where: str | None = MASK,
    width: int | None = None,
) -> Objective:
    """ReviewKD: each level of the teacher is taught to all deeper ones of the student.

    From the last level to the first, attention fuses the student's map with what came
    from the level after it; a 3x3 convolution of the fused map is pulled to the
    teacher's by :func:`kdjax.losses.hierarchical_context`. The fusion modules are
    trained with the student. They normalise by the statistics of the examples that
    count, on all devices; under accumulation, of each micro-batch.

    Args:
      pairs: paths of maps ``[B, H, W, C]``, the student's first, from the first level
        to the last. A vector ``[B, C]``, such as the pooled one before the head, is
        a map of one position.
      name: of the term, in metrics.
      weight: of the term; published are 0.6 to 8 by network, rising from 0 over 20
        epochs: ``optax.linear_schedule(0.0, 1.0, steps)``.
      where: entry of the batch that says which examples count.
      width: channels within the fusion; by default the last level's of the student,
        at most 512.

    Returns:
      An objective of one term, the sum over the levels, with the parameters of the
      fusion modules.

    Raises:
      ValueError: there are no pairs, the weight is not finite, ``width`` is below 1,
        or (when traced) a feature is missing or no map.

    Example:
      >>> levels = ["layer1", "layer2"]
      >>> objective = review(pairs=[(level, level) for level in levels])
      >>> maps = {"layer1": jnp.ones((2, 8, 8, 3)), "layer2": jnp.ones((2, 4, 4, 6))}
      >>> spec = Outputs(None, maps)
      >>> params = jax.eval_shape(objective.init, jax.random.key(0), spec, spec)
      >>> sorted(params["0"])
      ['attention', 'enter', 'leave']

    Reference:
      Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, 2021,
      section 3.3. arXiv:2104.09044
    """
    if not pairs:
        raise ValueError("pairs: got none; expected at least one (student, teacher).")
    if width is not None:
        _checks.whole(width=width)
    levels = [pair_of(name, ours, theirs) for ours, theirs in pairs]

    def maps(student: Outputs, teacher: Outputs) -> list[tuple[Array, Array]]:
        """Of each level, as ``[B, H, W, C]``."""
        picked = [level(student, teacher) for level in levels]
        return [(_as_map(ours), _as_map(theirs)) for ours, theirs in picked]

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        shapes = jax.eval_shape(maps, student, teacher)
        inner = min(512, shapes[-1][0].shape[-1]) if width is None else width
        params = {}
        for index, (ours, theirs) in enumerate(shapes):
            keys = jax.random.split(jax.random.fold_in(rng, index), 3)
            params[str(index)] = {
                "enter": init_normalized(keys[0], 1, ours.shape[-1], inner),
                "leave": init_normalized(keys[1], 3, inner, theirs.shape[-1]),
            }
            if index < len(shapes) - 1:
                attention = init_convolution(keys[2], 1, 2 * inner, 2)
                params[str(index)]["attention"] = attention | {"bias": jnp.zeros(2)}
        return params

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        both, deeper = maps(student, teacher), None
        examples = both[0][0].shape[:1]
        counts = counted(batch, where, examples, None)
        total = jnp.zeros(examples)
        for index in reversed(range(len(both))):
            ours, theirs = both[index]
            level, deeper = _fused(
                params[str(index)], ours, deeper, theirs.shape[1:3], counts
            )
            total += losses.hierarchical_context(level, theirs)
        return Mean.of(total, counts)

    return single(name, weight, compute, init)


def _as_map(feature: Array) -> Array:
    return feature[:, None, None, :] if feature.ndim == 2 else feature


def _fused(
    params: PyTree,
    ours: Array,
    deeper: Array | None,
    size: tuple[int, ...],
    counts: Array | None,
) -> tuple[Array, Array]:
    """The level as the teacher's should be, and what goes on to the level before."""
    x = normalized(params["enter"], ours, counts)
    if deeper is not None:
        deeper = _resized(deeper, x.shape[1:3])
        scores = convolution(params["attention"], jnp.concatenate([x, deeper], -1))
        shares = jax.nn.sigmoid(scores + params["attention"]["bias"].astype(x.dtype))
        x = x * shares[..., :1] + deeper * shares[..., 1:]
    x = _resized(x, size)
    return normalized(params["leave"], x, counts), x


def _resized(x: Array, size: tuple[int, ...]) -> Array:
    """To another height and width, by the nearest position."""
    if x.shape[1:3] == size:
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "nearest")
