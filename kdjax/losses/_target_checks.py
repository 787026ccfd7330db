"""Refusals of targets that keep some of the classes; see ``_checks.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from kdjax.losses import _checks
from kdjax.types import SampledTargets, SparseTargets


def sparse(student_logits: ArrayLike, targets: SparseTargets) -> None:
    """Targets of the student's positions and classes, no class twice."""
    if not isinstance(targets, SparseTargets):
        raise TypeError(
            f"targets: got {type(targets).__name__}, expected kdjax.SparseTargets; "
            "top_k_targets makes them of logits."
        )
    indices = _slots(student_logits, targets, log_probs=targets.log_probs)
    _numbers(np.shape(student_logits)[:-1], tail=targets.tail)
    if indices is not None:
        in_order = np.sort(indices, -1)
        again = in_order[..., 1:][in_order[..., 1:] == in_order[..., :-1]]
        if (again >= 0).any():
            raise ValueError(
                f"targets.indices: got {again.max()} twice in one position, expected "
                "each class once."
            )


def sampled(student_logits: ArrayLike, targets: SampledTargets) -> None:
    """Targets of the student's positions and classes, with a weight each."""
    if not isinstance(targets, SampledTargets):
        raise TypeError(
            f"targets: got {type(targets).__name__}, expected kdjax.SampledTargets; "
            "sampled_targets draws them from logits."
        )
    numbers = {"log_probs": targets.log_probs, "weights": targets.weights}
    _slots(student_logits, targets, **numbers)


def python_number(**numbers: float) -> None:
    """Every number is a positive Python number."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float)):
            raise TypeError(
                f"{name}: got {type(number).__name__}, expected a Python number: it is "
                "part of the targets' type, as a shape is."
            )
    _checks.positive(**numbers)


def keys(batch: tuple[int, ...], **keys: Array) -> None:
    """Every key is one of ``jax.random.key``, or one for each position."""
    for name, key in keys.items():
        dtype = jnp.result_type(key)
        if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"{name}: got dtype {dtype}, expected a key of jax.random.key."
            )
        if key.shape not in ((), batch):
            raise ValueError(
                f"{name}: got {key.shape} keys, expected one, or one per position, "
                f"{batch}."
            )


def _slots(
    student_logits: ArrayLike,
    targets: SparseTargets | SampledTargets,
    **numbers: Array,
) -> np.ndarray | None:
    """Checks the slots ``[..., k]``; their indices where they can be looked at."""
    _checks.floating(student_logits=student_logits)
    python_number(temperature=targets.temperature)
    *batch, classes = np.shape(student_logits)
    shape, dtype = np.shape(targets.indices), targets.indices.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"targets.indices: got dtype {dtype}, expected integers.")
    if list(shape[:-1]) != batch or len(shape) != len(batch) + 1:
        expected = ", ".join(map(str, [*batch, "k"]))
        raise ValueError(
            f"targets.indices: got shape {shape}, expected ({expected}): some classes "
            "for every position of student_logits."
        )
    _numbers(shape, **numbers)
    indices = _used_indices(targets)
    if indices is not None and indices.size and indices.max() >= classes:
        raise ValueError(
            f"targets.indices: got {indices.max()}, expected less than the {classes} "
            "classes of the student; are they of another vocabulary?"
        )
    return indices


def _numbers(shape: tuple[int, ...], **arrays: Array) -> None:
    """Every array holds floating-point numbers, one for each entry of the shape."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"targets.{name}: got dtype {array.dtype}, expected floating-point "
                "numbers."
            )
        if np.shape(array) != shape:
            raise ValueError(
                f"targets.{name}: got shape {np.shape(array)}, expected {shape}."
            )


def _used_indices(targets: SparseTargets | SampledTargets) -> np.ndarray | None:
    """The indices, -1 in slots without use; ``None`` under jit."""
    arrays = targets.indices, targets.log_probs
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return None
    indices, log_probs = np.asarray(arrays[0], np.int64), np.asarray(arrays[1])
    used = ~np.isneginf(log_probs.astype(np.float32))
    if (used & (indices < 0)).any():
        raise ValueError(
            f"targets.indices: got {indices[used].min()}, expected classes. A slot "
            "without use is one whose log-probability is -inf."
        )
    return np.where(used, indices, -1)
