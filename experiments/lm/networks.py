"""Decoders as kdjax takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from experiments.jobs.networks import seeded_key
from experiments.lm.model import Decoder, DecoderConfig
from kdjax import Adapted
from kdjax.models import from_nnx

INPUTS = ("tokens", "segments")
"""Entries of a batch that a decoder reads."""


def network(
    config: DecoderConfig,
    *,
    seed: int = 0,
    features: Sequence[str] = (),
    inputs: Sequence[str] = INPUTS,
) -> Adapted:
    """A decoder with the initial weights of a seed.

    Args:
      config: its shape.
      seed: of the weights.
      features: what it shows besides its logits.
      inputs: entries of the batch with its tokens and their segments.
    """
    module = _initialiser(config)(seeded_key(seed))
    return from_nnx(module, inputs=inputs, features=features)


# Compiled as a whole, which is faster than a program for each shape.
@functools.lru_cache
def _initialiser(config: DecoderConfig) -> Callable[[jax.Array], Decoder]:
    return nnx.jit(lambda key: Decoder(config, rngs=nnx.Rngs(key)))
