"""Contrastive representation distillation, with its memory of all examples."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdjax.losses import _checks
from kdjax.losses._contrast import log_normalizer, noise_contrastive
from kdjax.losses._labels import widened
from kdjax.losses._vectors import product, unit
from kdjax.objectives._keys import by_example
from kdjax.objectives._relations import embedding
from kdjax.objectives._terms import MASK, counted, entry, remembering
from kdjax.objectives.projectors import linear
from kdjax.types import Batch, Mean, Objective, Outputs, PyTree, Scheduled

_SIDES = ("student", "teacher")


def contrastive_memory(
    *,
    student: str,
    teacher: str,
    dataset_size: int,
    name: str = "crd",
    weight: Scheduled = 0.8,
    where: str | None = MASK,
    index: str = "index",
    classes: Sequence[int] | np.ndarray | None = None,
    width: int = 128,
    negatives: int = 16384,
    momentum: float = 0.5,
    temperature: float = 0.07,
    pool: bool = True,
    seed: int = 0,
) -> Objective:
    """CRD: tells an example's embedding from thousands of remembered ones.

    Student and teacher are each projected to ``width`` numbers of length 1, by
    matrices that are trained. A memory keeps such an embedding of every example for
    both; the student's embedding is compared with the teacher's memories, its own and
    others', and the teacher's with the student's. The loss is the sum of both,
    :func:`kdjax.losses.contrastive_representation`.

    The memories, and the two normalisers, which the first batch sets, are the
    objective's state: saved and restored with it, and split over a mesh by a rule
    such as ``("objective_state/.*memory", PartitionSpec("data"))``. Which others an
    example is compared with depends on the seed, the step and its index alone. Under
    accumulation the memories move with every micro-batch.

    Memory: ``[dataset_size, width]`` twice, and scores ``[B, dataset_size]`` twice:
    all scores are computed, and those that were drawn are picked, since at the
    published number of negatives this is less than a copy of every embedding drawn.

    Args:
      student: path of the student's feature, ``[B, D]``, a map or tokens.
      teacher: path of the teacher's.
      dataset_size: how many examples the training data has.
      name: of the term, in metrics.
      weight: of the term; the published one is 0.8.
      where: entry of the batch that says which examples count, and are remembered.
      index: entry of the batch with the index of each example, integers ``[B]``
        below ``dataset_size``, as :func:`kdjax.io.input.batches` gives it. An index
        that is too large makes the loss NaN.
      classes: the class of every example, ``[dataset_size]``: others are then drawn
        of other classes, as in the published code; by default of all other examples.
      width: of the embeddings.
      negatives: how many others each example is compared with, drawn with
        repetition.
      momentum: share of the old embedding in the new memory, in [0, 1].
      temperature: of the scores.
      pool: whether maps and tokens are averaged over their positions; otherwise the
        feature must be ``[B, D]``.
      seed: of the first memories and of what is drawn.

    Returns:
      An objective of one term, with the projections as its parameters and the
      memories as its state.

    Raises:
      ValueError: a number is out of its range, ``classes`` has another length or only
        one class, the weight is not finite, or (when traced) a feature or an entry
        is missing.

    Example:
      >>> objective = contrastive_memory(
      ...     student="pooled", teacher="pooled", dataset_size=50_000)
      >>> objective.init_state()["student"]["memory"].shape
      (50000, 128)

    Reference:
      Tian, Krishnan and Isola, Contrastive Representation Distillation, 2020, section
      3. arXiv:1910.10699
    """
    _checks.whole(dataset_size=dataset_size, width=width, negatives=negatives)
    _checks.positive(temperature=temperature)
    _checks.fraction(momentum=momentum)
    if dataset_size < 2:
        raise ValueError("dataset_size: got 1; expected others to compare with.")
    groups = None if classes is None else _grouped(np.asarray(classes), dataset_size)
    paths = dict(zip(_SIDES, (student, teacher), strict=True))

    def vectors(*outputs: Outputs) -> dict[str, Array]:
        return {
            side: embedding(each, paths[side], f"term {name!r}: the {side}", pool)
            for side, each in zip(_SIDES, outputs, strict=True)
        }

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        specs = jax.eval_shape(vectors, student, teacher)
        return {
            side: linear().init(key, specs[side].shape[-1], width)
            for side, key in zip(_SIDES, jax.random.split(rng), strict=True)
        }

    def compute(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[Mean, PyTree]:
        own = entry(batch, index, "index")
        mask = counted(batch, where, own.shape, None)
        seen = {
            side: unit(widened(linear().apply(params[side], feature)))
            for side, feature in vectors(student, teacher).items()
        }
        drawn = _others(own, by_example(own, step, seed), negatives, state)
        examples = jnp.concatenate([own[:, None], drawn], 1)
        rows, changed = _compared(seen, state, examples, mask, temperature, momentum)
        return Mean.of(rows, mask), changed

    first = functools.partial(_first, dataset_size, width, groups, seed)
    return remembering(name, weight, compute, init, first)


def _first(
    dataset_size: int, width: int, groups: dict[str, np.ndarray] | None, seed: int
) -> dict[str, PyTree]:
    """The state that a run starts from: random memories, and no normalisers yet."""
    bound = (3 / width) ** 0.5
    state: dict[str, PyTree] = {
        side: {
            "memory": jax.random.uniform(
                jax.random.fold_in(jax.random.key(seed), i),
                (dataset_size, width),
                minval=-bound,
                maxval=bound,
            ),
            "log_normalizer": jnp.asarray(-jnp.inf),
        }
        for i, side in enumerate(_SIDES)
    }
    if groups is not None:
        # Arrays of the state, since a constant would be copied into the program.
        state["classes"] = {kind: jnp.asarray(array) for kind, array in groups.items()}
    return state


def _compared(
    seen: dict[str, Array],
    state: PyTree,
    examples: Array,
    mask: Array | None,
    temperature: float,
    momentum: float,
) -> tuple[Array, PyTree]:
    """The loss ``[B]`` of what was seen of the examples ``[B, 1 + K]``, own first."""
    own = examples[:, 0]
    counts = jnp.ones(own.shape, bool) if mask is None else mask
    rows, changed = jnp.zeros(own.shape), dict(state)
    for side, other in zip(_SIDES, reversed(_SIDES), strict=True):
        memory = state[side]["memory"]
        size = jnp.asarray(len(memory))
        every = product(seen[side], state[other]["memory"].T) / temperature
        scores = jnp.take_along_axis(every, examples, 1)
        scores = jnp.where(counts[:, None], scores, 0.0)
        constant = state[side]["log_normalizer"]
        first = log_normalizer(scores, size, counts)
        constant = jnp.where(jnp.isneginf(constant), first, constant)
        rows += noise_contrastive(scores, constant, size)
        memory = _remembered(memory, own, seen[side], counts, momentum)
        changed[side] = {"memory": memory, "log_normalizer": constant}
    return rows, changed


def _remembered(
    memory: Array, index: Array, seen: Array, where: Array, momentum: float
) -> Array:
    """The memory with what was seen of the examples that count mixed in."""
    seen = jax.lax.stop_gradient(seen)
    # Beyond the end, which drops it; a negative index would count from there.
    index = jnp.where(where & (index >= 0), index, memory.shape[0])
    mixed = unit(momentum * memory[index] + (1 - momentum) * seen)
    return memory.at[index].set(mixed.astype(memory.dtype), mode="drop")


def _grouped(classes: np.ndarray, dataset_size: int) -> dict[str, np.ndarray]:
    """The examples in the order of their classes, and where its class is for each."""
    if classes.shape != (dataset_size,):
        raise ValueError(
            f"classes: got shape {classes.shape}; expected one class for each of the "
            f"dataset_size={dataset_size} examples."
        )
    _, group, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ValueError("classes: got a single class; expected others to draw from.")
    starts = np.cumsum(sizes) - sizes
    return {
        "order": np.argsort(group, kind="stable").astype(np.int32),
        "start": starts[group].astype(np.int32),
        "size": sizes[group].astype(np.int32),
    }


def _others(index: Array, keys: Array, number: int, state: PyTree) -> Array:
    """Examples drawn of all but an example's own class, or itself: ``[B, number]``."""
    total = state["student"]["memory"].shape[0]
    if "classes" in state:
        groups = state["classes"]
        start, size = groups["start"][index], groups["size"][index]
    else:
        start, size = index, jnp.ones_like(index)

    def draw(key: Array, start: Array, size: Array) -> Array:
        place = jax.random.randint(key, (number,), 0, total - size)
        return jnp.where(place >= start, place + size, place)

    places = jax.vmap(draw)(keys, start, size)
    return groups["order"][places] if "classes" in state else places
