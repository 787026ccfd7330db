"""One step of distillation, as a pure function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdjax.micro_batches import split
from kdjax.objectives import split_over
from kdjax.train.state import DistillState
from kdjax.types import Batch, Mean, Model, Objective, PyTree, Teacher, Term

Metrics: TypeAlias = dict[str, Mean]


def make_train_step(
    student: Model,
    teacher: Teacher,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> Callable[[DistillState, PyTree, Batch], tuple[DistillState, Metrics]]:
    """Joins a student, a teacher, an objective and an optimizer in one pure step.

    The teacher's forward pass, the student's forward and backward pass and the
    update are one program: jit it, or give it to :func:`~kdjax.train.place_step`.
    A step whose loss or gradient is not finite changes nothing but the counters.

    Args:
      student: what is trained.
      teacher: where targets come from; its arrays are the step's ``frozen``.
      objective: terms and weights.
      optimizer: from Optax, over ``{'student': ..., 'objective': ...}``.
      accumulate: micro-batches that a batch is split into, one after the other, to
        save memory. Averages are over the whole batch, whatever the masks: the result
        is that of one big batch, but for layers that look across examples.
      axis_name: axis of ``shard_map`` or ``pmap`` to sum over, if the step runs under
        one, as of :func:`~kdjax.train.shard_map_step`; under ``jit`` on a mesh nothing
        is needed.

    Returns:
      ``step(state, frozen, batch) -> (state, metrics)``. Metrics are the objective's
      terms, unweighted, and ``loss``, ``grad_norm`` and ``skipped``.

    Raises:
      ValueError: ``accumulate`` is below 1 or (when traced) does not divide the batch;
        or an objective with a state meets an ``axis_name``.
      TypeError: ``student`` is no model.

    Example:
      >>> from kdjax import models, objectives, teachers
      >>> from kdjax.train import init_state
      >>> linear = lambda w, batch: batch["x"] @ w
      >>> net = models.from_apply(linear, jnp.zeros((2, 3)))
      >>> teacher, frozen = teachers.frozen(models.from_apply(linear, jnp.eye(2, 3)))
      >>> parts = teacher, objectives.soft_labels(), optax.sgd(0.1)
      >>> batch = {"x": jnp.ones((4, 2))}
      >>> state = init_state(
      ...     net, *parts, frozen=frozen, batch=batch, rng=jax.random.key(0))
      >>> step = jax.jit(make_train_step(net.model, *parts))
      >>> state, metrics = step(state, frozen, batch)
      >>> int(state.step), sorted(metrics)
      (1, ['grad_norm', 'loss', 'skipped', 'soft'])
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: got {accumulate}, expected at least 1.")
    if not isinstance(student, Model):
        raise TypeError(
            f"student: got {type(student).__name__}; expected a Model, the `model` of "
            "what an adapter in kdjax.models returns."
        )

    run = _Forward(student, teacher, objective, axis_name)

    def step(
        state: DistillState, frozen: PyTree, batch: Batch
    ) -> tuple[DistillState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        if axis_name is not None:
            _refuse_own_states(state.objective_state)
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        sums, moved = _gradient(run, state, frozen, batch, rng, accumulate, axis_name)
        # Squares of a gradient in float16 would overflow.
        loss, grad_norm = sums.loss, optax.tree.norm(jax.tree.map(_wide, sums.grads))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        changed = _changed(state, sums.grads, moved, teacher, optimizer)
        kept = {
            name: jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), new, getattr(state, name)
            )
            for name, new in changed.items()
        }
        skipped = 1 - finite.astype(jnp.int32)
        new_state = dataclasses.replace(
            state, **kept, step=state.step + 1, skipped=state.skipped + skipped
        )
        one = jnp.ones((), jnp.int32)
        return new_state, {
            **sums.means,
            "loss": Mean(loss, one),
            "grad_norm": Mean(grad_norm, one),
            "skipped": Mean(skipped.astype(jnp.float32), one),
        }

    # Read by what compiles it.
    vars(step)["axis_name"] = axis_name
    return step


def check_axis(step: Callable[..., Any], axis_name: str | None) -> None:
    """A step sums over the axis that it is compiled for, or every device is alone."""
    made_with = getattr(step, "axis_name", axis_name)
    if made_with != axis_name:
        raise ValueError(
            f"step: was made with axis_name={made_with!r}; expected {axis_name!r}, as "
            "it is compiled for. Give make_train_step the same."
        )


def _refuse_own_states(objective_state: PyTree) -> None:
    """A memory that each device moves by its own examples has no common value."""
    if jax.tree.leaves(objective_state):
        raise ValueError(
            "axis_name: this objective keeps a state (a memory bank, say), which every "
            "device of shard_map or pmap would move by its own examples; compile the "
            "step with place_step instead, without axis_name."
        )


class _Moved(NamedTuple):
    """What a forward pass changes."""

    model_state: PyTree
    objective_state: PyTree


class _Sums(NamedTuple):
    """What adds up over micro-batches and devices."""

    grads: PyTree
    loss: Array
    means: Metrics


class _Forward(NamedTuple):
    """Both models and the objective on one micro-batch."""

    student: Model
    teacher: Teacher
    objective: Objective
    axis_name: str | None

    def __call__(
        self,
        params: PyTree,
        moved: _Moved,
        state: DistillState,
        frozen: PyTree,
        batch: Batch,
        rng: Array,
    ) -> tuple[dict[str, Term], _Moved]:
        shown, model_state = self.student.apply(
            params["student"], moved.model_state, batch, rng=rng, train=True
        )
        target = self.teacher.outputs(frozen, state.teacher_state, batch)
        with split_over(self.axis_name):
            terms, objective_state = self.objective.apply(
                params["objective"],
                moved.objective_state,
                shown,
                target,
                batch,
                state.step,
            )
        return terms, _Moved(model_state, objective_state)


def _gradient(
    run: _Forward,
    state: DistillState,
    frozen: PyTree,
    batch: Batch,
    rng: Array,
    accumulate: int,
    axis_name: str | None,
) -> tuple[_Sums, _Moved]:
    """Loss and gradient of the whole batch, over micro-batches and devices."""

    def everywhere(tree: PyTree) -> PyTree:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def sums(
        moved: _Moved, micro: Batch, rng: Array, counts: dict[str, Array] | None
    ) -> tuple[_Sums, _Moved]:
        def loss(params: PyTree) -> tuple[Array, tuple[Metrics, _Moved]]:
            terms, changed = run(params, moved, state, frozen, micro, rng)
            over = everywhere(_counts(terms)) if counts is None else counts
            means = {name: term.mean for name, term in terms.items()}
            return _weighted(terms, over), (means, changed)

        differentiate = jax.value_and_grad(loss, has_aux=True)
        (value, (means, changed)), grads = differentiate(state.params)
        return _Sums(grads, value, means), changed

    moved = _Moved(state.model_state, state.objective_state)
    if accumulate == 1:
        total, moved = sums(moved, dict(batch), rng, None)
        return everywhere(total), _averaged(moved, axis_name)

    micros = split(batch, accumulate, "accumulate")
    rngs = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(accumulate))

    # The gradient is divided by how much counts in the whole batch, which must be
    # known first. The compiler drops from this pass all that no count needs.
    def count(micro: Batch, rng: Array) -> dict[str, Array]:
        return _counts(run(state.params, moved, state, frozen, micro, rng)[0])

    each = jax.lax.map(lambda inputs: count(*inputs), (micros, rngs))
    counts = everywhere(jax.tree.map(lambda values: values.sum(0), each))

    def add(
        carry: tuple[_Sums, _Moved], inputs: tuple[Batch, Array]
    ) -> tuple[tuple[_Sums, _Moved], None]:
        micro, rng = inputs
        more, moved = sums(carry[1], micro, rng, counts)
        return (jax.tree.map(jnp.add, carry[0], more), moved), None

    micro, key = jax.tree.map(lambda values: values[0], (micros, rngs))
    shapes, _ = jax.eval_shape(lambda: sums(moved, micro, key, counts))
    # In bfloat16 a small part of a sum would be rounded away.
    zeros = jax.tree.map(lambda leaf: _wide(jnp.zeros(leaf.shape, leaf.dtype)), shapes)
    (total, moved), _ = jax.lax.scan(add, (zeros, moved), (micros, rngs))
    total = jax.tree.map(
        lambda leaf, like: leaf.astype(like.dtype), everywhere(total), shapes
    )
    return total, _averaged(moved, axis_name)


def _wide(leaf: Array) -> Array:
    """In float32 at least; integers as they are."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _counts(terms: dict[str, Term]) -> dict[str, Array]:
    return {name: term.mean.count for name, term in terms.items()}


def _weighted(terms: dict[str, Term], counts: dict[str, Array]) -> Array:
    """The weighted sum of the terms, each divided by what counts in the whole batch."""
    summands = [
        _summand(term, counts[name])
        for name, term in terms.items()
        if not _is_diagnostic(term)
    ]
    if not summands:
        raise ValueError(
            f"objective: all of its terms {sorted(terms)} have weight 0; nothing is "
            "left to train for."
        )
    return jnp.asarray(sum(summands))


def _summand(term: Term, count: Array) -> Array:
    weighted = term.weight * Mean(term.mean.total, count).value()
    # What a schedule leaves out may be infinite, and 0 * inf is NaN.
    return jnp.where(jnp.equal(term.weight, 0), 0, weighted)


def _is_diagnostic(term: Term) -> bool:
    return isinstance(term.weight, (int, float)) and term.weight == 0


def _averaged(moved: _Moved, axis_name: str | None) -> _Moved:
    """Batch statistics, which each device took of its own examples, made equal."""
    if axis_name is None:
        return moved
    return jax.tree.map(
        lambda leaf: (
            jax.lax.pmean(leaf, axis_name)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
        ),
        moved,
    )


def _changed(
    state: DistillState,
    grads: PyTree,
    moved: _Moved,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
) -> dict[str, PyTree]:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    teacher_state = teacher.update(
        state.teacher_state, params["student"], moved.model_state, state.step
    )
    return {
        "params": params,
        "model_state": moved.model_state,
        "objective_state": moved.objective_state,
        "teacher_state": teacher_state,
        "opt_state": opt_state,
    }
