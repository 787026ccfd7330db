"""The losses compiled for an absent TPU slice: memory, traffic, collectives."""

from __future__ import annotations

import collections
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import forms
from experiments.benchmarks.inputs import LOSSES
from experiments.benchmarks.report import Figure
from kdjax.tools import preflight
from kdjax.train.chips import Chip, chip_of

SLICE = "v5e:4x4"
AXES = ("data", "model")
LAYOUTS = {
    "batch 16 ways": PartitionSpec(AXES, None),
    "classes 16 ways": PartitionSpec(None, AXES),
    "batch and classes 4 ways each": PartitionSpec(*AXES),
}
SUMS = ("all-reduce", "reduce-scatter")


class Program(NamedTuple):
    """What the compiler says of one chip."""

    temporaries: int
    traffic: float
    collectives: Mapping[str, int]

    @property
    def moved(self) -> int:
        """Collectives that carry logits from chip to chip, not just sums of rows."""
        return sum(
            count for kind, count in self.collectives.items() if kind not in SUMS
        )


def available() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def mesh(ways: tuple[int, int]) -> Mesh:
    """The chips of the slice: tokens and classes split so many ways."""
    return preflight.slice_mesh(SLICE, dict(zip(AXES, ways, strict=True)))


def chip() -> Chip:
    """What one of them can do."""
    found = chip_of(mesh((4, 4)).devices.flat[0].device_kind)
    assert found is not None
    return found


def figures(
    tokens: int, vocabulary: int, losses: Sequence[str] = LOSSES
) -> Iterator[Figure]:
    """Every loss in every layout, in float32, beside the Optax form."""
    chips = mesh((4, 4))
    logits_bytes = tokens * vocabulary * 4 / chips.size
    for layout, spec in LAYOUTS.items():
        section = f"[{tokens}, {vocabulary}] on {SLICE}, {layout}, per chip"
        for name in losses:
            ours, theirs = (
                compiled(form[name], chips, spec, (tokens, vocabulary))
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
    found = preflight.costs(compiled.as_text()).collectives
    return Program(
        compiled.memory_analysis().temp_size_in_bytes,
        compiled.cost_analysis()["bytes accessed"],
        collections.Counter(each.kind for each in found),
    )
