"""Two tokenizations of one text, cut where both have a boundary."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def align_chunks(
    student_ends: ArrayLike, teacher_ends: ArrayLike
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Finds the shortest stretches of text that are whole tokens on both sides.

    Args:
      student_ends: where each token of the student ends in the text, in bytes or
        characters, integers ``[S]`` that never fall; -1 for special tokens and padding,
        which stand for none of it.
      teacher_ends: the same of the teacher's tokens, ``[T]``, in the same unit.

    Returns:
      The chunk of each token, ``[S]`` and ``[T]``, numbered from 0 in order of the
      text, for :func:`kdjax.losses.chunk_likelihood`. It is -1 for special tokens, and
      for those behind the last common boundary, as where one side was cut short.

    Raises:
      ValueError: ends that fall, or that are not one axis.
      TypeError: ends that are not integers.

    Example:
      >>> # "new york": "new", " york" and "new ", "yo", "rk"
      >>> align_chunks([3, 8], [4, 6, 8])
      (array([0, 0], dtype=int32), array([0, 0, 0], dtype=int32))
      >>> align_chunks([-1, 3, 8], [3, 6, 8])
      (array([-1,  0,  1], dtype=int32), array([0, 1, 1], dtype=int32))

    Reference:
      Minixhofer, Vulić and Ponti, Universal Cross-Tokenizer Distillation via
      Approximate Likelihood Matching, 2025. arXiv:2503.20083
    """
    student = _ends("student_ends", student_ends)
    teacher = _ends("teacher_ends", teacher_ends)
    common = np.intersect1d(student[student >= 0], teacher[teacher >= 0])

    def chunks(ends: NDArray[np.integer]) -> NDArray[np.int32]:
        # The chunk of a token is the one with the first boundary that is not before it.
        found = np.searchsorted(common, ends)
        return np.where((ends < 0) | (found == len(common)), -1, found).astype(np.int32)

    return chunks(student), chunks(teacher)


def _ends(name: str, ends: ArrayLike) -> NDArray[np.integer]:
    array = np.asarray(ends)
    if array.ndim != 1:
        raise ValueError(f"{name}: got shape {array.shape}, expected one axis.")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected integers.")
    inside = array[array >= 0]
    falls = np.flatnonzero(np.diff(inside) < 0)
    if falls.size:
        before, after = inside[falls[0] : falls[0] + 2]
        raise ValueError(
            f"{name}: got {after} after {before}, expected offsets into one text that "
            "never fall."
        )
    return array.astype(np.int64)
