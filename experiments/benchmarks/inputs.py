"""What every loss is measured on, with NumPy alone: PyTorch's process draws it too."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LOSSES = ("forward_kl", "reverse_kl", "jensen_shannon", "knowledge_distillation")
TEMPERATURE = 2.0
ALPHA = 0.5


class Inputs(NamedTuple):
    student: np.ndarray
    teacher: np.ndarray
    labels: np.ndarray


def draw(tokens: int, vocabulary: int) -> Inputs:
    """Logits with the spread of a language model's, and labels."""
    rng = np.random.default_rng(0)
    shape = tokens, vocabulary
    student, teacher = (
        3 * rng.standard_normal(shape, dtype=np.float32) for _ in range(2)
    )
    return Inputs(
        student, teacher, rng.integers(vocabulary, size=tokens, dtype="int32")
    )


class HeadInputs(NamedTuple):
    """Hidden states ``[N, D]`` and kernel ``[D, V]`` of both sides, and labels."""

    student: tuple[np.ndarray, np.ndarray]
    teacher: tuple[np.ndarray, np.ndarray]
    labels: np.ndarray


def draw_heads(tokens: int, vocabulary: int, width: int) -> HeadInputs:
    """Heads whose logits have that spread too; the teacher's is twice as wide."""
    rng = np.random.default_rng(0)

    def head(width: int) -> tuple[np.ndarray, np.ndarray]:
        hidden = rng.standard_normal((tokens, width), dtype=np.float32)
        kernel = rng.standard_normal((width, vocabulary), dtype=np.float32)
        return hidden, np.float32(3 / width**0.5) * kernel

    student, teacher = head(width), head(2 * width)
    labels = rng.integers(vocabulary, size=tokens, dtype="int32")
    return HeadInputs(student, teacher, labels)
