"""Where arrays live: meshes, rules, and a step compiled for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax.train.state import DistillState
from kdjax.types import Batch, Mean, PyTree

Rules: TypeAlias = Sequence[tuple[str, PartitionSpec]]
"""Pairs of a pattern and how arrays are split whose path it matches."""


def make_mesh(axes: Mapping[str, int] | None = None) -> Mesh:
    """Makes a mesh of all devices.

    Args:
      axes: sizes by name; their product is the number of devices. ``None`` is one
        axis ``data`` over all of them.

    Returns:
      A mesh whose axes are ``Auto``: the compiler places what the rules leave open.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.

    Example:
      >>> mesh = make_mesh({"data": jax.device_count()})
      >>> mesh.axis_names
      ('data',)
    """
    count = jax.device_count()
    axes = {"data": count} if axes is None else dict(axes)
    if np.prod(list(axes.values())) != count:
        raise ValueError(
            f"axes: {axes} is for {np.prod(list(axes.values()))} devices, but there "
            f"are {count}."
        )
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def shardings(tree: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """How every array of a tree is split: by the first rule that matches its path.

    Args:
      tree: arrays, or ``jax.ShapeDtypeStruct``.
      mesh: from :func:`make_mesh`.
      rules: pairs of a regular expression, searched for in paths such as
        ``params/student/dense/kernel``, and a ``PartitionSpec``. What none of them
        matches is replicated.

    Returns:
      The tree with a ``NamedSharding`` per array.

    Raises:
      ValueError: a rule does not fit an array that it matches.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                sharding = NamedSharding(mesh, spec)
                try:
                    sharding.shard_shape(leaf.shape)
                except ValueError as error:
                    raise ValueError(
                        f"rules: {pattern!r} -> {spec} does not fit {name} of shape "
                        f"{leaf.shape} on {dict(mesh.shape)}: {error}"
                    ) from error
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)


def place(tree: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """Puts the arrays of a tree onto a mesh, as :func:`shardings` says."""
    return jax.device_put(tree, shardings(tree, mesh, rules))


def place_step(
    step: Callable[..., tuple[DistillState, dict[str, Mean]]],
    mesh: Mesh,
    *,
    state: DistillState,
    frozen: PyTree,
    batch: PartitionSpec | Mapping[str, PartitionSpec] = PartitionSpec("data"),
    rules: Rules = (),
    teacher_rules: Rules = (),
    donate: bool = True,
) -> Callable[[DistillState, PyTree, Batch], tuple[DistillState, dict[str, Mean]]]:
    """Compiles a step for a mesh.

    Args:
      step: from :func:`~kdjax.make_train_step`, without an ``axis_name``.
      mesh: from :func:`make_mesh`.
      state: the state or its shapes; put the real one onto the mesh with
        ``place(state, mesh, rules)``.
      frozen: the teacher's arrays or their shapes; likewise, with ``teacher_rules``.
      batch: how batches are split, one spec for all entries or one for each.
      rules: how the state is split; replicated by default.
      teacher_rules: how the teacher is split; replicated by default.
      donate: reuse the memory of the old state for the new one.

    Returns:
      ``step(state, frozen, batch)``, which takes batches from the host and gives
      replicated metrics.

    Raises:
      ValueError: a rule does not fit its array, or (when called) the mesh does not
        divide the batch.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    state_shardings = shardings(state, mesh, rules)

    def by_entry(given: Batch) -> dict[str, NamedSharding]:
        specs = batch if isinstance(batch, Mapping) else dict.fromkeys(given, batch)
        return {name: NamedSharding(mesh, specs[name]) for name in given}

    compiled = jax.jit(
        step,
        in_shardings=(state_shardings, shardings(frozen, mesh, teacher_rules), None),
        out_shardings=(state_shardings, replicated),
        donate_argnums=(0,) if donate else (),
    )

    def placed(
        state: DistillState, frozen: PyTree, batch: Batch
    ) -> tuple[DistillState, dict[str, Mean]]:
        return compiled(state, frozen, _spread(batch, by_entry(batch)))

    return placed


def _spread(batch: Batch, targets: Mapping[str, NamedSharding]) -> dict[str, Any]:
    """Puts a batch from the host onto the mesh."""
    for name, array in batch.items():
        try:
            targets[name].shard_shape(np.shape(array))
        except ValueError as error:
            raise ValueError(
                f"batch: {name!r} of shape {np.shape(array)} cannot be split as "
                f"{targets[name].spec} over the mesh {dict(targets[name].mesh.shape)}: "
                "choose a batch size that it divides, or fill the batch up and mask."
            ) from error
    return {
        name: jax.make_array_from_process_local_data(targets[name], np.asarray(array))
        if jax.process_count() > 1
        else jax.device_put(array, targets[name])
        for name, array in batch.items()
    }
