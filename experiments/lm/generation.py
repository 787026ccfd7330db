"""Sampling from a decoder, the whole loop in one compiled program."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.lm.model import Cache, DecoderConfig, with_params
from kdjax import LinearHead
from kdjax.types import PyTree


class Generated(NamedTuple):
    """Prompts and what a decoder wrote behind them.

    Attributes:
      tokens: each prompt, its continuation right behind it, then zeros,
        ``[B, P + new_tokens]``.
      mask: the tokens that were sampled, a stop token included; equal in shape.
      log_probs: of each sampled token given all before it, 0 elsewhere; under the
        model itself, without temperature and filters.
    """

    tokens: Array
    mask: Array
    log_probs: Array


def generate(
    config: DecoderConfig,
    params: PyTree,
    prompts: Array,
    lengths: Array,
    *,
    rng: Array,
    new_tokens: int,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    stop_tokens: tuple[int, ...] = (),
) -> Generated:
    """Samples a continuation of every prompt.

    Keys and values are kept, so that a token costs one pass over those before it. The
    loop ends early when all texts have. It is compiled once for all temperatures,
    keys, lengths and stop tokens.

    Args:
      config: of the decoder.
      params: its parameters.
      prompts: ``[B, P]``, with any padding behind; see :func:`padded_behind`.
      lengths: tokens of each prompt, ``[B]``, from 1 to P.
      rng: key; each step takes a part of its own.
      new_tokens: how many are sampled at most.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: sample from so many of the likeliest tokens; ``None`` for all.
      top_p: sample from the likeliest tokens that have this probability together,
        after temperature and ``top_k``; ``None`` for all.
      stop_tokens: a text ends with any of them.

    Returns:
      Tokens, which of them were sampled, and their log-probabilities.

    Raises:
      ValueError: shapes do not fit, or a number is out of its range.
      TypeError: tokens or lengths that are not integers.

    Reference:
      Holtzman et al., The Curious Case of Neural Text Degeneration, 2019, section 3.1
      (top-p). arXiv:1904.09751
    """
    _check(config, prompts, lengths, new_tokens, temperature, top_k, top_p, stop_tokens)
    stops = jnp.asarray(stop_tokens, jnp.int32)
    return _generate(
        config, params, prompts, lengths, rng, new_tokens,
        temperature, top_k, top_p, stops,
    )  # fmt: skip


class _Loop(NamedTuple):
    """What a step of the loop hands to the next."""

    step: Array
    written: Generated
    ended: Array
    caches: tuple[Cache, ...]


@functools.partial(jax.jit, static_argnums=(0, 5, 7), inline=True)
def _generate(
    config: DecoderConfig,
    params: PyTree,
    prompts: Array,
    lengths: Array,
    rng: Array,
    new_tokens: int,
    temperature: Array,
    top_k: int | None,
    top_p: Array | None,
    stops: Array,
) -> Generated:
    batch, width = prompts.shape
    slots = width + new_tokens
    index = jnp.arange(slots)

    def unfinished(loop: _Loop) -> Array:
        return (loop.step < new_tokens) & ~loop.ended.all()

    def step(loop: _Loop) -> _Loop:
        tokens, mask, log_probs = loop.written
        last = lengths - 1 + loop.step
        # Flax has a module belong to the loop whose body uses it.
        decoder = with_params(config, params)
        read = jnp.take_along_axis(tokens, last[:, None], 1)
        head, caches = decoder.decode(read, last, loop.caches)
        logits = _logits(head)[:, 0]
        key = jax.random.fold_in(rng, loop.step)
        chosen = _sample(key, logits, temperature, top_k, top_p).astype(tokens.dtype)
        scores = jax.nn.log_softmax(logits)
        log_prob = jnp.take_along_axis(scores, chosen[:, None], 1)
        here = (index == last[:, None] + 1) & ~loop.ended[:, None]
        written = Generated(
            jnp.where(here, chosen[:, None], tokens),
            mask | here,
            jnp.where(here, log_prob, log_probs),
        )
        ended = loop.ended | jnp.isin(chosen, stops)
        return _Loop(loop.step + 1, written, ended, caches)

    inside = index[:width] < lengths[:, None]
    tokens = jnp.pad(jnp.where(inside, prompts, 0), ((0, 0), (0, new_tokens)))
    none = Generated(tokens, jnp.zeros(tokens.shape, bool), jnp.zeros(tokens.shape))
    # The first step reads the last token of each prompt again, for its logits.
    first, caches = jnp.zeros_like(lengths), Cache.empty(config, batch, slots)
    _, caches = with_params(config, params).decode(tokens[:, :width], first, caches)
    start = _Loop(jnp.zeros((), jnp.int32), none, jnp.zeros(batch, bool), caches)
    return jax.lax.while_loop(unfinished, step, start).written


def _logits(head: LinearHead) -> Array:
    """In float32, whatever the dtype of the model."""
    products = jnp.matmul(head.hidden, head.kernel, preferred_element_type=jnp.float32)
    return head.finished(products)


def _sample(
    key: Array,
    logits: Array,
    temperature: Array,
    top_k: int | None,
    top_p: Array | None,
) -> Array:
    """One token for each row of ``[B, V]``."""
    greedy = jnp.argmax(logits, -1)
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return jnp.where(temperature > 0, jax.random.categorical(key, logits), greedy)


def keep_top_k(logits: Array, top_k: int) -> Array:
    """Sets all but the ``top_k`` highest logits ``[..., V]`` to -inf.

    Of equal ones the first stay, as in an argmax.
    """
    values, indices = jax.lax.top_k(logits, top_k)
    return _placed(values, indices, logits)


def keep_top_p(logits: Array, top_p: float | Array) -> Array:
    """Sets logits ``[..., V]`` outside of the nucleus to -inf.

    It is the smallest set of the likeliest tokens that have at least the probability
    ``top_p`` together; the likeliest token is always in it. With 1 or more it is all.
    """
    indices = jnp.argsort(logits, axis=-1, descending=True)
    values = jnp.take_along_axis(logits, indices, -1)
    probabilities = jax.nn.softmax(values, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    first = jnp.arange(logits.shape[-1]) == 0
    # Rounded, the sum may be 1 before the last tokens.
    kept = first | (before < top_p) | (jnp.asarray(top_p) >= 1)
    return _placed(jnp.where(kept, values, -jnp.inf), indices, logits)


def _placed(values: Array, indices: Array, logits: Array) -> Array:
    """Logits of which these are left."""
    nothing = jnp.full_like(logits, -jnp.inf)
    return jnp.put_along_axis(nothing, indices, values, axis=-1, inplace=False)


def padded_behind(tokens: Array, where: Array) -> tuple[Array, Array]:
    """Moves the padding of prompts behind them.

    Args:
      tokens: ``[B, P]``.
      where: which of them are real, ``[B, P]``.

    Returns:
      The tokens ``[B, P]``, those of each prompt first and in their order, and the
      lengths ``[B]`` of the prompts.
    """
    order = jnp.argsort(~where, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, 1), where.sum(1)


def _check(
    config: DecoderConfig,
    prompts: Array,
    lengths: Array,
    new_tokens: int,
    temperature: float | Array,
    top_k: int | None,
    top_p: float | Array | None,
    stop_tokens: tuple[int, ...],
) -> None:
    if prompts.ndim != 2:
        raise ValueError(f"prompts: got shape {prompts.shape}; expected [B, P].")
    if lengths.shape != prompts.shape[:1]:
        raise ValueError(
            f"lengths: got shape {lengths.shape} for prompts {prompts.shape}; expected "
            "one entry per prompt."
        )
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths: got {lengths.dtype}; expected integers.")
    if not isinstance(lengths, jax.core.Tracer):
        width, given = prompts.shape[1], np.asarray(lengths)
        wrong = given[(given < 1) | (given > width)].tolist()
        if wrong:
            raise ValueError(f"lengths: got {wrong}; expected 1 to {width}.")
    if new_tokens < 1:
        raise ValueError(f"new_tokens: got {new_tokens}; expected at least 1.")
    if isinstance(temperature, _NUMBERS) and not temperature >= 0:
        raise ValueError(f"temperature: got {temperature}; expected 0 or more.")
    if top_k is not None and not 1 <= top_k <= config.vocabulary:
        raise ValueError(
            f"top_k: got {top_k}; expected 1 to {config.vocabulary}, the vocabulary."
        )
    if isinstance(top_p, _NUMBERS) and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}; expected more than 0 and at most 1.")
    beyond = [each for each in stop_tokens if not 0 <= each < config.vocabulary]
    if beyond:
        raise ValueError(
            f"stop_tokens: got {beyond}; expected tokens below {config.vocabulary}."
        )


# What is known while a step is compiled.
_NUMBERS = (int, float, np.integer, np.floating)
