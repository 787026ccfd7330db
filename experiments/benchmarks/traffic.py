"""The losses compiled for an absent TPU slice: memory, traffic, collectives."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import forms
from experiments.benchmarks.inputs import LOSSES
from experiments.benchmarks.report import Figure

SLICE = "v5e:4x4"
AXES = ("data", "model")
LAYOUTS = {
    "batch 16 ways": PartitionSpec(AXES, None),
    "classes 16 ways": PartitionSpec(None, AXES),
    "batch and classes 4 ways each": PartitionSpec(*AXES),
}
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


class Program(NamedTuple):
    """What the compiler says of one chip."""

    temporaries: int
    traffic: float
    collectives: dict[str, int]

    @property
    def moved(self) -> int:
        """Collectives that carry logits from chip to chip, not just sums of rows."""
        counts = dict(self.collectives)
        del counts["all-reduce"]
        return sum(counts.values())


def available() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def devices() -> np.ndarray:
    """The chips of the slice."""
    return np.array(topologies.get_topology_desc(SLICE, platform="tpu").devices)


def figures(
    tokens: int, vocabulary: int, losses: Sequence[str] = LOSSES
) -> Iterator[Figure]:
    """Every loss in every layout, in float32, beside the Optax form."""
    mesh = Mesh(devices().reshape(4, 4), AXES, axis_types=(AxisType.Auto,) * 2)
    logits_bytes = tokens * vocabulary * 4 / mesh.size
    for layout, spec in LAYOUTS.items():
        section = f"[{tokens}, {vocabulary}] on {SLICE}, {layout}, per chip"
        for name in losses:
            ours, theirs = (
                compiled(form[name], mesh, spec, (tokens, vocabulary))
                for form in (forms.KDJAX, forms.OPTAX)
            )
            yield Figure(
                section,
                name,
                "traffic",
                f"{ours.traffic / 1e9:.2f} GB",
                "Optax",
                f"{theirs.traffic / 1e9:.2f} GB",
                ours.traffic / theirs.traffic,
                target=0.8,
            )
            yield Figure(
                section,
                name,
                "temporaries",
                f"{ours.temporaries / 1e6:.1f} MB",
                "the logits",
                f"{logits_bytes / 1e6:.1f} MB",
                ours.temporaries / logits_bytes,
                # Sums of rows are temporaries too, and this is far above them.
                target=0.1,
            )
            yield Figure(
                section,
                name,
                f"gathered (+{ours.collectives['all-reduce']} all-reduce)",
                str(ours.moved),
                "Optax",
                f"{theirs.moved} (+{theirs.collectives['all-reduce']})",
                ours.moved,
                target=0,
            )


def compiled(
    loss: forms.Loss, mesh: Mesh, spec: PartitionSpec, shape: tuple[int, int]
) -> Program:
    """Value and gradient by the student, which stays where the logits are."""
    sharded = NamedSharding(mesh, spec)
    by_row = NamedSharding(mesh, PartitionSpec(spec[0]))
    logits = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharded)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=by_row)
    function: Any = jax.jit(
        forms.mean_and_gradient(loss),
        out_shardings=(NamedSharding(mesh, PartitionSpec()), sharded),
    )
    return program(function.lower(logits, logits, labels).compile())


def program(compiled: Any) -> Program:
    """What the compiler says of what it compiled."""
    text = compiled.as_text()
    return Program(
        compiled.memory_analysis().temp_size_in_bytes,
        compiled.cost_analysis()["bytes accessed"],
        # An asynchronous one is a pair of instructions, of which one counts.
        {n: len(re.findall(rf" {n}(?:-start)?\(", text)) for n in COLLECTIVES},
    )
