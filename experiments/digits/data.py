"""The 1,797 digits that scikit-learn ships, split once and for all."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from sklearn.datasets import load_digits

from kdjax.io.input import HostBatch

Images: TypeAlias = dict[str, np.ndarray]
"""``x``, float32 ``[N, 8, 8, 1]`` in [0, 1], and ``label``, int32 ``[N]``."""

CLASSES = 10
UNLABELLED = -100


class Digits(NamedTuple):
    """The three parts; every class is spread 60 : 20 : 20 over them.

    Attributes:
      train: what models learn from.
      validation: what settings were chosen on, and curves are drawn of.
      test: what the table reports, looked at nowhere else.
    """

    train: Images
    validation: Images
    test: Images


def load() -> Digits:
    """Loads and splits; the split is always the same."""
    source = load_digits()
    x = (source.images[..., None] / 16).astype(np.float32)
    label = source.target.astype(np.int32)
    rng = np.random.default_rng(0)
    parts: list[list[np.ndarray]] = [[], [], []]
    for digit in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(label == digit))
        borders = [len(rows) * 6 // 10, len(rows) * 8 // 10]
        for part, own in zip(parts, np.split(rows, borders), strict=True):
            part.append(own)
    index = [np.sort(np.concatenate(part)) for part in parts]
    return Digits(*({"x": x[rows], "label": label[rows]} for rows in index))


def hide_labels(images: Images, per_class: int, seed: int) -> Images:
    """Leaves the labels of some images of every class, drawn by the seed.

    Args:
      images: all labelled.
      per_class: how many stay labelled in each class.
      seed: of the draw.

    Returns:
      The same images; ``label`` is -100 where it is hidden.

    Raises:
      ValueError: a class has fewer images.
    """
    most = int(np.bincount(images["label"], minlength=CLASSES).min())
    if per_class > most:
        raise ValueError(
            f"--labels-per-class: got {per_class}; expected 1 to {most}, which every "
            "class has in the training part."
        )
    rng = np.random.default_rng(seed)
    label = np.full_like(images["label"], UNLABELLED)
    for digit in range(CLASSES):
        rows = np.flatnonzero(images["label"] == digit)
        label[rng.choice(rows, per_class, replace=False)] = digit
    return {"x": images["x"], "label": label}


def labelled_only(images: Images) -> Images:
    """Drops the images without a label."""
    kept = images["label"] >= 0
    return {name: array[kept] for name, array in images.items()}


def shift(batch: HostBatch, bits: np.ndarray) -> HostBatch:
    """Moves every image by up to one pixel each way, by its own random bits."""
    x = batch["x"]
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (1, 2))
    down, right = (bits % 3).astype(int), (bits // 3 % 3).astype(int)
    moved = windows[np.arange(len(x)), down, right]  # [B, C, H, W]
    return batch | {"x": np.ascontiguousarray(moved.transpose(0, 2, 3, 1))}
