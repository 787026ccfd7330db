"""Objectives of several terms."""

from __future__ import annotations

import jax
from jax import Array

from kdjax.types import Batch, Objective, Outputs, PyTree, Term


def combine(*objectives: Objective) -> Objective:
    """Adds objectives up; every term keeps its name and weight.

    Args:
      *objectives: at least one.

    Returns:
      One objective with all their terms.

    Raises:
      ValueError: there are none, or (when traced) two terms have one name.

    Example:
      >>> from kdjax.objectives import hard_labels, soft_labels
      >>> objective = combine(
      ...     hard_labels(weight=0.1), soft_labels(weight=0.9, temperature=4.0))
      >>> outputs, batch = Outputs(jnp.zeros((1, 2))), {"label": jnp.array([0])}
      >>> terms, _ = objective.apply({}, {}, outputs, outputs, batch, jnp.array(0))
      >>> sorted(terms)
      ['hard', 'soft']
    """
    if not objectives:
        raise ValueError("objectives: got none, expected at least one.")
    keys = [str(index) for index in range(len(objectives))]

    def init(rng: Array, student: Outputs, teacher: Outputs) -> PyTree:
        params = {
            key: objective.init(jax.random.fold_in(rng, int(key)), student, teacher)
            for key, objective in zip(keys, objectives, strict=True)
        }
        return {key: own for key, own in params.items() if jax.tree.leaves(own)}

    def init_state() -> PyTree:
        states = {
            key: objective.init_state()
            for key, objective in zip(keys, objectives, strict=True)
        }
        return {key: own for key, own in states.items() if jax.tree.leaves(own)}

    def apply(
        params: PyTree,
        state: PyTree,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        step: Array,
    ) -> tuple[dict[str, Term], PyTree]:
        terms: dict[str, Term] = {}
        states = {}
        for key, objective in zip(keys, objectives, strict=True):
            own, changed = objective.apply(
                params.get(key, {}), state.get(key, {}), student, teacher, batch, step
            )
            twice = sorted(set(own) & set(terms))
            if twice:
                raise ValueError(
                    f"name: {twice} is the name of several terms; give each its own."
                )
            terms |= own
            if jax.tree.leaves(changed):
                states[key] = changed
        return terms, states

    return Objective(init, init_state, apply)
