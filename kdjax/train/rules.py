"""How arrays are split over a mesh: by the pattern of a path, or by size."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax.types import PyTree

Automatic: TypeAlias = Callable[[tuple[int, ...], Mesh], PartitionSpec]
"""``(shape, mesh)`` to how an array of that shape is split."""

Rules: TypeAlias = Sequence[tuple[str, PartitionSpec | Automatic]]
"""Pairs of a pattern and how arrays are split whose path it matches."""


def largest_axes(*axes: str, above: int = 2**16) -> Automatic:
    """Splits each array along its largest axes: the usual rule for all that is large.

    Each axis of the mesh in turn goes to the largest axis of the array that it divides
    and that is not split yet; where there is none, it is left out.

    Args:
      *axes: of the mesh, such as ``"fsdp"``; the first one gets the largest axis.
      above: arrays of fewer elements than that are replicated.

    Returns:
      What stands in a rule for a ``PartitionSpec``.

    Raises:
      ValueError: no axes, one twice, or (when called) one that the mesh does not have.

    Example:
      >>> from kdjax.train import make_mesh
      >>> mesh = make_mesh({"fsdp": jax.device_count() // 2, "tensor": 2})
      >>> split = largest_axes("tensor", "fsdp", above=64)
      >>> tuple(split((3, 8, 16), mesh))
      (None, 'fsdp', 'tensor')
      >>> rules = [("head/kernel", PartitionSpec(None, "tensor")),
      ...          (".*", largest_axes("fsdp"))]
    """
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(
            f"axes: got {axes}, expected names of a mesh's axes, each once."
        )

    def split(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        missing = [axis for axis in axes if axis not in mesh.shape]
        if missing:
            raise ValueError(f"axes: the mesh has no {missing}.")
        names: list[str | None] = [None] * len(shape)
        if math.prod(shape) >= above:
            for axis in axes:
                free = [
                    place
                    for place, size in enumerate(shape)
                    if names[place] is None and size % mesh.shape[axis] == 0
                ]
                if free:
                    names[max(free, key=lambda place: shape[place])] = axis
        return PartitionSpec(*names)

    return split


def shardings(tree: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """How every array of a tree is split: by the first rule that matches its path.

    An array of the optimizer's state that has the shape of its parameter follows it:
    it is also found by the parameter's path. One of another shape (Adafactor's) is not
    found by that part of its own path.

    Args:
      tree: arrays, or ``jax.ShapeDtypeStruct``.
      mesh: from :func:`~kdjax.train.make_mesh`.
      rules: pairs of a regular expression, searched for in paths such as
        ``params/student/dense/kernel``, and a ``PartitionSpec`` or
        :func:`largest_axes`. What none of them matches is replicated.

    Returns:
      The tree with a ``NamedSharding`` per array.

    Raises:
      ValueError: a rule does not fit an array that it matches, or one with a
        ``PartitionSpec`` matches nothing.

    Example:
      >>> from kdjax.train import make_mesh
      >>> tree = {"out": {"kernel": np.ones((16, 8)), "bias": np.ones(8)}}
      >>> rules = [("kernel", PartitionSpec("data"))]
      >>> found = shardings(tree, make_mesh(), rules)
      >>> tuple(found["out"]["kernel"].spec), tuple(found["out"]["bias"].spec)
      (('data',), ())
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    shapes = [np.shape(leaf) for _, leaf in flat]
    by_name = dict(zip(names, shapes, strict=True))
    searched = [_searched(name, by_name) for name in names]
    _refuse_unused(rules, names, searched)
    found = [
        _first_match(mesh, rules, *each)
        for each in zip(names, searched, shapes, strict=True)
    ]
    return jax.tree.unflatten(structure, found)


def _searched(name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What patterns are searched for in to find an array: its path, for most."""
    start, *rest = name.split("/")
    if start != "opt_state":
        return [name]
    ends = ("/".join(rest[index:]) for index in range(len(rest)))
    end = next((end for end in ends if f"params/{end}" in shapes), None)
    if end is None:
        return [name]
    if shapes[f"params/{end}"] == shapes[name]:
        return [name, f"params/{end}"]
    return [name.removesuffix(end)]


def _refuse_unused(
    rules: Rules, names: Sequence[str], searched: Sequence[Sequence[str]]
) -> None:
    texts = list(itertools.chain.from_iterable(searched))
    for pattern, rule in rules:
        # An automatic rule is for what is left, which may be nothing.
        if isinstance(rule, PartitionSpec) and not any(
            re.search(pattern, text) for text in texts
        ):
            some = ", ".join(names[:5]) or "none at all"
            raise ValueError(
                f"rules: {pattern!r} -> {rule} matches no path; there are "
                f"{len(names)}: {some}{', ...' if len(names) > 5 else ''}. "
                "Correct the pattern, or leave the rule out."
            )


def _first_match(
    mesh: Mesh,
    rules: Rules,
    name: str,
    searched: Sequence[str],
    shape: tuple[int, ...],
) -> NamedSharding:
    for pattern, rule in rules:
        if any(re.search(pattern, text) for text in searched):
            try:
                spec = rule if isinstance(rule, PartitionSpec) else rule(shape, mesh)
                return fitting(mesh, spec, shape)
            except ValueError as error:
                raise ValueError(
                    f"rules: {pattern!r} -> {rule} does not fit {name} of shape "
                    f"{shape} on {dict(mesh.shape)}: {error}"
                ) from error
    return NamedSharding(mesh, PartitionSpec())


def fitting(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding, if an array of this shape can be split so."""
    sharding = NamedSharding(mesh, spec)
    if len(spec) > len(shape):
        raise ValueError(f"{len(spec)} axes to split, and the array has {len(shape)}.")
    sharding.shard_shape(shape)
    return sharding
