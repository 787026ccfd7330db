"""States made where they belong, and teachers that rest in the memory of the host."""

import functools
from operator import attrgetter

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks import traffic
from kdjax import models, objectives, teachers
from kdjax.objectives import projectors
from kdjax.tools.preflight import slice_mesh
from kdjax.train import (
    init_state,
    largest_axes,
    make_mesh,
    make_placed,
    make_train_step,
    place,
    place_step,
    shardings,
)
from tests.marks import rest_slow
from tests.train import setups

RULES = [(".*", largest_axes("data", above=8))]
MESH = make_mesh()


def from_nnx():
    return models.from_nnx(setups.Noisy(rngs=nnx.Rngs(0)))


def from_linen():
    module = setups.LinenNoisy()
    x = jnp.zeros((1, setups.WIDTH))
    variables = module.init(jax.random.key(0), x, train=False)
    return models.from_linen(module, variables)


def from_apply():
    keys = jax.random.split(jax.random.key(0), 2)
    sizes = {"hidden": (setups.WIDTH, 8), "out": (8, setups.CLASSES)}
    params = {
        name: {"kernel": jax.random.normal(key, size), "bias": jnp.zeros(size[1])}
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    return models.from_apply(setups.bare_mlp, params)


def goal():
    """With a projector, and with memories of 16 examples."""
    return objectives.combine(
        objectives.soft_labels(),
        objectives.relations(
            lambda student, teacher, where: jnp.abs(student - teacher).mean(),
            projector=projectors.mlp(8),
        ),
    )


def state_of(make_net):
    """As a user would write it, of whatever network."""
    teacher, frozen = teachers.frozen(from_nnx())
    return init_state(
        make_net(),
        teacher,
        goal(),
        optax.adam(1e-2),
        frozen=frozen,
        batch=setups.batch(),
        rng=jax.random.key(1),
    )


@pytest.mark.parametrize(
    "make_net",
    rest_slow(
        [from_nnx, from_linen, from_apply],
        lambda make: make is from_nnx,
        name=attrgetter("__name__"),
    ),
)
def test_a_state_is_made_with_each_device_holding_its_share(make_net):
    make = functools.partial(state_of, make_net)
    state = make_placed(make, MESH, RULES)
    kernel = state.params["student"]["hidden"]["kernel"]
    projector = state.params["objective"]["1"]["projector"]
    large = (kernel, *jax.tree.leaves(state.opt_state[0].mu["student"]["hidden"]))
    for leaf in large:
        assert [each.data.size for each in leaf.addressable_shards] == [
            leaf.size / 8
        ] * 8
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(projector))
    jax.tree.map(
        lambda leaf, target: chex.assert_equal(
            leaf.sharding.is_equivalent_to(target, leaf.ndim), True
        ),
        state,
        shardings(state, MESH, RULES),
    )
    # The numbers are those of one device.
    chex.assert_trees_all_equal(setups.bits(state), setups.bits(jax.jit(make)()))


def test_no_device_ever_has_the_whole():
    size = 2**20

    def make():
        kernel = jax.random.normal(jax.random.key(0), (size // 64, 64))
        net = models.from_apply(lambda w, batch: batch["x"] @ w, {"kernel": kernel})
        return net.params, optax.adam(1e-3).init(net.params)

    targets = shardings(jax.eval_shape(make), MESH, RULES)
    program = jax.jit(make, out_shardings=targets).lower().compile()
    memory = program.memory_analysis()
    # Three arrays of 4 MB: a device has an eighth of each, and draws with no more
    # than a few times its share at hand.
    assert memory.output_size_in_bytes < 3 * 4 * size / 8 * 1.01
    assert memory.temp_size_in_bytes < 4 * size / 2


def test_the_step_of_a_network_needs_only_its_shapes():
    # Of a network that never is on one device, there is nothing but shapes.
    shapes = nnx.eval_shape(lambda: setups.Noisy(rngs=nnx.Rngs(0)))
    parts = *teachers.frozen(from_nnx()), goal(), optax.adam(1e-2)
    teacher, frozen, *rest = parts
    state, batch = state_of(from_nnx), setups.batch()
    ends = [
        jax.jit(make_train_step(net.model, teacher, *rest))(state, frozen, batch)
        for net in (models.from_nnx(shapes), from_nnx())
    ]
    chex.assert_trees_all_equal(*(setups.bits(end) for end in ends))


@functools.cache
def plain():
    """A training without any of it."""
    return setups.training(from_nnx())


def run(teacher_memory_kind):
    state, frozen, step = plain()
    rules = [("hidden/kernel", PartitionSpec(None, "data"))]
    placing = {"teacher_rules": rules, "teacher_memory_kind": teacher_memory_kind}
    step = place_step(step, MESH, state=state, frozen=frozen, donate=False, **placing)
    frozen = place(frozen, MESH, rules, memory_kind=teacher_memory_kind)
    for seed in range(2):
        state, metrics = step(state, frozen, setups.batch(seed))
    return frozen, (state, metrics)


@pytest.mark.slow
def test_a_teacher_in_the_memory_of_the_host_gives_the_same():
    frozen, got = run("pinned_host")
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(frozen)}
    assert kinds == {"pinned_host"}
    assert not frozen["params"]["hidden"]["kernel"].is_fully_replicated
    chex.assert_trees_all_equal(setups.bits(got), setups.bits(run(None)[1]))


def test_refuses_a_memory_that_devices_do_not_have():
    state, frozen, step = plain()
    match = r"memory_kind: got 'attic'.* do not have; they have \['device'"
    with pytest.raises(ValueError, match=match):
        place(frozen, MESH, memory_kind="attic")
    with pytest.raises(ValueError, match=match):
        place_step(step, MESH, state=state, frozen=frozen, teacher_memory_kind="attic")


@pytest.mark.skipif(not traffic.available(), reason="libtpu is not installed")
def test_on_a_slice_the_resting_teacher_is_no_memory_of_the_chips():
    mesh = slice_mesh("v5e:4x4")
    kernel = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    net = models.from_apply(lambda w, batch: batch["x"] @ w, kernel)
    teacher, frozen = teachers.frozen(net)
    split = NamedSharding(mesh, PartitionSpec("data"))
    batch = {"x": jax.ShapeDtypeStruct((32, 512), jnp.float32, sharding=split)}
    parts = teacher, objectives.soft_labels(), optax.sgd(0.1)

    def make():
        student = net._replace(params=jnp.zeros(kernel.shape))
        key = jax.random.key(0)
        return init_state(student, *parts, frozen=frozen, batch=batch, rng=key)

    state = jax.eval_shape(make)
    step = make_train_step(net.model, *parts)

    def memory(kind):
        placed = place_step(
            step, mesh, state=state, frozen=frozen, teacher_memory_kind=kind
        )
        at_rest = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        resting = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at_rest),
            frozen,
        )
        return jax.jit(placed).lower(state, resting, batch).compile().memory_analysis()

    on_chip, on_host = memory(None), memory("pinned_host")
    size = 4 * 512 * 512
    saved = on_chip.argument_size_in_bytes - on_host.argument_size_in_bytes
    assert saved == on_host.host_argument_size_in_bytes == size
