"""The 1,797 digits that scikit-learn ships, split once and for all."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from experiments.jobs.augmentation import crop
from experiments.jobs.data import Parts
from kdjax.io.input import HostBatch

CLASSES = 10


def load() -> Parts:
    """Loads and splits; the split is always the same.

    Returns:
      Images ``x``, float32 ``[N, 8, 8, 1]`` in [0, 1], and ``label``, int32 ``[N]``;
      every class is spread 60 : 20 : 20 over the parts.
    """
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
    return Parts(*({"x": x[rows], "label": label[rows]} for rows in index))


def shift(batch: HostBatch, bits: np.ndarray) -> HostBatch:
    """Moves every image by up to one pixel each way, by its own random bits."""
    return crop(batch, bits, padding=1)
