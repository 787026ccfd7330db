"""The kinds of students that are compared."""

from __future__ import annotations

import dataclasses

from etils.epath import Path


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a student is trained.

    Attributes:
      name: of its folder.
      title: in tables and pictures.
      few: whether it sees only some of the labels.
      distilled: whether it learns from the teacher, or from labels alone.
      unlabelled: whether it also sees the images without labels.
    """

    name: str
    title: str
    few: bool
    distilled: bool
    unlabelled: bool = False

    def folder(self, out: Path, seed: int) -> Path:
        """Where the training with a seed is kept."""
        return out / self.name / f"seed-{seed}"

    def __str__(self) -> str:
        return f"{'few' if self.few else 'all'} labels, {self.title}"


FEW_ALONE = Kind("few-alone", "alone", few=True, distilled=False)
# Tells what the teacher adds on the images that the student alone sees too.
FEW_SAME_IMAGES = Kind(
    "few-distilled-labelled", "distilled, same images", few=True, distilled=True
)
FEW_DISTILLED = Kind(
    "few-distilled", "distilled, all images", few=True, distilled=True, unlabelled=True
)
ALL_ALONE = Kind("all-alone", "alone", few=False, distilled=False)
ALL_DISTILLED = Kind("all-distilled", "distilled", few=False, distilled=True)

KINDS = (FEW_ALONE, FEW_SAME_IMAGES, FEW_DISTILLED, ALL_ALONE, ALL_DISTILLED)
