"""Sequences of tokens: what each position is to predict, and chunks of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Integer

from kdjax.losses import _checks
from kdjax.losses._kl_core import forward_core
from kdjax.losses._labels import wide_integers, widened
from kdjax.losses._rows import wide_dtype
from kdjax.types import LinearHead

UNSCORED = -100
"""The label of what is not to be predicted, as in PyTorch; all below 0 mean it."""


def next_token(
    logits: Float[Array, "*batch T V"] | LinearHead,
    tokens: Integer[Array, "*batch T"],
    where: Bool[Array, "*batch T"] | None = None,
    *,
    segments: Integer[Array, "*batch T"] | None = None,
) -> tuple[Float[Array, "*batch L V"] | LinearHead, Integer[Array, "*batch L"]]:
    """Puts every position beside the token it is to predict, the next one.

    Args:
      logits: of every position of a sequence, ``[..., T, V]``, or the head over its
        hidden states ``[..., T, D]``.
      tokens: the sequence itself, integers ``[..., T]``.
      where: tokens that are real, ``[..., T]``; the others are padding, on either side.
      segments: numbers of the texts that are packed into one sequence, ``[..., T]``;
        none predicts the first token of the next.

    Returns:
      The logits without their last position, ``[..., T - 1, V]`` or a head, and the
      labels ``[..., T - 1]``: the next tokens, or -100, which no loss scores, where
      the position or the next token is padding, or the text ends.

    Raises:
      ValueError: shapes do not fit.
      TypeError: tokens or segments that are not integers, a mask that is not boolean.

    Example:
      >>> logits, tokens = jnp.zeros((4, 10)), jnp.array([7, 8, 9, 0])
      >>> logits, labels = next_token(logits, tokens, jnp.array([1, 1, 1, 0], bool))
      >>> logits.shape, labels
      ((3, 10), Array([   8,    9, -100], dtype=int32))
    """
    positions = logits.hidden if isinstance(logits, LinearHead) else logits
    shape = jnp.shape(positions)[:-1]
    if not shape:
        raise ValueError("logits: got no axis of positions, expected [..., T, V].")
    _integers(shape, tokens=tokens)
    if where is not None:
        _checks.boolean(shape, where=where)
    if segments is not None:
        _integers(shape, segments=segments)

    tokens = wide_integers(tokens)
    scored = jnp.ones(tokens[..., 1:].shape, bool)
    if where is not None:
        scored &= where[..., :-1] & where[..., 1:]
    if segments is not None:
        scored &= segments[..., :-1] == segments[..., 1:]
    labels = jnp.where(scored, tokens[..., 1:], UNSCORED)
    before_last = positions[..., :-1, :]
    if isinstance(logits, LinearHead):
        return logits._replace(hidden=before_last), labels
    return before_last, labels


def _integers(shape: tuple[int, ...], **arrays: Array) -> None:
    """Every array holds integers, one for each position."""
    for name, array in arrays.items():
        dtype = _checks.dtype_of(name, array)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f"{name}: got dtype {dtype}, expected integers.")
        if jnp.shape(array) != shape:
            raise ValueError(
                f"{name}: got shape {jnp.shape(array)}, expected {shape}, one for each "
                "position."
            )


def _over_chunks(log_probs: Array, chunks: Array, count: int) -> tuple[Array, Array]:
    """Sums and numbers of tokens by chunk, ``[count]``, of a sequence ``[T]``."""
    chunks = wide_integers(chunks)
    places = jnp.where(chunks < 0, count, chunks)
    # What is in no chunk may be NaN.
    log_probs = jnp.where(chunks < 0, 0, log_probs)
    sums = jnp.zeros(count, log_probs.dtype).at[places].add(log_probs, mode="drop")
    return sums, jnp.zeros(count, int).at[places].add(1, mode="drop")


@functools.partial(jax.jit, inline=True, static_argnames="chunks")
def _chunk_likelihood(
    student_log_probs: Array,
    teacher_log_probs: Array,
    student_chunks: Array,
    teacher_chunks: Array,
    temperature: Array,
    *,
    chunks: int,
) -> Array:
    dtype = wide_dtype(student_log_probs, teacher_log_probs)
    summed = jnp.vectorize(
        functools.partial(_over_chunks, count=chunks), signature="(t),(t)->(c),(c)"
    )
    softening = jnp.asarray(temperature, dtype)

    def outcomes(log_probs: Array, ids: Array) -> tuple[Array, Array]:
        """Log-probabilities of saying the chunk, and of anything else."""
        sums, tokens = summed(widened(log_probs), ids)
        # A probability that rounds to 1: what is left of it has to be something.
        likely = jnp.minimum(sums, -jnp.finfo(dtype).eps) / softening
        return jnp.stack([likely, jnp.log(-jnp.expm1(likely))], -1), tokens > 0

    student, by_student = outcomes(student_log_probs, student_chunks)
    teacher, by_teacher = outcomes(teacher_log_probs, teacher_chunks)
    there = by_student & by_teacher
    logits = (jnp.where(there[..., None], each, 0) for each in (student, teacher))
    return softening * forward_core(*logits, jnp.ones((), dtype))


def chunk_likelihood(
    student_log_probs: Float[Array, "*batch S"],
    teacher_log_probs: Float[Array, "*batch T"],
    student_chunks: Integer[Array, "*batch S"],
    teacher_chunks: Integer[Array, "*batch T"],
    *,
    chunks: int,
    temperature: float | Array = 100.0,
) -> Float[Array, "*batch chunks"]:
    r"""Pulls the probability of each stretch of text, however it is cut into tokens.

    .. math:: \tau \Bigl[ P \log \frac{P}{Q} + (1 - P) \log \frac{1 - P}{1 - Q} \Bigr],
       \quad P = \Bigl( \prod_{i \in c} p_i \Bigr)^{1 / \tau}, \;
       Q = \Bigl( \prod_{j \in c} q_j \Bigr)^{1 / \tau}

    for each chunk c that begins and ends in both tokenizations (approximate likelihood
    matching, ALM). The factor is the temperature, not its square, which is what keeps
    the size of the gradient here: with a and b for minus the logarithms of the chunk's
    probabilities by teacher and student, the loss tends to
    :math:`a \log (a / b) - a + b`. The published code has no factor.

    Args:
      student_log_probs: log-probabilities of the student's tokens of a text, each given
        those before, ``[..., S]``.
      teacher_log_probs: the same of the teacher's tokens of the text, ``[..., T]``.
      student_chunks: the chunk of each token, integers below ``chunks``, ``[..., S]``;
        negative for none, such as special tokens and padding.
        :func:`kdjax.io.alignment.align_chunks` finds them.
      teacher_chunks: the same of the teacher's tokens, ``[..., T]``.
      chunks: how many there are at most.
      temperature: of the chunks' probabilities; positive.

    Returns:
      One value per chunk, ``[..., chunks]``: 0, without a gradient, for chunks without
      tokens on either side, which ``Mean.of`` should not count. +inf where the student
      excludes a chunk that the teacher does not.

    Raises:
      ValueError: shapes do not fit, a chunk is out of range (where it can be seen; else
        it is left out), or a number is out of its range.
      TypeError: log-probabilities that are not floating, chunks that are not integers.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25]))
      >>> ids = jnp.array([0, 0]), jnp.array([0])
      >>> chunk_likelihood(student, teacher, *ids, chunks=1).round(4)
      Array([0.], dtype=float32)

    Reference:
      Minixhofer, Vulić and Ponti, Universal Cross-Tokenizer Distillation via
      Approximate Likelihood Matching, 2025. arXiv:2503.20083
    """
    _checks.real("[..., S]", student_log_probs=student_log_probs)
    _checks.real("[..., T]", teacher_log_probs=teacher_log_probs)
    shapes = jnp.shape(student_log_probs), jnp.shape(teacher_log_probs)
    if shapes[0][:-1] != shapes[1][:-1]:
        raise ValueError(
            "student_log_probs {} and teacher_log_probs {}: expected the same "
            "texts.".format(*shapes)
        )
    _integers(shapes[0], student_chunks=student_chunks)
    _integers(shapes[1], teacher_chunks=teacher_chunks)
    _checks.whole(chunks=chunks)
    _checks.positive(temperature=temperature)
    _checks.scale((), temperature=temperature)
    sides = {"student_chunks": student_chunks, "teacher_chunks": teacher_chunks}
    for name, ids in sides.items():
        if isinstance(ids, jax.core.Tracer):
            continue
        largest = np.asarray(ids, np.int64).max(initial=-1)
        if largest >= chunks:
            raise ValueError(
                f"{name}: got chunk {largest}, expected less than chunks={chunks}."
            )
    return _chunk_likelihood(
        student_log_probs,
        teacher_log_probs,
        student_chunks,
        teacher_chunks,
        temperature,
        chunks=chunks,
    )
