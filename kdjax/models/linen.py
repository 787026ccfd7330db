"""Flax Linen modules as pure functions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import jax
from flax import core, linen
from flax.traverse_util import flatten_dict
from jax import Array

from kdjax.models._outputs import arguments, as_outputs, by_path, pick
from kdjax.types import Adapted, Batch, Model, Outputs, PyTree

# How modules name the switch between training and evaluation; the value that
# means training.
_SWITCHES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def from_linen(
    module: linen.Module,
    variables: PyTree,
    *,
    inputs: str | Sequence[str] = "x",
    features: Sequence[str] = (),
    rngs: Sequence[str] = ("dropout",),
) -> Adapted:
    """Takes a Linen module and its variables.

    The collection ``params`` is trained, all others are the model state. If
    ``__call__`` has an argument named ``train``, ``training``, ``is_training``,
    ``deterministic`` or ``use_running_average``, it is set.

    Args:
      module: called as ``module.apply(variables, *inputs)``; returns logits
        ``[..., V]``, a :class:`~kdjax.types.LinearHead` or an
        :class:`~kdjax.types.Outputs`.
      variables: what ``module.init`` returned.
      inputs: which entries of the batch it takes, in order.
      features: paths of submodules whose output is wanted, such as ``"Dense_0"``, or
        of what they sow as ``"intermediates"``, such as
        ``"attention/attention_weights"``. A second call of the same one is
        ``"Dense_0#1"``. Under ``linen.scan`` with ``variable_axes={"intermediates":
        0, ...}`` the layers come stacked, ``[L, ...]``: ``"blocks[2]"`` is the third
        of them, ``"blocks[-1]/attention"`` a part of the last.
      rngs: random streams it uses while training.

    Returns:
      The model, its parameters and its state, plain dicts of arrays.

    Raises:
      ValueError: ``variables`` has no ``params``, or an input or a feature does not
        exist (when the model is traced).
      TypeError: the module returns something else.

    Example:
      >>> from flax import linen
      >>> dense = linen.Dense(3)
      >>> variables = dense.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> net = from_linen(dense, variables)
      >>> jax.tree.map(jnp.shape, net.params)
      {'bias': (3,), 'kernel': (4, 3)}
    """
    if "params" not in variables:
        raise ValueError(
            f"variables: got the collections {sorted(variables)}, expected 'params' "
            "among them; pass what module.init returned."
        )
    variables = core.unfreeze(variables)
    params = variables["params"]
    state = {name: tree for name, tree in variables.items() if name != "params"}
    taken = inspect.signature(type(module).__call__).parameters
    switches = {name: on for name, on in _SWITCHES.items() if name in taken}

    def run(
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        rng: Array | None,
        train: bool,
        capture: bool,
    ) -> tuple[Any, dict[str, Array], PyTree]:
        modes: Any = {name: on == train for name, on in switches.items()}
        returned, changed = module.apply(
            {"params": params, **model_state},
            *arguments(batch, inputs),
            **modes,
            rngs=_keys(rngs, rng if train else None),
            mutable=[*(model_state if train else ()), *(["intermediates"] * capture)],
            capture_intermediates=capture,
        )
        changed = core.unfreeze(changed)
        calls = by_path(flatten_dict(changed.pop("intermediates", {})))
        return returned, calls, {**model_state, **changed}

    def apply(
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        rng: Array | None,
        train: bool,
    ) -> tuple[Outputs, PyTree]:
        capture = bool(features)
        returned, calls, state = run(params, model_state, batch, rng, train, capture)
        return as_outputs(returned, pick(calls, features) if capture else {}), state

    def capturable(
        params: PyTree, model_state: PyTree, batch: Batch
    ) -> dict[str, Array]:
        return run(params, model_state, batch, None, train=False, capture=True)[1]

    return Adapted(Model(apply, capturable), params, state)


def _keys(streams: Sequence[str], rng: Array | None) -> dict[str, Array]:
    """A key of its own for each random stream, or none at all."""
    if rng is None:
        return {}
    return {name: jax.random.fold_in(rng, i) for i, name in enumerate(streams)}
