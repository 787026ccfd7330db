"""Rules: by pattern, by size, and the optimizer's state beside its parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from kdjax import models
from kdjax.train import largest_axes, make_mesh, shardings
from tests.train import setups

P = PartitionSpec
MESH = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def specs(tree, rules):
    return jax.tree.map(lambda each: each.spec, shardings(tree, MESH, rules))


def state(optimizer):
    net = models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0)))
    return setups.training(net, optimizer)[0]


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((4, 8), ["fsdp"], P(None, "fsdp")),
        ((8, 8), ["fsdp"], P("fsdp", None)),  # the first of equals
        ((9, 8), ["fsdp"], P(None, "fsdp")),  # the largest that 2 divides
        ((3, 8, 16), ["tensor", "fsdp"], P(None, "fsdp", "tensor")),
        ((3, 5, 16), ["tensor", "fsdp"], P(None, None, "tensor")),
        ((9, 5), ["fsdp"], P(None, None)),
        ((2, 7), ["fsdp"], P(None, None)),  # 14 elements are not worth it
        ((), ["fsdp"], P()),
    ],
)
def test_the_largest_axis_that_is_divisible_is_split(shape, axes, expected):
    assert largest_axes(*axes, above=16)(shape, MESH) == expected


def test_patterns_first_and_size_for_the_rest():
    tree = {"embed": jnp.ones((6, 8)), "hidden": jnp.ones((6, 8)), "bias": jnp.ones(8)}
    rules = [("embed", P("tensor", "fsdp")), ("", largest_axes("fsdp", above=16))]
    expected = {"embed": P("tensor", "fsdp"), "hidden": P(None, "fsdp"), "bias": P()}
    got = specs(tree, rules)
    assert {name: _stripped(spec) for name, spec in got.items()} == expected


def _stripped(spec):
    return P() if set(spec) == {None} else spec


def test_the_state_of_the_optimizer_follows_its_parameter():
    rules = [("^params/student/hidden/kernel", P("fsdp", "tensor"))]
    chained = optax.chain(optax.clip(1.0), optax.adam(1e-2))
    got = specs(state(optax.MultiSteps(chained, 2)), rules)
    moments = got.opt_state.inner_opt_state[1][0]
    gradients = got.opt_state.acc_grads
    for tree in (got.params, moments.mu, moments.nu, gradients):
        assert tree["student"]["hidden"]["kernel"] == P("fsdp", "tensor")
        assert tree["student"]["out"]["kernel"] == P()
    assert moments.count == P()


def test_the_state_of_the_optimizer_can_be_split_alone():
    # As ZeRO's first stage has it.
    rules = [("^opt_state/", largest_axes("data", above=16))]
    got = specs(state(optax.adam(1e-2)), rules)
    assert got.opt_state[0].mu["student"]["hidden"]["kernel"] == P(None, "data")
    assert got.params["student"]["hidden"]["kernel"] == P()


def test_factors_of_a_parameter_are_not_split_as_it_is():
    optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=4)
    rules = [
        ("hidden/kernel", P("fsdp", "tensor")),
        ("", largest_axes("fsdp", above=2)),
    ]
    got = specs(state(optimizer), rules)
    factors = got.opt_state[0]
    assert got.params["student"]["hidden"]["kernel"] == P("fsdp", "tensor")
    rows, columns = (
        tree["student"]["hidden"]["kernel"] for tree in (factors.v_row, factors.v_col)
    )
    # Of one axis each, which two to split would not fit.
    assert (rows, columns) == (P("fsdp"), P("fsdp"))


def test_refuses_a_rule_that_matches_nothing():
    tree = {"hidden": {"kernel": jnp.ones((4, 4))}, "bias": jnp.ones(4)}
    match = r"rules: 'kernle' -> .*data.* matches no path; there are 2: .*hidden/kernel"
    with pytest.raises(ValueError, match=match):
        shardings(tree, MESH, [("kernel", P("fsdp")), ("kernle", P("data"))])
    with pytest.raises(ValueError, match="there are 0: none at all"):
        shardings({}, MESH, [("kernel", P("fsdp"))])
    # What is shadowed by a rule before it does match, and the rest may be empty.
    shardings(tree, MESH, [("kernel", P("fsdp")), ("hidden", P("data"))])
    shardings({}, MESH, [("", largest_axes("fsdp"))])


def test_refuses_axes_that_are_not_there():
    with pytest.raises(ValueError, match=r"axes: got .*expected names"):
        largest_axes()
    with pytest.raises(ValueError, match=r"axes: got .*each once"):
        largest_axes("fsdp", "fsdp")
    with pytest.raises(
        ValueError, match=r"rules: .*axes: the mesh has no \['expert'\]"
    ):
        shardings({"x": jnp.ones(4)}, MESH, [("x", largest_axes("expert"))])
