"""What every term is made of: its weight, its settings, and what counts in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled, Term

MASK = "mask"

Compute = Callable[[PyTree, Outputs, Outputs, Batch, Array], Mean]
"""``(objective_params, student, teacher, batch, step)`` to the mean of a term."""

Init = Callable[[Array, Outputs, Outputs], PyTree]
"""``(rng, student_spec, teacher_spec)`` to what is trained beside the student."""


def nothing(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
    """Trains nothing beside the student."""
    return {}


def check_weight(name: str, weight: Scheduled) -> None:
    """A weight that is a Python number is finite."""
    if isinstance(weight, (int, float)) and not np.isfinite(weight):
        raise ValueError(f"weight of {name!r}: got {weight}, expected a finite number.")


def single(
    name: str, weight: Scheduled, compute: Compute, init: Init = nothing
) -> Objective:
    """An objective of one term, without a state."""

    def unmoved(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[Mean, PyTree]:
        return compute(params, student, teacher, batch, step), state

    return remembering(name, weight, unmoved, init, dict)


def remembering(
    name: str,
    weight: Scheduled,
    compute: Callable[..., tuple[Mean, PyTree]],
    init: Init,
    init_state: Callable[[], PyTree],
) -> Objective:
    """An objective of one term that moves a state; ``compute`` gets it second."""
    check_weight(name, weight)

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        mean, state = compute(params, state, student, teacher, batch, step)
        return {name: Term(now(weight, step), mean)}, state

    return Objective(init, init_state, apply)


def feature(outputs: Outputs, path: str, who: str) -> Array:
    """A feature that a term asks for; ``who`` says whose it is in the refusal."""
    if path not in outputs.features:
        raise ValueError(
            f"{who} gives no feature {path!r}; it gives {sorted(outputs.features)}. "
            "Ask its adapter for it: features=[...]."
        )
    return outputs.features[path]


def pair_of(
    name: str, student: str, teacher: str
) -> Callable[[Outputs, Outputs], tuple[Array, Array]]:
    """Picks one feature of each model for the term of that name."""

    def pick(shown: Outputs, target: Outputs) -> tuple[Array, Array]:
        return (
            feature(shown, student, f"term {name!r}: the student"),
            feature(target, teacher, f"term {name!r}: the teacher"),
        )

    return pick


def now(number: Scheduled, step: Array) -> Any:
    """A number as it is, a schedule at this step."""
    return number(step) if callable(number) else number


def settings(numbers: Mapping[str, Any], step: Array) -> dict[str, Any]:
    """Hyper-parameters at this step."""
    return {name: now(number, step) for name, number in numbers.items()}


def entry(batch: Batch, name: str, argument: str) -> Array:
    """An entry of the batch that an argument names."""
    if name not in batch:
        raise ValueError(
            f"{argument}: got {name!r}, which the batch does not have; it has "
            f"{sorted(batch)}."
        )
    return batch[name]


def counted(
    batch: Batch, name: str | None, shape: tuple[int, ...], labels: Array | None
) -> Array | None:
    """What counts among values of a shape: the mask of the batch, and the labels'."""
    # The usual mask may be absent; one that was asked for by another name may not.
    absent = name is None or (name == MASK and MASK not in batch)
    scored = None if labels is None else labels >= 0
    if absent:
        return scored
    mask = entry(batch, str(name), "where")
    if mask.dtype != bool:
        raise TypeError(
            f"where: {name!r} of the batch has dtype {mask.dtype}; expected bool (True "
            "counts)."
        )
    if not mask.ndim or mask.shape != shape[: mask.ndim]:
        raise ValueError(
            f"where: {name!r} of the batch has shape {mask.shape}; expected one entry "
            f"per example {shape[:1]} or per value {shape}."
        )
    mask = jnp.broadcast_to(
        mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape
    )
    return mask if scored is None else mask & scored
