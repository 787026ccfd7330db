"""Texts that models make to learn from: rows of the data, gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.lm.generation import generate, padded_behind
from experiments.lm.model import DecoderConfig
from kdjax.types import Batch, PyTree

SCORED = "scored"
"""Entry of a batch: the tokens that a model has made, which are learnt from."""


class Continuation(NamedTuple):
    """How a row is gone on with.

    Attributes:
      prompt: tokens of the row that are kept.
      stop: the token that ends a text.
      temperature: of sampling.
      top_k: the tokens that may be drawn; ``None`` for all.
      top_p: the share of probability that may be drawn; ``None`` for all.
    """

    prompt: int
    stop: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __call__(
        self,
        config: DecoderConfig,
        params: PyTree,
        tokens: Array,
        segments: Array,
        rng: Array,
    ) -> dict[str, Array]:
        """Rows with the same beginnings.

        Where a text ends in a prompt and another begins, the prompt is what is there
        of the other.

        Args:
          config: of the decoder that goes on.
          params: its parameters.
          tokens: ``[B, T]``, of which the prompts are read.
          segments: which text each token is of, ``[B, T]``.
          rng: key.

        Returns:
          Entries of a batch, ``[B, T]`` each: tokens, segments, and which are scored.
        """
        length = tokens.shape[1]
        read = segments[:, : self.prompt]
        prompts, lengths = padded_behind(
            tokens[:, : self.prompt], read == read[:, -1, None]
        )
        made = generate(
            config,
            params,
            prompts,
            lengths,
            rng=rng,
            new_tokens=length - self.prompt,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_tokens=(self.stop,),
        )
        inside = made.mask | (jnp.arange(length) < lengths[:, None])
        return {
            "tokens": made.tokens,
            # What is behind the end is a segment of its own.
            "segments": inside.astype(jnp.int32),
            SCORED: made.mask,
        }


def as_data(batch: Batch) -> dict[str, Array]:
    """The same entries of rows of the data, which are scored as a whole."""
    tokens, segments = batch["tokens"], batch["segments"]
    return {
        "tokens": tokens,
        "segments": segments,
        SCORED: jnp.ones(tokens.shape, bool),
    }


def in_groups(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Rows by so many as a model goes through at a time."""
    for first in range(0, len(arrays[0]), _ROWS):
        yield tuple(array[first : first + _ROWS] for array in arrays)


_ROWS = 64


def step_key(rng: Array, step: Array) -> Array:
    """The key of a step's texts, apart from the one of its dropout."""
    return jax.random.fold_in(jax.random.fold_in(rng, step), _TEXTS)


_TEXTS = 0x7E87
