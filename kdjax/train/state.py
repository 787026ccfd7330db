"""Everything that moves during training, in one value."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdjax.types import Adapted, Batch, Objective, PyTree, Teacher


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillState:
    """All that a step changes, donates and checkpoints; the teacher is not in it.

    Attributes:
      step: steps taken, int32 scalar; a skipped step counts, since its batch is gone.
      skipped: steps among them that changed nothing else, int32 scalar.
      params: ``{'student': ..., 'objective': ...}``, what the optimizer moves.
      model_state: the student's batch statistics and the like.
      objective_state: memory banks and balances of the objective.
      teacher_state: a moving teacher's parameters (EMA), ``()`` for a frozen one.
      opt_state: the optimizer's.
      rng: base key; step ``n`` uses ``fold_in(rng, n)``.
    """

    step: Array
    skipped: Array
    params: dict[str, PyTree]
    model_state: PyTree
    objective_state: PyTree
    teacher_state: PyTree
    opt_state: PyTree
    rng: Array


def init_state(
    student: Adapted,
    teacher: Teacher,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    frozen: PyTree,
    batch: Batch,
    rng: Array,
    axis_name: str | None = None,
) -> DistillState:
    """Makes the state that a run starts from.

    Args:
      student: the network with its initial arrays, which are copied: the state can
        be donated, and the caller's arrays stay valid.
      teacher: as given to :func:`make_train_step`.
      objective: likewise.
      optimizer: likewise; it sees ``{'student': ..., 'objective': ...}``.
      frozen: the teacher's arrays.
      batch: any batch of the right shapes, for shapes only; nothing is computed.
      rng: base key of the run, from ``jax.random.key``.
      axis_name: as given to :func:`make_train_step`.

    Returns:
      The state at step 0.

    Raises:
      TypeError: ``student`` is no network from an adapter.

    Example:
      >>> from kdjax import models, objectives, teachers
      >>> net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.zeros((2, 3)))
      >>> teacher, frozen = teachers.frozen(net)
      >>> objective = objectives.hard_labels()
      >>> batch = {"x": jnp.ones((4, 2)), "label": jnp.zeros(4, jnp.int32)}
      >>> state = init_state(net, teacher, objective, optax.sgd(0.1), frozen=frozen,
      ...                    batch=batch, rng=jax.random.key(0))
      >>> int(state.step), state.params["student"].shape
      (0, (2, 3))
    """
    if not isinstance(student, Adapted):
        raise TypeError(
            f"student: got {type(student).__name__}; expected a network with its "
            "arrays, as kdjax.models.from_nnx, from_linen or from_apply returns it."
        )
    params, model_state = jax.tree.map(
        lambda leaf: jnp.array(leaf, copy=True), (student.params, student.model_state)
    )
    # The teacher's copy must not share buffers with the student's: a state that
    # holds a buffer twice cannot be donated.
    teacher_state = jax.tree.map(jnp.copy, teacher.init(params, model_state))
    objective_rng, rng = jax.random.split(rng)

    def outputs(params, model_state, teacher_state, frozen, batch, rng):
        shown, _ = student.model.apply(params, model_state, batch, rng=rng, train=True)
        return shown, teacher.outputs(frozen, teacher_state, batch)

    if axis_name is not None:
        # Layers that look across devices must find the axis, of whatever size.
        outputs = jax.vmap(outputs, None, None, axis_name=axis_name, axis_size=1)
    student_spec, teacher_spec = jax.eval_shape(
        outputs, params, model_state, teacher_state, frozen, dict(batch), rng
    )
    trained = {
        "student": params,
        "objective": objective.init(objective_rng, student_spec, teacher_spec),
    }
    state = DistillState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=trained,
        model_state=model_state,
        objective_state=objective.init_state(),
        teacher_state=teacher_state,
        # Some optimizers keep the parameters themselves.
        opt_state=jax.tree.map(jnp.copy, optimizer.init(trained)),
        rng=rng,
    )
    return jax.tree.map(_strong, state)


def _strong(leaf: Array) -> Array:
    """Without a weak type, which the first step or a restart would make a strong one.

    The step would then be compiled once more.
    """
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return jax.lax.convert_element_type(leaf, leaf.dtype)
