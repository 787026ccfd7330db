"""Losses that relate examples to each other: the same however the batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.losses import cases, feature_cases, relation_cases
from tests.losses.running import mesh_of

# Unequal numbers of examples count on every device of two and of four, and none does
# on one of these.
KEPT = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool)


def _rows():
    """Each loss, and what it takes for eight examples."""
    for case in cases.CASES:
        if case.gives in ("class", "scalar"):
            inputs = cases.sample((8, 8), dtype=jnp.float64)
            yield case, ({name: inputs[name] for name in case.arguments},)
    for case in relation_cases.CASES:
        if case.name == "contrastive_representation":
            # Its normalizer is estimated from the batch.
            case = case._replace(hyper={**case.hyper, "normalizer": None}, relates=True)
        if case.relates:
            yield case, (relation_cases.sample(case, dtype=jnp.float64),)
    for case in feature_cases.CASES:
        if case.relates and " " not in case.name:
            yield case, feature_cases.sample(case, 0, jnp.float64, batch=8)


with jax.enable_x64(True):
    ROWS = {case.name: (case, arguments) for case, arguments in _rows()}


def test_every_loss_that_relates_examples_is_here():
    assert set(ROWS) == {
        "relational_distance",
        "relational_angle",
        "similarity_preserving",
        "correlation_congruence",
        "probabilistic_transfer",
        "contrastive_representation",
        "contrastive",
        "linear_cka",
        "feature_correlation",
        "intra_class_relation",
        "multi_level_relation",
    }


# The batteries have each loss on one mesh; this is every number of devices.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "devices", "tolerance"),
    [
        pytest.param(jnp.float32, (1, 2, 4), 1e-6, id="float32"),
        pytest.param(jnp.float64, (4,), 1e-12, id="float64"),
    ],
)
@pytest.mark.parametrize("name", ROWS)
def test_devices_change_no_value_and_no_gradient(name, dtype, devices, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        case, arguments = ROWS[name]
        arguments = jax.tree.map(lambda each: jnp.asarray(each, dtype), arguments)

        @jax.jit
        def run(arguments, where):
            def total(arguments):
                values = case(*arguments, where=where)
                # Other weights than ones: a sum may hide an entry.
                weights = jnp.cos(jnp.arange(values.size)).reshape(values.shape)
                return jnp.sum(values * weights), values

            return jax.grad(total, has_aux=True)(arguments)

        given = arguments, jnp.asarray(KEPT)
        expected = jax.tree.map(np.asarray, run(*given))
        for count in devices:
            mesh = mesh_of(data=count)
            got = run(*jax.device_put(given, NamedSharding(mesh, P("data"))))
            for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
                assert one.dtype == dtype
                assert np.abs(other).max() > 1e-4
                error = np.abs(np.asarray(one) - other).max()
                assert error <= tolerance * np.abs(other).max()
