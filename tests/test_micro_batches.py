"""Micro-batches: the teacher's own, whose outputs are those of the whole batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from kdjax import LinearHead, models, teachers
from kdjax.micro_batches import mapped
from kdjax.train import batch_axes, make_mesh, place, place_step
from kdjax.types import Outputs
from tests.marks import rest_slow
from tests.train import setups


def shows_all(params, batch):
    """A head, a feature of each example, and layers of a scan with examples second."""
    hidden = jnp.tanh(batch["x"] @ params["body"])
    layers = jnp.stack([hidden, 2 * hidden, 3 * hidden])
    head = LinearHead(hidden, params["head"], soft_cap=5.0)
    return Outputs(head, {"hidden": hidden, "layers": layers})


def net():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "body": jax.random.normal(keys[0], (setups.WIDTH, 4)),
        "head": jax.random.normal(keys[1], (4, setups.CLASSES)),
    }
    return models.from_apply(shows_all, params)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_outputs_are_those_of_the_whole_batch(parts):
    teacher, frozen = teachers.frozen(net())
    own = teachers.micro_batched(teacher, parts)
    batch = setups.batch()
    expected = jax.jit(teacher.outputs)(frozen, (), batch)
    got = jax.jit(own.outputs)(frozen, (), batch)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_kernel_is_not_multiplied_by_the_parts():
    teacher, frozen = teachers.frozen(net())
    own = teachers.micro_batched(teacher, 4)
    program = str(jax.make_jaxpr(own.outputs)(frozen, (), setups.batch()))
    assert "f32[4,4,4]" in program  # hidden states by part
    assert "f32[4,4,5]" not in program  # and no kernels


def step_of(parts, **options):
    """A step with a teacher in parts, its state and arrays."""
    student = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    state, frozen, step = setups.training(student, **options, teacher_parts=parts)
    return step, state, frozen


@pytest.mark.parametrize("accumulate", rest_slow([1, 2], lambda number: number > 1))
def test_the_step_is_the_same(accumulate):
    ends = []
    for parts in (None, 4):
        step, state, frozen = step_of(parts, accumulate=accumulate)
        ends.append(jax.jit(step)(state, frozen, setups.batch()))
    chex.assert_trees_all_close(
        (ends[0][0].params, ends[0][1]), (ends[1][0].params, ends[1][1]), rtol=1e-5
    )


def test_nothing_of_a_split_batch_is_gathered():
    step, state, frozen = step_of(2)
    mesh = make_mesh()
    placed = place_step(step, mesh, state=state, frozen=frozen, donate=False)
    arrays = place((state, frozen), mesh)
    batch = jax.device_put(setups.batch(), NamedSharding(mesh, batch_axes(mesh)))
    text = jax.jit(placed).lower(*arrays, batch).compile().as_text()
    assert "all-reduce" in text
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert kind not in text


def test_refuses_what_has_no_parts():
    teacher, frozen = teachers.frozen(net())
    with pytest.raises(ValueError, match="parts: got 0, expected at least 1"):
        teachers.micro_batched(teacher, 0)
    with pytest.raises(ValueError, match=r"parts: got 3.*16 examples of 'x'"):
        teachers.micro_batched(teacher, 3).outputs(frozen, (), setups.batch())
    batch = {"x": np.ones((4, 2))}
    flat = lambda x: x.reshape(-1)  # noqa: E731
    for bad in (lambda x: x @ x.T, lambda x: jnp.ones(len(x) + 1), flat):
        with pytest.raises(ValueError, match=r"parts: an output of shape .* one axis"):
            mapped(lambda given, bad=bad: bad(given["x"]), batch, 2, "parts")
