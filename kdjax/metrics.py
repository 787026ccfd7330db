"""How well a student does, and how faithfully it follows its teacher.

Everything here is a sum that is divided at the very end, so that results over many
batches, of whatever sizes, are exact: add them, then take ``.value()``.
"""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp
from jax import Array

from kdjax import losses
from kdjax.losses import _checks
from kdjax.losses._rows import wide_dtype
from kdjax.types import Mean


def accuracy(logits: Array, labels: Array, *, where: Array | None = None) -> Mean:
    """Share of positions whose most likely class is the label.

    Args:
      logits: ``[..., V]``.
      labels: integers ``[...]``; negative ones do not count.
      where: boolean ``[...]``, what else counts.

    Returns:
      The mean, over what counts.

    Raises:
      ValueError: labels or mask are not one per position, or a label is too large
        (where its value can be seen).
      TypeError: logits, labels or mask are of the wrong type.

    Example:
      >>> accuracy(jnp.eye(3), jnp.array([0, 2, -100])).value()
      Array(0.5, dtype=float32)
    """
    scored = _scored(logits, labels, where)
    hits = (logits.argmax(-1) == labels).astype(jnp.float32)
    return Mean.of(hits, scored)


def agreement(
    student_logits: Array, teacher_logits: Array, *, where: Array | None = None
) -> Mean:
    """Share of positions on which student and teacher name the same class.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      where: boolean ``[...]``, what counts.

    Returns:
      The mean, over what counts.

    Raises:
      ValueError: the shapes of the logits, or of ``where``, differ.
      TypeError: logits or mask are of the wrong type.

    Example:
      >>> agreement(jnp.eye(2), 5 * jnp.eye(2)).value()
      Array(1., dtype=float32)
    """
    _checks.logits(student_logits, teacher_logits)
    same = student_logits.argmax(-1) == teacher_logits.argmax(-1)
    return Mean.of(same.astype(jnp.float32), where)


def top_k_overlap(
    student_logits: Array,
    teacher_logits: Array,
    *,
    k: int = 5,
    where: Array | None = None,
) -> Mean:
    """Share of the teacher's ``k`` most likely classes that are the student's too.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      k: how many classes of each; all of them if there are fewer.
      where: boolean ``[...]``, what counts.

    Returns:
      The mean, over what counts; at ``k=1`` that of :func:`agreement`.

    Raises:
      ValueError: ``k`` is below 1, or the shapes of the logits, or of ``where``,
        differ.
      TypeError: logits or mask are of the wrong type.

    Example:
      >>> top_k_overlap(jnp.arange(4.0), jnp.array([0.0, 3.0, 1.0, 2.0]), k=2).value()
      Array(0.5, dtype=float32)
    """
    _checks.logits(student_logits, teacher_logits)
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1.")
    k = min(k, student_logits.shape[-1])
    _, own = jax.lax.top_k(student_logits, k)
    _, others = jax.lax.top_k(teacher_logits, k)
    shared = (own[..., :, None] == others[..., None, :]).any(-1)
    return Mean.of(shared.mean(-1), where)


def entropy(logits: Array, *, where: Array | None = None) -> Mean:
    """Entropy of the softmax, in nats.

    Args:
      logits: ``[..., V]``.
      where: boolean ``[...]``, what counts.

    Returns:
      The mean, over what counts.

    Example:
      >>> entropy(jnp.zeros((1, 4))).value()
      Array(1.3862944, dtype=float32)
    """
    # The cross-entropy of a distribution with itself is its entropy.
    return Mean.of(losses.soft_cross_entropy(logits, logits), where)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy by bins of confidence, as sums that add up.

    Attributes:
      confidence: sum of the probabilities of the chosen classes, ``[bins]``.
      correct: how many choices were right, ``[bins]``.
      count: how many there were, ``[bins]``.
    """

    confidence: Array
    correct: Array
    count: Array

    def __add__(self, other: Calibration) -> Calibration:
        return jax.tree.map(operator.add, self, other)

    def value(self) -> Array:
        """Expected calibration error, in [0, 1]; 0 where nothing counts."""
        gaps = jnp.abs(self.confidence - self.correct).sum()
        return gaps / jnp.maximum(self.count.sum(), 1)


def calibration(
    logits: Array, labels: Array, *, bins: int = 15, where: Array | None = None
) -> Calibration:
    """Sums for the expected calibration error, with bins of equal width.

    Args:
      logits: ``[..., V]``.
      labels: integers ``[...]``; negative ones do not count.
      bins: how many, over confidences in (0, 1].
      where: boolean ``[...]``, what else counts.

    Returns:
      The sums; ``.value()`` is the error.

    Raises:
      ValueError: ``bins`` is below 1, or as for :func:`accuracy`.
      TypeError: as for :func:`accuracy`.

    Example:
      >>> calibration(jnp.zeros((4, 2)), jnp.array([0, 0, 0, 1])).value()
      Array(0.25, dtype=float32)

    Reference:
      Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3.
      arXiv:1706.04599
    """
    if bins < 1:
        raise ValueError(f"bins: got {bins}, expected at least 1.")
    counts = _scored(logits, labels, where).ravel()
    probabilities = jax.nn.softmax(logits.astype(wide_dtype(logits)), axis=-1)
    confidence = probabilities.max(-1).ravel()
    right = (logits.argmax(-1) == labels).astype(jnp.float32).ravel()
    # Bins are closed above: (k/n, (k+1)/n].
    index = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    member = (index[:, None] == jnp.arange(bins)) & counts[:, None]
    return Calibration(
        jnp.where(member, confidence[:, None], 0).sum(0),
        jnp.where(member, right[:, None], 0).sum(0),
        member.sum(0, dtype=jnp.int32),
    )


def side_by_side(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array | None = None,
    *,
    where: Array | None = None,
) -> dict[str, Mean | Calibration]:
    """Student and teacher on the same batch: quality of both, and fidelity.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      labels: integers ``[...]``; without them there is no accuracy nor calibration.
      where: boolean ``[...]``, what counts.

    Returns:
      ``agreement``, ``forward_kl`` and ``reverse_kl`` at temperature 1, and for both
      models ``_entropy``, ``_accuracy`` and ``_calibration_error``.

    Example:
      >>> sums = side_by_side(jnp.eye(2), jnp.eye(2), jnp.array([0, 0]))
      >>> float(sums["agreement"].value()), float(sums["student_accuracy"].value())
      (1.0, 0.5)
    """
    sums: dict[str, Mean | Calibration] = {
        "agreement": agreement(student_logits, teacher_logits, where=where),
        "forward_kl": Mean.of(losses.forward_kl(student_logits, teacher_logits), where),
        "reverse_kl": Mean.of(losses.reverse_kl(student_logits, teacher_logits), where),
    }
    for who, logits in (("student", student_logits), ("teacher", teacher_logits)):
        sums[f"{who}_entropy"] = entropy(logits, where=where)
        if labels is not None:
            sums[f"{who}_accuracy"] = accuracy(logits, labels, where=where)
            sums[f"{who}_calibration_error"] = calibration(logits, labels, where=where)
    return sums


def _scored(logits: Array, labels: Array, where: Array | None) -> Array:
    """What counts: positions with a label, and not masked."""
    _checks.floating(logits=logits)
    _checks.labels(labels, logits)
    scored = jnp.asarray(labels) >= 0
    if where is None:
        return scored
    if where.dtype != bool:
        raise TypeError(f"where: got dtype {where.dtype}, expected bool (True counts).")
    if where.shape != scored.shape:
        raise ValueError(
            f"where: got shape {where.shape}, expected {scored.shape}, one entry per "
            "label."
        )
    return scored & where
