"""What a compiled step will take of every chip: memory, products, traffic, messages."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from kdjax.tools.preflight._costs import Costs, costs
from kdjax.train import batch_axes, place_step, shardings
from kdjax.train.chips import Chip, chip_of
from kdjax.train.loop import Step
from kdjax.train.rules import Rules
from kdjax.train.state import DistillState
from kdjax.types import PyTree

# libtpu compiles for chips that are not there when it is told not to look for them;
# the last name lets several processes do so at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What TPU compilers say where it does not fit: of all, or of what lives inside a step.
_EXHAUSTED = re.compile(r"(Used |temporaries \()([\d.]+)([KMGT]?)")


class Plan(NamedTuple):
    """A step and the shapes of all that it works on; nothing is allocated.

    Attributes:
      step: from :func:`~kdjax.make_train_step`.
      state: of ``jax.ShapeDtypeStruct``, as from ``jax.eval_shape``.
      frozen: the teacher's, likewise.
      batch: of all processes together, likewise.
      rules: how the state is split, as for :func:`~kdjax.train.place_step`.
      teacher_rules: how the teacher is split.
    """

    step: Step
    state: DistillState
    frozen: PyTree
    batch: Mapping[str, jax.ShapeDtypeStruct]
    rules: Rules = ()
    teacher_rules: Rules = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """What one step takes on each chip.

    Attributes:
      mesh: sizes of its axes.
      examples: of the batch, over all chips.
      device_kind: what JAX calls the chips.
      memory: bytes by what they hold. The arrays are as large as their shards;
        ``padding`` is what the device adds to them, ``activations`` all that lives
        inside the step only, gradients and gathered parameters too.
      costs: products, traffic and messages; ``None`` where it does not fit, and the
        compiler gave up.
    """

    mesh: Mapping[str, int]
    examples: int
    device_kind: str
    memory: Mapping[str, int]
    costs: Costs | None

    @property
    def chip(self) -> Chip | None:
        """What the maker says of the chip; ``None`` if that is not known."""
        return chip_of(self.device_kind)

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.values())

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether that is less than the chip has; ``None`` if that is not known."""
        if self.costs is None:
            return False
        return None if self.chip is None else self.peak <= self.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """The least time for each of three things, all of which may go on at once.

        ``{}`` where the chip is not known, or the step does not fit.
        """
        if self.chip is None or self.costs is None:
            return {}
        moved = sum(each.times * each.moved for each in self.costs.collectives)
        return {
            "products": self.costs.flops / self.chip.flops,
            "memory traffic": self.costs.traffic / self.chip.bandwidth,
            "links": moved / self.chip.links,
        }

    def gathered(self, size: int) -> list[tuple[int, ...]]:
        """Shapes of all-gathers with an axis of this size, or a chip's part of it."""
        parts = {size // ways for ways in range(1, self.chips + 1) if size % ways == 0}
        return [
            shape
            for each in (self.costs.collectives if self.costs else ())
            if each.kind == "all-gather"
            for shape in each.shapes
            if parts & set(shape)
        ]


def slice_mesh(topology: str, axes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh over a TPU slice that need not be there.

    Args:
      topology: such as ``"v5e:16x16"`` or ``"v5p:4x4x4"``.
      axes: sizes by name; ``None`` is one axis ``data`` over all chips.

    Raises:
      ValueError: libtpu is missing or has no such topology, or the sizes do not
        multiply to its chips.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Both cores of such a chip are one device, unless told otherwise.
    cores = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        found = topologies.get_topology_desc(topology, platform="tpu", **cores).devices
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"topology: got {topology!r}; expected one such as v5e:16x16, and libtpu "
            f"installed (pip install 'kdjax[tpu]'). {error}"
        ) from error
    axes = {"data": len(found)} if axes is None else axes
    wanted = math.prod(axes.values())
    if wanted != len(found):
        raise ValueError(
            f"axes: {dict(axes)} is for {wanted} chips, but {topology} has "
            f"{len(found)}; sizes are positive and multiply to it."
        )
    # As make_mesh does where they are.
    kinds = (AxisType.Auto,) * len(axes)
    try:
        return jax.make_mesh(
            tuple(axes.values()), tuple(axes), devices=found, axis_types=kinds
        )
    except NotImplementedError as error:
        raise ValueError(
            f"axes: {dict(axes)} cannot be laid over {topology}; expected sizes that "
            f"are products of its own. {error}"
        ) from error


def check(plan: Plan, mesh: Mesh) -> Report:
    """Compiles a step as :func:`~kdjax.train.place_step` would, and reads the program.

    Args:
      plan: the step and its shapes.
      mesh: of chips that are there, or from :func:`slice_mesh`.

    Returns:
      What the step takes on each chip. Where its arrays alone are too large for the
      chip it is not compiled.

    Raises:
      ValueError: as ``place_step``: a rule does not fit its array, or the mesh does not
        divide the batch.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from kdjax import make_train_step, models, objectives, teachers
      >>> from kdjax.train import init_state, make_mesh
      >>> net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.ones((4, 2)))
      >>> teacher, frozen = teachers.frozen(net)
      >>> parts = teacher, objectives.soft_labels(), optax.sgd(0.1)
      >>> batch = {"x": jax.ShapeDtypeStruct((16, 4), jnp.float32)}
      >>> state = jax.eval_shape(lambda: init_state(
      ...     net, *parts, frozen=frozen, batch=batch, rng=jax.random.key(0)))
      >>> step = make_train_step(net.model, *parts)
      >>> report = check(Plan(step, state, frozen, batch), make_mesh())
      >>> report.memory["student"], report.memory["teacher"]
      (32, 32)
    """
    arrays = _placed(plan, mesh)
    held = _held(arrays)
    kind = mesh.devices.flat[0].device_kind
    examples = jax.tree.leaves(plan.batch)[0].shape[0]
    report = functools.partial(Report, dict(mesh.shape), examples, kind)
    chip = chip_of(kind)
    if chip is not None and sum(held.values()) > chip.memory:
        return report(held, None)
    step = place_step(
        plan.step,
        mesh,
        state=plan.state,
        frozen=plan.frozen,
        rules=plan.rules,
        teacher_rules=plan.teacher_rules,
    )
    lowered: Any = jax.jit(step, donate_argnums=0).lower(*arrays)
    try:
        compiled, text = _compiled(lowered, mesh)
    except jax.errors.JaxRuntimeError as error:
        used = _EXHAUSTED.search(str(error))
        if used is None:
            raise
        of_all = used.group(1) == "Used "
        size = int(float(used.group(2)) * _UNITS[used.group(3)])
        held["activations"] = max(0, size - of_all * sum(held.values()))
        return report(held, None)
    return report(held | _inside(compiled, held), costs(text))


def _compiled(lowered: Any, mesh: Mesh) -> tuple[Any, str]:
    """The program, and its text."""
    if mesh.devices.flat[0].platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # libtpu writes the text itself: JAX cannot always read its programs, such as those
    # of a v5p with asynchronous updates (jax 0.10.2).
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (path,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, path.read_text()


def _placed(plan: Plan, mesh: Mesh) -> tuple[PyTree, PyTree, PyTree]:
    """State, teacher and batch with the shardings that they will have."""

    def on_mesh(tree: PyTree, where: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            tree,
            where,
        )

    batch = NamedSharding(mesh, batch_axes(mesh))
    return (
        on_mesh(plan.state, shardings(plan.state, mesh, plan.rules)),
        on_mesh(plan.frozen, shardings(plan.frozen, mesh, plan.teacher_rules)),
        on_mesh(dict(plan.batch), dict.fromkeys(plan.batch, batch)),
    )


def _held(arrays: tuple[Any, PyTree, PyTree]) -> dict[str, int]:
    """Bytes of each chip's shards."""
    state, frozen, batch = arrays
    params = state.params
    trees = {
        "student": params["student"],
        "objective": (params["objective"], state.objective_state),
        "optimizer": state.opt_state,
        "student's state": (state.model_state, state.step, state.skipped, state.rng),
        "teacher": (frozen, state.teacher_state),
        "batch": batch,
    }
    return {
        name: sum(map(_shard_bytes, jax.tree.leaves(tree)))
        for name, tree in trees.items()
    }


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _inside(compiled: Any, held: Mapping[str, int]) -> dict[str, int]:
    """Bytes beside the shards, by the compiler's own account."""
    found = compiled.memory_analysis()
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "padding": max(0, found.argument_size_in_bytes - sum(held.values())),
        "results": kept,
        "activations": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
