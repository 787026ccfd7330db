"""Refusals: every bad argument is named, with what came and what was expected.

Shapes and dtypes are known while tracing and always checked; values only where
they are concrete, which is why ranges are checked for Python numbers alone. A wrong
dtype raises ``TypeError``, anything else ``ValueError``; nothing is returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kdjax.types import LinearHead


def dtype_of(name: str, array: ArrayLike) -> np.dtype:
    """That of an array, or of a number; refuses lists, trees and ``None``."""
    if isinstance(array, LinearHead):
        raise TypeError(
            f"{name}: got a LinearHead, expected an array: its .logits(), or "
            "kdjax.fused.token_mean of this loss."
        )
    try:
        # To JAX, None is a float.
        return jnp.result_type(array if array is not None else "None")
    except TypeError:
        raise TypeError(
            f"{name}: got {type(array).__name__}, expected an array."
        ) from None


def _floating(kind: str, **arrays: ArrayLike) -> None:
    for name, array in arrays.items():
        dtype = dtype_of(name, array)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}: got dtype {dtype}, expected floating-point {kind}."
            )


def floating(**arrays: ArrayLike) -> None:
    """Every array holds floating-point numbers and has at least one axis."""
    _floating(
        "logits; integer labels go to cross_entropy, and class scores are cast by the "
        "caller",
        **arrays,
    )
    for name, array in arrays.items():
        if not np.shape(array):
            raise ValueError(f"{name}: got a scalar, expected shape [..., V].")


def logits(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    where: ArrayLike | None = None,
    rank: int | None = None,
) -> None:
    """Student and teacher have floating logits of one shape, and so has ``where``."""
    floating(student_logits=student_logits, teacher_logits=teacher_logits)
    student, teacher = np.shape(student_logits), np.shape(teacher_logits)
    if student[-1] != teacher[-1]:
        hint = "kdjax never pads or truncates a vocabulary: align them first."
    else:
        hint = "Nothing is broadcast: give both the same leading axes."
    chex.assert_equal_shape(
        (student_logits, teacher_logits),
        custom_message=f"student_logits {student} and teacher_logits {teacher}: "
        f"expected one shape [..., V]. {hint}",
        exception_type=ValueError,
    )
    if rank is not None and len(student) != rank:
        raise ValueError(
            f"student_logits: got shape {student}, expected {rank} axes [B, V]: this "
            "loss relates the examples of one batch."
        )
    if where is not None:
        boolean(student, where=where)


def features(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    rank: int | None = None,
    width: bool = True,
) -> None:
    """Both hold features ``[..., D]`` of one shape, but for D without ``width``."""
    _floating(
        "features", student_features=student_features, teacher_features=teacher_features
    )
    student, teacher = np.shape(student_features), np.shape(teacher_features)
    shape = "[..., D]" if rank is None else "[B, D]"
    for name, got in ("student_features", student), ("teacher_features", teacher):
        if not got or rank not in (None, len(got)):
            raise ValueError(f"{name}: got shape {got}, expected {shape}.")
    if student != teacher if width else student[:-1] != teacher[:-1]:
        hint = "Project the student's to the teacher's width." if width else ""
        raise ValueError(
            f"student_features {student} and teacher_features {teacher}: expected one "
            f"{'shape' if width else 'batch'} {shape}. Nothing is broadcast. {hint}"
        )


def maps(
    *,
    where: ArrayLike | None = None,
    channels: bool = True,
    space: bool = True,
    **arrays: ArrayLike,
) -> None:
    """All are maps ``[B, H, W, C]`` of one batch, and equal in what is asked for.

    A mask ``[B, H, W]`` needs maps of one size.
    """
    _floating("features", **arrays)
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    for name, shape in shapes.items():
        if len(shape) != 4 or 0 in shape[1:]:
            raise ValueError(
                f"{name}: got shape {shape}, expected a map [B, H, W, C], channels "
                "last, of at least one position and channel."
            )
    one_size = space or where is not None

    def compared(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:1] + shape[1:3] * one_size + shape[3:] * channels

    first = next(iter(shapes.values()))
    if any(compared(shape) != compared(first) for shape in shapes.values()):
        asked = ["batch"] + ["height and width"] * one_size + ["channels"] * channels
        raise ValueError(
            f"{_shapes(arrays)}: expected maps [B, H, W, C] of equal "
            f"{', '.join(asked)}. Nothing is broadcast: pool or project the student's "
            "to the teacher's."
        )
    if where is not None:
        boolean(first[:3], where=where)


def per_channel(features: ArrayLike, **arrays: ArrayLike) -> None:
    """Every array has one floating-point number per channel of the features."""
    _floating("features", **arrays)
    for name, array in arrays.items():
        if np.shape(array) != np.shape(features)[-1:]:
            raise ValueError(
                f"{name}: got shape {np.shape(array)}, expected one number per channel,"
                f" {np.shape(features)[-1:]}."
            )


def softened(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    where: ArrayLike | None,
) -> None:
    """What every divergence asks of its common arguments."""
    logits(student_logits, teacher_logits, where=where)
    positive(temperature=temperature)
    scale(np.shape(student_logits)[:-1], temperature=temperature)


def boolean(shape: tuple[int, ...], **masks: ArrayLike) -> None:
    """Every mask is boolean and of the given shape."""
    for name, mask in masks.items():
        dtype = dtype_of(name, mask)
        if dtype != jnp.bool_:
            raise TypeError(f"{name}: got dtype {dtype}, expected bool (True counts).")
        if np.shape(mask) != shape:
            raise ValueError(
                f"{name}: got shape {np.shape(mask)}, expected {shape}, the shape of "
                "what it masks; broadcast it explicitly. A mask over examples or "
                "tokens belongs to Mean.of."
            )


def real(shape: str, **arrays: ArrayLike) -> None:
    """Every array holds floating-point numbers along the axes that ``shape`` names."""
    _floating("numbers", **arrays)
    axes = [axis for axis in shape.strip("[]").split(", ") if axis != "..."]
    for name, array in arrays.items():
        found = np.shape(array)
        if len(found) < len(axes) or ("..." not in shape and len(found) > len(axes)):
            raise ValueError(f"{name}: got shape {found}, expected {shape}.")


def one_shape(shape: str, hint: str = "", /, **arrays: ArrayLike) -> None:
    """All arrays have the same shape."""
    if len({np.shape(array) for array in arrays.values()}) > 1:
        hint = hint or "Nothing is broadcast."
        raise ValueError(f"{_shapes(arrays)}: expected one shape {shape}. {hint}")


def related(shape: str, where: ArrayLike | None, **arrays: ArrayLike) -> None:
    """What every relation asks: arrays over the same examples, and a mask of those."""
    real(shape, **arrays)
    batch, *others = (np.shape(array)[:1] for array in arrays.values())
    if any(other != batch for other in others):
        raise ValueError(f"{_shapes(arrays)}: expected the same examples B in {shape}.")
    if where is not None:
        boolean(batch, where=where)


def _shapes(arrays: Mapping[str, ArrayLike]) -> str:
    return " and ".join(f"{name} {np.shape(array)}" for name, array in arrays.items())


def whole(**numbers: int) -> None:
    """Every number is a Python integer, and at least 1."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(
                f"{name}: got {type(number).__name__}, expected a Python integer."
            )
        if number < 1:
            raise ValueError(f"{name}: got {number}, expected at least 1.")


def labels(labels: ArrayLike, logits: ArrayLike) -> None:
    """Labels are integers, one per position, and below the number of classes.

    The values are looked at only where they are concrete. Under jit a label that is
    too large makes the loss NaN instead.
    """
    dtype = dtype_of("labels", labels)
    shape, batch = np.shape(labels), np.shape(logits)
    one_hot = "one-hot or soft labels? Take labels.argmax(-1), or soft_cross_entropy."
    if not jnp.issubdtype(dtype, jnp.integer):
        hint = one_hot if shape == batch else "Cast them to int32."
        raise TypeError(f"labels: got dtype {dtype}, expected integers. {hint}")
    if shape != batch[:-1]:
        hint = one_hot if shape == batch else "One label per position."
        raise ValueError(f"labels: got shape {shape}, expected {batch[:-1]}. {hint}")
    if not isinstance(labels, jax.core.Tracer) and np.size(labels):
        largest = int(np.max(np.asarray(labels)))
        if largest >= batch[-1]:
            raise ValueError(
                f"labels: got {largest}, expected less than the {batch[-1]} classes of "
                "the logits (negative labels are not scored)."
            )


def _concrete(numbers: dict[str, ArrayLike]) -> Iterator[tuple[str, float]]:
    """The numbers whose value is known without asking a device."""
    for name, number in numbers.items():
        if isinstance(number, (int, float, np.integer, np.floating)):
            yield name, float(number)


def positive(**numbers: ArrayLike) -> None:
    """Every Python number is positive and finite."""
    for name, number in _concrete(numbers):
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(
                f"{name}: got {number}, expected a positive, finite number."
            )


def finite(**numbers: ArrayLike) -> None:
    """Every Python number is finite."""
    for name, number in _concrete(numbers):
        if not math.isfinite(number):
            raise ValueError(f"{name}: got {number}, expected a finite number.")


def non_negative(**numbers: ArrayLike) -> None:
    """Every Python number is finite and at least 0."""
    for name, number in _concrete(numbers):
        if not (number >= 0 and math.isfinite(number)):
            raise ValueError(
                f"{name}: got {number}, expected a finite number of at least 0."
            )


def fraction(**numbers: ArrayLike) -> None:
    """Every Python number lies in [0, 1]."""
    for name, number in _concrete(numbers):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: got {number}, expected a number in [0, 1].")


def inside(*, at_zero: str, at_one: str, **numbers: ArrayLike) -> None:
    """Every Python number lies strictly between 0 and 1."""
    for name, number in _concrete(numbers):
        if not 0 < number < 1:
            instead = {0.0: at_zero, 1.0: at_one}.get(number)
            hint = f"; for that end use {instead}" if instead else ""
            raise ValueError(
                f"{name}: got {number}, expected a number strictly between 0 and 1"
                f"{hint}."
            )


def scale(shape: tuple[int, ...], **numbers: ArrayLike) -> None:
    """Every number is a scalar or has one value per position."""
    for name, number in numbers.items():
        if np.shape(number) not in ((), shape):
            raise ValueError(
                f"{name}: got shape {np.shape(number)}, expected a scalar or one value "
                f"per position, {shape}."
            )
