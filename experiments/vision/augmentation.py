"""What a batch goes through before both models see it.

Teacher and student see the same view by construction: there is one batch.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.jobs.augmentation import crop
from kdjax.io.input import HostBatch


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The field's usual views; a transform of :func:`kdjax.io.input.batches`.

    Crops and flips depend on the bits of their own image alone. Mixup pairs the images
    of a batch, and so depends on who else is in it.

    Attributes:
      padding: of the random crop, in pixels; 0 for none.
      flip: whether half of the images are mirrored.
      mixup: alpha of the Beta distribution of the mix; 0 for none.
    """

    padding: int = 0
    flip: bool = True
    mixup: float = 0.0

    def __call__(self, batch: HostBatch, bits: np.ndarray) -> HostBatch:
        """The batch as seen; with mixup also ``partner_label`` and ``mix``, ``[B]``."""
        if self.flip:
            mirrored = (bits & 1).astype(bool)[:, None, None, None]
            batch = batch | {
                "x": np.where(mirrored, batch["x"][:, :, ::-1], batch["x"])
            }
        batch = crop(batch, bits >> 1, padding=self.padding)
        return mixed(batch, bits, self.mixup) if self.mixup else batch


def mixed(batch: HostBatch, bits: np.ndarray, alpha: float) -> HostBatch:
    """Blends each image with the one before it in the batch.

    Args:
      batch: ``x``, ``[B, H, W, C]``, and ``label``, ``[B]``.
      bits: uint64 ``[B]``; the first decides on the blend of the whole batch.
      alpha: the blend is drawn from Beta(alpha, alpha).

    Returns:
      The batch with the blended ``x``, float32, the ``partner_label`` of each image,
      and ``mix``, float32 ``[B]``: how much of the image is its own.

    Reference:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, 2017. arXiv:1710.09412
    """
    mix = np.float32(np.random.default_rng(int(bits[0])).beta(alpha, alpha))
    x = batch["x"].astype(np.float32)
    return batch | {
        "x": mix * x + (1 - mix) * np.roll(x, 1, axis=0),
        "partner_label": np.roll(batch["label"], 1),
        "mix": np.full(len(x), mix),
    }
