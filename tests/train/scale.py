"""One training for every number of devices, kind of mesh, and form of the step.

It has what differs between devices when something is wrong: BatchNorm, a loss over the
relations of all examples, and masks that leave each device another count. Processes of
a test of several import it too.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdjax import losses, models, objectives, teachers
from kdjax.objectives import projectors
from kdjax.train import (
    batch_axes,
    init_state,
    largest_axes,
    make_train_step,
    place,
    place_step,
    pmap_step,
    shard_map_step,
)
from kdjax.types import Outputs

EXAMPLES, WIDTH, CLASSES = 16, 6, 5


class Net(nnx.Module):
    """Two layers with batch statistics over all devices."""

    def __init__(self, width, seed, dtype, axis_name=None):
        make = {"param_dtype": dtype, "rngs": nnx.Rngs(seed)}
        self.hidden = nnx.Linear(WIDTH, width, use_bias=False, **make)
        self.norm = nnx.BatchNorm(width, axis_name=axis_name, momentum=0.9, **make)
        self.out = nnx.Linear(width, CLASSES, **make)

    def __call__(self, x):
        hidden = nnx.relu(self.norm(self.hidden(x)))
        return Outputs(self.out(hidden), {"hidden": hidden})


def _net(width, seed, dtype, axis_name=None):
    net = models.from_nnx(Net(width, seed, dtype, axis_name))
    # Flax has running statistics in float32, whatever the parameters are in.
    wide = jax.tree.map(lambda leaf: leaf.astype(dtype), net.model_state)
    return net._replace(model_state=wide)


def objective():
    return objectives.combine(
        objectives.hard_labels(weight=0.3),
        objectives.soft_labels(temperature=3.0, weight=0.7),
        objectives.relations(
            losses.relational_distance,
            student="hidden",
            teacher="hidden",
            name="distance",
        ),
        objectives.relations(
            losses.similarity_preserving,
            student="hidden",
            teacher="hidden",
            name="similarity",
            projector=projectors.linear(),
        ),
    )


def batch(step: int, dtype) -> dict[str, np.ndarray]:
    """All examples of a step; every device would count another number of them."""
    rng = np.random.default_rng(step)
    labels = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)
    labels[rng.random(EXAMPLES) < 0.2] = -100
    return {
        "x": rng.normal(size=(EXAMPLES, WIDTH)).astype(dtype),
        "label": labels,
        "mask": rng.random(EXAMPLES) < 0.7,
    }


def mesh_of(axes: Mapping[str, int]) -> Mesh:
    """A mesh of the first devices."""
    sizes = tuple(axes.values())
    devices = np.asarray(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))


def rules_of(mesh: Mesh):
    """What the axes ``fsdp`` and ``tensor`` are there for."""
    axes = [axis for axis in ("fsdp", "tensor") if axis in mesh.axis_names]
    return [(".*", largest_axes(*axes, above=16))] if axes else []


class Run(NamedTuple):
    """What a training ends with, on the host."""

    losses: np.ndarray
    params: list[np.ndarray]
    statistics: list[np.ndarray]


def run(
    form: str = "jit",
    axes: Mapping[str, int] | None = None,
    *,
    dtype=np.float64,
    steps: int = 20,
    axis_name: str = "data",
    accumulate: int = 1,
) -> Run:
    """Trains on the first devices as the axes say: ``jit``, ``shard_map`` or ``pmap``.

    Without axes, a plain ``jax.jit`` on one device. ``axis_name`` is what the last two
    forms split the batch over.
    """
    with jax.enable_x64(dtype == np.float64):
        over = None if form == "jit" else axis_name
        net = _net(8, 0, dtype, over)
        teacher, frozen = teachers.frozen(_net(12, 1, dtype))
        parts = teacher, objective(), optax.adam(1e-2)
        state = init_state(
            net,
            *parts,
            frozen=frozen,
            batch=batch(0, dtype),
            rng=jax.random.key(2),
            axis_name=over,
        )
        make = functools.partial(make_train_step, net.model, *parts)
        step = make(axis_name=over, accumulate=accumulate)
        mesh = mesh_of(axes or {"data": 1})
        step, state, frozen = _compiled(form, step, axes and mesh, state, frozen, over)
        values = []
        for number in range(steps):
            part = _own(batch(number, dtype), mesh)
            state, metrics = step(state, frozen, part)
            values.append(np.asarray(metrics["loss"].total))
        fetch = functools.partial(_fetched, mesh)
        return Run(np.asarray(values), fetch(state.params), fetch(state.model_state))


def _compiled(form, step, mesh, state, frozen, axis_name):
    """The step in one of its forms, with its arrays in their places."""
    if mesh is None:
        return jax.jit(step), state, frozen
    if form == "pmap":
        devices = list(mesh.devices.flat)
        return pmap_step(step, axis_name=axis_name, devices=devices), state, frozen
    rules = rules_of(mesh)
    given = {"state": state, "frozen": frozen, "rules": rules, "teacher_rules": rules}
    if form == "shard_map":
        compiled = shard_map_step(step, mesh, axis_name=axis_name, **given)
    else:
        compiled = place_step(step, mesh, **given)
    return compiled, place(state, mesh, rules), place(frozen, mesh, rules)


def _own(whole: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """The examples of this process's devices."""
    sharding = NamedSharding(mesh, batch_axes(mesh))
    slices = sharding.addressable_devices_indices_map((EXAMPLES,)).values()
    rows = sorted({row for (part,) in slices for row in range(EXAMPLES)[part]})
    return {name: array[rows] for name, array in whole.items()}


def _fetched(mesh: Mesh, tree) -> list[np.ndarray]:
    """Whole arrays, also of those that are split over processes."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))]
