"""The step by hand: every device runs it on its own part of the batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax.train.loop import Step
from kdjax.train.rules import Rules
from kdjax.train.sharding import batch_specs, place_step
from kdjax.train.state import DistillState
from kdjax.train.step import check_axis
from kdjax.types import Batch, Mean, PyTree


def shard_map_step(
    step: Step,
    mesh: Mesh,
    *,
    state: DistillState,
    frozen: PyTree,
    axis_name: str = "data",
    batch: PartitionSpec | Mapping[str, PartitionSpec] | None = None,
    rules: Rules = (),
    teacher_rules: Rules = (),
    teacher_memory_kind: str | None = None,
    donate: bool = True,
) -> Step:
    """Compiles a step that sums over an axis of a mesh by itself.

    The other axes of the mesh are left to the compiler, as by ``place_step``: the state
    may be split over them by rules. What rules split over ``axis_name`` is gathered
    before the step and split again after it.

    Args:
      step: from :func:`~kdjax.make_train_step`, with the same ``axis_name``.
      mesh: from :func:`~kdjax.train.make_mesh`.
      state: as for :func:`~kdjax.train.place_step`.
      frozen: likewise.
      axis_name: of the mesh, over which ``shard_map`` splits the batch.
      batch: as for :func:`~kdjax.train.place_step`.
      rules: likewise.
      teacher_rules: likewise.
      teacher_memory_kind: likewise.
      donate: likewise.

    Returns:
      ``step(state, frozen, batch)``, with the numbers of ``place_step``.

    Raises:
      ValueError: the mesh has no such axis, it has size 1 beside others, or as
        ``place_step`` raises it.
    """
    _check_mesh(mesh, axis_name)
    check_axis(step, axis_name)

    def here(spec: PartitionSpec) -> PartitionSpec:
        """The part of a spec that is not left to the compiler."""
        names = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
        return PartitionSpec(*(axis_name if axis_name in of else None for of in names))

    @functools.wraps(step)
    def mapped(
        state: DistillState, frozen: PyTree, given: Batch
    ) -> tuple[DistillState, dict[str, Mean]]:
        whole = PartitionSpec()
        specs = batch_specs(batch, mesh, given)
        split = {name: here(specs[name]) for name in given}
        # The check would sum gradients of what is the same everywhere on its own, and
        # the step sums them too.
        run = jax.shard_map(
            step,
            in_specs=(whole, whole, split),
            out_specs=(whole, whole),
            axis_names={axis_name},
            check_vma=False,
        )
        return run(state, frozen, given)

    vars(mapped)["axis_name"] = None  # none is open outside
    return place_step(
        mapped,
        mesh,
        state=state,
        frozen=frozen,
        batch=batch,
        rules=rules,
        teacher_rules=teacher_rules,
        teacher_memory_kind=teacher_memory_kind,
        donate=donate,
    )


def _check_mesh(mesh: Mesh, axis_name: str) -> None:
    """It has the axis, and the batch is split over that."""
    if axis_name not in mesh.axis_names:
        raise ValueError(
            f"axis_name: got {axis_name!r}, but the mesh has {mesh.axis_names}; "
            "expected one of them."
        )
    if mesh.shape[axis_name] == 1 < mesh.size:
        # XLA fails on sums over it (jax 0.10.2).
        raise ValueError(
            f"axis_name: {axis_name!r} has one part alone on {dict(mesh.shape)}; there "
            "is nothing to sum over. Use place_step and a step without axis_name."
        )


def pmap_step(
    step: Step,
    *,
    axis_name: str = "data",
    devices: Sequence[jax.Device] | None = None,
    donate: bool = True,
) -> Step:
    """Compiles a step with ``jax.pmap``: everything is on every device but the batch.

    States are as for every other form of the step, without an axis of devices.

    Args:
      step: from :func:`~kdjax.make_train_step`, with the same ``axis_name``.
      axis_name: what ``pmap`` calls its axis.
      devices: of all processes; all there are by default.
      donate: reuse the memory of the old state for the new one.

    Returns:
      ``step(state, frozen, batch)`` for batches from the host, in which each process
      has the examples of its own devices.

    Raises:
      ValueError: the step was made with another ``axis_name``, or (when called) the
        devices do not divide the batch.
    """
    check_axis(step, axis_name)
    mapped = jax.pmap(
        step,
        axis_name=axis_name,
        in_axes=(None, None, 0),
        out_axes=(None, None),
        devices=devices,
        donate_argnums=(0,) if donate else (),
    )
    everywhere = jax.devices() if devices is None else devices
    own = [each for each in everywhere if each.process_index == jax.process_index()]
    mesh = Mesh(np.asarray(own), (axis_name,), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec(axis_name))
    whole = NamedSharding(mesh, PartitionSpec())

    def run(
        state: DistillState, frozen: PyTree, batch: Batch
    ) -> tuple[DistillState, dict[str, Mean]]:
        parts = {name: _parts(name, array, len(own)) for name, array in batch.items()}
        if jax.process_count() > 1:
            # A donated state that lies on one device alone is deleted before it is read
            # (jax 0.10.2).
            state, frozen = jax.device_put((state, frozen), whole)
        return mapped(state, frozen, jax.device_put(parts, split))

    return run


def _parts(name: str, array: Any, devices: int) -> Any:
    """The examples of each device, along a new first axis."""
    shape = np.shape(array)
    if not shape or shape[0] % devices:
        raise ValueError(
            f"batch: {name!r} of shape {shape} cannot be split over {devices} devices; "
            "choose a batch size that they divide, or fill the batch up and mask."
        )
    return array.reshape(devices, -1, *shape[1:])
