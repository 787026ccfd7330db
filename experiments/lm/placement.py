"""How decoders and what they compute are split over a mesh."""

from __future__ import annotations

import math
from collections.abc import Collection

import jax
from jax import Array
from jax.sharding import PartitionSpec

from kdjax.fused import TOKEN_AXES
from kdjax.train.rules import Rules


def rules(axes: Collection[str], *, tied: bool) -> Rules:
    """Rules for a decoder's parameters, of student or teacher.

    The vocabulary, the heads and the insides of dense layers go over ``tensor``, and
    the layers' widths over ``fsdp``. Embedding and head are not split over ``fsdp``:
    it splits the tokens too, all of which need the whole vocabulary.

    Args:
      axes: of the mesh; what it lacks of these two is left out.
      tied: whether the head is the embedding.
    """
    tensor, fsdp = (name if name in axes else None for name in ("tensor", "fsdp"))
    head = [] if tied else [("(^|/)head$", PartitionSpec(None, tensor))]
    return [
        ("embedding$", PartitionSpec(tensor, None)),
        *head,
        ("(query|key|value)/kernel$", PartitionSpec(None, fsdp, tensor)),
        ("attention/out/kernel$", PartitionSpec(None, tensor, None, fsdp)),
        ("mlp/(gate|up)/kernel$", PartitionSpec(None, fsdp, tensor)),
        ("mlp/down/kernel$", PartitionSpec(None, tensor, fsdp)),
    ]


def by_examples(x: Array) -> Array:
    """Hidden states ``[B, T, width]``, split over a mesh as the batch is.

    The compiler would otherwise split them as the parameters are, and gather the batch
    where it should gather a layer (jax 0.10.2).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name in TOKEN_AXES
        if name in mesh.axis_names and name not in mesh.manual_axes
    )
    if not axes or x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))
