"""Refusals: what does not fit is named before anything is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.types import LinearHead


def named(per_token_args: tuple[Any, ...]) -> dict[str, Any]:
    """What messages call them."""
    return {f"per_token_args[{i}]": each for i, each in enumerate(per_token_args)}


def arguments(given: dict[str, Any], chunk_size: int | None) -> tuple[int, ...]:
    """All have the tokens of the first, a head; these are returned as a shape.

    The others are heads too, or trees of arrays: logits, labels, targets.
    """
    (name, first), *others = given.items()
    if not isinstance(first, LinearHead):
        raise TypeError(
            f"{name}: got {type(first).__name__}, expected a kdjax.LinearHead; logits "
            "that are multiplied out need no chunks: call the function with them."
        )
    _head(name, first)
    batch = first.hidden.shape[:-1]
    for name, other in others:
        if isinstance(other, LinearHead):
            _head(name, other)
            _tokens(f"{name}.hidden", other.hidden, batch)
            continue
        for path, leaf in jax.tree.leaves_with_path(other):
            _tokens(name + jax.tree_util.keystr(path), leaf, batch)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected 1 or more.")
    return batch


def _on_no_mesh(name: str, array: Any) -> None:
    """Loops over tokens run in types that name no axis of a mesh."""
    kind = jax.typeof(array)
    if kind.manual_axis_type.varying:
        raise ValueError(
            f"{name}: varies over {sorted(kind.manual_axis_type.varying)} of a "
            "shard_map that checks it; give that check_vma=False."
        )
    if kind.sharding.mesh.explicit_axes:
        raise ValueError(
            f"{name}: lies on Explicit axes {kind.sharding.mesh.explicit_axes} of a "
            "mesh; expected AxisType.Auto, as kdjax.train.make_mesh makes them."
        )


def mask(where: Any, batch: tuple[int, ...]) -> None:
    """A boolean for each token."""
    if jnp.result_type(where) != jnp.bool_:
        raise TypeError(
            f"where: got dtype {jnp.result_type(where)}, expected bool (True counts)."
        )
    if jnp.shape(where) != batch:
        raise ValueError(
            f"where: got shape {jnp.shape(where)}, expected {batch}, one entry per "
            "token."
        )


def _head(name: str, head: LinearHead) -> None:
    """Hidden states ``[*batch, D]``, kernel ``[D, V]``, bias ``[V]``, all floating."""
    arrays = {"hidden": head.hidden, "kernel": head.kernel, "bias": head.bias}
    for part, array in arrays.items():
        if array is None:
            continue
        _on_no_mesh(f"{name}.{part}", array)
        if not jnp.issubdtype(array.dtype, jnp.floating):
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
    for part, number in (("soft_cap", head.soft_cap), ("scale", head.scale)):
        if number is not None and jnp.shape(number):
            raise ValueError(
                f"{name}.{part}: got shape {jnp.shape(number)}, expected a scalar."
            )
    if head.bias is not None and head.bias.shape != kernel[1:]:
        raise ValueError(
            f"{name}.bias: got shape {head.bias.shape}, expected {kernel[1:]}, one "
            "number per class."
        )


def _tokens(name: str, array: Any, batch: tuple[int, ...]) -> None:
    _on_no_mesh(name, array)
    shape = jnp.shape(array)
    if shape[: len(batch)] != batch:
        raise ValueError(
            f"{name}: got shape {shape}, expected {batch} first, the student's tokens. "
            "What is the same for all tokens is bound with functools.partial."
        )
