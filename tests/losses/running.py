"""How the batteries compile: quickly, and for the mesh of a data-parallel run."""

import jax
from jax.sharding import AxisType

# Halves the time to compile; eager calls use the default.
QUICK = {"xla_backend_optimization_level": 0}

# Compilations since the tests began. JAX reports each one, whatever caused it.
COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILED.append(name) if "backend_compile" in name else None
)


def mesh_of(**axes):
    """A mesh of named axes over the first devices. Auto is what place_step uses too."""
    size = 1
    for length in axes.values():
        size *= length
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:size],
    )
