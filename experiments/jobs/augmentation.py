"""What is done to the images of a batch, by random bits of each image."""

from __future__ import annotations

import numpy as np

from kdjax.io.input import HostBatch


def crop(batch: HostBatch, bits: np.ndarray, *, padding: int) -> HostBatch:
    """Moves every image by up to ``padding`` pixels each way, black beyond its edge.

    Args:
      batch: ``x`` is ``[B, H, W, C]``.
      bits: uint64 ``[B]``; see :func:`kdjax.io.input.batches`.
      padding: pixels; 0 moves nothing.

    Returns:
      The batch with another ``x``, of the same size and type.
    """
    x = batch["x"]
    height, width = x.shape[1:3]
    sides = (padding, padding)
    padded = np.pad(x, ((0, 0), sides, sides, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (1, 2))
    places = 2 * padding + 1
    down, right = (bits % places).astype(int), (bits // places % places).astype(int)
    moved = windows[np.arange(len(x)), down, right]  # [B, C, H, W]
    return batch | {"x": np.ascontiguousarray(moved.transpose(0, 2, 3, 1))}
