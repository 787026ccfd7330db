"""Flax NNX modules as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import Array

from kdjax.models._outputs import arguments, as_outputs, by_path, pick
from kdjax.types import Adapted, Batch, Model, Outputs, PyTree


def from_nnx(
    module: nnx.Module,
    *,
    inputs: str | Sequence[str] = "x",
    features: Sequence[str] = (),
) -> Adapted:
    """Takes an NNX module apart; the module itself stays as it is.

    Parameters (``nnx.Param``) become the params, all other variables but random
    streams the model state. While training, every stream gets a key of its own from
    the step's; otherwise dropout is off and BatchNorm uses its running statistics.

    Args:
      module: called as ``module(*inputs)``; returns logits ``[..., V]``, a
        :class:`~kdjax.types.LinearHead` or an :class:`~kdjax.types.Outputs`.
      inputs: which entries of the batch it takes, in order.
      features: paths of submodules whose output is wanted, such as ``"blocks/0"``, or
        of what they sow as ``nnx.Intermediate``, such as
        ``"attention/attention_weights"``. A second call of the same one is
        ``"blocks/0#1"``. Under ``nnx.scan`` the layers come stacked, ``[L, ...]``:
        ``"blocks[2]"`` is the third of them, ``"blocks[-1]/attention"`` a part of the
        last.

    Returns:
      The model, its parameters and its state, plain dicts of arrays.

    Raises:
      ValueError: an input or a feature does not exist (when the model is traced).
      TypeError: the module returns something else.

    Example:
      >>> from flax import nnx
      >>> net = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> jax.tree.map(jnp.shape, net.params)
      {'bias': (3,), 'kernel': (4, 3)}
      >>> arrays, batch = (net.params, net.model_state), {"x": jnp.ones((2, 4))}
      >>> outputs, _ = net.model.apply(*arrays, batch, rng=None, train=False)
      >>> outputs.logits.shape
      (2, 3)
    """
    parts: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
    graph, params, streams, rest = parts
    stream_arrays = nnx.to_pure_dict(streams)

    def network(
        params: PyTree, model_state: PyTree, rng: Array | None, train: bool
    ) -> tuple[Any, Any]:
        fresh = _reseeded(stream_arrays, rng) if train else stream_arrays
        merged = nnx.merge(graph, params, fresh, model_state)
        view = nnx.view(
            merged,
            deterministic=not train,
            use_running_average=not train,
            raise_if_not_found=False,
        )
        return merged, view

    def apply(
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        rng: Array | None,
        train: bool,
    ) -> tuple[Outputs, PyTree]:
        merged, view = network(params, model_state, rng, train)
        taken, captured = arguments(batch, inputs), {}
        if features:
            returned, calls = _captured(view, taken)
            captured = pick(calls, features)
        else:
            # Capturing no kind of variable: what the network sows goes nowhere, where
            # a plain call would make it part of the network.
            returned = nnx.capture(view)(*taken)
        state = nnx.state(merged, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        return as_outputs(returned, captured), nnx.to_pure_dict(state)

    def capturable(
        params: PyTree, model_state: PyTree, batch: Batch
    ) -> dict[str, Array]:
        _, view = network(params, model_state, None, train=False)
        return _captured(view, arguments(batch, inputs))[1]

    model = Model(apply, capturable)
    return Adapted(model, nnx.to_pure_dict(params), nnx.to_pure_dict(rest))


def _captured(network: Any, inputs: tuple[Array, ...]) -> tuple[Any, dict[str, Array]]:
    kind = nnx.Intermediate
    returned, captured = nnx.capture(network, kind, method_outputs=kind)(*inputs)
    return returned, by_path(flatten_dict(nnx.to_pure_dict(captured)))


def _reseeded(streams: PyTree, rng: Array | None) -> PyTree:
    """Streams started anew from one key, every one from a different part of it.

    ``nnx.reseed`` would give the same key to all streams of one name, and so the same
    mask to all dropout layers of one shape.
    """
    leaves, structure = jax.tree.flatten(streams)
    if not leaves:
        return streams
    if rng is None:
        raise ValueError("rng: got None; this network needs a key while training.")
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.random.fold_in(rng, index)
            leaves[index] = jax.random.split(own, leaf.shape)
        else:  # how many keys were drawn from it; of shapes, that is not known
            leaves[index] = jnp.zeros(leaf.shape, leaf.dtype)
    return jax.tree.unflatten(structure, leaves)
