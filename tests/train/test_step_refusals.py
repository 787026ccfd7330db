"""What a step cannot be made or compiled of is refused by name."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from kdjax import models, objectives, teachers
from kdjax.train import (
    init_state,
    make_mesh,
    make_train_step,
    place_step,
    pmap_step,
    shard_map_step,
)
from kdjax.types import Adapted, Model, Outputs
from tests.train import setups


def test_refuses_bad_arguments_by_name():
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="accumulate: got 0"):
        setups.training(net, accumulate=0)
    state, frozen, step = setups.training(net, accumulate=3)
    with pytest.raises(ValueError, match=r"accumulate: got 3.*16 examples"):
        jax.jit(step)(state, frozen, setups.batch())
    with pytest.raises(TypeError, match="student: got Adapted; expected a Model"):
        make_train_step(net, *teachers.frozen(net), optax.sgd(0.1))
    started = {"frozen": frozen, "batch": setups.batch(), "rng": jax.random.key(0)}
    parts = teachers.frozen(net)[0], objectives.hard_labels(), optax.sgd(0.1)
    with pytest.raises(TypeError, match=r"student: got Model; .*models\.from_nnx"):
        init_state(net.model, *parts, **started)
    silent = objectives.soft_labels(weight=0)
    state, frozen, step = setups.training(net, goal=silent)
    with pytest.raises(ValueError, match=r"objective: all of its terms.*weight 0"):
        jax.jit(step)(state, frozen, setups.batch())


def test_refuses_to_compile_a_step_for_another_axis():
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    mesh, told = make_mesh(), "step: was made with axis_name"
    state, frozen, step = setups.training(net)
    given = {"state": state, "frozen": frozen}
    with pytest.raises(ValueError, match=f"{told}=None; expected 'data'"):
        shard_map_step(step, mesh, **given)
    with pytest.raises(ValueError, match=f"{told}=None; expected 'data'"):
        pmap_step(step)
    parts = teachers.frozen(net)[0], objectives.hard_labels(), optax.sgd(0.1)
    other = make_train_step(net.model, *parts, axis_name="data")
    with pytest.raises(ValueError, match=f"{told}='data'; expected None"):
        place_step(other, mesh, **given)


def test_refuses_a_teacher_of_another_vocabulary():
    def apply(params, model_state, batch, *, rng, train):
        return Outputs(jnp.zeros((setups.EXAMPLES, 7))), model_state

    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    other = Adapted(Model(apply), {}, {})
    state, frozen, step = setups.training(net, teacher_net=other)
    with pytest.raises(ValueError, match=r"student_logits \(16, 5\).*\(16, 7\)"):
        jax.jit(step)(state, frozen, setups.batch())
