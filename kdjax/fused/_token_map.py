"""Any function of logits, token by token, without all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from kdjax.fused import _checks
from kdjax.fused._chunks import mapped, per_token
from kdjax.fused._tokens import TOKEN_AXES, Rows
from kdjax.types import LinearHead, PyTree


def token_map(
    function: Callable[..., PyTree],
    head: LinearHead,
    *per_token_args: PyTree,
    chunk_size: int | None = None,
    token_axes: Sequence[str] = TOKEN_AXES,
) -> PyTree:
    """Computes anything per token from logits that are multiplied out chunk by chunk.

    The teacher's sparse targets, say, or predictions: what is kept of 150000 logits is
    then all that exists of them. What is drawn at random takes a key for each token,
    so that it is the same for every size of a chunk.

    Under a mesh it runs as :func:`token_mean` does, each device with its own tokens;
    like that one, it belongs within ``jax.jit``.

    Args:
      function: ``function(logits, *per_token_args)`` for logits ``[n, V]`` of any
        ``n`` tokens to a tree of arrays ``[n, ...]``.
      head: hidden states ``[*batch, D]`` and their head.
      *per_token_args: labels or keys, say: arrays ``[*batch, ...]``, trees of them, or
        further heads, which become logits.
      chunk_size: as for :func:`token_mean`.
      token_axes: likewise.

    Returns:
      The tree of ``function`` for all tokens, arrays ``[*batch, ...]``. It has no
      gradient.

    Raises:
      ValueError: shapes do not fit, ``chunk_size`` is below 1, or ``function`` gives
        arrays without an entry for each token.
      TypeError: ``head`` is no :class:`~kdjax.types.LinearHead`, or a dtype is wrong.

    Example:
      >>> import functools
      >>> from kdjax import losses
      >>> teacher = LinearHead(jnp.eye(4, 3), jnp.eye(3, 5))
      >>> top_two = functools.partial(losses.top_k_targets, k=2)
      >>> token_map(top_two, teacher).indices[:, 0]
      Array([0, 1, 2, 0], dtype=int32)
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> draw = lambda logits, keys: losses.sampled_targets(keys, logits, 12)
      >>> token_map(draw, teacher, keys).weights.shape
      (4, 12)
    """
    given = {"head": head} | _checks.named(per_token_args)
    batch = _checks.arguments(given, chunk_size)
    rows = Rows.of(batch, token_axes)
    inputs = per_token(rows.joined, (head, per_token_args))
    size = chunk_size or rows.chunk_of(head)
    return jax.tree.map(rows.parted, mapped(function, size, rows.axes, *inputs))
