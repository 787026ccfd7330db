"""Meshes, rules, and a placed step: where everything lives, and that nothing moves."""

import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from kdjax import models
from kdjax.train import make_mesh, place, place_step, shardings
from tests.train import setups

P = PartitionSpec

# Weights over both axes of a 4x2 mesh, as fully sharded training has them.
RULES = (
    ("hidden/kernel", P("model", "data")),
    ("out/kernel", P("data")),
    ("out/bias", P()),
    ("bias", P("data")),
)
TEACHER_RULES = (("params/hidden/kernel", P(None, "data")),)


@functools.cache
def mesh():
    return make_mesh({"data": 4, "model": 2})


@functools.cache
def training():
    """A state, a teacher and a step that no test donates."""
    return setups.training(models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0))))


@functools.cache
def placed(donate=True):
    state, frozen, step = training()
    return place_step(
        step,
        mesh(),
        state=state,
        frozen=frozen,
        rules=RULES,
        teacher_rules=TEACHER_RULES,
        donate=donate,
    )


def fresh():
    """A copy of them on the mesh."""
    state, frozen, _ = training()
    state = jax.device_put(state, may_alias=False)
    return place(state, mesh(), RULES), place(frozen, mesh(), TEACHER_RULES)


def spec(array):
    """How an array is split, without what is left open at the end."""
    parts = list(array.sharding.spec)
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def test_mesh_has_the_axes_asked_for():
    whole = make_mesh()
    assert dict(whole.shape) == {"data": 8}
    assert dict(mesh().shape) == {"data": 4, "model": 2}
    assert mesh().devices.shape == (4, 2)
    # Under Explicit axes, jax.make_mesh's default, x @ x.T of a sharded x fails.
    assert set(whole.axis_types) == set(mesh().axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "axes", [{"data": 3}, {"data": 4, "model": 4}, {}, {"a": -2, "b": -4}]
)
def test_mesh_refuses_other_numbers_of_devices(axes):
    with pytest.raises(
        ValueError, match=r"axes: .* is for .* devices, but there are 8"
    ):
        make_mesh(axes)


def test_first_rule_that_matches_wins():
    tree = {
        "a": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)},
        "step": jnp.int32(0),
    }
    rules = [("a/kernel", P("data")), ("kernel", P("model")), ("^step", P())]
    got = jax.tree.map(lambda each: each.spec, shardings(tree, mesh(), rules))
    assert got == {"a": {"kernel": P("data"), "bias": P()}, "step": P()}
    got = shardings(tree, mesh(), rules[::-1])
    assert got["a"]["kernel"].spec == P("model")


def test_rules_take_shapes_for_arrays():
    state, _, _ = training()
    from_arrays = shardings(state, mesh(), RULES)
    assert shardings(jax.eval_shape(lambda: state), mesh(), RULES) == from_arrays


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (P("data"), "partitioned 4 times"),  # 6 rows over 4
        (P(None, None, "model"), "3 axes to split, and the array has 2"),
        (P("expert"), "expert"),  # no such axis
    ],
)
def test_refuses_a_rule_that_does_not_fit(bad, why):
    tree = {"out": {"kernel": jnp.ones((6, 4))}}
    match = (
        rf"rules: 'out/k' -> .*{bad[-1]}.* does not fit out/kernel of shape \(6, 4\)"
    )
    with pytest.raises(ValueError, match=f"{match}.*{why}"):
        shardings(tree, mesh(), [("out/k", bad)])


def test_place_splits_as_the_rules_say():
    state, frozen = fresh()
    for params in (state.params["student"], state.opt_state[0].mu["student"]):
        assert spec(params["hidden"]["kernel"]) == P("model", "data")
        assert spec(params["out"]["kernel"]) == P("data")
        assert spec(params["hidden"]["bias"]) == P("data")
        assert spec(params["out"]["bias"]) == P()
    # 6 x 8 numbers over all 8 devices.
    shards = state.params["student"]["hidden"]["kernel"].addressable_shards
    assert [shard.data.shape for shard in shards] == [(3, 2)] * 8
    assert spec(frozen["params"]["hidden"]["kernel"]) == P(None, "data")
    assert spec(frozen["params"]["out"]["kernel"]) == P()
    chex.assert_trees_all_equal(frozen, training()[1])


def test_placed_step_equals_the_step_alone():
    expected, teacher, step = training()
    state, frozen = fresh()
    jitted = jax.jit(step)
    for seed in range(3):
        state, got = placed()(state, frozen, setups.batch(seed))
        expected, metrics = jitted(expected, teacher, setups.batch(seed))
        assert set(got) == set(metrics)
        for name, mean in metrics.items():
            assert got[name].count == mean.count
            np.testing.assert_allclose(
                got[name].total, mean.total, rtol=1e-5, atol=1e-6, err_msg=name
            )
    chex.assert_trees_all_close(
        jax.device_get(state.params), expected.params, rtol=1e-5, atol=1e-5
    )


def test_placed_step_keeps_everything_where_it_is():
    state, frozen = fresh()
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    for seed in range(2):
        state, metrics = placed()(state, frozen, setups.batch(seed))
    jax.tree.map(
        lambda leaf, was: chex.assert_equal(
            leaf.sharding.is_equivalent_to(was, leaf.ndim), True
        ),
        state,
        before,
    )
    # Rules split something, and every device can read the metrics alone.
    assert not state.params["student"]["hidden"]["kernel"].is_fully_replicated
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(metrics))
    assert len(metrics["loss"].total.sharding.device_set) == 8


def test_results_go_where_the_rules_say_and_not_where_they_were_computed():
    # Left to the compiler, both results would be split as the batch is.
    def step(state, frozen, batch):
        return {"total": state["total"] + batch["x"]}, {"seen": batch["x"]}

    state = {"total": jnp.zeros(8)}
    compiled = place_step(step, mesh(), state=state, frozen={}, donate=False)
    got, metrics = compiled(place(state, mesh()), {}, {"x": np.arange(8.0)})
    assert got["total"].is_fully_replicated
    assert metrics["seen"].is_fully_replicated
    np.testing.assert_array_equal(got["total"], np.arange(8.0))


@pytest.mark.parametrize("donate", [True, False])
def test_placed_step_donates_the_state_alone(donate):
    state, frozen = fresh()
    placed(donate)(state, frozen, setups.batch())
    held = (state.params, state.opt_state)
    gone = {leaf.is_deleted() for leaf in jax.tree.leaves(held)}
    assert gone == {donate}
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_placed_step_is_compiled_once(caplog):
    state, frozen, step = training()
    small = make_mesh({"data": 8})
    compiled = place_step(step, small, state=state, frozen=frozen, donate=False)
    state, frozen = place(state, small), place(frozen, small)

    def compilations(seed):
        nonlocal state
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            state, _ = compiled(state, frozen, setups.batch(seed))
        return [
            record.getMessage()
            for record in caplog.records
            if record.getMessage().startswith("Compiling jit(step)")
        ]

    assert len(compilations(0)) == 1
    assert compilations(1) == []
    assert compilations(2) == []


def test_placed_step_moves_nothing_but_the_batch():
    state, frozen = fresh()
    state, _ = placed()(state, frozen, setups.batch())
    # The batch goes over explicitly, all else stays: no implicit transfer.
    with jax.transfer_guard("disallow"):
        for seed in range(2):
            state, metrics = placed()(state, frozen, setups.batch(seed))
        with pytest.raises(Exception, match=r"Disallowed .* transfer"):
            jax.jit(jnp.sin)(np.ones(3))
    assert np.isfinite(float(metrics["loss"].value()))


def test_batches_are_split_as_said():
    seen = {}

    def step(state, frozen, batch):
        for name, array in batch.items():
            jax.debug.inspect_array_sharding(
                array, callback=functools.partial(seen.__setitem__, name)
            )
        return state, {}

    specs = {"x": P(("data", "model")), "label": P("data"), "mask": P()}
    compiled = place_step(step, mesh(), state={}, frozen={}, batch=specs)
    batch = setups.batch()
    compiled({}, {}, batch)
    shares = {name: seen[name].shard_shape(batch[name].shape)[0] for name in batch}
    # 16 examples over 8 devices, over 4, and on every one.
    assert shares == {"x": 2, "label": 4, "mask": 16}


def test_refuses_a_batch_that_the_mesh_does_not_divide():
    state, frozen = fresh()
    match = r"batch: 'x' of shape \(6, 6\) cannot be split as .*data.*'data': 4"
    with pytest.raises(ValueError, match=match):
        placed()(state, frozen, setups.batch(examples=6))
    # A scalar has no examples to split.
    match = r"batch: 'scale' of shape \(\) cannot be split"
    with pytest.raises(ValueError, match=match):
        placed()(state, frozen, setups.batch() | {"scale": np.float32(1)})
    # Nothing was donated to the step that did not run.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_refuses_specs_that_do_not_fit_the_batch_or_the_mesh():
    state, frozen, step = training()
    common = {"state": state, "frozen": frozen}
    compiled = place_step(step, mesh(), **common, batch={"x": P("data")})
    match = r"batch: .* specs for \['x'\], but the batch also has \['label', 'mask'\]"
    with pytest.raises(ValueError, match=match):
        compiled(state, frozen, setups.batch())
    compiled = place_step(step, mesh(), **common, batch=P("expert"))
    match = r"batch: 'x' .* split as .*expert.* over the mesh .*: name axes of the mesh"
    with pytest.raises(ValueError, match=match):
        compiled(state, frozen, setups.batch())
    with pytest.raises(ValueError, match=r"rules: 'hidden' -> .* does not fit params/"):
        place_step(step, mesh(), **common, teacher_rules=[("hidden", P("data"))])
