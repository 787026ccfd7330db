"""Images with labels, in three parts, of which some labels may be hidden."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from kdjax.losses import UNSCORED

Images: TypeAlias = dict[str, np.ndarray]
"""``x``, ``[N, H, W, C]``, and ``label``, int32 ``[N]``."""


class Parts(NamedTuple):
    """The three parts of a set of images.

    Attributes:
      train: what models learn from.
      validation: what settings were chosen on, and curves are drawn of.
      test: what the table reports, and nothing is chosen by.
    """

    train: Images
    validation: Images
    test: Images


def fewest(images: Images, classes: int) -> int:
    """How many images the class has that has the fewest."""
    return int(np.bincount(images["label"], minlength=classes).min())


def hide_labels(images: Images, per_class: int, seed: int) -> Images:
    """Leaves the labels of some images of every class, drawn by the seed.

    Args:
      images: all labelled.
      per_class: how many stay labelled in each class; at most :func:`fewest`.
      seed: of the draw.

    Returns:
      The same images; ``label`` is -100 where it is hidden.
    """
    rng = np.random.default_rng(seed)
    label = np.full_like(images["label"], UNSCORED)
    for each in np.unique(images["label"]):
        rows = np.flatnonzero(images["label"] == each)
        label[rng.choice(rows, per_class, replace=False)] = each
    return {"x": images["x"], "label": label}


def labelled_only(images: Images) -> Images:
    """Drops the images without a label."""
    kept = images["label"] >= 0
    return {name: array[kept] for name, array in images.items()}
