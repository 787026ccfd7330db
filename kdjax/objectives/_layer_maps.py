"""Which layer of a deep teacher each layer of its student is to match."""

from __future__ import annotations


def uniform_layers(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Pairs every student layer with the end of its share of the teacher's layers.

    Args:
      student_layers: how many the student has.
      teacher_layers: how many the teacher has, at least as many.

    Returns:
      Pairs of indices, student first, both from 0; the last layers are a pair.

    Raises:
      ValueError: a number is below 1, or the student has more layers.

    Example:
      >>> uniform_layers(4, 12)
      [(0, 2), (1, 5), (2, 8), (3, 11)]

    Reference:
      Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, 2019,
      section 3. arXiv:1909.10351
    """
    _check(student_layers, teacher_layers)
    return [
        (layer, (layer + 1) * teacher_layers // student_layers - 1)
        for layer in range(student_layers)
    ]


def last_layers(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Pairs the student's layers with as many of the teacher's last ones, in order.

    Args:
      student_layers: how many the student has.
      teacher_layers: how many the teacher has, at least as many.

    Returns:
      Pairs of indices, student first, both from 0; the last layers are a pair.

    Raises:
      ValueError: a number is below 1, or the student has more layers.

    Example:
      >>> last_layers(3, 12)
      [(0, 9), (1, 10), (2, 11)]

    Reference:
      Sun et al., Patient Knowledge Distillation for BERT Model Compression, 2019,
      section 3.2 (PKD-Last). arXiv:1908.09355
    """
    _check(student_layers, teacher_layers)
    skipped = teacher_layers - student_layers
    return [(layer, layer + skipped) for layer in range(student_layers)]


def _check(student_layers: int, teacher_layers: int) -> None:
    for name, count in (("student", student_layers), ("teacher", teacher_layers)):
        if count < 1:
            raise ValueError(f"{name}_layers: got {count}; expected at least 1.")
    if student_layers > teacher_layers:
        raise ValueError(
            f"student_layers: got {student_layers}, more than the teacher's "
            f"{teacher_layers}; give explicit pairs instead."
        )
