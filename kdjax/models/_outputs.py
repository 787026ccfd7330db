"""What a network may return, and how its features are picked by path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdjax.types import Adapted, Batch, LinearHead, Outputs, PyTree


def arguments(batch: Batch, inputs: str | Sequence[str]) -> tuple[Array, ...]:
    """The entries of a batch that a network takes, in order."""
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(
            f"inputs: the network takes {list(names)}, but the batch has "
            f"{sorted(batch)}; pass inputs= to the adapter."
        )
    return tuple(batch[name] for name in names)


def as_outputs(returned: Any, features: Mapping[str, Array]) -> Outputs:
    """Wraps what a network returned, beside the features captured on the way."""
    if isinstance(returned, Outputs):
        return Outputs(returned.logits, {**returned.features, **features})
    if isinstance(returned, np.ndarray):  # an entry of a batch from the host
        returned = jnp.asarray(returned)
    if isinstance(returned, (jax.Array, LinearHead)):
        return Outputs(returned, dict(features))
    raise TypeError(
        f"The network returned {type(returned).__name__}; expected logits, a "
        "kdjax.LinearHead or a kdjax.Outputs. Wrap what it returns."
    )


def paths(
    net: Adapted, batch: Mapping[str, Array | jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Lists what can be captured of a network, in evaluation mode, without running it.

    Args:
      net: from an adapter.
      batch: the entries that the network takes, arrays or their shapes.

    Returns:
      Shape and dtype of each feature by its path, as ``features=`` of an adapter takes
      it; for a bare function, the features that it shows by itself. The layers of a
      scan are the first axis of what is captured in it, where ``"blocks[2]"`` picks
      one of ``"blocks"``.

    Raises:
      ValueError: the batch lacks an entry that the network takes.

    Example:
      >>> from flax import nnx
      >>> from kdjax.models import from_nnx
      >>> rngs = nnx.Rngs(0)
      >>> layers = nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs)
      >>> found = paths(from_nnx(nnx.Sequential(*layers)), {"x": jnp.ones((2, 4))})
      >>> {path: feature.shape for path, feature in found.items()}
      {'layers/0': (2, 8), 'layers/2': (2, 3)}
    """

    def shown(params: PyTree, model_state: PyTree, batch: Batch) -> Mapping[str, Array]:
        outputs, _ = net.model.apply(params, model_state, batch, rng=None, train=False)
        return outputs.features

    captured = net.model.capturable or shown
    return dict(jax.eval_shape(captured, net.params, net.model_state, batch))


def pick(captured: Mapping[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
    """The captured arrays of the wanted paths, each named as it was asked for."""
    places = {path: _place(path, captured) for path in wanted}
    missing = [path for path, (name, _) in places.items() if name not in captured]
    if missing:
        known = ", ".join(sorted(captured)) or "none"
        raise ValueError(
            f"features: got {missing}, which match nothing in this network. "
            f"Paths that can be captured: {known}."
        )
    return {
        path: captured[name] if index is None else _entry(captured[name], index, path)
        for path, (name, index) in places.items()
    }


def _place(path: str, captured: Mapping[str, Array]) -> tuple[str, int | None]:
    """What ``"blocks[2]/norm"`` names, or ``"blocks/norm[2]"``: its entry 2."""
    indexed = re.fullmatch(r"(.+)\[(-?\d+)\](.*)", path)
    if path in captured or indexed is None:
        return path, None
    return indexed[1] + indexed[3], int(indexed[2])


def _entry(stack: Array, index: int, path: str) -> Array:
    """One entry along the first axis: the layer of a scan, say."""
    length = stack.shape[0] if stack.ndim else 0
    if not -length <= index < length:
        raise ValueError(
            f"features: got {path!r}, whose index {index} is out of range: the first "
            f"axis of what is captured there, {stack.shape}, has length {length}."
        )
    return jax.lax.index_in_dim(stack, index, keepdims=False)


def by_path(calls: Mapping[tuple[Any, ...], Any]) -> dict[str, Array]:
    """Names outputs by module path: ``blocks/0``, and ``blocks/0#1`` if called again.

    Methods other than ``__call__`` are named too, as in ``encoder/attend``, and so is
    what a module sows, as in ``attention/attention_weights``. An output that holds one
    array, like the ``(carry, None)`` of a scan's body, is that array; one that holds
    several (a tuple of two, say) cannot be captured.
    """
    named = {}
    for path, outputs in calls.items():
        name = "/".join(str(part) for part in path if part != "__call__")
        # A tuple with an entry for each call, unless what was sown is added up.
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for repeat, output in enumerate(outputs):
            leaves = jax.tree.leaves(output)
            if len(leaves) == 1 and isinstance(leaves[0], jax.Array):
                named[f"{name}#{repeat}" if repeat else name] = leaves[0]
    named.pop("", None)  # the network itself
    return named
