"""Where arrays live: meshes, rules, and a step compiled for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax.fused import TOKEN_AXES
from kdjax.train.rules import Rules, fitting, shardings
from kdjax.train.state import DistillState
from kdjax.train.step import check_axis
from kdjax.types import Batch, Mean, PyTree


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
    wanted = math.prod(axes.values())
    if wanted != count or min(axes.values(), default=0) < 1:
        raise ValueError(
            f"axes: {axes} is for {wanted} devices, but there are {count}; sizes are "
            "positive and multiply to it."
        )
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def batch_axes(mesh: Mesh) -> PartitionSpec:
    """The first axis of a batch over the axes ``data`` and ``fsdp`` of the mesh."""
    return PartitionSpec(tuple(axis for axis in TOKEN_AXES if axis in mesh.axis_names))


def place(
    tree: PyTree, mesh: Mesh, rules: Rules = (), *, memory_kind: str | None = None
) -> PyTree:
    """Puts the arrays of a tree onto a mesh, as :func:`shardings` says.

    What lies there already is not copied, to save memory: once a step has donated the
    placed tree, the tree that it came from is gone too, in part or as a whole. Of
    several processes each passes the same arrays, whole.

    Args:
      tree: arrays.
      mesh: from :func:`make_mesh`.
      rules: as for :func:`shardings`.
      memory_kind: of the devices, such as ``"pinned_host"`` for a teacher that a step
        fetches; ``None`` is their own memory.

    Returns:
      The tree of arrays on the mesh.

    Raises:
      ValueError: as from :func:`shardings`, or the devices have no such memory.
    """
    return jax.tree.map(_put, tree, _in_memory(tree, mesh, rules, memory_kind))


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    if jax.process_count() > 1 and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # JAX 0.10.2 and 0.12 refuse keys for devices of other processes.
        data = jax.device_put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(leaf, sharding)


def place_batch(batch: Batch, mesh: Mesh, spec: PartitionSpec | None = None) -> Batch:
    """Splits a batch from the host over a mesh, as :func:`place_step` does.

    Args:
      batch: arrays by name; of several processes each gives its part, see
        :func:`kdjax.io.input.shard_of`.
      mesh: from :func:`make_mesh`.
      spec: how all entries are split; by default :func:`batch_axes`.

    Returns:
      The whole batch on the mesh, the same in all processes.

    Raises:
      ValueError: the mesh does not divide the batch.

    Example:
      >>> mesh = make_mesh()
      >>> batch = place_batch({"x": np.zeros((2 * mesh.size, 3))}, mesh)
      >>> batch["x"].addressable_shards[0].data.shape
      (2, 3)
    """
    spec = batch_axes(mesh) if spec is None else spec
    return _spread(batch, mesh, dict.fromkeys(batch, spec))


def make_placed(make: Callable[[], PyTree], mesh: Mesh, rules: Rules = ()) -> PyTree:
    """Makes arrays where they belong: none is ever whole on one device or host.

    Args:
      make: traced, such as ``lambda: init_state(make_net(), ...)``; what it closes over
        and computes with is whole on every device.
      mesh: from :func:`make_mesh`.
      rules: as for :func:`shardings`.

    Returns:
      What ``make`` returns, on the mesh, with the numbers of ``jax.jit(make)()``.

    Raises:
      ValueError: as from :func:`shardings`.

    Example:
      >>> mesh = make_mesh()
      >>> rows = 4 * jax.device_count()
      >>> def make():
      ...     return {"kernel": jax.random.normal(jax.random.key(0), (rows, 8))}
      >>> made = make_placed(make, mesh, [("kernel", PartitionSpec("data"))])
      >>> made["kernel"].addressable_shards[0].data.shape
      (4, 8)
    """
    targets = shardings(jax.eval_shape(make), mesh, rules)
    return jax.jit(make, out_shardings=targets)()


def _in_memory(
    tree: PyTree, mesh: Mesh, rules: Rules, memory_kind: str | None
) -> PyTree:
    """The shardings of a tree in a memory of the devices."""
    found = shardings(tree, mesh, rules)
    if memory_kind is None:
        return found
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if memory_kind not in kinds:
        raise ValueError(
            f"memory_kind: got {memory_kind!r}, which devices such as {device} do not "
            f"have; they have {kinds}. Leave it out."
        )
    return jax.tree.map(lambda each: each.with_memory_kind(memory_kind), found)


def place_step(
    step: Callable[..., tuple[DistillState, dict[str, Mean]]],
    mesh: Mesh,
    *,
    state: DistillState,
    frozen: PyTree,
    batch: PartitionSpec | Mapping[str, PartitionSpec] | None = None,
    rules: Rules = (),
    teacher_rules: Rules = (),
    teacher_memory_kind: str | None = None,
    donate: bool = True,
) -> Callable[[DistillState, PyTree, Batch], tuple[DistillState, dict[str, Mean]]]:
    """Compiles a step for a mesh.

    Args:
      step: from :func:`~kdjax.make_train_step`, without an ``axis_name``.
      mesh: from :func:`make_mesh`.
      state: the state or its shapes; put the real one onto the mesh with
        ``place(state, mesh, rules)``.
      frozen: the teacher's arrays or their shapes; likewise, with ``teacher_rules``.
      batch: how batches are split, one spec for all entries or one for each; by
        default their first axis over :func:`batch_axes`.
      rules: how the state is split, see :func:`shardings`; replicated by default.
      teacher_rules: how the teacher is split; replicated by default.
      teacher_memory_kind: where the teacher lies between steps, as for :func:`place`:
        from ``"pinned_host"``, each step fetches its arrays to the devices.
      donate: reuse the memory of the old state for the new one.

    Returns:
      ``step(state, frozen, batch)``, which takes batches from the host and gives
      replicated metrics.

    Raises:
      ValueError: a rule does not fit its array or matches none, the devices have no
        such memory, or (when called) the mesh does not divide the batch.
    """
    check_axis(step, None)
    replicated = NamedSharding(mesh, PartitionSpec())
    state_shardings = shardings(state, mesh, rules)
    at_work = shardings(frozen, mesh, teacher_rules)
    at_rest = _in_memory(frozen, mesh, teacher_rules, teacher_memory_kind)

    @functools.wraps(step)
    def on_mesh(
        state: DistillState, frozen: PyTree, given: Batch
    ) -> tuple[DistillState, dict[str, Mean]]:
        if teacher_memory_kind is not None:
            frozen = jax.device_put(frozen, at_work)
        # What the step calls can ask for the mesh, as kdjax.fused does.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, frozen, given)

    compiled = jax.jit(
        on_mesh,
        in_shardings=(state_shardings, at_rest, None),
        out_shardings=(state_shardings, replicated),
        donate_argnums=(0,) if donate else (),
    )

    def placed(
        state: DistillState, frozen: PyTree, given: Batch
    ) -> tuple[DistillState, dict[str, Mean]]:
        return compiled(
            state, frozen, _spread(given, mesh, batch_specs(batch, mesh, given))
        )

    return placed


def batch_specs(
    batch: PartitionSpec | Mapping[str, PartitionSpec] | None, mesh: Mesh, given: Batch
) -> Mapping[str, PartitionSpec]:
    """How every entry of a batch is split, from what ``place_step`` was told."""
    if not isinstance(batch, Mapping):
        return dict.fromkeys(given, batch_axes(mesh) if batch is None else batch)
    missing = sorted(set(given) - set(batch))
    if missing:
        raise ValueError(
            f"batch: place_step got specs for {sorted(batch)}, but the batch also "
            f"has {missing}; give each entry its own, or one spec for all."
        )
    return batch


def _spread(
    batch: Batch, mesh: Mesh, specs: Mapping[str, PartitionSpec]
) -> dict[str, Any]:
    """Puts a batch from the host onto the mesh, all of its entries at once."""

    def target(name: str, array: Any) -> NamedSharding:
        try:
            if jax.process_count() == 1:
                return fitting(mesh, specs[name], np.shape(array))
            return NamedSharding(mesh, specs[name])
        except ValueError as error:
            raise _does_not_fit(name, array, specs[name], mesh) from error

    targets = {name: target(name, array) for name, array in batch.items()}
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), targets)

    def from_parts(name: str, array: Any) -> Array:
        # Each process has its own part of the batch.
        try:
            return jax.make_array_from_process_local_data(
                targets[name], np.asarray(array)
            )
        except ValueError as error:
            raise _does_not_fit(name, array, specs[name], mesh) from error

    return {name: from_parts(name, array) for name, array in batch.items()}


def _does_not_fit(name: str, array: Any, spec: PartitionSpec, mesh: Mesh) -> ValueError:
    return ValueError(
        f"batch: {name!r} of shape {np.shape(array)} cannot be split as {spec} over "
        f"the mesh {dict(mesh.shape)}: name axes of the mesh, and choose a batch size "
        "that they divide, or fill the batch up and mask."
    )
