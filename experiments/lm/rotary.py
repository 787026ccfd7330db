"""Rotary positions: queries and keys are turned by angles that grow with position."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary positions, so that a model reads longer texts.

    A pair that turns less than ``low_frequency_factor`` times over the positions of
    the first training is slowed down by ``factor``; one that turns more than
    ``high_frequency_factor`` times stays as it is; in between, a blend.
    """

    factor: float
    """How many times slower."""
    low_frequency_factor: float
    """Turns below which a pair is slowed down in full."""
    high_frequency_factor: float
    """Turns above which a pair stays as it is."""
    original_positions: int
    """Length of the texts before the stretching."""

    def __post_init__(self) -> None:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not 0 < low < high:
            raise ValueError(
                f"low_frequency_factor: got {low} beside a high_frequency_factor of "
                f"{high}; expected 0 < low < high."
            )
        for name in ("factor", "original_positions"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}; expected more than 0."
                )


def frequencies(
    head_width: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Radians per position of every rotary pair, ``[head_width / 2]``.

    Args:
      head_width: of a query or key.
      theta: base; the slowest pair turns by nearly ``1 / theta`` per position.
      scaling: how slow pairs are slowed down further.

    Reference:
      Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021,
      section 3.2.2. arXiv:2104.09864
    """
    plain = theta ** -(np.arange(0, head_width, 2) / head_width)
    if scaling is None:
        return plain.astype(np.float32)
    turns = scaling.original_positions * plain / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (kept * plain + (1 - kept) * plain / scaling.factor).astype(np.float32)


class Rotation(NamedTuple):
    """How far the vectors of tokens are turned; called with vectors, it turns them.

    Attributes:
      cosine: of the angles, ``[B, T, 1, head_width / 2]``.
      sine: equal in shape.
    """

    cosine: Array
    sine: Array

    @classmethod
    def of(cls, positions: Array, frequencies: np.ndarray) -> Rotation:
        """That of tokens at ``positions [B, T]``."""
        angles = positions[..., None, None] * jnp.asarray(frequencies)
        return cls(jnp.cos(angles), jnp.sin(angles))

    def __call__(self, x: Array) -> Array:
        """Turns the pairs of vectors ``[B, T, heads, head_width]``.

        Entry i makes a pair with entry i + head_width / 2, as in checkpoints of
        Hugging Face's format; Meta's own Llama files pair neighbours.
        """
        first, second = jnp.split(x, 2, axis=-1)
        turned = (
            first * self.cosine - second * self.sine,
            second * self.cosine + first * self.sine,
        )
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
