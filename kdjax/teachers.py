"""Where targets come from. Gradients end here, and nowhere else.

Every factory returns a :class:`~kdjax.types.Teacher` and the arrays that it reads
and never changes; these go to the step as ``frozen``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from kdjax import micro_batches
from kdjax.losses._rows import wide_dtype
from kdjax.types import (
    Adapted,
    Batch,
    Model,
    Outputs,
    PyTree,
    SampledTargets,
    Scheduled,
    SparseTargets,
    Teacher,
)


def _stopped(outputs: Callable[..., Outputs]) -> Callable[..., Outputs]:
    # The name tells the teacher's share in profiles, and in compiled programs.
    @jax.named_scope("teacher")
    def without_gradient(*args: Any) -> Outputs:
        return jax.lax.stop_gradient(outputs(*args))

    return without_gradient


def _evaluated(model: Model, arrays: PyTree, batch: Batch) -> Outputs:
    params, state = arrays["params"], arrays["model_state"]
    return model.apply(params, state, batch, rng=None, train=False)[0]


def _is_floating(leaf: ArrayLike) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _cast(tree: PyTree, dtype: DTypeLike | None) -> PyTree:
    """Floating-point leaves in ``dtype``, the others as they are."""
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if _is_floating(leaf) else leaf, tree
    )


def _widened(tree: PyTree) -> PyTree:
    """Floating-point leaves in float32 at least, the others as they are."""
    return jax.tree.map(
        lambda leaf: leaf.astype(wide_dtype(leaf)) if _is_floating(leaf) else leaf, tree
    )


def frozen(
    net: Adapted, *, dtype: DTypeLike | None = None
) -> tuple[Teacher, dict[str, PyTree]]:
    """A network that stays as it is: the usual teacher.

    It runs in evaluation mode: no dropout, running statistics.

    Args:
      net: the network with its trained arrays.
      dtype: what its parameters are stored in, and its floating-point inputs cast to,
        such as ``jnp.bfloat16``; ``None`` leaves both. Running statistics keep theirs.

    Returns:
      The teacher, and its arrays ``{'params', 'model_state'}`` for the step's
      ``frozen``.

    Raises:
      TypeError: ``dtype`` is not a floating-point type.

    Example:
      >>> from kdjax import models
      >>> net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.ones((4, 3)))
      >>> teacher, arrays = frozen(net, dtype=jnp.bfloat16)
      >>> teacher.outputs(arrays, (), {"x": jnp.ones((2, 4))}).logits.dtype
      dtype(bfloat16)
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: got {dtype}, expected a floating-point type.")

    def outputs(frozen: PyTree, teacher_state: PyTree, batch: Batch) -> Outputs:
        return _evaluated(net.model, frozen, _cast(batch, dtype))

    arrays = {"params": _cast(net.params, dtype), "model_state": net.model_state}
    return _still(outputs), arrays


def cached(
    targets: Callable[[Batch], SparseTargets | SampledTargets | Array],
) -> tuple[Teacher, dict[str, PyTree]]:
    """What a teacher has said before, and the batch brings along.

    The step then runs no teacher at all.

    Args:
      targets: picks them from the batch: targets for
        :func:`kdjax.losses.sparse_forward_kl` and its like, or all logits.

    Returns:
      The teacher, and ``{}`` for the step's ``frozen``.

    Example:
      >>> teacher, _ = cached(
      ...     lambda batch: SparseTargets(batch["indices"], batch["log_probs"],
      ...                                 batch["tail"], temperature=2.0))
      >>> batch = {"indices": jnp.zeros((4, 2), int), "log_probs": jnp.zeros((4, 2)),
      ...          "tail": jnp.zeros(4)}
      >>> teacher.outputs({}, (), batch).logits.temperature
      2.0
    """

    def outputs(frozen: PyTree, teacher_state: PyTree, batch: Batch) -> Outputs:
        return Outputs(targets(batch))

    return _still(outputs), {}


def micro_batched(teacher: Teacher, parts: int) -> Teacher:
    """The same teacher, whose forward pass runs over micro-batches of its own.

    It saves memory where the teacher's activations, and not the student's, are what
    does not fit. Outputs are those of the whole batch, in its order.

    Args:
      teacher: any.
      parts: how many micro-batches; they divide the batch that the teacher gets, which
        under accumulation is a micro-batch of the step.

    Returns:
      A teacher with the same state and arrays.

    Raises:
      ValueError: ``parts`` is below 1 or (when traced) does not divide the batch, or an
        output has the examples along several axes.

    Example:
      >>> from kdjax import models
      >>> net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.ones((4, 3)))
      >>> teacher, arrays = frozen(net)
      >>> micro_batched(teacher, 2).outputs(arrays, (), {"x": jnp.eye(4)}).logits.shape
      (4, 3)
    """
    if parts < 1:
        raise ValueError(f"parts: got {parts}, expected at least 1.")

    def outputs(frozen: PyTree, teacher_state: PyTree, batch: Batch) -> Outputs:
        def of(micro: Batch) -> Outputs:
            return teacher.outputs(frozen, teacher_state, micro)

        return micro_batches.mapped(of, batch, parts, "parts")

    return teacher._replace(outputs=outputs)


def _still(outputs: Callable[..., Outputs]) -> Teacher:
    """A teacher in which nothing moves."""
    return Teacher(
        init=lambda params, model_state: (),
        outputs=_stopped(outputs),
        update=lambda teacher_state, params, model_state, step: teacher_state,
    )


def ema(net: Adapted, *, decay: Scheduled = 0.999) -> tuple[Teacher, dict[str, PyTree]]:
    """The student's own past: an exponential moving average of it.

    The average is part of the training state, is checkpointed with it, and takes one
    step per optimizer step: ``average = decay * average + (1 - decay) * student``,
    parameters and batch statistics alike; integers are the student's. It starts from
    the student, and is kept in float32 at least: in bfloat16 a step of 0.001 of the way
    would be rounded away. The network runs it in the dtypes of its own arrays.

    Args:
      net: the student's network, of whose arrays only dtypes are read.
      decay: in [0, 1), a number or a schedule of the optimizer step.

    Returns:
      The teacher, and ``{}`` for the step's ``frozen``.

    Raises:
      ValueError: a Python ``decay`` is out of its range.

    Example:
      >>> from kdjax import models
      >>> net = models.from_apply(lambda w, batch: batch["x"] @ w, jnp.ones(3))
      >>> teacher, _ = ema(net, decay=0.9)
      >>> average = teacher.init(jnp.zeros(1), {})
      >>> average = teacher.update(average, jnp.ones(1), {}, jnp.array(0))
      >>> average["params"]
      Array([0.1], dtype=float32)

    Reference:
      Tarvainen and Valpola, Mean teachers are better role models, 2017, equation 1.
      arXiv:1703.01780
    """
    if isinstance(decay, (int, float)) and not 0 <= decay < 1:
        raise ValueError(f"decay: got {decay}, expected a number in [0, 1).")

    own = {"params": net.params, "model_state": net.model_state}

    def outputs(frozen: PyTree, teacher_state: PyTree, batch: Batch) -> Outputs:
        arrays = jax.tree.map(
            lambda leaf, like: leaf.astype(jnp.result_type(like)), teacher_state, own
        )
        return _evaluated(net.model, arrays, batch)

    def update(
        teacher_state: PyTree, params: PyTree, model_state: PyTree, step: Array
    ) -> PyTree:
        current = decay(step) if callable(decay) else decay
        student = {"params": params, "model_state": model_state}

        def mixed(old: Array, new: Array) -> Array:
            # A counter has no average.
            if not _is_floating(old):
                return new
            return (old * current + new * (1 - current)).astype(old.dtype)

        return jax.tree.map(mixed, teacher_state, _widened(student))

    def init(params: PyTree, model_state: PyTree) -> PyTree:
        return _widened({"params": params, "model_state": model_state})

    teacher = Teacher(
        init=init,
        outputs=_stopped(outputs),
        update=update,
    )
    return teacher, {}
