"""Refusals: what does not fit is named before anything is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.types import LinearHead


def arguments(
    heads: tuple[Any, ...], per_token_args: tuple[Any, ...], where: Any, chunk_size: Any
) -> None:
    """Everything has the student's tokens, and heads fit their hidden states."""
    student, *teacher = heads
    if not isinstance(student, LinearHead):
        raise TypeError(
            f"student: got {type(student).__name__}, expected a kdjax.LinearHead; for "
            "logits that are multiplied out, average the loss with Mean.of."
        )
    _head("student", student)
    batch = student.hidden.shape[:-1]
    for other in teacher:
        if isinstance(other, LinearHead):
            _head("teacher", other)
            _tokens("teacher.hidden", other.hidden, batch)
        else:
            _tokens("teacher", other, batch)
    for index, tree in enumerate(per_token_args):
        for leaf in jax.tree.leaves(tree):
            _tokens(f"per_token_args[{index}]", leaf, batch)
    if where is not None:
        if jnp.result_type(where) != jnp.bool_:
            raise TypeError(
                f"where: got dtype {jnp.result_type(where)}, expected bool (True "
                "counts)."
            )
        if jnp.shape(where) != batch:
            raise ValueError(
                f"where: got shape {jnp.shape(where)}, expected {batch}, one entry per "
                "token."
            )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected 1 or more.")


def _head(name: str, head: LinearHead) -> None:
    """Hidden states ``[*batch, D]``, kernel ``[D, V]``, bias ``[V]``, all floating."""
    arrays = {"hidden": head.hidden, "kernel": head.kernel, "bias": head.bias}
    for part, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{name}.{part}: got dtype {array.dtype}, expected floating-point "
                "numbers."
            )
    hidden, kernel = head.hidden.shape, head.kernel.shape
    if not hidden or len(kernel) != 2 or hidden[-1] != kernel[0]:
        raise ValueError(
            f"{name}: got hidden {hidden} and kernel {kernel}, expected [*batch, D] "
            "and [D, V]; an embedding [V, D] is tied as embedding.T."
        )
    if head.bias is not None and head.bias.shape != kernel[1:]:
        raise ValueError(
            f"{name}.bias: got shape {head.bias.shape}, expected {kernel[1:]}, one "
            "number per class."
        )


def _tokens(name: str, array: Any, batch: tuple[int, ...]) -> None:
    shape = jnp.shape(array)
    if shape[: len(batch)] != batch:
        raise ValueError(
            f"{name}: got shape {shape}, expected {batch} first, the student's tokens. "
            "What is the same for all tokens is bound with functools.partial."
        )
