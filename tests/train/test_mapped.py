"""The step under shard_map and pmap: what is gathered, counted, donated and refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import losses, models, objectives
from kdjax.train import make_mesh, place, pmap_step, shard_map_step
from kdjax.types import Outputs
from tests.train import scale, setups

MESH = make_mesh()


class Shown(setups.Mlp):
    """Shows its hidden layer too, of 8 numbers."""

    def __call__(self, x):
        hidden = nnx.relu(self.hidden(x))
        return Outputs(self.out(hidden), {"hidden": hidden})


@functools.cache
def training():
    net = models.from_nnx(Shown(rngs=nnx.Rngs(0)))
    related = objectives.relations(
        losses.similarity_preserving, student="hidden", teacher="hidden"
    )
    goal = objectives.combine(setups.objective(), related)
    teacher_net = models.from_nnx(Shown(rngs=nnx.Rngs(7)))
    return setups.training(net, teacher_net=teacher_net, goal=goal, axis_name="data")


@functools.cache
def compiled(form):
    state, frozen, step = training()
    if form == "pmap":
        return pmap_step(step)
    return shard_map_step(step, MESH, state=state, frozen=frozen)


def fresh():
    state, frozen, _ = training()
    state = jax.device_put(state, may_alias=False)
    return place(state, MESH), place(frozen, MESH)


@pytest.mark.parametrize("form", ["shard_map", "pmap"])
def test_counts_are_those_of_one_device_and_the_state_is_donated(form):
    state, frozen = fresh()
    batch = setups.batch()
    after, metrics = compiled(form)(state, frozen, batch)
    assert int(after.step) == 1
    assert int(metrics["soft"].count) == batch["mask"].sum()
    assert int(metrics["relations"].count) == 1
    held = jax.tree.leaves((state.params, state.opt_state))
    assert all(leaf.is_deleted() for leaf in held)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_relations_alone_are_gathered():
    state, frozen, step = training()
    program = str(
        jax.make_jaxpr(step, axis_env=[("data", 8)])(state, frozen, setups.batch())
    )
    gathered = [line for line in program.splitlines() if "= all_gather[" in line]
    shapes = [line.split(":")[1].split(" ")[0] for line in gathered]
    # Both features and the mask, of 8 times 16 examples; logits have 5 classes.
    assert sorted(shapes) == ["bool[128]", "f32[128,8]", "f32[128,8]"]


@pytest.mark.slow
def test_relations_under_accumulation():
    expected = scale.run(accumulate=2, steps=5)
    got = scale.run("shard_map", {"data": 4}, accumulate=2, steps=5)
    np.testing.assert_allclose(got.losses, expected.losses, 1e-10)
    for one, other in zip(got.params, expected.params, strict=True):
        np.testing.assert_allclose(one, other, 1e-10, 1e-10)


def test_a_term_of_ones_own_sees_the_whole_batch():
    def values(x):
        return jnp.square(x - x.mean())

    def local(x):
        with objectives.split_over("data"):
            return jax.lax.psum(objectives.over_whole_batch(values, x), "data")

    x = jnp.arange(16.0)
    mean = jax.pmap(local, axis_name="data", out_axes=None)(x.reshape(8, 2))
    assert int(mean.count) == 16
    np.testing.assert_allclose(mean.value(), x.var(), rtol=1e-6)


def test_refuses_other_axes_and_batches():
    state, frozen, step = training()
    with pytest.raises(ValueError, match=r"axis_name: got 'rows'.* has \('data',\)"):
        shard_map_step(step, MESH, state=state, frozen=frozen, axis_name="rows")
    narrow = make_mesh({"data": 1, "fsdp": 8})
    with pytest.raises(ValueError, match=r"axis_name: 'data' has one part .*'fsdp': 8"):
        shard_map_step(step, narrow, state=state, frozen=frozen)
    placed = fresh()
    match = r"batch: 'x' of shape \(12, 6\) cannot be split over 8 devices"
    with pytest.raises(ValueError, match=match):
        compiled("pmap")(*placed, setups.batch(examples=12))
    with pytest.raises(ValueError, match=r"batch: 'scale' of shape \(\)"):
        compiled("pmap")(*placed, setups.batch() | {"scale": np.float32(1)})
    match = r"batch: 'x' of shape \(12, 6\) cannot be split as"
    with pytest.raises(ValueError, match=match):
        compiled("shard_map")(*placed, setups.batch(examples=12))


@pytest.mark.parametrize("form", ["shard_map", "pmap"])
def test_refuses_states_of_objectives(form):
    state, frozen = fresh()
    own = dataclasses.replace(state, objective_state={"memory": jnp.zeros(8)})
    _, _, step = training()
    if form == "pmap":
        run = pmap_step(step)
    else:
        run = shard_map_step(step, MESH, state=own, frozen=frozen)
    with pytest.raises(ValueError, match="axis_name: this objective keeps a state"):
        run(own, frozen, setups.batch())
