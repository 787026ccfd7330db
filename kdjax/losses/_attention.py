"""Losses over the attention of transformers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kdjax.losses import _checks
from kdjax.losses._kl import forward_kl
from kdjax.losses._labels import widened
from kdjax.losses._regression import logit_mse
from kdjax.losses._vectors import product

_SCORES = "[B, heads, T, T]"


def _over_scores(where: Array | None, shape: tuple[int, ...]) -> Array | None:
    """A mask over keys, ``[B, T]``, as one over all scores."""
    if where is None or where.ndim == len(shape):
        return where
    return jnp.broadcast_to(where[:, None, None, :], shape)


def _check(
    student_attention: Array, teacher_attention: Array, where: Array | None
) -> None:
    both = {
        "student_attention": student_attention,
        "teacher_attention": teacher_attention,
    }
    _checks.real(_SCORES, **both)
    _checks.one_shape(
        _SCORES,
        "Heads that differ are compared by self_attention_relation.",
        **both,
    )
    if where is not None:
        shape = jnp.shape(student_attention)
        full = jnp.ndim(where) == len(shape)
        _checks.boolean(shape if full else (shape[0], shape[-1]), where=where)


@functools.partial(jax.jit, inline=True)
def _attention_mse(student: Array, teacher: Array, where: Array | None) -> Array:
    return logit_mse(student, teacher, where=_over_scores(where, student.shape))


def attention_mse(
    student_attention: Float[Array, "B heads Q K"],
    teacher_attention: Float[Array, "B heads Q K"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "B heads Q"]:
    r"""Pulls every attention score of the student to the teacher's.

    .. math:: \frac{1}{K} \sum_k (a^s_k - a^t_k)^2

    over the keys k of each query, before the softmax. TextBrewer's version of it
    without a mask sets all scores below -0.001 to 0 first, which is not followed:
    give ``where``.

    Args:
      student_attention: scores of the student, ``[B, heads, T, T]``, queries before
        keys.
      teacher_attention: the same of the teacher, equal in shape.
      where: keys that count, ``[B, T]``, or scores that do, ``[B, heads, T, T]``, as
        under a causal mask. A score at -inf on both sides does not.

    Returns:
      One value per query, ``[B, heads, T]``, the mean over its keys; 0 where there is
      none. A mask over queries belongs to ``Mean.of``.

    Raises:
      ValueError: the shapes differ, or there are not four axes.
      TypeError: scores that are not floating, a mask that is not boolean.

    Example:
      >>> student = jnp.array([[[[1.0, 2.0], [0.0, 4.0]]]])
      >>> attention_mse(student, jnp.zeros((1, 1, 2, 2)))
      Array([[[2.5, 8. ]]], dtype=float32)

    Reference:
      Jiao, Yin, Shang, Jiang, Chen, Li, Wang and Liu, TinyBERT: Distilling BERT for
      Natural Language Understanding, 2019, section 3.1. arXiv:1909.10351
    """
    _check(student_attention, teacher_attention, where)
    return _attention_mse(student_attention, teacher_attention, where)


@functools.partial(jax.jit, inline=True)
def _attention_kl(student: Array, teacher: Array, where: Array | None) -> Array:
    return forward_kl(student, teacher, where=_over_scores(where, student.shape))


def attention_kl(
    student_attention: Float[Array, "B heads Q K"],
    teacher_attention: Float[Array, "B heads Q K"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "B heads Q"]:
    r"""Pulls each query's attention over the keys to the teacher's.

    .. math:: \sum_k p_k \log \frac{p_k}{q_k}, \quad
       p = \mathrm{softmax}(a^t), \; q = \mathrm{softmax}(a^s)

    from the scores before the softmax, scaled as the model scales them. TextBrewer's
    cross-entropy of attention takes the softmax over masked keys too, drops these
    from the sum and keeps the teacher's entropy; here they have no probability.

    Args:
      student_attention: scores of the student, ``[B, heads, T, T]``, queries before
        keys.
      teacher_attention: the same of the teacher, equal in shape.
      where: keys that exist, ``[B, T]``, or scores that do, ``[B, heads, T, T]``, as
        under a causal mask. A score at -inf on both sides does not.

    Returns:
      One value per query, ``[B, heads, T]``, never negative; 0 where it has no keys.
      A mask over queries belongs to ``Mean.of``.

    Raises:
      ValueError: the shapes differ, or there are not four axes.
      TypeError: scores that are not floating, a mask that is not boolean.

    Example:
      >>> scores = jnp.array([[[[1.0, 2.0], [0.0, 4.0]]]])
      >>> attention_kl(scores + 3, scores)
      Array([[[0., 0.]]], dtype=float32)

    Reference:
      Wang, Wei, Dong, Bao, Yang and Zhou, MiniLM: Deep Self-Attention Distillation for
      Task-Agnostic Compression of Pre-Trained Transformers, 2020, section 3.1.
      arXiv:2002.10957
    """
    _check(student_attention, teacher_attention, where)
    return _attention_kl(student_attention, teacher_attention, where)


@functools.partial(jax.jit, inline=True, static_argnames="heads")
def _self_attention_relation(
    student: Array, teacher: Array, where: Array | None, heads: int
) -> Array:
    def relation(vectors: Array) -> Array:
        vectors = widened(vectors)
        if where is not None:
            vectors = jnp.where(where[..., None], vectors, 0.0)
        batch, tokens, width = vectors.shape
        vectors = vectors.reshape(batch, tokens, heads, width // heads)
        vectors = jnp.swapaxes(vectors, 1, 2)
        scores = product(vectors, jnp.swapaxes(vectors, 2, 3))
        return scores / (width // heads) ** 0.5

    student, teacher = relation(student), relation(teacher)
    return forward_kl(student, teacher, where=_over_scores(where, student.shape))


def self_attention_relation(
    student: Float[Array, "B T S"],
    teacher: Float[Array, "B T D"],
    *,
    heads: int,
    where: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B heads T"]:
    r"""Pulls how the tokens' queries, keys or values relate to each other.

    .. math:: KL(p \| q), \quad
       p = \mathrm{softmax}(A_t A_t^\top / \sqrt{d_t}), \;
       q = \mathrm{softmax}(A_s A_s^\top / \sqrt{d_s})

    over the tokens, for every token and relation head. MiniLMv2 adds this for the
    queries, the keys and the values of one layer; MiniLM takes the values with the
    model's own heads, and :func:`attention_kl` besides.

    The vectors of all heads are concatenated and split anew into relation heads, so
    that models may differ in heads and width.

    Args:
      student: queries, keys or values of the student's layer, all heads concatenated,
        ``[B, T, D]``.
      teacher: the same of the teacher, ``[B, T, D]``; its width may be another.
      heads: how many relation heads; divides both widths.
      where: tokens that exist, ``[B, T]``.

    Returns:
      One value per relation head and token, ``[B, heads, T]``, never negative. A
      token that does not exist has 0, and does not count in a ``Mean.of`` that has
      the mask too.

    Raises:
      ValueError: other numbers of examples or tokens, not three axes, or widths that
        ``heads`` does not divide.
      TypeError: arrays that are not floating, ``heads`` that is not an integer, a mask
        that is not boolean.

    Example:
      >>> keys = jnp.arange(12.0).reshape(1, 3, 4)
      >>> self_attention_relation(keys, keys, heads=2).shape
      (1, 2, 3)

    Reference:
      Wang, Bao, Huang, Dong and Wei, MiniLMv2: Multi-Head Self-Attention Relation
      Distillation for Compressing Pretrained Transformers, 2020, section 3.
      arXiv:2012.15828
    """
    _checks.real("[B, T, D]", student=student, teacher=teacher)
    shapes = jnp.shape(student), jnp.shape(teacher)
    if shapes[0][:2] != shapes[1][:2]:
        raise ValueError(
            "student {}, teacher {}: expected the same examples and tokens "
            "[B, T].".format(*shapes)
        )
    _checks.whole(heads=heads)
    for name, shape in zip(("student", "teacher"), shapes, strict=True):
        if shape[2] % heads:
            raise ValueError(
                f"heads: got {heads}, which does not divide {shape[2]}, the width of "
                f"{name}."
            )
    if where is not None:
        _checks.boolean(shapes[0][:2], where=where)
    return _self_attention_relation(student, teacher, where, heads)
