"""How the batteries compile: quickly, and for the mesh of a data-parallel run."""

import jax
from jax.sharding import AxisType


def _known(option):
    """Whether the compiler of this version of JAX has an option."""
    try:
        jax.jit(lambda: 0.0, compiler_options={option: False})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


# Leaves about half of the time to compile, and a quarter where the newer generator of
# code for fusions can be left out; eager calls use the defaults.
QUICK: dict[str, int] = {"xla_backend_optimization_level": 0}
if _known("xla_cpu_use_fusion_emitters"):
    QUICK["xla_cpu_use_fusion_emitters"] = False

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
