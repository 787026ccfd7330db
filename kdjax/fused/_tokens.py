"""Tokens in a row, and split over a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdjax.losses._rows import wide_dtype
from kdjax.types import LinearHead

CHUNK_BYTES = 2**26
"""Memory for a chunk's logits of student and teacher and their gradient, on each
device, by default: 64 MiB."""

LEAST_TOKENS = 128
"""Tokens of a chunk by default at least, whatever their logits take: with fewer, matrix
products would wait for the kernel to be read."""

LEAST_TOKENS_ON_CPU = 192
"""The same on a CPU, where each chunk also packs the kernel for its products anew."""

TOKEN_AXES = ("data", "fsdp")
"""Axes of a mesh that tokens are split over, by default."""


class Rows(NamedTuple):
    """Tokens ``[*batch]`` as one axis that the devices divide.

    Attributes:
      batch: their shape.
      axes: of the mesh around this, which they are split over.
      padding: how many are added, copies of the first.
      class_shards: devices that the mesh has for each part of them, which classes are
        taken to be split over.
      platform: of the mesh's devices, or else JAX's default.
    """

    batch: tuple[int, ...]
    axes: tuple[str, ...]
    padding: int
    class_shards: int
    platform: str

    @classmethod
    def of(cls, batch: tuple[int, ...], token_axes: Sequence[str]) -> Rows:
        """As the mesh around this wants them."""
        if isinstance(token_axes, str):
            raise TypeError(
                f"token_axes: got {token_axes!r}, expected a sequence of names: "
                f"({token_axes!r},)."
            )
        mesh = jax.sharding.get_abstract_mesh()
        free = set(mesh.axis_names) - set(mesh.manual_axes)
        axes = tuple(
            name for name in token_axes if name in free and mesh.shape[name] > 1
        )
        shards = math.prod(mesh.shape[name] for name in axes)
        all_shards = math.prod(mesh.shape[name] for name in free)
        padding = -math.prod(batch) % shards
        device = mesh.abstract_device
        platform = device.platform if device else jax.default_backend()
        return cls(batch, axes, padding, all_shards // shards, platform)

    def chunk_of(self, head: LinearHead) -> int:
        """How many tokens have logits at a time on each device, by default."""
        classes, dtype = head.kernel.shape[1], wide_dtype(head.hidden, head.kernel)
        token_bytes = 3 * classes * dtype.itemsize
        least = LEAST_TOKENS_ON_CPU if self.platform == "cpu" else LEAST_TOKENS
        tokens = max(least, CHUNK_BYTES // max(1, token_bytes))
        return tokens * self.class_shards

    def joined(self, array: Array) -> Array:
        """From ``[*batch, ...]`` to ``[N, ...]``."""
        array = jnp.asarray(array)
        rest = array.shape[len(self.batch) :]
        array = array.reshape(math.prod(self.batch), *rest)
        if not self.padding:
            return array
        # Not zeros, which random keys have none of.
        copies = jnp.broadcast_to(array[:1], (self.padding, *rest))
        return jnp.concatenate([array, copies])

    def counted(self, counts: Array) -> Array:
        """A mask ``[*batch]`` as ``[N]``, false for what was added."""
        return jnp.pad(counts.ravel(), (0, self.padding))

    def parted(self, array: Array) -> Array:
        """From ``[N, ...]`` to ``[*batch, ...]``."""
        tokens = array.shape[0] - self.padding
        return array[:tokens].reshape(*self.batch, *array.shape[1:])
