"""What the batteries count, and the meshes that they run on."""

from typing import Any

import jax
from jax.sharding import AxisType

# What programs are compiled with outside of the tests; see conftest.py.
AS_FOR_USERS: dict[str, Any] = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    AS_FOR_USERS["xla_cpu_use_fusion_emitters"] = True

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
