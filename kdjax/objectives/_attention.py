"""Terms over the attention of transformers: scores, and relations of their vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from kdjax import losses
from kdjax.losses._labels import widened
from kdjax.losses._vectors import product
from kdjax.objectives._combine import combine
from kdjax.objectives._terms import MASK, counted, feature, pair_of, settings, single
from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled


def attention(
    loss: Callable[..., Array] = losses.attention_kl,
    *,
    student: str,
    teacher: str,
    name: str = "attention",
    weight: Scheduled = 1.0,
    where: str | None = MASK,
    causal: bool = False,
    **hyperparameters: Any,
) -> Objective:
    """A loss between the attention scores of a layer of the student and the teacher.

    The scores are made of the queries and keys that an attention module computes, so
    that the models stay as they are: with ``student="blocks/0/attention"``, ask the
    adapter for ``"blocks/0/attention/query"`` and ``"blocks/0/attention/key"``. This
    fits modules that change neither afterwards; one that turns them (rotary positions)
    or masks otherwise must show its scores, before the softmax, as a feature.

    Args:
      loss: :func:`kdjax.losses.attention_kl` or :func:`kdjax.losses.attention_mse`,
        or another of scores ``[B, heads, T, T]`` with ``where``.
      student: path of an attention module of the student, whose queries and keys are
        ``[B, T, heads, D]``; or of a feature that holds the scores.
      teacher: the same of the teacher, equal in tokens and heads.
      name: of the term, in metrics.
      weight: of the term.
      where: entry of the batch that says which tokens ``[B, T]`` exist, as queries
        and as keys, or which examples ``[B]`` count.
      causal: whether a token attends to those before it and itself alone.
      **hyperparameters: the loss's own; each a value or a schedule.

    Returns:
      An objective of one term, the average over examples, heads and queries.

    Raises:
      ValueError: the weight is not finite, or (when traced) features are missing, or
        the loss refuses them.

    Example:
      >>> objective = attention(student="attention", teacher="attention", causal=True)
      >>> heads = {"attention/query": jnp.ones((1, 3, 2, 4)),
      ...          "attention/key": jnp.ones((1, 3, 2, 4))}
      >>> outputs = Outputs(None, heads)
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, {}, jnp.array(0))
      >>> terms["attention"].mean.count.item()
      6

    Reference:
      Wang et al., MiniLM: Deep Self-Attention Distillation for Task-Agnostic
      Compression of Pre-Trained Transformers, 2020, section 3.1. arXiv:2002.10957
    """
    paths = student, teacher

    def compute(
        params: PyTree, student: Outputs, teacher: Outputs, batch: Batch, step: Array
    ) -> Mean:
        ours = _scores(student, paths[0], f"term {name!r}: the student")
        theirs = _scores(teacher, paths[1], f"term {name!r}: the teacher")
        batch_size, _, queries, keys = ours.shape
        tokens = counted(batch, where, (batch_size, keys), None)
        attended = None if tokens is None else tokens[:, None, None, :]
        if causal:
            before = jnp.tril(jnp.ones((queries, keys), bool), keys - queries)
            attended = before if attended is None else before & attended
        if attended is not None:
            attended = jnp.broadcast_to(attended, ours.shape)
        values = loss(ours, theirs, where=attended, **settings(hyperparameters, step))
        return Mean.of(values, _over_heads(tokens, values))

    return single(name, weight, compute)


def self_attention_relation(
    *,
    student: str,
    teacher: str,
    heads: int,
    of: Sequence[str] = ("query", "key", "value"),
    name: str = "minilm",
    weight: Scheduled = 1.0,
    where: str | None = MASK,
) -> Objective:
    """MiniLM: how the queries, keys and values of tokens relate, in one layer of each.

    Widths and heads of the models may differ, since the vectors of all heads are
    split anew; :func:`kdjax.losses.self_attention_relation` is the loss. Ask the
    adapters for ``"<path>/query"`` and so on.

    Args:
      student: path of an attention module of the student, whose queries, keys and
        values are ``[B, T, heads, D]`` or ``[B, T, D]``; MiniLM takes the last layer.
      teacher: the same of the teacher; MiniLMv2 takes an upper middle layer of a
        large one.
      heads: how many relation heads; divides both widths.
      of: which vectors; MiniLM (2002.10957) takes ``("value",)``, and besides
        :func:`attention`.
      name: of the terms, ``name/query`` and so on.
      weight: of each term.
      where: entry of the batch that says which tokens ``[B, T]`` exist, or which
        examples ``[B]`` count.

    Returns:
      An objective of one term for each kind of vectors, the average over examples,
      relation heads and tokens.

    Raises:
      ValueError: ``of`` is empty, the weight is not finite, or (when traced) features
        are missing, or the loss refuses them.

    Example:
      >>> objective = self_attention_relation(
      ...     student="blocks/3/attention", teacher="blocks/11/attention", heads=12)

    Reference:
      Wang, Bao, Huang, Dong and Wei, MiniLMv2: Multi-Head Self-Attention Relation
      Distillation for Compressing Pretrained Transformers, 2020, section 3.
      arXiv:2012.15828
    """
    if not of:
        raise ValueError("of: got none; expected some of 'query', 'key' and 'value'.")

    def term(kind: str) -> Objective:
        label = f"{name}/{kind}"
        both = pair_of(label, f"{student}/{kind}", f"{teacher}/{kind}")

        def compute(
            params: PyTree, shown: Outputs, target: Outputs, batch: Batch, step: Array
        ) -> Mean:
            ours, theirs = (
                each.reshape(*each.shape[:2], -1) for each in both(shown, target)
            )
            tokens = counted(batch, where, ours.shape[:2], None)
            values = losses.self_attention_relation(
                ours, theirs, heads=heads, where=tokens
            )
            return Mean.of(values, _over_heads(tokens, values))

        return single(label, weight, compute)

    return combine(*(term(kind) for kind in of))


def _scores(outputs: Outputs, path: str, who: str) -> Array:
    """``[B, heads, T, T]``, as shown or of queries and keys, in float32 at least."""
    if path in outputs.features:
        return outputs.features[path]
    query, key = (
        jnp.swapaxes(widened(feature(outputs, f"{path}/{kind}", who)), 1, 2)
        for kind in ("query", "key")
    )
    return product(query, key.mT) / query.shape[-1] ** 0.5


def _over_heads(tokens: Array | None, values: Array) -> Array | None:
    """A mask over tokens ``[B, T]`` as one over values ``[B, heads, T]``."""
    return (
        None if tokens is None else jnp.broadcast_to(tokens[:, None, :], values.shape)
    )
