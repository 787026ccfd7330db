"""The values that models, teachers, objectives and steps hand to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

PyTree: TypeAlias = Any
"""Any nesting of dicts, lists, tuples and registered dataclasses with array leaves."""

Batch: TypeAlias = Mapping[str, Array]
"""One batch: arrays by name, with the examples along their first axis."""

Scheduled: TypeAlias = float | Array | Callable[[Array], Array | float]
"""A number, or its value by optimizer step, such as one of Optax's schedules."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """An average that adds up exactly over micro-batches, devices and hosts.

    Sums of ``Mean`` weigh every value alike, however the values were grouped; an
    average of averages would not.

    Attributes:
      total: sum of the values that count, a scalar of float32 at least.
      count: how many they were, a scalar integer.
    """

    total: Array
    count: Array

    @classmethod
    def of(cls, values: Array, where: Array | None = None) -> Mean:
        """Sums ``values`` where ``where`` is true.

        Args:
          values: one value per example or token, any shape.
          where: boolean, the shape of ``values``; what is false is left out, be it
            NaN or infinite. ``None`` counts everything.

        Returns:
          The mean of what counts, not yet divided.

        Raises:
          ValueError: the shapes differ.
          TypeError: ``where`` is not boolean.

        Example:
          >>> mask = jnp.array([True, True, False])
          >>> mean = Mean.of(jnp.array([1.0, 2.0, jnp.nan]), mask)
          >>> float(mean.value()), int(mean.count)
          (1.5, 2)
        """
        values = jnp.asarray(values)
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        if where is None:
            return cls(values.sum(), jnp.asarray(values.size, jnp.int32))
        where = jnp.asarray(where)
        if where.dtype != bool:
            raise TypeError(
                f"where: got dtype {where.dtype}, expected bool (True counts)."
            )
        if where.shape != values.shape:
            raise ValueError(
                f"where: got shape {where.shape} for values of shape {values.shape}; "
                "expected one entry per value."
            )
        return cls(jnp.where(where, values, 0).sum(), jnp.sum(where, dtype=jnp.int32))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> Array:
        """The average, a scalar; 0 where nothing counts."""
        return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1), 0.0)


class LinearHead(NamedTuple):
    """Logits that are not multiplied out yet: ``hidden @ kernel + bias``.

    Attributes:
      hidden: last hidden states, ``[*batch, D]``.
      kernel: output projection, ``[D, V]``.
      bias: ``[V]``, or ``None``; at -inf the class is out, whatever scale and cap.
      soft_cap: ``c`` in ``c * tanh(logits / c)``, or ``None``.
      scale: factor on the logits before the cap, or ``None``.
    """

    hidden: Array
    kernel: Array
    bias: Array | None = None
    soft_cap: float | Array | None = None
    scale: float | Array | None = None

    def logits(self) -> Array:
        """Multiplies the logits out, ``[*batch, V]``."""
        return self.finished(self.hidden @ self.kernel)

    def finished(self, products: Array) -> Array:
        """The logits of ``hidden @ kernel``: with bias, scale and cap."""
        if self.bias is None:
            return self._scaled(products)
        logits = products + self.bias
        # The derivative of a scale or a cap would be 0 * -inf.
        out = jnp.isneginf(logits)
        return jnp.where(out, -jnp.inf, self._scaled(jnp.where(out, 0, logits)))

    def _scaled(self, logits: Array) -> Array:
        if self.scale is not None:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        return logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseTargets:
    """The teacher's most likely classes, and how likely all others are together.

    :func:`kdjax.losses.top_k_targets` makes them. A slot whose log-probability is -inf
    is not used, whatever its index; a position without a used slot and with a tail of
    -inf has no target, and every loss of it is 0.

    Attributes:
      indices: classes, integers ``[*batch, k]``, no one twice.
      log_probs: log-probabilities of these at the temperature, ``[*batch, k]``.
      tail: logarithm of the probability of all other classes together, ``[*batch]``;
        -inf where there is none.
      temperature: what the teacher was softened with, and the student will be.
    """

    indices: Array
    log_probs: Array
    tail: Array
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledTargets:
    """Classes drawn at random, weighted so that sums over them are unbiased.

    :func:`kdjax.losses.sampled_targets` draws them. A slot whose log-probability is
    -inf is not used.

    Attributes:
      indices: classes, integers ``[*batch, n]``; one may be there several times.
      weights: ``[*batch, n]``: the mean over draws of the weights that a class gets is
        its probability. They need not sum to 1.
      log_probs: the teacher's log-probabilities of the classes at the temperature,
        ``[*batch, n]``.
      temperature: what the teacher was softened with, and the student will be.
    """

    indices: Array
    weights: Array
    log_probs: Array
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})


class AlignedLogits(NamedTuple):
    """Logits over another vocabulary; see :func:`kdjax.losses.align_vocabulary`.

    Attributes:
      logits: ``[*batch, size]``, -inf for classes that the model does not have.
      lost_mass: probability of the classes that have no place in it, ``[*batch]``.
    """

    logits: Array
    lost_mass: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model shows to an objective.

    Attributes:
      logits: ``[*batch, V]``, a :class:`LinearHead`, or ``None`` for encoders. Of a
        teacher also what is kept of them: :class:`SparseTargets` or
        :class:`SampledTargets`.
      features: intermediate arrays by name; empty when none were asked for.
    """

    logits: Array | LinearHead | SparseTargets | SampledTargets | None
    features: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def dense_logits(self) -> Array:
        """The logits multiplied out, ``[*batch, V]``; refused where there are none."""
        if self.logits is None:
            raise ValueError("logits: this model gives none, only features.")
        if isinstance(self.logits, LinearHead):
            return self.logits.logits()
        if isinstance(self.logits, (SparseTargets, SampledTargets)):
            raise ValueError(
                f"logits: this teacher gives {type(self.logits).__name__}; expected a "
                "loss of such targets, kdjax.losses.sparse_forward_kl, say."
            )
        return self.logits


class ApplyModel(Protocol):
    """Runs a model: ``(params, model_state, batch, *, rng, train)``."""

    def __call__(
        self,
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        *,
        rng: Array | None,
        train: bool,
    ) -> tuple[Outputs, PyTree]: ...


class Model(NamedTuple):
    """A network as a pure function of its arrays.

    Attributes:
      apply: runs it on one batch and returns its outputs and its new state (batch
        statistics, say). ``rng`` feeds dropout and is ``None`` where ``train`` is
        false.
      capturable: ``(params, model_state, batch)`` to every feature that an adapter
        can be asked for, by path; :func:`kdjax.models.paths` lists them. ``None``
        where the network shows what it shows.
    """

    apply: ApplyModel
    capturable: Callable[[PyTree, PyTree, Batch], dict[str, Array]] | None = None


class Adapted(NamedTuple):
    """A network taken apart: what the adapters in :mod:`kdjax.models` return.

    Attributes:
      model: the pure function.
      params: what an optimizer moves, a tree of arrays.
      model_state: what the forward pass moves (batch statistics), ``{}`` when none.
    """

    model: Model
    params: PyTree
    model_state: PyTree


class Teacher(NamedTuple):
    """Where targets come from; its outputs never carry a gradient.

    Build one with :mod:`kdjax.teachers`, which is where the gradient is stopped.

    Attributes:
      init: ``(student_params, student_model_state) -> teacher_state``, ``()`` when
        nothing moves.
      outputs: ``(frozen, teacher_state, batch) -> Outputs``.
      update: ``(teacher_state, student_params, student_model_state, step) ->
        teacher_state``, once per optimizer step. The student's state is passed too,
        since an average of its parameters needs the batch statistics that fit them.
    """

    init: Callable[[PyTree, PyTree], PyTree]
    outputs: Callable[[PyTree, PyTree, Batch], Outputs]
    update: Callable[[PyTree, PyTree, PyTree, Array], PyTree]


class Term(NamedTuple):
    """One summand of an objective.

    Attributes:
      weight: what it is multiplied by. The Python number 0 makes the term a
        diagnostic: reported, and never differentiated.
      mean: its unweighted average.
    """

    weight: float | Array
    mean: Mean


class ApplyObjective(Protocol):
    """Computes the terms; see :class:`Objective`."""

    def __call__(
        self,
        objective_params: PyTree,
        objective_state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
        /,
    ) -> tuple[dict[str, Term], PyTree]: ...


class Objective(NamedTuple):
    """What the student is trained for: named terms, summed with their weights.

    Attributes:
      init: ``(rng, student_spec, teacher_spec) -> objective_params`` from the
        :class:`Outputs` of both as ``jax.ShapeDtypeStruct``; ``{}`` when nothing
        is trained beside the student.
      init_state: ``() -> objective_state``: memory banks, balances; ``{}`` when none.
      apply: ``(objective_params, objective_state, student, teacher, batch, step)
        -> (terms, objective_state)``.
    """

    init: Callable[[Array, Outputs, Outputs], PyTree]
    init_state: Callable[[], PyTree]
    apply: ApplyObjective
